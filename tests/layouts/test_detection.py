"""Which layouts claim which checkpoints."""

import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import UnknownLayoutError, restore
from orbax_nnx_handler.planning.layouts import LAYOUTS, candidates
from orbax_nnx_handler.planning.layouts.layout import Layout, Stored
from orbax_nnx_handler.storage.checkpoint.find import find_item
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from tests.handler.programs import save_stock
from tests.layouts.fixtures import FIXTURES, Fixture

pytestmark = pytest.mark.filterwarnings("ignore:Flax Checkpointing will soon be deprecated")

# Two general layouts read these the same, except that the second keeps no collections apart.
ALSO = {"openpi, weights only": {"variables"}, "MaxText": {"train_state"}}
FOREIGN = {"t5x", "scenic", "kauldron", "big_vision", "gemma", "tunix", "openpi", "openpi_weights"}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Stored]:
    """The stored leaves of every fixture."""
    roots = {fixture.name: tmp_path_factory.mktemp("fixture") for fixture in FIXTURES}
    return {
        fixture.name: read_metadata(find_item(fixture.write(roots[fixture.name]))).leaves
        for fixture in FIXTURES
    }


@pytest.mark.parametrize("fixture", FIXTURES, ids=str)
def test_each_checkpoint_is_read_under_its_own_layout(trees: Mapping[str, Stored], fixture: Fixture) -> None:
    found = candidates(trees[fixture.name], "auto")

    assert {layout.name for layout in found} == {fixture.layout} | ALSO.get(fixture.name, set())


@pytest.mark.parametrize(
    "layout", [item for item in LAYOUTS if item.name in FOREIGN], ids=lambda item: item.name
)
def test_a_foreign_layout_claims_its_own_checkpoints_and_no_others(
    trees: Mapping[str, Stored], layout: Layout
) -> None:
    claimed = {name for name, stored in trees.items() if layout.fits(stored)}

    assert claimed == {fixture.name for fixture in FIXTURES if fixture.layout == layout.name}


@pytest.mark.parametrize("name", ["params", "opt_state", "step", "batch_stats", "target", "value"])
def test_a_module_of_bare_params_may_have_any_name(tmp_path: pathlib.Path, name: str) -> None:
    tree = {name: {"kernel": np.ones((2, 3), np.float32)}, "other": {"bias": np.full(3, 2, np.float32)}}
    target = nnx.State(jax.tree.map(lambda leaf: nnx.Param(jnp.zeros(leaf.shape)), tree))

    state = restore(save_stock(tmp_path / "item", tree), target)

    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(state), tree)


@pytest.mark.parametrize("fixture", FIXTURES, ids=str)
def test_every_stored_leaf_has_one_placement(trees: Mapping[str, Stored], fixture: Fixture) -> None:
    stored = trees[fixture.name]
    (layout,) = candidates(stored, fixture.layout)

    placed = [placement.leaf.path for placement in layout.place(stored)]

    assert len(placed) == len(stored)
    assert set(placed) == set(stored)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("MaxText", "maxtext"),
        ("Flax TrainState", "train_state"),
        ("trainstate", "train_state"),
        ("t5", "t5x"),
    ],
)
def test_a_layout_by_the_name_that_a_plan_prints_leads_to_the_one_to_pass(given, meant):
    with pytest.raises(UnknownLayoutError, match=f"there is no layout '{given}'") as raised:
        candidates({}, given)

    assert raised.value.hints[0].arguments == {"layout": meant}


def test_a_layout_that_is_like_none_is_answered_with_the_list():
    with pytest.raises(UnknownLayoutError) as raised:
        candidates({}, "zzz")

    assert [hint.words[:22] for hint in raised.value.hints] == ["layout is one of auto,"]
