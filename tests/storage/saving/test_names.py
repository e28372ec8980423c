"""No two leaves have one name on disk, and none has a name that cannot be read back."""

import jax.numpy as jnp
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

from orbax_nnx_handler import (
    AmbiguousMappingError,
    NNXLinenHandler,
    NNXLinenSave,
    RestoreError,
    UnreadableLeafError,
    cli,
    from_linen,
    plan_restore,
    restore,
    save,
)

ONE, OTHER = np.float32([1, 2]), np.float32([3, 4])


def state(tree: dict) -> nnx.State:
    return nnx.State(
        {
            key: state(value) if isinstance(value, dict) else nnx.Param(jnp.asarray(value))
            for key, value in tree.items()
        }
    )


@pytest.mark.parametrize(
    ("tree", "keys", "place"),
    [
        ({"a.b": ONE, "a": {"b": OTHER}}, ("'a.b'", "'a', 'b'"), "params.a.b"),
        ({"x": {"a.b": {"c": ONE}, "a": {"b.c": OTHER}}}, ("'a.b', 'c'", "'a', 'b.c'"), "params.x.a.b.c"),
        ({"a/b": ONE, "a": {"b": OTHER}}, ("'a/b'", "'a', 'b'"), "params/a/b"),
    ],
)
def test_two_leaves_of_one_name_are_refused_before_anything_is_written(tree, keys, place, tmp_path) -> None:
    with pytest.raises(RestoreError, match="would both be stored at") as caught:
        save(tmp_path / "out", state(tree))

    assert all(key in str(caught.value) for key in (*keys, place))
    assert len(caught.value.paths) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["a/../b", "x/", "a//b", "/"])
def test_a_name_that_cannot_be_read_back_is_refused(key, tmp_path) -> None:
    with pytest.raises(RestoreError, match="no name inside a checkpoint"):
        save(tmp_path / "out", state({key: ONE}))

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["a\\b", "\\", "..\\x", "a.__lock", "ß" * 128])
def test_a_name_that_no_directory_can_have_is_refused_without_a_database(key, tmp_path) -> None:
    given = state({key: ONE})
    refused = pytest.raises(RestoreError, match=r"hint: save with use_ocdbt=True")
    with ocp.Checkpointer(NNXLinenHandler(use_ocdbt=False)) as checkpointer, refused:
        checkpointer.save(tmp_path / "out", args=NNXLinenSave(given))
    # Orbax's checkpointer notes when a save begins.
    assert {found.name for found in tmp_path.rglob("*") if found.is_file()} <= {"_CHECKPOINT_METADATA"}
    assert not (tmp_path / "out").exists()

    with ocp.Checkpointer(NNXLinenHandler(use_ocdbt=True)) as checkpointer:
        checkpointer.save(tmp_path / "as_hinted", args=NNXLinenSave(given))
    np.testing.assert_array_equal(restore(tmp_path / "as_hinted", given)[key].get_value(), ONE)


@pytest.mark.parametrize(
    "tree",
    [
        {"a.b": ONE, "a": {"c": OTHER}},
        {"a": ONE, "a.b": OTHER},
        {"a": ONE, "a/b": OTHER},
        {"a.b/c": ONE, "a": {"b": {"c": OTHER}}},
        {"": ONE, "..": OTHER},
    ],
)
def test_names_that_only_look_alike_come_back(tree, tmp_path) -> None:
    save(tmp_path / "out", state(tree))

    found = restore(tmp_path / "out", state(tree))

    for path, leaf in nnx.to_flat_state(state(tree)):
        np.testing.assert_array_equal(dict(nnx.to_flat_state(found))[path].get_value(), leaf.get_value())


def test_leaves_of_a_tree_that_share_an_array_are_unreadable(tmp_path) -> None:
    ocp.PyTreeCheckpointer().save(tmp_path / "in", {"params": {"a.b": ONE, "a": {"b": OTHER}, "c": ONE}})

    with pytest.raises(UnreadableLeafError, match=r"2 leaves have one array, 'params\.a\.b'"):
        restore(tmp_path / "in", state({"a.b": ONE, "a": {"b": OTHER}, "c": ONE}))
    with pytest.raises(
        UnreadableLeafError, match=r"hint: Orbax joins the keys of a path by dots, and kept one"
    ):
        restore(tmp_path / "in", state({"a": {"b": OTHER}}), unexpected="ignore")
    plan = plan_restore(tmp_path / "in", state({"c": ONE}), unexpected="ignore")

    assert list(plan.restored) == [("c",)]


def test_two_keys_that_are_spelled_alike_are_shown_with_the_way_out() -> None:
    stored = {"d/kernel": ONE, "d": {"kernel": OTHER}}
    target = state({"d": {"kernel": OTHER}})

    with pytest.raises(AmbiguousMappingError) as caught:
        from_linen({"params": stored}, target)

    (hint,) = caught.value.hints
    assert hint.words == (
        "params/d/kernel is stored at several keys, ('params', 'd', 'kernel') and ('params', 'd/kernel'), "
        "and no rule tells which is meant: take the others out of the tree, or call them otherwise."
    )
    del stored["d/kernel"]
    np.testing.assert_array_equal(from_linen({"params": stored}, target)["d"]["kernel"].get_value(), OTHER)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"..": 2, "/": {"": 3}}, "no name inside a checkpoint"),
        ({"a": {"b": ONE}, "a.b": OTHER}, "would both be stored at 'a.b'"),
    ],
)
def test_convert_refuses_such_names_in_one_error(tree, said, tmp_path, capsys) -> None:
    packed = serialization.msgpack_serialize(tree) if "a" in tree else msgpack.packb(tree)
    (tmp_path / "checkpoint_3").write_bytes(packed)

    status = cli.main(["convert", str(tmp_path / "checkpoint_3"), str(tmp_path / "out")])

    assert status == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize(
    "value",
    [
        jnp.zeros((0, 3)),
        jnp.zeros((2, 1), "uint4"),
        np.zeros(2, "datetime64[s]"),
        np.array(["a"]),
        np.array([{}], dtype=object),
        np.zeros(2, np.longdouble),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}",
)
def test_arrays_that_no_program_can_store_are_named_before_anything_is_written(
    value, use_ocdbt, tmp_path
) -> None:
    given = nnx.State({"a": {"w": nnx.Param(value)}, "b": nnx.Param(jnp.ones(2))})
    with ocp.Checkpointer(NNXLinenHandler(use_ocdbt=use_ocdbt)) as checkpointer:
        with pytest.raises(RestoreError, match="1 leaf that Orbax cannot store") as caught:
            checkpointer.save(tmp_path / "out", args=NNXLinenSave(given))
        assert f"a/w   {value.shape} {value.dtype}" in str(caught.value)
        assert not (tmp_path / "out").exists()

        checkpointer.save(tmp_path / "as_hinted", args=NNXLinenSave(nnx.State({"b": given["b"]})))
    np.testing.assert_array_equal(restore(tmp_path / "as_hinted", {"b": given["b"]})["b"].get_value(), [1, 1])
