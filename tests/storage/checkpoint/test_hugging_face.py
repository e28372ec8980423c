"""Directories of Hugging Face's libraries: every form, and headers of strangers."""

import functools
import json
import pathlib
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx, serialization, traverse_util

from orbax_nnx_handler import NotACheckpointError, UnreadableLeafError, plan_restore, restore, save
from orbax_nnx_handler.cli import main
from orbax_nnx_handler.storage.checkpoint.directories import HUGGING_FACE_FILES
from orbax_nnx_handler.storage.checkpoint.find import find_item
from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.reading.fetch import read_values
from tests.storage.checkpoint import hugging_face
from tests.storage.checkpoint.hugging_face import header_of, write_file
from tests.storage.reading.networks import CountingStore
from tests.storage.stores.fake_store import files_of

_RANDOM = np.random.default_rng(0)


def weights() -> dict[str, Any]:
    def layer() -> dict[str, Any]:
        return {
            "dense": {"kernel": _RANDOM.normal(size=(3, 4)).astype("f"), "bias": np.arange(4, dtype="f")},
            "scale": np.asarray(jnp.asarray([1.5, -2.0], jnp.bfloat16)),
        }

    return {"encoder": {"layer": {"0": layer(), "1": layer()}}, "logit_scale": np.float32(2.5).reshape(())}


TREE = weights()
FORMS: dict[str, Callable[[pathlib.Path, Any], pathlib.Path]] = {
    "msgpack": hugging_face.msgpack,
    "msgpack in parts": functools.partial(hugging_face.msgpack_in_parts, parts=3),
    "safetensors": hugging_face.safetensors,
    "safetensors in parts": functools.partial(hugging_face.safetensors_in_parts, parts=3),
}


@pytest.fixture(params=FORMS)
def directory(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    return FORMS[request.param](tmp_path / "model", TREE)


def abstract(tree: Any, dtype: Any = None) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), tree)


def assert_equal(found: Any, tree: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(np.asarray(one), other)


def test_every_form_restores_the_same_values(directory: pathlib.Path) -> None:
    assert_equal(restore(directory, abstract(TREE)), TREE)


def test_a_part_is_cast_and_sliced(directory: pathlib.Path) -> None:
    wanted = {
        "encoder": {"layer": {"1": {"dense": {"kernel": TREE["encoder"]["layer"]["1"]["dense"]["kernel"]}}}}
    }
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wanted)

    assert_equal(restore(directory, abstract(wanted, jnp.bfloat16), unexpected="ignore"), narrow)


def test_a_module_takes_layers_with_a_rule(directory: pathlib.Path) -> None:
    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.dense = nnx.Linear(3, 4, rngs=rngs)
            self.scale = nnx.Param(jnp.zeros(2, jnp.bfloat16))

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.blocks = nnx.List([Layer(rngs) for _ in range(2)])
            self.logit_scale = nnx.Param(jnp.zeros(()))

    target = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    model = restore(directory, target, renames=[("encoder/layer/{i}", "blocks/{i}")])

    np.testing.assert_array_equal(
        model.blocks[1].dense.kernel[...], TREE["encoder"]["layer"]["1"]["dense"]["kernel"]
    )


def test_the_weights_file_or_the_index_may_be_named_itself(directory: pathlib.Path) -> None:
    names = {file.name for file in directory.iterdir()}
    index = next((name for name in names if name.endswith(".index.json")), None)
    file = directory / (index or next(name for name in names if name != "config.json"))

    assert_equal(restore(file, abstract(TREE)), TREE)


def test_flax_s_own_file_is_taken_before_pytorch_s(tmp_path: pathlib.Path) -> None:
    folder = hugging_face.msgpack(tmp_path / "both", TREE)
    write_file(folder / "model.safetensors", header_of({}), {})

    assert read_metadata(folder).disk_format == "msgpack"


def test_tree_shows_the_configuration(directory: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tree", str(directory)]) == 0
    shown = capsys.readouterr().out

    has_config = (directory / "config.json").exists()
    line = "config.json   model_type='gpt2', architectures=['GPT2LMHeadModel'], n_layer=2, eps=1e-05"
    assert (line in shown) == has_config
    assert "encoder/layer/{0..1}/dense/kernel" in shown


def test_a_configuration_that_is_damaged_or_hostile_keeps_nobody(tmp_path: pathlib.Path, capsys: Any) -> None:
    folder = hugging_face.safetensors(tmp_path / "model", TREE)
    for content in (b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"model_type": "\\u001b[2J", "n": 1e999}'):
        (folder / "config.json").write_bytes(content)
        assert main(["tree", str(folder)]) == 0
        assert main(["tree", str(folder), "--json"]) == 0
        assert "\x1b" not in capsys.readouterr().out


def test_convert_and_diff_take_a_directory(directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    there = tmp_path / "there"

    assert main(["convert", str(directory), str(there)]) == 0
    assert main(["diff", str(directory), str(there), "--values"]) == 0


@pytest.mark.parametrize("by", ["rules", "plan"])
def test_saved_back_under_the_plan_the_weights_lie_at_the_root_again(tmp_path: pathlib.Path, by: str) -> None:
    folder = hugging_face.msgpack(
        tmp_path / "model", {"encoder": {"dense": TREE["encoder"]["layer"]["0"]["dense"]}}
    )
    target = nnx.State({"first": {x: nnx.Param(jax.ShapeDtypeStruct(s, "f")) for x, s in SHAPES.items()}})
    rules = [("encoder/dense", "first")]
    plan = plan_restore(folder, target, renames=rules)

    save(tmp_path / "back", restore(folder, target, renames=rules), renames=plan if by == "plan" else rules)

    level = ("params",) if by == "rules" else ()
    assert {*read_metadata(tmp_path / "back").leaves} == {
        (*level, *path) for path in read_metadata(folder).leaves
    }


SHAPES = {"kernel": (3, 4), "bias": (4,)}


def test_only_headers_are_read_for_a_plan(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"w": np.ones((4096, 1024), "f")}
    folder = hugging_face.safetensors(tmp_path / "model", large)

    tracemalloc.start()
    plan = plan_restore(folder, abstract(large))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert plan.fits
    assert peak < large["w"].nbytes / 4


def header(tree: Any = None) -> dict[str, Any]:
    return header_of(hugging_face.flat(tree or TREE, "."))


KERNEL = "encoder.layer.0.dense.kernel"
END = sum(array.nbytes for array in jax.tree.leaves(TREE))

BROKEN_LEAVES: dict[str, tuple[Any, str]] = {
    "a dtype that nobody knows": ({"dtype": "F7"}, "dtype is 'F7'"),
    "a dtype that is a number": ({"dtype": 3}, "dtype is 3"),
    "a shape that is a text": ({"shape": "(3, 4)"}, "where a list should be"),
    "a length below zero": ({"shape": [-3, -4]}, "which is no shape"),
    "a length that is true": ({"shape": [True, 12]}, "which is no shape"),
    "too many axes": ({"shape": [1] * 65}, "which is no shape"),
    "a length beyond all memory": ({"shape": [2**62, 4]}, "takes 73786976294838206464"),
    "offsets the wrong way round": ({"data_offsets": [48, 0]}, "which is no begin and end"),
    "one offset": ({"data_offsets": [0]}, "which is no begin and end"),
    "offsets below zero": ({"data_offsets": [-48, 0]}, "which is no shape"),
    "fewer bytes than the shape takes": (
        {"data_offsets": [0, 44]},
        "has 44 bytes for it where (3, 4) float32",
    ),
    "bytes behind the end of the file": ({"data_offsets": [END, END + 48]}, "ends before it does"),
    "bytes far behind the end": ({"data_offsets": [2**60, 2**60 + 48]}, "ends before it does"),
    "no object": (None, "where an object should be"),
}


@pytest.mark.parametrize("name", BROKEN_LEAVES)
def test_what_a_header_says_wrongly_of_one_array_is_an_unreadable_leaf(
    name: str, tmp_path: pathlib.Path
) -> None:
    change, words = BROKEN_LEAVES[name]
    fields = header()
    fields[KERNEL] = None if change is None else {**fields[KERNEL], **change}
    folder = tmp_path / "model"
    folder.mkdir()
    write_file(folder / "model.safetensors", fields, hugging_face.flat(TREE, "."))

    tracemalloc.start()
    with pytest.raises(UnreadableLeafError) as raised:
        restore(folder, abstract(TREE))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert "encoder/layer/0/dense/kernel" in str(raised.value)
    assert words in str(raised.value)
    assert peak < 50e6


def test_two_arrays_that_share_bytes_are_both_damaged(tmp_path: pathlib.Path) -> None:
    fields = header()
    other = "encoder.layer.1.dense.kernel"
    fields[other]["data_offsets"] = fields[KERNEL]["data_offsets"]
    folder = tmp_path / "model"
    folder.mkdir()
    write_file(folder / "model.safetensors", fields, hugging_face.flat(TREE, "."))

    damaged = read_metadata(folder).damaged

    assert damaged == {
        tuple(name.split(".")): "its bytes are another array's too" for name in (KERNEL, other)
    }


WHOLE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it has 0 bytes"),
    "half a length": (b"\1\0\0", "it has 3 bytes"),
    "a header longer than the file": (struct.pack("<Q", 1 << 40) + b"{}", "would have 1099511627776 bytes"),
    "a header that is no JSON": (struct.pack("<Q", 4) + b"{{{{", "its header is no JSON"),
    "a header that is a list": (struct.pack("<Q", 2) + b"[]", "its header is no JSON object"),
    "a header nested without end": (struct.pack("<Q", 200_000) + b"[" * 200_000, "its header is no JSON"),
    "a name twice": (struct.pack("<Q", 16) + b'{"a": 1, "a": 2}', "a name stands there twice"),
    "no array": (struct.pack("<Q", 2) + b"{}", "holds no array"),
    "a pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0" + b"cos\nsystem\n" * 3, "its header would have"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_no_file_of_safetensors_is_refused(name: str, tmp_path: pathlib.Path) -> None:
    content, words = WHOLE[name]
    (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(NotACheckpointError, match=words):
        read_metadata(find_item(tmp_path))


def test_an_array_and_a_subtree_of_one_name_are_refused(tmp_path: pathlib.Path) -> None:
    arrays = {"a": np.ones(2, "f"), "a.b": np.ones(2, "f")}
    write_file(tmp_path / "model.safetensors", header_of(arrays), arrays)

    with pytest.raises(NotACheckpointError, match=r"an array and a subtree under one name:\n  a\n"):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "../secret.safetensors"}}, "weight_map names '../secret.safetensors'"),
        ({"weight_map": {"a": "/etc/passwd"}}, "weight_map names '/etc/passwd'"),
        ({"weight_map": {"a": ".."}}, "weight_map names '..'"),
        ({"weight_map": {}}, "weight_map names no file"),
        ({"weight_map": {"a": 3}}, "a is 3"),
        ({"weight_map": ["a"]}, "weight_map is"),
        ({}, "weight_map is absent"),
        ({"weight_map": {"a": "absent-1.safetensors"}}, "names, 1 cannot be found:\n  absent-1"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "flax_model.msgpack.index.json"])
def test_an_index_names_files_beside_it_and_no_others(
    index: Any, words: str, name: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_text(json.dumps(index))

    with pytest.raises(NotACheckpointError) as raised:
        read_metadata(find_item(folder))

    assert words in str(raised.value)


def test_one_path_in_two_parts_is_refused(tmp_path: pathlib.Path) -> None:
    folder = hugging_face.msgpack_in_parts(tmp_path / "model", TREE)
    first, second = sorted(folder.glob("*.msgpack"))
    second.write_bytes(first.read_bytes())

    with pytest.raises(NotACheckpointError, match="holds several arrays under one name:\n"):
        read_metadata(folder)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("save", [hugging_face.msgpack_in_parts, hugging_face.safetensors_in_parts])
def test_an_index_that_lost_a_part_is_refused(save: Any, kept: int, tmp_path: pathlib.Path) -> None:
    folder = save(tmp_path / "model", TREE)
    (index,) = folder.glob("*.index.json")
    parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    fields = json.loads(index.read_text())["weight_map"].items()
    index.write_text(json.dumps({"weight_map": {k: part for k, part in fields if part == parts[kept]}}))

    with pytest.raises(NotACheckpointError) as raised:
        plan_restore(folder, TREE, policy="init")

    assert f"{index} does not name {parts[1 - kept]}, of which the names of the other parts" in str(
        raised.value
    )


BIAS = ("encoder", "layer", "1", "dense", "bias")
TWO_PARTS: dict[str, tuple[Callable[[pathlib.Path, Any], pathlib.Path], str]] = {
    "flax_model.msgpack.index.json": (hugging_face.msgpack_in_parts, "/"),
    "model.safetensors.index.json": (hugging_face.safetensors_in_parts, "."),
}
CONTRADICTIONS = {
    "absent": "{index} says that it lies in {said}, and it does not",
    "elsewhere": "{index} says that it lies in {said}, and it lies in {held}",
    "unnamed": "{held} holds it, and {index} does not name it",
}


@pytest.mark.parametrize("policy", ["error", "warn", "init"])
@pytest.mark.parametrize("case", CONTRADICTIONS)
@pytest.mark.parametrize("name", TWO_PARTS)
def test_a_leaf_that_lies_elsewhere_than_the_index_says_is_unreadable_and_never_filled(
    name: str, case: str, policy: Any, tmp_path: pathlib.Path
) -> None:
    write, separator = TWO_PARTS[name]
    stored = traverse_util.flatten_dict(TREE)
    if case == "absent":
        del stored[BIAS]
    index = write(tmp_path / "model", traverse_util.unflatten_dict(stored)) / name
    where = json.loads(index.read_text())["weight_map"]
    held = where.pop(separator.join(BIAS), None)
    said = next(part for part in where.values() if part != held)
    if case != "unnamed":
        where[separator.join(BIAS)] = said
    index.write_text(json.dumps({"weight_map": where}))

    with pytest.raises(UnreadableLeafError) as raised:
        restore(index.parent, abstract(TREE), policy=policy, init=lambda: TREE)

    assert "/".join(BIAS) in str(raised.value)
    assert CONTRADICTIONS[case].format(index=index, said=said, held=held) in str(raised.value)


def test_a_text_where_the_index_says_that_an_array_lies_is_not_missing(tmp_path: pathlib.Path) -> None:
    folder = hugging_face.msgpack_in_parts(tmp_path / "model", {"a": np.ones(2, "f"), "b": np.ones(2, "f")})
    part = min(folder.glob("*.msgpack"))
    part.write_bytes(serialization.msgpack_serialize({"a": "text"}))

    with pytest.raises(UnreadableLeafError, match=f"lies in {part.name}, and it does not"):
        restore(
            folder,
            {"a": jax.ShapeDtypeStruct((2,), "f"), "b": jax.ShapeDtypeStruct((2,), "f")},
            policy="warn",
        )


@pytest.mark.parametrize("name", TWO_PARTS)
def test_parts_without_their_index_lead_to_it_and_to_no_model_beside_or_below(
    name: str, tmp_path: pathlib.Path
) -> None:
    for other in ("another", "mine/original"):
        hugging_face.msgpack(tmp_path / other, TREE)
    folder = tmp_path / "mine"
    write, _ = TWO_PARTS[name]
    for file in write(tmp_path / "whole", TREE).iterdir():
        file.rename(folder / file.name)
    index, part = folder / name, next(file for file in folder.iterdir() if "-of-" in file.name)

    with pytest.raises(
        NotACheckpointError, match=rf"one of several parts of weights\.\nhint: pass {index}\."
    ):
        restore(part, abstract(TREE))
    index.unlink()
    for path in (folder, part):
        with pytest.raises(NotACheckpointError) as raised:
            restore(path, abstract(TREE), policy="warn")

        assert f"hint: download or copy {name} into {folder} too." in str(raised.value)
        assert str(tmp_path / "another") not in str(raised.value)


def test_weights_of_another_name_are_named_and_no_model_beside_them(tmp_path: pathlib.Path) -> None:
    hugging_face.msgpack(tmp_path / "another", TREE)
    folder = hugging_face.safetensors(tmp_path / "mine", TREE)
    file = (folder / "model.safetensors").rename(folder / "mine.safetensors")

    with pytest.raises(NotACheckpointError, match=rf"\nhint: pass {file}\.$"):
        restore(folder, abstract(TREE))
    assert_equal(restore(file, abstract(TREE)), TREE)

    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(NotACheckpointError) as raised:
        restore(folder, abstract(TREE))
    assert str(tmp_path / "another") not in str(raised.value)


def test_a_file_cut_short_says_which_leaves_are_lost(tmp_path: pathlib.Path) -> None:
    folder = hugging_face.safetensors(tmp_path / "model", TREE)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-6])

    assert set(read_metadata(folder).damaged.values()) == {"model.safetensors ends before it does"}


def test_bytes_that_no_array_takes_are_no_whole_file(tmp_path: pathlib.Path) -> None:
    for name, write in FORMS.items():
        file = next(file for file in write(tmp_path / name, TREE).iterdir() if "json" not in file.name)
        content = file.read_bytes()
        places = (len(content),) if "msgpack" in name else (len(content), len(content) - 8)
        for place in places:
            file.write_bytes(content[:place] + b"\1" * 16 + content[place:])

            with pytest.raises(NotACheckpointError) as raised:
                plan_restore(file.parent, abstract(TREE), policy="init")

            what = (
                "holds 16 bytes behind the tree in it."
                if "msgpack" in name
                else ("is no whole file of safetensors: no array takes 16 of the bytes behind its header.")
            )
            hint = "copy it again from where it was written: a file is damaged, or was not copied whole."
            assert str(raised.value) == f"{file} {what}\nhint: {hint}"


@pytest.mark.parametrize("name", TWO_PARTS)
def test_a_leaf_that_an_index_alone_names_and_nobody_wants_is_said(
    name: str, tmp_path: pathlib.Path, caplog: Any
) -> None:
    write, separator = TWO_PARTS[name]
    index = write(tmp_path / "model", TREE) / name
    fields = json.loads(index.read_text())
    where = fields["weight_map"] | {
        separator.join(("old", "head")): next(iter(fields["weight_map"].values()))
    }
    index.write_text(json.dumps({"weight_map": where}))

    assert_equal(restore(index.parent, abstract(TREE)), TREE)

    words = f"{index} and its parts do not agree about {{}}: download or copy the directory again."
    said = {record.getMessage() for record in caplog.records if record.levelname == "WARNING"}
    assert said == {words.format(separator.join(("old", "head")))}


def test_arrays_without_an_element_are_read(tmp_path: pathlib.Path) -> None:
    tree = {"a": np.ones((0, 3), "f"), "b": np.ones((2,), "f"), "c": np.ones((0,), "f")}
    folder = hugging_face.safetensors(tmp_path / "model", tree)

    assert_equal(restore(folder, abstract(tree)), tree)


@pytest.mark.parametrize("version", [b"1", b"2"])
def test_data_of_another_version_than_the_header_is_an_error(tmp_path: pathlib.Path, version: bytes) -> None:
    hugging_face.safetensors(tmp_path / "model", TREE)
    files, bucket = files_of(tmp_path)
    file = "gs://bucket/model/model.safetensors"
    bucket.versions[file] = b"1"
    checkpoint = read_metadata(epath.Path("gs://bucket/model"), files)
    paths = list(checkpoint.arrays)

    with CountingStore(tmp_path / "model") as store:
        store.version = lambda _key, _start: version
        checkpoint.arrays[paths[0]].store.__dict__["base"] = store
        if version == b"1":
            assert len(read_values(checkpoint, paths)) == len(paths)
            return
        with pytest.raises(UnreadableLeafError) as raised:
            read_values(checkpoint, paths)

    assert "cannot be read: the object was written to while it was read" in str(raised.value)
    assert f"file: {file}" in str(raised.value)


@pytest.mark.parametrize(
    ("first", "others"),
    [
        ("msgpack", ["msgpack in parts"]),
        ("safetensors", ["safetensors in parts"]),
        ("msgpack", ["safetensors"]),
        ("msgpack in parts", ["safetensors", "safetensors in parts"]),
    ],
)
def test_of_several_forms_one_is_taken_and_the_others_are_named_to_be_read(
    tmp_path: pathlib.Path, caplog: Any, first: str, others: list[str]
) -> None:
    folder, names = FORMS[first](tmp_path / "model", TREE), list[str]()
    taken = next(file.name for file in folder.iterdir() if "msgpack" in file.name or "safe" in file.name)
    taken = taken if " " not in first else "flax_model.msgpack.index.json"
    other = jax.tree.map(lambda leaf: leaf + 1, TREE)
    for form in others:
        made = FORMS[form](tmp_path / form, other)
        names += sorted(file.name for file in made.iterdir() if file.name in HUGGING_FACE_FILES)
        for file in made.iterdir():
            file.rename(folder / file.name)

    assert_equal(restore(folder, abstract(TREE)), TREE)

    (warned,) = {x for record in caplog.records if "which is read" in (x := record.getMessage())}
    words, _, paths = warned.partition("not read: name ")
    assert words.startswith(f"{folder} holds {taken}, which is read, and beside it the same weights")
    assert f"in {' and '.join(names)}, " in words
    for path in paths.removesuffix(" to read them").split(" or "):
        assert_equal(restore(path, abstract(TREE)), other)


@pytest.mark.parametrize("form", ["msgpack in parts", "safetensors in parts"])
@pytest.mark.parametrize("more", [0, 7])
def test_an_index_that_counts_other_bytes_is_said(
    tmp_path: pathlib.Path, caplog: Any, form: str, more: int
) -> None:
    folder = FORMS[form](tmp_path / "model", TREE)
    (index,) = folder.glob("*.index.json")
    fields = json.loads(index.read_text())
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(TREE))
    index.write_text(json.dumps(fields | {"metadata": {"total_size": held + more}}))

    assert_equal(restore(folder, abstract(TREE)), TREE)

    said = {record.getMessage() for record in caplog.records if record.levelname == "WARNING"}
    assert said == (
        {f"{index} says that its parts hold {held + 7} bytes, and they hold {held}"} if more else set()
    )
