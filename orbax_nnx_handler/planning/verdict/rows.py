"""The rows of lists: the same look in errors, plans, reports and logs."""

import functools
from collections.abc import Iterable
from typing import Any

from orbax_nnx_handler.planning.core.dtypes import KEY_IMPLEMENTATIONS, is_key, name_of, same_key
from orbax_nnx_handler.planning.core.folding import Row, fold_in_order, ranges
from orbax_nnx_handler.planning.core.leaves import StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.core.paths import render
from orbax_nnx_handler.planning.core.recipes import Read, Recipe, describe, reads
from orbax_nnx_handler.planning.mapping.matches import GROUNDS, Discarded, Dropped
from orbax_nnx_handler.planning.verdict.outcomes import Defaulted, Mismatched, Missing, Restored


def look(leaf: WantedLeaf | StoredLeaf) -> str:
    """Returns shape and dtype: `(4096, 32000) bfloat16`."""
    return f"{leaf.shape} {dtype_name(leaf.dtype)}"


def dtype_name(dtype: Any) -> str:
    """Returns a dtype as a person knows it: a random key's by its implementation."""
    if dtype is None:
        return "not an array"
    return _key_name(dtype) if is_key(dtype) else name_of(dtype)


@functools.cache
def _key_name(dtype: Any) -> str:
    known = next((name for name in KEY_IMPLEMENTATIONS if same_key(name, dtype)), None)
    return f"key<{known}>" if known else name_of(dtype)


def restored_rows(items: Iterable[Restored]) -> list[Row]:
    """Returns leaf, shape, dtype, source, transform, and what says an axis that its own shape does not."""
    return [
        Row(
            item.wanted.path,
            (f"{item.wanted.shape} {dtype_name(item.dtype)}",),
            _sources(item.recipe),
            _transform(item),
        )
        for item in items
    ]


def _transform(item: Restored) -> str:
    ground = item.evidence.axis_by
    told = item.transform if ground in (None, "shape") else f"{item.transform}: {GROUNDS[ground]}"
    return told if item.transform else ""


def evidence_rows(items: Iterable[Restored]) -> list[Row]:
    """Returns leaf, and what its mapping rests on."""
    return [Row(item.wanted.path, (item.evidence.words,)) for item in items]


def missing_rows(items: Iterable[Missing], *, with_policy: bool = False) -> list[Row]:
    """Returns leaf, shape, dtype, and what becomes of it."""
    return [
        Row(item.wanted.path, (look(item.wanted), _layers(item), _settled(item) if with_policy else ""))
        for item in items
    ]


def _layers(item: Missing) -> str:
    return (
        f"{'layer' if len(item.layers) == 1 else 'layers'} {ranges(item.layers)} missing"
        if item.layers
        else ""
    )


_SOURCES = {
    "target": "its value in the target",
    "init": "computed by init",
    "zeros": "zeros",
    "seed": "derived from its path",
}


def _settled(item: Missing) -> str:
    if item.policy == "error" or item.filled_by is None:
        return "policy error" if item.policy == "error" else f"policy {item.policy}: no initial value"
    return f"policy {item.policy}: {_SOURCES[item.filled_by]}"


def mismatched_rows(items: Iterable[Mismatched]) -> list[Row]:
    """Returns leaf, both shapes and dtypes, source and transform."""
    return [
        Row(
            item.wanted.path,
            _differences(item),
            _sources(item.recipe),
            describe(item.recipe),
        )
        for item in items
    ]


def _differences(item: Mismatched) -> tuple[str, ...]:
    stored, wanted = f"{item.stored_shape} {item.stored_dtype}", look(item.wanted)
    return (
        (wanted, item.detail) if stored == wanted else (f"stored {stored}", f"wanted {wanted}", item.detail)
    )


def defaulted_rows(items: Iterable[Defaulted]) -> list[Row]:
    """Returns leaf, where its value comes from, and why."""
    return [Row(item.wanted.path, (_SOURCES[item.source], item.reason)) for item in items]


def stored_rows(leaves: Iterable[StoredLeaf]) -> list[Row]:
    """Returns stored leaf, shape and dtype."""
    return [Row(leaf.path, (look(leaf),)) for leaf in leaves]


def dropped_rows(items: Iterable[Dropped | Discarded]) -> list[Row]:
    """Returns stored leaf, shape, dtype and the reason."""
    return [Row(item.leaf.path, (look(item.leaf), item.reason)) for item in items]


def _sources(recipe: Recipe) -> str:
    if isinstance(recipe, Read):
        return render(recipe.path)  # Nearly every leaf: there is nothing to fold.
    return fold_in_order(reads(recipe))
