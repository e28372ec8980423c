"""NumPy archives: what NumPy wrote is what comes back, and what is not whole is said."""

import contextlib
import io
import math
import pathlib
import re
import tempfile
import tracemalloc
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import hypothesis
import hypothesis.extra.numpy as arrays_of
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from orbax_nnx_handler import NNXLinenHandler, NNXLinenRestore, RestoreError, plan_restore, restore
from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.planning.core.regions import slices
from orbax_nnx_handler.storage.checkpoint.find import find_item
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.reading import chunks, read_arrays, read_values
from orbax_nnx_handler.storage.reading.fetch import fill_targets
from orbax_nnx_handler.storage.reading.jobs import Destination
from tests.gallery.models import save
from tests.storage.checkpoints import as_remote
from tests.storage.jobs import plain_jobs

SAVES = {"stored": np.savez, "deflated": np.savez_compressed}
DTYPES = ["<f4", ">f4", "<f8", "<f2", "<i4", ">i8", "|u1", "|i1", "|b1", "<c8"]


@contextlib.contextmanager
def file_of(content: bytes) -> Iterator[pathlib.Path]:
    """A file with some content, for the time of a `with` block."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder).resolve() / "checkpoint.npz"
        path.write_bytes(content)
        yield path


def packed(tree: Mapping[str, Any], how: str = "stored") -> bytes:
    """What NumPy writes of a flat tree."""
    content = io.BytesIO()
    SAVES[how](content, **tree)
    return content.getvalue()


def target_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A pure dict that wants the arrays of a flat tree as they are."""
    return {name: jax.ShapeDtypeStruct(np.shape(leaf), np.asarray(leaf).dtype) for name, leaf in tree.items()}


def said(path: pathlib.Path) -> str:
    """Returns what is said of an archive whose leaf `a` is wanted, without its place on this machine."""
    with pytest.raises(RestoreError) as caught:
        restore(path, {"a": jax.ShapeDtypeStruct((3,), np.float32)}, unexpected="ignore")
    return f"{type(caught.value).__name__}: {caught.value}".replace(str(path.parent), "RUN")


@st.composite
def stored_arrays(draw: st.DrawFn) -> np.ndarray:
    """Arrays of every type and order that NumPy writes as it is, 0-d and empty ones included."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    # Bytes, not numbers: every NaN has to come back as it was.
    content = draw(st.binary(min_size=16, max_size=16)) * (1 + math.prod(shape))
    bits = np.frombuffer(content, np.uint8)[: math.prod(shape) * dtype.itemsize]
    array = (bits & 1 if dtype.kind == "b" else bits).view(dtype)
    return array.reshape(shape, order=draw(st.sampled_from("CF")))


def regions(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """Rectangles of an array, empty ones included."""
    ends = [st.tuples(st.integers(0, length), st.integers(0, length)) for length in shape]
    return st.tuples(*ends).map(lambda found: tuple((min(pair), max(pair)) for pair in found))


@hypothesis.given(data=st.data(), how=st.sampled_from(list(SAVES)))
def test_every_region_of_every_array_is_numpys_to_the_bit(data: st.DataObject, how: str) -> None:
    tree = data.draw(st.dictionaries(st.sampled_from(["a", "b/c", "b/d"]), stored_arrays(), min_size=1))
    places = {}
    for name, array in tree.items():
        wanted = data.draw(st.lists(regions(array.shape), min_size=1, max_size=3))
        views = [np.zeros(array[slices(region)].shape, array.dtype.newbyteorder("=")) for region in wanted]
        places[tuple(name.split("/"))] = [Destination(*pair) for pair in zip(wanted, views, strict=True)]

    with pytest.MonkeyPatch.context() as patch, file_of(packed(tree, how)) as path:
        patch.setattr(chunks, "_SPARE_BYTES", data.draw(st.sampled_from([0, 1 << 16])))
        patch.setattr(chunks, "BLOCK_BYTES", data.draw(st.sampled_from([7, 2 << 20])))
        patch.setenv("ORBAX_NNX_GAP_BYTES", data.draw(st.sampled_from(["0", "10"])))
        leaves = read_metadata(path).leaves
        fill_targets(read_metadata(path), places, None, None)

    for name, array in tree.items():
        leaf = leaves[tuple(name.split("/"))]
        assert (leaf.shape, leaf.dtype) == (array.shape, array.dtype.newbyteorder("="))
        for place in places[leaf.path]:
            assert place.view.tobytes() == array[slices(place.region)].astype(leaf.dtype).tobytes()


@pytest.mark.parametrize("how", SAVES)
@pytest.mark.parametrize("asked", ["in one piece", "in ranges"])
def test_an_archive_behind_a_network_gives_the_same_values(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, how: str, asked: str
) -> None:
    tree = {"a": np.arange(600, dtype=np.float32), "b": np.asfortranarray(np.arange(6).reshape(2, 3))}
    (tmp_path / "x.npz").write_bytes(packed(tree, how))
    monkeypatch.setenv("ORBAX_NNX_RANGE_BYTES", "100" if asked == "in ranges" else "10000")

    values = read_values(as_remote(read_metadata(tmp_path / "x.npz"), listed=True), [("a",), ("b",)])

    for name, value in tree.items():
        np.testing.assert_array_equal(values[(name,)], value)


def test_bfloat16_is_what_numpy_stores_as_two_raw_bytes(tmp_path: pathlib.Path) -> None:
    value = np.asarray(jnp.asarray([1.5, -2.25, jnp.inf], jnp.bfloat16))
    (tmp_path / "x.npz").write_bytes(packed({"a": value}))

    assert np.load(tmp_path / "x.npz")["a"].dtype == np.dtype("V2")
    found = restore(tmp_path / "x.npz", target_of({"a": value}))["a"]

    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, value)


def test_a_plan_needs_the_headers_alone(tmp_path: pathlib.Path) -> None:
    tree = {"a": np.arange(1 << 16, dtype=np.float32)}
    content = bytearray(packed(tree))
    start = content.index(np.float32(5000).tobytes())
    content[start : start + 100_000] = bytes(100_000)
    (tmp_path / "x.npz").write_bytes(content)

    assert plan_restore(tmp_path / "x.npz", target_of(tree)).fits
    with pytest.raises(UnreadableLeafError) as caught:
        restore(tmp_path / "x.npz", target_of(tree))

    assert str(caught.value) == (
        "stored leaf a cannot be read: its checksum is not the one that was stored with it\n"
        f"file: {tmp_path}/x.npz (a.npy)\n"
        "hint: a part of it is damaged, or was not copied: copy it again, or restore another step."
    )


@pytest.mark.parametrize("how", SAVES)
def test_memory_stays_that_of_a_few_blocks(tmp_path: pathlib.Path, how: str) -> None:
    tree = {"a": np.zeros((1 << 11, 1 << 12), np.float32)}
    (tmp_path / "x.npz").write_bytes(packed(tree, how))
    checkpoint, kept = read_metadata(tmp_path / "x.npz"), np.ones((1 << 11, 8), np.float16)

    tracemalloc.start()
    fill_targets(checkpoint, {("a",): [Destination(((0, 1 << 11), (0, 8)), kept)]}, None, None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert not kept.any()
    assert peak < tree["a"].nbytes // 4


@hypothesis.given(data=st.data(), how=st.sampled_from(list(SAVES)))
def test_a_file_that_was_cut_off_is_never_restored(data: st.DataObject, how: str) -> None:
    content = packed({"a": np.arange(3, dtype=np.float32)}, how)

    with file_of(content[: data.draw(st.integers(0, len(content) - 1))]) as path:
        assert said(path).startswith("NotACheckpointError: RUN/checkpoint.npz is no whole NumPy archive: ")


@hypothesis.given(data=st.data(), how=st.sampled_from(list(SAVES)))
def test_a_file_with_damaged_bytes_is_restored_right_or_not_at_all(data: st.DataObject, how: str) -> None:
    tree = {"a": np.arange(1200, dtype=np.float32), "b": np.arange(3, dtype=np.float32)}
    content = bytearray(packed(tree, how))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))

    with file_of(content) as path, contextlib.suppress(RestoreError):
        found = restore(path, target_of(tree), unexpected="ignore")
        for name, value in tree.items():
            np.testing.assert_array_equal(found[name], value)


FOREIGN = {
    "objects": (np.array([None, 1, 2], object), "pickled Python objects, which are never loaded"),
    "float8": (
        np.zeros(3, jnp.float8_e4m3fn),
        "raw bytes (V1), whose type NumPy does not store; V2 is bfloat16",
    ),
    "records": (np.zeros(3, [("x", "<f4"), ("y", "<f4")]), "records of several fields"),
    "records with names of their own": (np.zeros(3, [("ž", "<f4")]), "records of several fields"),
    "dates": (np.zeros(3, "<M8[s]"), "values of the type datetime64[s], which are no numbers"),
    "words": (np.array(["x", "y"]), "values of the type <U1, which are no numbers"),
}


@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_number_is_refused_by_its_name(tmp_path: pathlib.Path, kind: str) -> None:
    value, what = FOREIGN[kind]
    (tmp_path / "x.npz").write_bytes(packed({"a": value, "b": np.zeros(2)}))

    assert said(tmp_path / "x.npz").replace("  a\n      ", "  a   ", 1) == (
        "UnreadableLeafError + MissingParamError: "
        "the checkpoint has 1 leaf that holds no numbers of a known type:\n"
        f"  a   {what} (a.npy in RUN/x.npz)\n"
        "hint: load it where it was written, and save them again as arrays of float32 or of integers.\n"
        "the checkpoint lacks the one leaf that the target needs:\n  a   (3,) float32\n"
        "checkpoint: RUN/x.npz (layout: bare params, 1 stored leaf, 1 of them unexpected)"
    )


def test_what_is_no_number_and_not_wanted_is_no_obstacle(tmp_path: pathlib.Path) -> None:
    tree = {"a": np.arange(3, dtype=np.float32)}
    (tmp_path / "x.npz").write_bytes(packed({**tree, "note": np.array([{}], object), "name": "a text"}))

    found = restore(tmp_path / "x.npz", target_of(tree), unexpected="ignore")

    np.testing.assert_array_equal(found["a"], tree["a"])
    assert read_metadata(tmp_path / "x.npz").leaves[("name",)].dtype is None


def test_a_file_of_nothing_else_is_refused_as_a_whole(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.npz").write_bytes(packed({"a": np.array([{}], object)}))

    assert said(tmp_path / "x.npz") == (
        "UnreadableLeafError: the checkpoint has 1 leaf that holds no numbers of a known type:\n"
        "  a\n      pickled Python objects, which are never loaded (a.npy in RUN/x.npz)\n"
        "hint: load it where it was written, and save them again as arrays of float32 or of integers."
    )


def zipped(members: list[tuple[str, bytes]], packing: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", packing) as archive:
        for name, member in members:
            archive.writestr(name, member)
    return content.getvalue()


def npy(value: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, value)
    return content.getvalue()


ONE = npy(np.zeros(3, np.float32))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_are_no_tree_are_listed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.npz"

    path.write_bytes(zipped([("a.npy", ONE), ("b/c.npy", ONE), ("b/c.npy", ONE), ("a.npy", ONE)]))
    assert said(path) == (
        "NotACheckpointError: RUN/x.npz holds several arrays under one name:\n  b/c\n  a\n"
        "hint: save it again with a name of its own for each array."
    )

    path.write_bytes(zipped([("a.npy", ONE), ("a/b/c.npy", ONE), ("a/b.npy", ONE)]))
    assert said(path) == (
        "NotACheckpointError: RUN/x.npz has an array and a subtree under one name:\n  a\n  a/b\n"
        "hint: save it again with a name of its own for each array."
    )


def test_a_zip_file_of_something_else_is_called_that(tmp_path: pathlib.Path) -> None:
    (tmp_path / "slides.zip").write_bytes(zipped([("a.txt", b"text"), ("folder/", b"")]))

    assert said(tmp_path / "slides.zip") == (
        "NotACheckpointError: RUN/slides.zip is a zip file without arrays.\n"
        "hint: pass a file that numpy.savez wrote, or a checkpoint of Orbax."
    )


def test_entries_for_folders_are_no_leaves(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.npz").write_bytes(zipped([("b/", b""), ("b/a.npy", ONE)]))

    checkpoint = read_metadata(tmp_path / "x.npz")

    assert (list(checkpoint.leaves), dict(checkpoint.foreign)) == ([("b", "a")], {})


def test_members_that_numpy_does_not_write_are_refused(tmp_path: pathlib.Path) -> None:
    encrypted = bytearray(zipped([("a.npy", ONE)]))
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    for name, content, what in (
        ("bzip2", zipped([("a.npy", ONE)], zipfile.ZIP_BZIP2), "neither stored nor deflated"),
        ("encrypted", bytes(encrypted), "a   encrypted"),
        ("text", zipped([("a", b"text"), ("b.npy", ONE)]), "a   a file that is no array"),
    ):
        (tmp_path / name).write_bytes(content)

        assert what in said(tmp_path / name)


def test_packed_bytes_that_do_not_unpack_are_damage(tmp_path: pathlib.Path) -> None:
    value = np.random.default_rng(0).normal(size=1 << 15).astype(np.float32)
    content = bytearray(packed({"a": value}, "deflated"))
    middle = len(content) // 2
    content[middle : middle + 20_000] = b"\xff" * 20_000
    (tmp_path / "x.npz").write_bytes(content)

    with pytest.raises(UnreadableLeafError) as caught:
        restore(tmp_path / "x.npz", target_of({"a": value}))

    message = str(caught.value)
    assert message.startswith("stored leaf a cannot be read: Error -3 while decompressing data: ")
    assert f"\nfile: {tmp_path}/x.npz (a.npy)\nhint: a part of it is damaged" in message


def test_a_header_that_promises_other_bytes_than_there_are_is_damage(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.npz").write_bytes(zipped([("a.npy", ONE[:-2])]))

    assert said(tmp_path / "x.npz") == (
        "UnreadableLeafError: the checkpoint names 1 leaf whose array cannot be read:\n"
        "  a\n      a.npy in RUN/x.npz is damaged: holds 138 bytes where (3,) float32 takes 140\n"
        "hint: a part of it is damaged, or was not copied: copy it again, or restore another step."
    )


BROKEN = {
    "a header that ends early": (zipped([("a.npy", ONE[:9])]), "EOF: reading array header length"),
    "a header of nothing": (zipped([("a.npy", ONE[:8] + b"\0\0")]), "Cannot parse header: ''"),
    "another magic": (zipped([("a.npy", b"x" + ONE[1:])]), "the magic string is not correct"),
    "another descr": (zipped([("a.npy", ONE.replace(b"<f4", b"<q9"))]), "descr is not a valid dtype"),
    "another shape": (zipped([("a.npy", ONE.replace(b"(3,)", b"'a' "))]), "shape is not valid"),
    "another name": (
        zipped([("a.npy", ONE)]).replace(b"a.npy", b"b.npy", 1),
        "File name in directory 'a.npy' and header b'b.npy' differ",
    ),
    "no member": (
        zipped([("a.npy", ONE)]).replace(b"PK\x03\x04", b"PK\x03\x05"),
        "header_offset is 0, where",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_member_is_said_with_its_archive_and_what_is_wrong(
    tmp_path: pathlib.Path, kind: str
) -> None:
    content, what = BROKEN[kind]
    (tmp_path / "x.npz").write_bytes(content)

    assert f"a.npy in RUN/x.npz is damaged: {what}" in said(tmp_path / "x.npz")


def test_a_packed_header_that_ends_early_is_said_in_words(tmp_path: pathlib.Path) -> None:
    content = zipped([("a.npy", ONE)], zipfile.ZIP_DEFLATED)
    (tmp_path / "x.npz").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        size = archive.infolist()[0].compress_size
    at = content.index(b"PK\x01\x02") + 20
    (tmp_path / "x.npz").write_bytes(content[:at] + (2).to_bytes(4, "little") + content[at + 4 :])

    assert size > 2
    assert re.search(r"a\.npy in RUN/x\.npz is damaged: \w", said(tmp_path / "x.npz"))


def test_a_copy_that_was_cut_off_leads_to_the_others(tmp_path: pathlib.Path) -> None:
    content = packed({"a": np.zeros(3, np.float32)})
    for name in ("checkpoint.npz", "checkpoint.npz-000000100"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "checkpoint.npz-000000200").write_bytes(content[:-1])

    assert said(tmp_path / "checkpoint.npz-000000200") == (
        "NotACheckpointError: RUN/checkpoint.npz-000000200 is no whole NumPy archive: "
        "File is not a zip file.\n"
        "hint: copy it again, or restore another one that lies beside it: "
        "RUN/checkpoint.npz, RUN/checkpoint.npz-000000100."
    )


def test_a_file_that_was_being_written_is_never_restored(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "checkpoint.npz-TEMPORARY"
    path.write_bytes(packed({"a": np.zeros(3, np.float32)}))

    assert said(path) == (
        "NotACheckpointError: RUN/checkpoint.npz-TEMPORARY is a save that was interrupted.\n"
        "hint: no finished step lies beside it: the job has to save again."
    )
    assert "RUN is no Orbax checkpoint; it holds: checkpoint.npz-TEMPORARY." in said_of_directory(tmp_path)

    path.with_name("checkpoint.npz").write_bytes(path.read_bytes())
    assert said(path).endswith("hint: the newest finished one is RUN/checkpoint.npz.")


def said_of_directory(path: pathlib.Path) -> str:
    with pytest.raises(RestoreError) as caught:
        find_item(path)
    return str(caught.value).replace(str(path), "RUN")


def test_an_archive_in_an_item_is_no_part_of_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "checkpoint").write_bytes(b"")
    (tmp_path / "weights.npz").write_bytes(packed({"a": np.zeros(3, np.float32)}))

    assert find_item(tmp_path / "weights.npz") == epath.Path(tmp_path / "weights.npz")


def test_an_item_of_orbax_beside_archives_is_what_its_directory_means(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "run" / "100" / "default", {"a": np.zeros(3, np.float32)})
    (tmp_path / "run" / "evaluation.npz").write_bytes(packed({"a": np.zeros(3, np.float32)}))

    assert find_item(tmp_path / "run") == epath.Path(tmp_path / "run" / "100" / "default")


def test_a_handler_with_type_handlers_of_its_own_leaves_archives_to_this_library(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "x.npz").write_bytes(packed({"a": np.arange(3, dtype=np.float32)}))
    checkpoint = read_metadata(tmp_path / "x.npz")

    found = read_arrays(checkpoint, plain_jobs(checkpoint), orbax=ocp.PyTreeCheckpointHandler())

    np.testing.assert_array_equal(found[("a",)], [0, 1, 2])


def test_the_handler_restores_an_archive(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.npz").write_bytes(packed({"a": np.arange(3, dtype=np.float32)}))
    target = {"a": jax.ShapeDtypeStruct((3,), np.float32)}

    # Orbax's own `Checkpointer` takes directories only.
    found = NNXLinenHandler().restore(epath.Path(tmp_path / "x.npz"), args=NNXLinenRestore(target))

    np.testing.assert_array_equal(found["a"], [0, 1, 2])


def test_a_member_that_would_end_behind_the_file_is_damage(tmp_path: pathlib.Path) -> None:
    content = bytearray(packed({"a": np.zeros(3, np.float32)}, "deflated"))
    content[content.index(b"PK\x01\x02") + 21] = 0xFF  # The packed size, as the directory has it.
    (tmp_path / "x.npz").write_bytes(content)

    assert re.search(
        r"a\.npy in RUN/x\.npz is damaged: compress_size is \d+, and the file ends before it does\n",
        said(tmp_path / "x.npz"),
    )


def test_an_archive_of_any_name_is_known_by_its_first_bytes(tmp_path: pathlib.Path) -> None:
    (tmp_path / "weights").write_bytes(packed({"a": np.zeros(3, np.float32)}))

    assert read_metadata(find_item(tmp_path / "weights")).disk_format == "npz"


def test_an_array_of_more_axes_than_there_can_be_is_an_unreadable_leaf(tmp_path: pathlib.Path) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'1,' * 70})}}".encode()
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(4)
    (tmp_path / "x.npz").write_bytes(zipped([("a.npy", member)]))

    with pytest.raises(
        UnreadableLeafError, match="damaged: shape has 70 axes, which is no shape: 64 is the most"
    ):
        restore(tmp_path / "x.npz", {"a": jax.ShapeDtypeStruct((1,) * 70, np.float32)})
