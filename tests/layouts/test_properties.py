"""No layout loses a leaf, places one twice, or falls over a strange tree."""

from collections.abc import Hashable

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.layouts import LAYOUTS
from orbax_nnx_handler.planning.layouts.layout import Layout, Stored

# Names that mean something to a layout, in any place, and keys that mean something to the path language.
WORDS = [
    *("target", "state", "step", "param_states", "flax_mutables", "optimizer", "version", "params", "opt"),
    *("opt_state", "collections", "global_step", "model_state", "rng", "batch_stats", "model_params"),
    *("optimizer_state", "train_state", "nnx_aux", "chrono", "inner_state", "value", "kernel", "layers_1"),
    *("transformer/layer_0/mlp/linear", "transformer/stacked_layers/attention_type_1/attn", "mlp", "w"),
    *("SigLiPFromPatches_0/x", "m", "v", "v_row", "grad_ema", "0", "1", "2", "a/b", "a.b", "~", "/"),
]
KEYS: st.SearchStrategy[Hashable] = st.one_of(
    st.sampled_from(WORDS),
    st.integers(0, 3),
    st.text(max_size=3),
    st.tuples(st.text(max_size=2), st.integers(0, 2)),
)
SHAPES = st.sampled_from([(), (1,), (4,), (3, 4)])


def stored_trees() -> st.SearchStrategy[Stored]:
    """Trees in which no leaf is a subtree, too."""
    paths = st.lists(KEYS, min_size=1, max_size=6).map(tuple)
    shapes = st.dictionaries(paths, SHAPES, min_size=1, max_size=12)
    return shapes.map(_without_leaves_inside).map(
        lambda found: {
            path: StoredLeaf(path=path, shape=shape, dtype=np.dtype(np.float32))
            for path, shape in found.items()
        }
    )


def _without_leaves_inside(shapes: dict[Path, tuple[int, ...]]) -> dict[Path, tuple[int, ...]]:
    inner = {path[:depth] for path in shapes for depth in range(1, len(path))}
    return {path: shape for path, shape in shapes.items() if path not in inner}


# A tree is drawn once for all layouts: to draw it takes longer than to place it in each of them.
@hypothesis.given(stored=stored_trees())
def test_every_leaf_has_exactly_one_placement(stored: Stored) -> None:
    for layout in LAYOUTS:
        placed = layout.place(stored)

        assert sorted(map(repr, (item.leaf.path for item in placed))) == sorted(map(repr, stored)), layout
        assert all(item.leaf == stored[item.leaf.path] for item in placed), layout


@hypothesis.given(stored=stored_trees())
def test_a_placed_path_is_never_empty_and_a_model_leaf_keeps_its_last_name(stored: Stored) -> None:
    for layout in LAYOUTS:
        placed = layout.place(stored)

        assert all(item.path for item in placed), layout
        for item in placed:
            if item.section == "model" and layout.name != "gemma":
                assert item.path[-1] == item.leaf.path[-1], layout


@hypothesis.given(stored=stored_trees())
def test_detection_answers_for_any_tree(stored: Stored) -> None:
    for layout in LAYOUTS:
        assert layout.fits(stored) in (True, False), layout


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_detection_answers_for_an_empty_tree_and_a_lone_leaf(layout: Layout) -> None:
    lone = {(): StoredLeaf(path=(), shape=(), dtype=np.dtype(np.float32))}

    assert not layout.fits({})
    assert layout.fits(lone) in (True, False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_detection_answers_for_a_leaf_that_has_others_below_it(layout: Layout) -> None:
    below = [("step", "params", "w"), ("step", "opt_state", "m"), ("step", "step", "n")]
    stored = {
        path: StoredLeaf(path=path, shape=(), dtype=np.dtype(np.float32)) for path in [("step",), *below]
    }

    assert layout.fits(stored) in (True, False)
