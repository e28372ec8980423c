"""Whatever is wrong is said at once, with every path, before the first array byte is read."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax import nnx

from orbax_nnx_handler import (
    DtypeMismatchError,
    MissingParamError,
    NNXLinenHandler,
    NNXLinenRestore,
    NNXLinenSave,
    RestoreError,
    ShapeMismatchError,
    plan_restore,
    restore,
)
from orbax_nnx_handler.storage import restoring
from tests.cases import Case, load_case, names
from tests.sampled import sampled

Tree = dict[str, Any]
Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Broken:
    """A checkpoint and a target that do not fit, and what must be said."""

    tree: Tree
    target: nnx.State
    paths: set[Path]
    kinds: tuple[type[RestoreError], ...]


@pytest.fixture(scope="module")
def trees() -> dict[str, Tree]:
    """What stock Orbax reads from each case's checkpoint."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        return {str(path): checkpointer.restore(path) for path in {load_case(name).path for name in names()}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Tree], pathlib.Path]:
    """Saves a tree under a name, once: two cases restore one checkpoint."""
    root = tmp_path_factory.mktemp("broken")
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)  # Nothing of it is read.

    def save(name: str, tree: Tree) -> pathlib.Path:
        if not (root / name).exists():
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(root / name, args=ocp.args.PyTreeSave(tree))
        return root / name

    return save


@pytest.fixture
def no_chunk_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test if the reader of arrays is called at all."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an array was read before the verdict")

    monkeypatch.setattr(restoring, "read_everywhere", refuse)
    monkeypatch.setattr(restoring, "check_values", refuse)
    return


def _reads() -> int:
    """Returns how often TensorStore has read a file, or a value from an OCDBT database, so far."""
    names = ("/tensorstore/kvstore/file/open_read", "/tensorstore/kvstore/ocdbt/read")
    metrics = [metric for name in names for metric in ts.experimental_collect_matching_metrics(name)]
    return sum(value["value"] for metric in metrics for value in metric["values"])


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(part) for key, part in tree.items()}
    return [_copy(part) for part in tree] if isinstance(tree, list) else tree


def _weights(case: Case) -> list[Path]:
    return [path for path in case.digests if path[0] == "model" and case.digests[path] is not None]


def _a_layer_weight(case: Case) -> tuple[Path, list[str]]:
    """Returns a wanted weight that no restacking touches, and its stored keys."""
    path = ("model", "token_embedder", "embedding")
    assert path in case.digests
    return path, ["params", "params", "token_embedder", "embedding"]


def _parent(tree: Tree, keys: list[str]) -> Any:
    for key in keys[:-1]:
        tree = tree[key]
    return tree


def _moments_of(case: Case, path: Path) -> set[Path]:
    return {
        other for other in case.digests if other[0] == "optimizer" and other[-len(path) + 1 :] == path[1:]
    }


def _removed_weight(case: Case, tree: Tree) -> Broken:
    path, keys = _a_layer_weight(case)
    del _parent(tree, keys)[keys[-1]]
    return Broken(tree, case.target, {path}, (MissingParamError,))


def _extra_wanted(case: Case, tree: Tree) -> Broken:
    extra = ("model", "decoder", "extra", "kernel")
    leaf = nnx.Param(jax.ShapeDtypeStruct((4, 4), jnp.float32))
    target = nnx.merge_state(case.target, nnx.from_flat_state([(extra, leaf)]))
    return Broken(tree, target, {extra}, (MissingParamError,))


def _changed_shape(case: Case, tree: Tree) -> Broken:
    path, keys = _a_layer_weight(case)
    _parent(tree, keys)[keys[-1]] = np.zeros((300, 64), np.float32)
    return Broken(tree, case.target, {path}, (ShapeMismatchError,))


def _changed_kind(case: Case, tree: Tree) -> Broken:
    path, keys = _a_layer_weight(case)
    _parent(tree, keys)[keys[-1]] = np.zeros((256, 64), np.int32)
    return Broken(tree, case.target, {path}, (DtypeMismatchError,))


def _renamed_layer(case: Case, tree: Tree) -> Broken:
    decoder = tree["params"]["params"]["decoder"]
    name = next(key for key in decoder if key.startswith("layers") and "remainder" not in key)
    decoder["strata"] = decoder.pop(name)
    lost = {path for path in _weights(case) if _from_layer(path, name, case)}
    return Broken(tree, case.target, lost, (MissingParamError,))


def _from_layer(path: Path, stored: str, case: Case) -> bool:
    """Tells whether a wanted weight comes from that stored child of the decoder."""
    if not str(path[2]).startswith("layers"):
        return False
    if stored == "layers":
        # Without the blocks nobody can number the layers of the remainder, unless it is wanted as it is.
        return path[2] != "layers_remainder"
    # One layer of several: that layer itself, or the stack (or block position) that holds it.
    inner = str(path[3])
    return path[2] == stored or (
        path[2] == "layers" and (inner == "layers_0" or not inner.startswith("layers"))
    )


def _missing_moment(case: Case, tree: Tree) -> Broken:
    path, _ = _a_layer_weight(case)
    del tree["opt_state"][0]["mu"]["params"]["token_embedder"]["embedding"]
    return Broken(tree, case.target, {("optimizer", "opt_state", 0, "mu", *path[1:])}, (MissingParamError,))


def _everything(case: Case, tree: Tree) -> Broken:
    params = tree["params"]["params"]
    del tree["opt_state"][0]["nu"]["params"]["decoder"]["decoder_norm"]["scale"]
    params["token_embedder"]["embedding"] = np.zeros((256, 65), np.float32)
    params["decoder"]["decoder_norm"]["scale"] = np.zeros((64,), np.bool_)
    extra = _extra_wanted(case, tree)
    paths = {
        ("model", "token_embedder", "embedding"),
        ("model", "decoder", "decoder_norm", "scale"),
        ("optimizer", "opt_state", 0, "nu", "decoder", "decoder_norm", "scale"),
        *extra.paths,
    }
    return Broken(tree, extra.target, paths, (MissingParamError, ShapeMismatchError, DtypeMismatchError))


BREAKS: list[Callable[[Case, Tree], Broken]] = [
    _removed_weight,
    _extra_wanted,
    _changed_shape,
    _changed_kind,
    _renamed_layer,
    _missing_moment,
    _everything,
]


FORMS = ("scanned", "unscanned")


def _word(value: Any) -> str:
    return value if isinstance(value, str) else value.__name__.strip("_")


@pytest.mark.parametrize(
    ("break_it", "model", "stored", "wanted"), sampled(BREAKS, ("gemma3", "llama2"), FORMS, FORMS), ids=_word
)
def test_a_broken_case_raises_one_error_that_names_every_path_and_reads_no_array(
    break_it: Callable[[Case, Tree], Broken],
    model: str,
    stored: str,
    wanted: str,
    trees: dict[str, Tree],
    saved: Callable[[str, Tree], pathlib.Path],
    no_chunk_read: None,
) -> None:
    case = load_case(f"{model}_{stored}_to_{wanted}")
    broken = break_it(case, _copy(trees[str(case.path)]))
    is_changed = break_it is not _extra_wanted
    path = saved(f"{case.step_path.name} {break_it.__name__}", broken.tree) if is_changed else case.path

    with pytest.raises(RestoreError) as caught:
        restore(path, broken.target)

    assert isinstance(caught.value, broken.kinds)
    for kind in broken.kinds:
        assert any(type(problem) is kind for problem in caught.value.problems) or type(caught.value) is kind
    assert broken.paths <= set(caught.value.paths)
    # A renamed layer takes its moments along: nobody can tell whose they are.
    moments = {path for weight in broken.paths for path in _moments_of(case, weight)}
    allowed = moments if break_it is _renamed_layer else set[Path]()
    assert set(caught.value.paths) <= broken.paths | allowed


def test_the_spy_sees_the_reads_of_a_whole_restore() -> None:
    case = load_case("llama2_scanned_to_scanned")

    before = _reads()
    plan_restore(case.path, case.target)
    planned = _reads() - before
    restore(case.path, case.target)
    whole = _reads() - before - planned

    assert whole > 2 * planned


def test_a_failing_restore_reads_as_often_as_its_plan(trees: dict[str, Tree], tmp_path) -> None:
    case = load_case("llama2_scanned_to_unscanned")
    broken = _everything(case, _copy(trees[str(case.path)]))
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "item", broken.tree)

    before = _reads()
    plan_restore(tmp_path / "item", broken.target)
    planned = _reads() - before
    with pytest.raises(RestoreError):
        restore(tmp_path / "item", broken.target)

    assert _reads() - before == 2 * planned


def test_a_manager_raises_the_same_error(trees: dict[str, Tree], tmp_path, no_chunk_read: None) -> None:
    case = load_case("llama2_scanned_to_scanned")
    broken = _changed_shape(case, _copy(trees[str(case.path)]))

    with ocp.CheckpointManager(tmp_path, item_handlers=NNXLinenHandler()) as manager:
        manager.save(1, args=NNXLinenSave(broken.tree))
        with pytest.raises(ShapeMismatchError) as caught:
            manager.restore(1, args=NNXLinenRestore(broken.target))

    assert broken.paths <= set(caught.value.paths)
