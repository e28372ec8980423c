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


GOOD = {"a/zarr.json": b"{}", "b": b"x"}


def test_a_database_made_by_hand_is_read(tmp_path):
    child = made.leaf(GOOD, packed=True)
    parent = made.interior({"a": ("d/n", 0, len(child))}, height=1)

    assert catalog_of(made.write(tmp_path / "db", [child, parent], height=1)).catalog == GOOD


def deep(height):
    """Nodes of which each has the one before as its sixteen children."""
    nodes = [made.leaf(GOOD)]
    for level in range(1, height + 1):
        start, size = sum(map(len, nodes[:-1])), len(nodes[-1])
        nodes.append(made.interior({chr(97 + at): ("d/n", start, size) for at in range(16)}, height=level))
    return nodes


def of_itself(height):
    first = made.interior({"a": ("d/n", 0, 1)}, height=height)
    return [made.interior({"a": ("d/n", 0, len(first))}, height=height)]


LEAF = made.leaf(GOOD)
HOSTILE = {
    "a node that names itself": ((of_itself(1),), {"height": 1}, "comes twice"),
    "a node that names itself under a great height": (
        (of_itself(255),),
        {"height": 255},
        "height|comes twice",
    ),
    "a node named sixteen times, on six levels": ((deep(6),), {"height": 6}, "comes twice"),
    "a height that is not the node's": (([LEAF],), {"height": 3}, "height: 0 where the node above it says 3"),
    "a root far behind the end": (([LEAF],), {"root": ("d/n", 1 << 62, 10)}, "ends at byte"),
    "a root larger than the file": (([LEAF],), {"root": ("d/n", 0, 1 << 62)}, "ends at byte"),
    "a root in a file above": (([LEAF],), {"root": ("../n", 0, 10)}, r"'\.\./n' is no path below"),
    "a root in an absolute file": (([LEAF],), {"root": ("/etc/passwd", 0, 10)}, "is no path below"),
    "a root in a file with a newline": (([LEAF],), {"root": ("d/n\nx", 0, 10)}, "is no path below"),
    "values in a file above": (([made.leaf({"a": ("../../secret", 0, 4)})],), {}, "is no path below"),
    "values in the directory's own file": (([made.leaf({"a": ("d/./n", 0, 4)})],), {}, "is no path below"),
    "a great number of entries": (([made.leaf(GOOD, count=1 << 40)],), {}, "num_entries"),
    "no entries": (([made.leaf(GOOD, count=0)],), {}, "num_entries"),
    "a wrong checksum": (([made.leaf(GOOD, checksum=7)],), {}, "crc32c_checksum"),
    "a wrong length": (([made.leaf(GOOD, length=1 << 50)],), {}, "length"),
    "another version": (([made.leaf(GOOD, version=9)],), {}, "version"),
    "another compression": (([made.leaf(GOOD, compression=9)],), {}, "compression_format"),
    "a frame that is none": (([made.leaf(GOOD, compression=1)],), {}, "body"),
    "a bomb": (([made.framed(made.NODE, bytes(1 << 28), packed=True)],), {}, "body: more than"),
    "keys in the wrong order": (
        ([made.framed(made.NODE, bytes([0, 0, 2]) + made.keys("ba") + b"ba" + bytes([1, 1, 0, 0]) + b"xy")],),
        {},
        "rising order",
    ),
    "keys that unfold to gigabytes": (
        (
            [
                made.framed(
                    made.NODE,
                    bytes([0, 0])
                    + made.varint(900_000)
                    + made.column([60_000] * 899_999)
                    + made.column([60_000] + [1] * 899_999)
                    + bytes(960_000),
                )
            ],
        ),
        {},
        "bytes of names",
    ),
    "lengths whose sum overflows to a small one": (
        (
            [
                made.framed(
                    made.NODE,
                    bytes([0, 0, 2]) + made.column([1, 1, (1 << 64) - 1]) + b"abb" + bytes([1, 1, 0, 0]),
                )
            ],
        ),
        {},
        "1 of 1, 18446744073709551615 more",
    ),
    "a numbered manifest": (([LEAF],), {"kind": 1}, "manifest_kind"),
    "a key that is no text": (([made.leaf({"a": b""}).replace(b"a", b"\xff")],), {}, "crc32c"),
}


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
        "hint: copy it again from where it was written: a file is truncated, or was not copied."
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
        "codecs": [{"name": "bytes"}],
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
