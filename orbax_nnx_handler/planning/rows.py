"""The rows of lists: the same look in errors, plans, reports and logs."""

from collections.abc import Iterable

from orbax_nnx_handler.planning.folding import Row, fold_paths, ranges
from orbax_nnx_handler.planning.leaves import StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.plan import Defaulted, Dropped, Mismatched, Missing, Restored
from orbax_nnx_handler.planning.recipes import Recipe, describe, reads


def look(leaf: WantedLeaf | StoredLeaf) -> str:
    """Returns shape and dtype: `(4096, 32000) bfloat16`."""
    dtype = "not an array" if leaf.dtype is None else str(leaf.dtype)
    return f"{leaf.shape} {dtype}"


def restored_rows(items: Iterable[Restored]) -> list[Row]:
    """Returns leaf, shape, dtype, source and transform."""
    return [
        Row(item.wanted.path, (f"{item.wanted.shape} {item.dtype}",), _sources(item.recipe), item.transform)
        for item in items
    ]


def missing_rows(items: Iterable[Missing], *, with_policy: bool = False) -> list[Row]:
    """Returns leaf, shape, dtype, and what becomes of it."""
    return [
        Row(item.wanted.path, (look(item.wanted), _layers(item), _settled(item) if with_policy else ""))
        for item in items
    ]


def _layers(item: Missing) -> str:
    return f"{'layer' if len(item.layers) == 1 else 'layers'} {ranges(item.layers)} missing" if item.layers else ""


_SOURCES = {"target": "its value in the target", "init": "computed by init", "zeros": "zeros", "seed": "derived from its path"}


def _settled(item: Missing) -> str:
    if item.policy == "error" or item.filled_by is None:
        return "error" if item.policy == "error" else f"{item.policy}: no initial value"
    return f"{item.policy}: {_SOURCES[item.filled_by]}"


def mismatched_rows(items: Iterable[Mismatched]) -> list[Row]:
    """Returns leaf, both shapes and dtypes, source and transform."""
    return [
        Row(
            item.wanted.path,
            (f"stored {item.stored_shape} {item.stored_dtype}", f"wanted {look(item.wanted)}", item.detail),
            _sources(item.recipe),
            describe(item.recipe),
        )
        for item in items
    ]


def defaulted_rows(items: Iterable[Defaulted]) -> list[Row]:
    """Returns leaf, where its value comes from, and why."""
    return [Row(item.wanted.path, (_SOURCES[item.source], item.reason)) for item in items]


def stored_rows(leaves: Iterable[StoredLeaf]) -> list[Row]:
    """Returns stored leaf, shape and dtype."""
    return [Row(leaf.path, (look(leaf),)) for leaf in leaves]


def dropped_rows(items: Iterable[Dropped]) -> list[Row]:
    """Returns stored leaf, shape, dtype and the reason."""
    return [Row(item.leaf.path, (look(item.leaf), item.reason)) for item in items]


def _sources(recipe: Recipe) -> str:
    paths: list[Path] = list(dict.fromkeys(reads(recipe)))
    return fold_paths(paths)
