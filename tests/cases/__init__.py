"""Real restore cases: a checkpoint as its training program wrote it, the NNX
state to restore it into, and a digest of every value that must come back.

    from tests.cases import load_case, problems
    case = load_case("llama2_scanned_to_unscanned")
    state = ...restore case.path into case.target...
    assert not problems(case, state)
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from flax import nnx

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint and one target.

    Attributes:
        name: The case's name.
        path: The item directory that Orbax wrote (holds `_METADATA`).
        target: Abstract state; its leaves are `jax.ShapeDtypeStruct`s without
            sharding.
        digests: For each leaf of the target, by path, the digest of its bytes
            (C order, the target's dtype), or None where the checkpoint does
            not hold the leaf: random state, which a Linen program never saves.
        transforms: What the mapping needs, for reading only.
    """

    name: str
    path: pathlib.Path
    target: nnx.State
    digests: dict[tuple[str | int, ...], str | None]
    transforms: tuple[str, ...]

    @property
    def step_path(self) -> pathlib.Path:
        """The step directory above the item."""
        return self.path.parent

    def copied_to(self, root: pathlib.Path, *, step: int = 3) -> "Case":
        """Returns the same case in a manager's directory of its own, free to be broken.

        Args:
            root: An existing directory, which becomes a manager's root.
            step: The step number that the copy gets.
        """
        shutil.copytree(self.step_path, root / str(step))
        return dataclasses.replace(self, path=root / str(step) / self.path.name)


def names() -> list[str]:
    """Returns the names of all cases."""
    return sorted(file.stem for file in (HERE / "wanted").glob("*.json"))


def load_case(name: str) -> Case:
    """Returns the case of that name."""
    spec = json.loads((HERE / "wanted" / f"{name}.json").read_text())
    leaves = {tuple(leaf["path"]): leaf for leaf in spec["leaves"]}
    return Case(
        name=name,
        path=HERE / "checkpoints" / spec["item"],
        target=nnx.from_flat_state([(path, _variable(leaf)) for path, leaf in leaves.items()]),
        digests={path: leaf.get("sha256") for path, leaf in leaves.items()},
        transforms=tuple(spec["transforms"]),
    )


def problems(case: Case, state: nnx.State) -> list[str]:
    """Returns what is wrong with a restored state; an empty list if nothing."""
    restored = dict(nnx.to_flat_state(state))
    wanted = dict(nnx.to_flat_state(case.target))
    found = [f"{_name(path)}: on one side only" for path in sorted(set(restored) ^ set(wanted), key=str)]
    for path in wanted:
        if path in restored:
            found += [
                f"{_name(path)}: {fault}"
                for fault in _faults(wanted[path], restored[path], case.digests[path])
            ]
    return found


def digest(array: Any) -> str:
    """Returns the digest of an array's bytes, as the cases hold it."""
    return hashlib.sha256(np.ascontiguousarray(np.asarray(array)).tobytes()).hexdigest()[:32]


def _faults(wanted: nnx.Variable[Any], restored: nnx.Variable[Any], expected: str | None) -> list[str]:
    faults: list[str] = []
    if type(restored) is not type(wanted):
        faults.append(f"is a {type(restored).__name__}, not a {type(wanted).__name__}")
    value, want = restored.get_value(), wanted.get_value()
    if not isinstance(value, jax.Array):
        faults.append(f"not an array but a {type(value).__name__}")
    elif (value.shape, value.dtype) != (want.shape, want.dtype):
        faults.append(f"{value.shape} {value.dtype}, not {want.shape} {want.dtype}")
    elif expected is not None and digest(value) != expected:
        faults.append("wrong values")
    return faults


def _variable(leaf: dict[str, Any]) -> nnx.Variable[Any]:
    kind = next(getattr(nnx, name) for name in leaf["types"] if hasattr(nnx, name))
    dtype = jax.random.key(0).dtype if leaf["dtype"].startswith("key<") else leaf["dtype"]
    return kind(jax.ShapeDtypeStruct(tuple(leaf["shape"]), dtype))


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))
