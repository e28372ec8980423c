"""What a converted checkpoint holds: every leaf, and the stored leaves it is made from."""

import dataclasses
from collections.abc import Iterable
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler.planning.core.dtypes import cast_between, is_key, scales_of
from orbax_nnx_handler.planning.core.errors import DtypeMismatchError, RestoreError
from orbax_nnx_handler.planning.core.folding import Row
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.lines import aligned
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.layouts.layout import Section, Stored
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.target.roles import roles_of
from orbax_nnx_handler.storage.converting.blocks import Written


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


def check_codes(leaves: Iterable[Written], stored: Stored) -> None:
    """Raises where codes of a quantised leaf would become floats of another type.

    Raises:
        DtypeMismatchError: Names the leaves.
    """
    scales = scales_of(stored.values())
    bad = [leaf for leaf in leaves if _changed(leaf, stored) & scales.keys()] if scales else []
    if bad:
        rows = aligned(Row(leaf.path, (str(leaf.shape), str(leaf.dtype))) for leaf in bad)
        beside = render(next(scales[path][0] for path in reads(bad[0].recipe) if path in scales))
        raise DtypeMismatchError(
            f"{len(bad)} leaves are quantised, with scales such as {beside} beside them:\n{rows}",
            paths=[leaf.path for leaf in bad],
            hints=["leave --dtype out: codes of another dtype are no weights either."],
        )


def rounded(leaves: Iterable[Written], stored: Stored) -> list[Path]:
    """Returns the leaves that are written in a narrower floating-point type than they are stored in."""
    return [
        leaf.path
        for leaf in leaves
        if any(
            not is_key(leaf.dtype) and cast_between(_dtype(stored[path]), leaf.dtype, False) == "narrower"
            for path in _changed(leaf, stored)
        )
    ]


def _changed(leaf: Written, stored: Stored) -> set[Path]:
    """Returns the stored leaves that a leaf is made from and that have another dtype."""
    return {path for path in reads(leaf.recipe) if stored[path].dtype not in (None, leaf.dtype)}


def _dtype(leaf: StoredLeaf) -> np.dtype[Any]:
    return cast("np.dtype[Any]", leaf.dtype)


def takes_dtype(section: Section, dtype: np.dtype[Any]) -> bool:
    """Tells a floating-point weight."""
    return section == "model" and not is_key(dtype) and jnp.issubdtype(dtype, jnp.floating)


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
        raise refusal("leaves would be written to a path that another leaf has", twice)


def refusal(what: str, paths: list[Path], hint: str = "") -> RestoreError:
    """Returns the error for a conversion that some leaves stand in the way of."""
    shown = "\n".join(f"  {render(path)}" for path in paths[:20])
    rest = f"\n  ... and {len(paths) - 20} more" if len(paths) > 20 else ""
    return RestoreError(f"{len(paths)} {what}:\n{shown}{rest}", paths=paths, hints=[hint] if hint else [])
