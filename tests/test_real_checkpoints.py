"""Checkpoints that MaxText's own Linen trainer wrote come up exactly, wherever they go."""

import jax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orbax_nnx_handler import NNXLinenHandler, NNXLinenRestore, restore
from tests.cases import Case, load_case, names, problems

LARGE = 1024  # elements; every leaf at least this large must be sharded


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {name: load_case(name) for name in names()}


def _spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Shards each of the mesh's axes over the first array axis that it divides."""
    axes: list[str | None] = [None] * len(shape)
    for name, size in mesh.shape.items():
        for at, length in enumerate(shape):
            if axes[at] is None and length % size == 0 and length >= size:
                axes[at] = name
                break
    return PartitionSpec(*axes)


def _sharded(target: nnx.State, mesh: Mesh) -> nnx.State:
    def leaf(value: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        large = value.size >= LARGE
        sharding = NamedSharding(mesh, _spec(value.shape, mesh) if large else PartitionSpec())
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    return jax.tree.map(leaf, target)


@pytest.mark.parametrize("name", names())
def test_a_case_restores_exactly_on_one_device(name: str, cases: dict[str, Case]) -> None:
    case = cases[name]

    state = restore(case.path, case.target, unexpected="error")

    assert not problems(case, state)


@pytest.mark.parametrize("name", names())
def test_a_case_restores_exactly_onto_a_mesh_with_every_large_leaf_sharded(
    name: str, cases: dict[str, Case], mesh: Mesh
) -> None:
    case = cases[name]
    target = _sharded(case.target, mesh)

    state = restore(case.path, target)

    assert not problems(case, state)
    wanted = dict(nnx.to_flat_state(target))
    for path, variable in nnx.to_flat_state(state):
        value, want = variable.get_value(), wanted[path].get_value()
        assert value.sharding.is_equivalent_to(want.sharding, value.ndim), path
        if value.size >= LARGE:
            assert not value.sharding.is_fully_replicated, path


@pytest.mark.parametrize("name", names())
def test_a_case_restores_exactly_through_a_manager(
    name: str, cases: dict[str, Case], tmp_path, mesh: Mesh
) -> None:
    case = cases[name].copied_to(tmp_path)
    handler = NNXLinenHandler(policy="error", unexpected="error")

    with ocp.CheckpointManager(tmp_path, item_handlers={"items": handler}) as manager:
        restored = manager.restore(
            3, args=ocp.args.Composite(items=NNXLinenRestore(_sharded(case.target, mesh)))
        )

    assert not problems(case, restored["items"])
    assert handler.report is not None
    assert len(handler.report.restored) == sum(digest is not None for digest in case.digests.values())


@pytest.mark.parametrize("name", ["llama2_scanned_to_unscanned", "gemma3_unscanned_to_scanned"])
def test_the_path_of_a_root_a_step_and_an_item_mean_the_same(
    name: str, cases: dict[str, Case], tmp_path
) -> None:
    case = cases[name].copied_to(tmp_path)

    states = [restore(path, case.target) for path in (tmp_path, tmp_path / "3", tmp_path / "3" / "items")]

    assert [problems(case, state) for state in states] == [[], [], []]
