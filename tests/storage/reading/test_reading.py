"""Arrays that the reader gives, against what stock Orbax restores and NumPy computes."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from jax.sharding import NamedSharding, PartitionSpec

from orbax_nnx_handler import NNXLinenHandler, NNXLinenRestore
from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.planning.core.recipes import (
    Concat,
    Index,
    Read,
    Reshape,
    Scale,
    Slice,
    Stack,
    Transpose,
)
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.checkpoint.trees import EMPTY_TYPES
from orbax_nnx_handler.storage.reading import Job, read_arrays, read_values
from orbax_nnx_handler.storage.reading.base_store import LocalData
from tests.cases import load_case, names
from tests.storage.checkpoints import FORMATS, DiskFormat, mixed_tree, numbers, save
from tests.storage.jobs import one_device, plain_jobs

RAW = DiskFormat(True, True, False)
ZSTD = DiskFormat(True, True, True)


def job(recipe, shape, sharding=None, dtype=np.float32):
    return Job(
        path=("x",),
        recipe=recipe,
        shape=shape,
        dtype=jax.ShapeDtypeStruct((), dtype).dtype,
        sharding=sharding or one_device(),
    )


def stock_leaves(path):
    """What stock Orbax restores, on one device."""
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(path).tree
    args = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=one_device(), restore_type=None), tree)
    restored = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))
    flat = jax.tree_util.tree_flatten_with_path(restored)[0]
    return {
        tuple(getattr(key, "key", getattr(key, "idx", None)) for key in keys): value for keys, value in flat
    }


def assert_same(found, expected):
    if jnp.issubdtype(expected.dtype, jax.dtypes.prng_key) if hasattr(expected, "dtype") else False:
        assert jax.random.key_impl(found) == jax.random.key_impl(expected)
        found, expected = jax.random.key_data(found), jax.random.key_data(expected)
    assert np.asarray(found).dtype == np.asarray(expected).dtype
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("disk_format", FORMATS, ids=str)
def test_all_leaves_are_what_stock_orbax_restores(tmp_path, disk_format):
    path = save(tmp_path / "item", mixed_tree(), disk_format)
    checkpoint = read_metadata(path)

    with jax.enable_x64(True):
        found = read_arrays(checkpoint, plain_jobs(checkpoint))
        expected = stock_leaves(path)

    for leaf, array in found.items():
        assert_same(array, expected[leaf])


@pytest.mark.parametrize("case", names())
def test_all_leaves_of_the_real_checkpoints_are_what_stock_orbax_restores(case):
    path = load_case(case).path
    checkpoint = read_metadata(path)

    found = read_arrays(checkpoint, plain_jobs(checkpoint))

    expected = stock_leaves(path)
    assert set(found) == set(expected)
    for leaf, array in found.items():
        assert_same(array, expected[leaf])


RECIPES = {
    "unstack": (Index(Read(("s",)), 1, 2), lambda t: t["s"][:, 2]),
    "stack": (Stack((Read(("a",)), Read(("b",))), 1), lambda t: np.stack([t["a"], t["b"]], 1)),
    "fuse": (Concat((Read(("a",)), Read(("b",))), 1), lambda t: np.concatenate([t["a"], t["b"]], 1)),
    "split": (Slice(Read(("a",)), 1, 4, 4), lambda t: t["a"][:, 4:]),
    "transpose": (Transpose(Read(("s",)), (2, 0, 1)), lambda t: t["s"].transpose(2, 0, 1)),
    "merge": (Reshape(Read(("s",)), (8, 32)), lambda t: t["s"].reshape(8, 32)),
    "part of a merge": (
        Stack((Reshape(Read(("s",)), (8, 32)),) * 2, 1),
        lambda t: np.stack([t["s"].reshape(8, 32)] * 2, 1),
    ),
    "fold": (Reshape(Read(("a",)), (4, 16)), lambda t: t["a"].reshape(4, 16)),
    "scale": (Scale(Read(("a",)), 0.5), lambda t: t["a"] * 0.5),
    "two layers again": (
        Stack((Index(Read(("s",)), 1, 3), Index(Read(("s",)), 1, 0)), 0),
        lambda t: np.stack([t["s"][:, 3], t["s"][:, 0]]),
    ),
}


@pytest.mark.parametrize("spec", [(), ("fsdp",), (None, "tensor"), ("tensor", "fsdp"), (("fsdp", "tensor"),)])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_on_a_mesh_gives_numpys_value(tmp_path_factory, mesh, name, spec):
    tree = {"a": numbers((8, 8)), "b": numbers((8, 8), seed=1), "s": numbers((8, 4, 8), seed=2)}
    path = tmp_path_factory.getbasetemp() / "recipes"
    if not path.exists():
        save(path, tree, ZSTD)
    recipe, compute = RECIPES[name]
    expected = compute(jax.tree.map(np.asarray, tree))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    if not divides(sharding, expected.shape):
        pytest.skip("the mesh does not divide the shape")

    found = read_arrays(read_metadata(path), [job(recipe, expected.shape, sharding)])[("x",)]

    assert found.sharding == sharding
    np.testing.assert_array_equal(np.asarray(found), expected)
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])


def divides(sharding, shape):
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("disk_format", [RAW, ZSTD, DiskFormat(True, False, True)], ids=str)
@pytest.mark.parametrize("spec", [(), ("fsdp",), (None, "tensor"), ("tensor", "fsdp")])
def test_chunks_and_shards_may_cross(tmp_path, mesh, disk_format, spec):
    array = numbers((24, 40))
    saved = jax.device_put(array, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    path = save(tmp_path / "item", {"w": saved}, disk_format)
    checkpoint = read_metadata(path)

    found = read_arrays(checkpoint, [job(Read(("w",)), (24, 40), NamedSharding(mesh, PartitionSpec(*spec)))])

    assert checkpoint.leaves[("w",)].chunk_shape == (6, 20)
    np.testing.assert_array_equal(np.asarray(found[("x",)]), np.asarray(array))


@pytest.mark.parametrize("disk_format", [RAW, ZSTD], ids=str)
@pytest.mark.parametrize("spec", [(), (None, "tensor"), ("fsdp", "tensor")])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_chunk_larger_than_a_block_is_read_piece_by_piece(
    tmp_path, mesh, monkeypatch, disk_format, spec, dtype
):
    monkeypatch.setattr("orbax_nnx_handler.storage.reading.chunks.BLOCK_BYTES", 256)
    monkeypatch.setattr("orbax_nnx_handler.storage.reading.chunks._ONE_CALL_BYTES", 256)
    monkeypatch.setenv("ORBAX_NNX_GAP_BYTES", "16")
    monkeypatch.setenv("ORBAX_NNX_RANGE_BYTES", "1024")
    array = numbers((16, 4, 32))
    path = save(tmp_path / "item", {"w": array}, disk_format)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    layers = [
        dataclasses.replace(job(Index(Read(("w",)), 1, i), (16, 32), sharding, dtype), path=(i,))
        for i in range(3)
    ]
    jobs = [*layers, job(Read(("w",)), (16, 4, 32), one_device(), dtype)]

    found = read_arrays(read_metadata(path), jobs)

    np.testing.assert_array_equal(np.asarray(found[("x",)]), np.asarray(array.astype(dtype)))
    for layer in range(3):
        np.testing.assert_array_equal(np.asarray(found[(layer,)]), np.asarray(array.astype(dtype))[:, layer])


@pytest.mark.parametrize(
    ("stored", "wanted"), [(np.float32, jnp.bfloat16), (jnp.bfloat16, np.float32), (np.int32, np.uint32)]
)
def test_a_cast_is_the_one_that_jax_makes(tmp_path, stored, wanted):
    array = jnp.asarray(np.random.default_rng(0).standard_normal((9, 7)) * 50 + 200).astype(stored)
    path = save(tmp_path / "item", {"w": array}, ZSTD)

    found = read_arrays(read_metadata(path), [job(Read(("w",)), (9, 7), dtype=wanted)])

    assert_same(found[("x",)], array.astype(wanted))


def test_random_keys_come_back_sharded_and_stacked(tmp_path, mesh):
    keys = jax.random.split(jax.random.key(0), 8)
    path = save(tmp_path / "item", {"a": keys, "b": keys[::-1]})
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    recipe = Stack((Read(("a",)), Read(("b",))), 1)

    found = read_arrays(read_metadata(path), [job(recipe, (8, 2), sharding, keys.dtype)])[("x",)]

    assert found.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(
        jax.random.key_data(found), jax.random.key_data(jnp.stack([keys, keys[::-1]], 1))
    )
    assert jax.random.uniform(found[0, 0]) == jax.random.uniform(keys[0])


def test_host_values_of_a_msgpack_file_are_placed_shard_by_shard(tmp_path, mesh):
    tree = {"w": np.arange(64.0, dtype=np.float32).reshape(8, 8), "step": 3}
    (tmp_path / "checkpoint_3").write_bytes(serialization.msgpack_serialize(tree))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    wanted = [
        job(Transpose(Read(("w",)), (1, 0)), (8, 8), sharding),
        dataclasses.replace(job(Read(("step",)), (), dtype=np.uint32), path=("step",)),
    ]

    found = read_arrays(read_metadata(tmp_path / "checkpoint_3"), wanted)

    np.testing.assert_array_equal(np.asarray(found[("x",)]), tree["w"].T)
    assert found[("step",)] == np.uint32(3)


@pytest.mark.parametrize("disk_format", [*FORMATS[:3], FORMATS[4]], ids=str)
def test_both_readers_give_the_same(tmp_path, mesh, disk_format):
    path = save(tmp_path / "item", mixed_tree() | {"s": numbers((8, 4, 8))}, disk_format)
    checkpoint = read_metadata(path)
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    numbers_only = [one for one in plain_jobs(checkpoint) if one.path[0] not in ("step", "rate", "host")]
    stacked = [
        dataclasses.replace(job(Index(Read(("s",)), 1, i), (8, 8), sharding), path=(i,)) for i in range(4)
    ]
    jobs = [*numbers_only, *stacked]

    own = read_arrays(checkpoint, jobs)
    orbax = read_arrays(checkpoint, jobs, orbax=ocp.PyTreeCheckpointHandler())

    for wanted in own:
        assert own[wanted].sharding.is_equivalent_to(orbax[wanted].sharding, own[wanted].ndim)
        assert_same(own[wanted], orbax[wanted])


@pytest.mark.parametrize("name", RECIPES)
def test_both_readers_give_the_same_for_every_recipe(tmp_path_factory, mesh, name):
    tree = {"a": numbers((8, 8)), "b": numbers((8, 8), seed=1), "s": numbers((8, 4, 8), seed=2)}
    path = tmp_path_factory.getbasetemp() / "recipes"
    if not path.exists():
        save(path, tree, ZSTD)
    recipe, compute = RECIPES[name]
    expected = compute(jax.tree.map(np.asarray, tree))
    wanted = job(recipe, expected.shape, NamedSharding(mesh, PartitionSpec("tensor")), jnp.bfloat16)

    found = read_arrays(read_metadata(path), [wanted], orbax=ocp.PyTreeCheckpointHandler())

    assert found[("x",)].sharding == wanted.sharding
    assert_same(found[("x",)], jnp.asarray(expected).astype(jnp.bfloat16))


def test_a_replicated_shard_is_read_once(tmp_path, mesh, monkeypatch):
    path = save(tmp_path / "item", {"w": numbers((8, 8))}, RAW)
    read = count_bytes(monkeypatch)

    read_arrays(read_metadata(path), [job(Read(("w",)), (8, 8), NamedSharding(mesh, PartitionSpec("fsdp")))])

    assert sum(read) <= 8 * 8 * 4 + 4 * 20


def test_a_stacked_leaf_that_feeds_many_is_read_once(tmp_path, monkeypatch):
    path = save(tmp_path / "item", {"s": numbers((8, 16, 8))}, RAW)
    jobs = [dataclasses.replace(job(Index(Read(("s",)), 1, i), (8, 8)), path=(i,)) for i in range(16)]
    read = count_bytes(monkeypatch)

    read_arrays(read_metadata(path), jobs)

    assert sum(read) <= 8 * 16 * 8 * 4 + 20


def test_a_slice_reads_only_its_bytes(tmp_path, monkeypatch):
    path = save(tmp_path / "item", {"s": numbers((64, 64))}, RAW)
    # Otherwise so small a gap as that to the index is read rather than skipped.
    monkeypatch.setenv("ORBAX_NNX_GAP_BYTES", "0")
    read = count_bytes(monkeypatch)

    read_arrays(read_metadata(path), [job(Slice(Read(("s",)), 0, 8, 2), (2, 64))])

    assert sum(read) <= 2 * 64 * 4 + 20


def count_bytes(monkeypatch):
    """Notes the size of every read of array bytes."""
    read, original = [], LocalData.read_into

    def counted(self, file, start, buffers):
        read.append(sum(map(len, buffers)))
        original(self, file, start, buffers)

    monkeypatch.setattr(LocalData, "read_into", counted)
    return read


def test_arrays_keep_their_memory_and_nothing_writes_to_it_again(tmp_path):
    path = save(tmp_path / "item", {"w": numbers((64, 64)), "v": numbers((3,))}, RAW)
    checkpoint = read_metadata(path)

    first = read_arrays(checkpoint, plain_jobs(checkpoint))
    copies = {path: np.array(array) for path, array in first.items()}
    second = read_arrays(
        checkpoint,
        [dataclasses.replace(one, recipe=Scale(one.recipe, 2.0)) for one in plain_jobs(checkpoint)],
    )
    gc.collect()

    for leaf in first:
        np.testing.assert_array_equal(np.asarray(first[leaf]), copies[leaf])
        np.testing.assert_array_equal(np.asarray(second[leaf]), copies[leaf] * 2)


def test_a_donated_replica_leaves_the_others_as_they_are(tmp_path, mesh):
    path = save(tmp_path / "item", {"w": numbers((64, 64))}, RAW)
    array = read_arrays(
        read_metadata(path), [job(Read(("w",)), (64, 64), NamedSharding(mesh, PartitionSpec()))]
    )[("x",)]
    replicas = [shard.data for shard in array.addressable_shards]
    before = np.array(replicas[1])

    jax.block_until_ready(jax.jit(lambda x: x * 2, donate_argnums=0)(replicas[0]))

    for replica in replicas[1:]:
        np.testing.assert_array_equal(np.asarray(replica), before)


def test_the_memory_is_freed_with_the_array(tmp_path, monkeypatch):
    blocks = []
    from orbax_nnx_handler.storage.reading import memory

    original = memory.mmap.mmap

    class Noted(original):
        def __new__(cls, *args, **kwargs):
            made = super().__new__(cls, *args, **kwargs)
            blocks.append(weakref.ref(made))
            return made

    monkeypatch.setattr(memory.mmap, "mmap", Noted)
    path = save(tmp_path / "item", {"w": numbers((64, 64))}, RAW)

    array = read_arrays(read_metadata(path), [job(Read(("w",)), (64, 64))])[("x",)]
    alive = [block() is not None for block in blocks]
    del array
    gc.collect()

    assert any(alive)
    assert all(block() is None for block in blocks)


@pytest.mark.parametrize("disk_format", FORMATS, ids=str)
def test_a_lost_chunk_raises_and_names_leaf_and_file(tmp_path, disk_format):
    path = save(tmp_path / "item", {"a": {"w": numbers((64, 64))}, "b": numbers((2,))}, disk_format)
    checkpoint = read_metadata(path)
    lose(checkpoint, path, "a.w")

    with pytest.raises(UnreadableLeafError, match=r"a/w") as raised:
        read_arrays(checkpoint, plain_jobs(checkpoint))

    assert raised.value.paths == (("a", "w"),)
    assert str(path) in str(raised.value)


def lose(checkpoint, path, name):
    """Removes the file that holds the chunk of a leaf."""
    array = next(array for array in checkpoint.arrays.values() if array.name == name)
    key = array.key((0, 0))
    extent = array.store.extent(key)
    (path / extent.file).unlink()


def test_a_chunk_that_the_database_does_not_list_raises_before_anything_is_read(tmp_path, monkeypatch):
    path = save(tmp_path / "item", {"a": numbers((2,)), "b": numbers((2,))}, RAW)
    checkpoint = read_metadata(path)
    catalog = checkpoint.arrays[("a",)].store.catalog
    catalog.pop("a/c/0")
    read = count_bytes(monkeypatch)

    with pytest.raises(UnreadableLeafError) as raised:
        read_arrays(checkpoint, plain_jobs(checkpoint))

    assert str(raised.value) == f"chunks of 1 stored leaves are absent from {path}:\n  a: a/c/0"
    assert not read


def test_where_the_writer_leaves_out_zeros_an_absent_chunk_is_zeros(tmp_path):
    path = save(tmp_path / "item", {"a": numbers((64, 64))}, DiskFormat(False, False, True))
    content = (path / "_METADATA").read_text()
    (path / "_METADATA").write_text(content.replace('"store_array_data_equal_to_fill_value": true', '"x": 0'))
    (path / "a" / "0.0").unlink()

    found = read_arrays(read_metadata(path), [job(Read(("a",)), (64, 64))])

    np.testing.assert_array_equal(np.asarray(found[("x",)]), np.zeros((64, 64)))


@pytest.mark.parametrize(
    "disk_format", [RAW, ZSTD, DiskFormat(False, False, False), DiskFormat(False, False, True)], ids=str
)
@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_damaged_bytes_raise_and_name_leaf_and_file(tmp_path, disk_format, damage):
    path = save(tmp_path / "item", {"w": numbers((64, 64))}, disk_format)
    checkpoint = read_metadata(path)
    array = checkpoint.arrays[("w",)]
    extent = array.store.extent(array.key((0, 0)))
    file = path / extent.file
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    else:
        stop = len(content) if extent.size < 0 else extent.start + extent.size
        content[extent.start : stop] = b"\x55" * (stop - extent.start)
    file.write_bytes(content)
    if damage == "overwritten" and disk_format == DiskFormat(False, False, False):
        pytest.skip("uncompressed Zarr 2 has no redundancy: any bytes are values")

    with pytest.raises(UnreadableLeafError, match="stored leaf w cannot be read") as raised:
        read_arrays(checkpoint, plain_jobs(checkpoint))

    assert str(file) in str(raised.value)


def test_progress_counts_all_bytes(tmp_path):
    path = save(tmp_path / "item", {"a": numbers((64, 64)), "b": numbers((3,))}, ZSTD)
    checkpoint = read_metadata(path)
    done = []

    read_arrays(checkpoint, plain_jobs(checkpoint), progress=done.append)

    assert sum(done) == 64 * 64 * 4 + 3 * 4


def test_other_codecs_are_left_to_tensorstore(tmp_path, mesh):
    import tensorstore as ts

    path = save(tmp_path / "item", {"w": numbers((8, 8))}, DiskFormat(False, False, True))
    (path / "w" / ".zarray").unlink()
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{path}/w/"},
        "metadata": {"shape": [8, 8], "chunks": [3, 5], "dtype": "<f4", "compressor": {"id": "blosc"}},
    }
    expected = np.arange(64, dtype=np.float32).reshape(8, 8)
    ts.open(spec, create=True, delete_existing=True).result().write(expected).result()
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))

    found = read_arrays(read_metadata(path), [job(Read(("w",)), (8, 8), sharding)])

    np.testing.assert_array_equal(np.asarray(found[("x",)]), expected)


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_chunks_that_hang_over_the_edge_are_cut(tmp_path, mesh, driver):
    import tensorstore as ts

    path = save(tmp_path / "item", {"w": numbers((8, 8))}, DiskFormat(False, driver == "zarr3", False))
    expected = np.arange(56, dtype=np.float32).reshape(8, 7)
    spec = {
        "driver": driver,
        "kvstore": {"driver": "file", "path": f"{path}/w/"},
        "dtype": "float32",
        "schema": {"domain": {"shape": [8, 7]}, "chunk_layout": {"chunk": {"shape": [3, 5]}}},
    }
    ts.open(spec, create=True, delete_existing=True).result().write(expected).result()
    checkpoint = read_metadata(path)

    found = read_arrays(checkpoint, [job(Read(("w",)), (8, 7), NamedSharding(mesh, PartitionSpec("fsdp")))])

    np.testing.assert_array_equal(np.asarray(found[("x",)]), expected)


def test_the_names_of_empty_nodes_are_those_that_orbax_writes(tmp_path):
    path = save(tmp_path / "item", {"a": numbers((2,)), "n": None, "d": {}, "l": [], "t": ()})

    nodes = read_metadata(path).nodes

    assert {nodes[(name,)] for name in "ndlt"} <= EMPTY_TYPES


def test_values_for_a_decision_come_as_numpy_arrays(tmp_path):
    path = save(tmp_path / "item", mixed_tree())
    checkpoint = read_metadata(path)

    values = read_values(checkpoint, [("step",), ("host",), ("key",)])

    assert values[("step",)] == 12
    np.testing.assert_array_equal(values[("host",)], np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(values[("key",)], jax.random.key_data(jax.random.key(3)))


def test_a_handler_with_type_handlers_of_its_own_reads_with_them(tmp_path, mesh):
    names = []

    class Noting(ocp.type_handlers.ArrayHandler):
        async def deserialize(self, infos, args=None):
            names.extend(info.name for info in infos)
            return await super().deserialize(infos, args)

    path = save(tmp_path / "item", {"params": {"w": numbers((8, 8)), "v": numbers((8,))}})
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, Noting()))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    target = nnx.State({"w": nnx.Param(jax.ShapeDtypeStruct((8, 8), np.float32, sharding=sharding))})
    handler = NNXLinenHandler(type_handler_registry=registry)

    state = handler.restore(path, args=NNXLinenRestore(target))

    np.testing.assert_array_equal(np.asarray(state["w"].get_value()), np.asarray(numbers((8, 8))))
    assert names == ["params.w"]


def test_single_replica_restore_is_orbaxs_own(tmp_path, mesh):
    path = save(tmp_path / "item", {"w": numbers((8, 8)), "s": numbers((8, 4, 8), seed=1)})
    single = ocp.type_handlers.SingleReplicaArrayHandler(replica_axis_index=0)
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, single))
    )
    sharding = NamedSharding(mesh, PartitionSpec("tensor"))
    layer = dataclasses.replace(job(Index(Read(("s",)), 1, 2), (8, 8), sharding), path=("layer",))

    found = read_arrays(read_metadata(path), [job(Read(("w",)), (8, 8), sharding), layer], orbax=handler)

    assert found[("x",)].sharding == sharding
    np.testing.assert_array_equal(np.asarray(found[("x",)]), np.asarray(numbers((8, 8))))
    np.testing.assert_array_equal(np.asarray(found[("layer",)]), np.asarray(numbers((8, 4, 8), seed=1))[:, 2])
