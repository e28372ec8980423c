"""What a converted checkpoint holds: every leaf, and the stored leaves it is made from."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal, cast

import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler.planning import layouts
from orbax_nnx_handler.planning.entries import model_entries
from orbax_nnx_handler.planning.errors import RestoreError
from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.moments import parameter_paths
from orbax_nnx_handler.planning.nnx_marks import marks_of_nnx
from orbax_nnx_handler.planning.paths import Path, canonical, render
from orbax_nnx_handler.planning.placement import Placement, Section, Stored
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.recipes import Read, Recipe
from orbax_nnx_handler.planning.roles import is_key, roles_of

Flavour = Literal["linen", "maxtext"]

# Layouts whose optimizer state has the shape that optax gives it.
_OPTAX = frozenset({"train_state", "maxtext", "variables", "params"})

WITHOUT_COLLECTIONS = frozenset({"nnx_state", "nnx_pure_dict"})
"""Layouts under NNX's names, which keep variables of all types together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """One leaf of a checkpoint to be written.

    Attributes:
        path: Where it will be.
        recipe: The stored leaves it is made from.
        shape: Its shape.
        dtype: Its dtype; a key dtype for random keys.
        section: The part of a train state that it belongs to.
        collection: The Linen collection of a model leaf, where the layout tells.
        parameter: For a model leaf its keys below the collection, for a moment
            those of its parameter; None for a leaf of neither.
    """

    path: Path
    recipe: Recipe
    shape: Shape
    dtype: np.dtype[Any]
    section: Section = "model"
    collection: str | None = None
    parameter: Path | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def above(self) -> Path:
        """The keys above the parameter's own."""
        return self.path[: len(self.path) - len(self.parameter or ())]


def every_leaf(stored: Stored, layout: str = "auto") -> list[Written]:
    """Returns the leaves of a checkpoint as they are.

    Args:
        stored: All stored leaves.
        layout: How to read them; `auto` finds out.

    Raises:
        UnknownLayoutError: The tree is in no known layout.
        RestoreError: A leaf is no array.
    """
    odd = [leaf.path for leaf in stored.values() if leaf.dtype is None]
    if odd:
        raise _refusal("leaves are strings, which cannot be converted", odd)
    placements = layouts.candidates(stored, layout)[0].place(stored)
    parameters = set(parameter_paths(model_entries(placements), ()))
    return [_written(placement, parameters) for placement in placements]


def _written(placement: Placement, parameters: set[tuple[str, ...]]) -> Written:
    leaf = placement.leaf
    return Written(
        path=leaf.path,
        recipe=Read(leaf.path),
        shape=leaf.shape,
        dtype=cast("np.dtype[Any]", leaf.dtype),
        section=placement.section,
        collection=placement.collection,
        parameter=_parameter(placement, parameters),
    )


def _parameter(placement: Placement, parameters: set[tuple[str, ...]]) -> Path | None:
    if placement.section == "model":
        return placement.path
    if placement.section != "optimizer" or placement.slot is not None:
        return None
    path = placement.path
    return next((path[at:] for at in range(len(path)) if canonical(path[at:]) in parameters), None)


def planned_leaves(plan: RestorePlan) -> list[Written]:
    """Returns the leaves that a plan restores, under their wanted paths."""
    sections: dict[str, Section] = {"optimizer": "optimizer", "step": "step"}
    roles = {item.leaf.path: item.role for item in roles_of({p: i.wanted for p, i in plan.restored.items()})}
    return [
        Written(
            path=path,
            recipe=item.recipe,
            shape=item.wanted.shape,
            dtype=item.dtype,
            section=sections.get(roles[path], "model"),
        )
        for path, item in plan.restored.items()
    ]


def weights_only(leaves: Iterable[Written]) -> list[Written]:
    """Returns the leaves of the model: no optimizer, no step."""
    return [leaf for leaf in leaves if leaf.section == "model"]


def with_dtype(leaves: Iterable[Written], dtype: np.dtype[Any] | None) -> list[Written]:
    """Returns the leaves with floating-point weights in another dtype; moments and counts keep theirs."""
    return [
        dataclasses.replace(leaf, dtype=dtype)
        if dtype is not None and takes_dtype(leaf.section, leaf.dtype)
        else leaf
        for leaf in leaves
    ]


def takes_dtype(section: Section, dtype: np.dtype[Any]) -> bool:
    """Tells a floating-point weight."""
    return section == "model" and not is_key(dtype) and jnp.issubdtype(dtype, jnp.floating)


def in_layout(leaves: Iterable[Written], layout: str, flavour: Flavour) -> list[Written]:
    """Returns the leaves where another family of Linen programs keeps them.

    Args:
        leaves: What `every_leaf` returned.
        layout: Name of the layout that they are in.
        flavour: `linen` (Flax TrainState) or `maxtext`.

    Raises:
        RestoreError: The layout does not tell what Linen needs to know.
    """
    leaves = list(leaves)
    if layout in WITHOUT_COLLECTIONS:
        raise RestoreError(
            "a saved NNX state does not tell parameters from statistics, so its layout cannot change alone.\n"
            "hint: give the factory of the model too (SRC DST MODULE:FACTORY --to linen); its Variable types "
            "tell the collections, and its modules what Linen stores in another form."
        )
    foreign = [leaf.path for leaf in leaves if leaf.section == "optimizer" and layout not in _OPTAX]
    if foreign:
        raise _refusal(
            "optimizer leaves are not arranged as optax arranges them", foreign, "pass --weights-only."
        )
    return [_moved(leaf, ("params",) if flavour == "maxtext" else ()) for leaf in leaves]


def check_linen_names(leaves: Iterable[Written]) -> None:
    """Raises where bare weights are under names that NNX gives.

    Raises:
        RestoreError: Names the leaves.
    """
    marked = marks_of_nnx(leaf.parameter for leaf in leaves if leaf.parameter and leaf.section == "model")
    if marked:
        raise _refusal(
            "leaves are named as NNX names them, so parameters and statistics cannot be told apart",
            marked,
            "give the factory of the model too (SRC DST MODULE:FACTORY --to linen); "
            "--layout params where a Linen program wrote this all the same.",
        )


def _moved(leaf: Written, level: Path) -> Written:
    if leaf.parameter is None:
        return leaf
    if leaf.section == "model":
        path = (*level, leaf.collection or "params", *leaf.parameter)
    else:
        # The optimizer of MaxText runs on the whole variables dict: `mu/params/...`.
        slot = leaf.above[:-1] if leaf.above[-1:] == ("params",) else leaf.above
        path = (*slot, *level, *leaf.parameter)
    return dataclasses.replace(leaf, path=path)


def check_distinct(leaves: Iterable[Written]) -> None:
    """Raises where two leaves would be written to one path.

    Raises:
        RestoreError: Names the paths.
    """
    seen: set[Path] = set()
    twice: list[Path] = []
    for leaf in leaves:
        (twice.append if leaf.path in seen else seen.add)(leaf.path)
    if twice:
        raise _refusal("leaves would be written to a path that another leaf has", twice)


def _refusal(what: str, paths: list[Path], hint: str = "") -> RestoreError:
    shown = "\n".join(f"  {render(path)}" for path in paths[:20])
    rest = f"\n  ... and {len(paths) - 20} more" if len(paths) > 20 else ""
    way_out = f"\nhint: {hint}" if hint else ""
    return RestoreError(f"{len(paths)} {what}:\n{shown}{rest}{way_out}", paths=paths)
