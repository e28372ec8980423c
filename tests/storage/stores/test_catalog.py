"""The contents of OCDBT databases against TensorStore's own, and hostile databases."""

import json
import os
import time
import tracemalloc

import google_crc32c
import jax
import numpy as np
import pytest
import tensorstore as ts
from etils import epath

from orbax_nnx_handler import NotACheckpointError, UnreadableLeafError, restore
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.stores.kvstore import files_at, open_ocdbt
from orbax_nnx_handler.storage.stores.ocdbt import DamagedDatabaseError, Extent, crc32c
from tests.storage.stores import ocdbt_writer as made
from tests.storage.stores.hostile_databases import GOOD, HOSTILE, LEAF


def catalog_of(folder):
    path = epath.Path(folder)
    return open_ocdbt(path, files_at(path))


@pytest.mark.parametrize("compression", [None, {"id": "zstd"}])
@pytest.mark.parametrize("count", [0, 1, 700])
def test_every_value_is_where_tensorstore_has_it(tmp_path, compression, count):
    config = {"compression": compression, "max_decoded_node_bytes": 900, "max_inline_value_bytes": 16}
    spec = {"driver": "ocdbt", "base": f"file://{tmp_path}/db/", "config": config}
    store = ts.KvStore.open(spec).result()
    written = {f"layer_{at % 40}/{at}": bytes([at % 251]) * (at % 33) for at in range(count)}
    with ts.Transaction() as transaction:
        for key, value in written.items():
            store.with_transaction(transaction)[key] = value
    if not count:
        store["gone"] = b""
        del store["gone"]

    found = catalog_of(tmp_path / "db")

    def value(place):
        if isinstance(place, bytes):
            return place
        return (tmp_path / "db" / place.file).read_bytes()[place.start :][: place.size]

    assert {key: value(place) for key, place in found.catalog.items()} == written
    assert not found.damaged


@pytest.mark.parametrize("size", [4, 5, 255, 256, 257, 4096, 70_001])
def test_the_checksum_is_that_of_the_standard(size):
    data = np.random.default_rng(size).bytes(size)

    assert crc32c(data) == google_crc32c.value(data)


def test_a_database_made_by_hand_is_read(tmp_path):
    child = made.leaf(GOOD, packed=True)
    parent = made.interior({"a": ("d/n", 0, len(child))}, height=1)

    assert catalog_of(made.write(tmp_path / "db", [child, parent], height=1)).catalog == GOOD


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_database_is_refused_at_once(tmp_path, name):
    (nodes,), options, said = HOSTILE[name]
    folder = made.write(tmp_path / "db", nodes, **options)
    tracemalloc.start()
    start = time.monotonic()

    with pytest.raises(DamagedDatabaseError, match=said):
        catalog_of(folder)

    assert time.monotonic() - start < 20
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()


def test_what_is_wrong_with_a_database_is_said_with_the_item(tmp_path):
    folder = made.write(tmp_path / "db", [made.leaf(GOOD, checksum=7)])

    with pytest.raises(NotACheckpointError) as raised:
        read_metadata(folder)

    assert str(raised.value) == (
        f"the database in {folder} cannot be read: d/n (B-tree node at byte 0) is damaged: "
        "crc32c_checksum: the bytes have another one.\n"
        "hint: copy it again from where it was written: a file is damaged, or was not copied whole."
    )


def test_a_value_that_its_file_cannot_hold_is_damage_before_anything_is_read(tmp_path):
    folder = made.write(tmp_path / "db", [made.leaf({"a": ("d/n", 4, 3 << 30), "b": ("d/gone", 0, 1)})])

    store = catalog_of(folder)

    size = (folder / "d" / "n").stat().st_size
    assert store.damaged == {
        "a": f"d/n ends at byte {size}, before byte {4 + (3 << 30)}",
        "b": "the file d/gone is absent",
    }
    assert store.catalog["a"] == Extent("d/n", 4, 3 << 30)


@pytest.mark.parametrize("size", [3 << 30, 1 << 62])
def test_a_leaf_whose_size_is_a_lie_is_named_and_takes_no_memory(tmp_path, size):
    array = {
        "zarr_format": 3, "node_type": "array", "shape": [size // 4], "data_type": "float32", "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [size // 4]}},
        "chunk_key_encoding": {"name": "default"}, "codecs": [{"name": "bytes"}],
    }  # fmt: skip
    values = {"w/zarr.json": json.dumps(array).encode(), "w/c/0": ("d/n", 0, size)}
    folder = made.write(tmp_path / "db", [made.leaf(values)])
    target = {"w": jax.ShapeDtypeStruct((size // 4,), np.float32)}

    with pytest.raises(UnreadableLeafError, match=r"w +w/c/0: d/n ends at byte"):
        restore(folder, target, policy="warn")


def test_no_file_outside_a_checkpoint_is_read(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"SECR" * 24)
    folder = made.write(tmp_path / "item" / "db", [made.leaf({"w/c/0": ("../../outside/secret", 0, 96)})])

    with pytest.raises(NotACheckpointError, match="is no path below the database"):
        restore(folder, {"w": np.zeros((6, 4), np.float32)})


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path):
    folder = made.write(tmp_path / "db", [LEAF])
    (folder / "manifest.ocdbt").unlink()
    os.mkfifo(folder / "manifest.ocdbt")

    with pytest.raises(NotACheckpointError, match="no regular file"):
        read_metadata(folder)
