"""A leaf that cannot be read is no missing leaf, whatever the policy, and under rules for single leaves."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from etils import epath
from flax import nnx

from orbax_nnx_handler import (
    Cast,
    Copy,
    Fuse,
    Rename,
    Scale,
    Split,
    StackLayers,
    Transpose,
    UnreadableLeafError,
    cli,
    from_linen,
    restore,
)
from orbax_nnx_handler.storage.checkpoint.find import find_item
from tests.storage.checkpoints import DiskFormat, save

FILES = DiskFormat(False, False, False)
POLICIES = ("error", "warn", "init")


def damage(item, leaf, how):
    """Cuts the description of an array short, or takes its bytes away."""
    folder = pathlib.Path(item) / leaf
    if how == "metadata":
        description = folder / ".zarray"
        description.write_bytes(description.read_bytes()[:40])
        return
    for chunk in folder.iterdir():
        if chunk.name != ".zarray":
            shutil.rmtree(chunk) if chunk.is_dir() else chunk.unlink()


def stored():
    layers = {f"l_{at}": {"w": np.full((4, 3), float(at), np.float32)} for at in range(3)}
    gates = {name: np.ones((4, 2), np.float32) for name in "qkv"}
    return {"params": {**layers, "attn": gates, "head": {"kernel": np.ones((4, 3), np.float32)}}}


def shape(*size, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(size, dtype)


UNDER_A_RULE = {
    "nothing": ("head.kernel", [], {"head": {"kernel": shape(4, 3)}}),
    "a name": ("head.kernel", [Rename("head", "out")], {"out": {"kernel": shape(4, 3)}}),
    "another name": ("head.kernel", [("head/kernel", "classifier/w")], {"classifier": {"w": shape(4, 3)}}),
    "Cast": (
        "head.kernel",
        [Cast("head/kernel", "bfloat16")],
        {"head": {"kernel": shape(4, 3, dtype="bfloat16")}},
    ),
    "Scale": ("head.kernel", [Scale("head/kernel", 2.0)], {"head": {"kernel": shape(4, 3)}}),
    "Transpose": ("head.kernel", [Transpose("head/kernel", (1, 0))], {"head": {"kernel": shape(3, 4)}}),
    "Copy": (
        "head.kernel",
        [Copy("head", "tied")],
        {"head": {"kernel": shape(4, 3)}, "tied": {"kernel": shape(4, 3)}},
    ),
    "Fuse": ("attn.k", [Fuse(("attn/q", "attn/k", "attn/v"), "attn/qkv", 1)], {"attn": {"qkv": shape(4, 6)}}),
    "StackLayers": ("l_1.w", [StackLayers("l_{i}/w", "l/w", 0)], {"l": {"w": shape(3, 4, 3)}}),
    "StackLayers of another name": (
        "l_1.w",
        [StackLayers("l_{i}/w", "deep/scale", 0)],
        {"deep": {"scale": shape(3, 4, 3)}},
    ),
    "Split": (
        "head.kernel",
        [Split("head/kernel", ("a/x", "a/y"), 0)],
        {"a": {"x": shape(2, 3), "y": shape(2, 3)}},
    ),
}


@pytest.mark.parametrize("how", ["metadata", "bytes"])
@pytest.mark.parametrize("rule", UNDER_A_RULE)
def test_no_rule_for_it_and_no_policy_makes_it_a_missing_weight(tmp_path, rule, how):
    leaf, rules, target = UNDER_A_RULE[rule]
    path = save(tmp_path / "item", stored(), FILES)
    damage(path, f"params.{leaf}", how)

    for policy in POLICIES:
        fresh = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 9, leaf.dtype), target)
        with pytest.raises(UnreadableLeafError) as raised:
            restore(path, target, policy=policy, renames=rules, init=lambda fresh=fresh: fresh)
        assert ("params", *leaf.split(".")) in raised.value.paths


@pytest.mark.parametrize("rule", UNDER_A_RULE)
def test_where_it_can_be_read_the_rules_restore_it(tmp_path, rule):
    _, rules, target = UNDER_A_RULE[rule]
    path = save(tmp_path / "item", stored(), FILES)

    restore(path, target, policy="warn", renames=rules)


class Noisy(nnx.Module):
    def __init__(self):
        self.out = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.1, rngs=nnx.Rngs(dropout=5))


@pytest.mark.parametrize("leaf", ["key", "count"])
def test_random_state_whose_metadata_cannot_be_read_is_not_made_anew(tmp_path, leaf):
    state = nnx.to_pure_dict(nnx.state(Noisy()))
    state["drop"]["rngs"]["key"] = jax.random.key_data(state["drop"]["rngs"]["key"])
    path = save(tmp_path / "item", state, FILES)
    damage(path, f"drop.rngs.{leaf}", "metadata")

    for policy in POLICIES:
        for target in (nnx.eval_shape(Noisy), Noisy()):
            with pytest.raises(UnreadableLeafError) as raised:
                restore(path, target, policy=policy, init=Noisy)
            assert ("drop", "rngs", leaf) in raised.value.paths


@pytest.mark.parametrize("how", ["metadata", "bytes"])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_nobody_wants_may_be_unreadable(tmp_path, policy, how):
    path = save(tmp_path / "item", stored(), FILES)
    damage(path, "params.attn.k", how)

    found = restore(path, {"head": {"kernel": shape(4, 3)}}, policy=policy)

    assert float(found["head"]["kernel"].sum()) == 12


@pytest.mark.parametrize(
    "name",
    [
        *("6.converting-815", "6.converting-815-old", "6_bak_20240101", "6_bak", "backup-6"),
        *("backup_6", "6-copy"),
        *("ocdbt.process_6", "6.orbax-checkpoint-tmp-77", "6~", "6.old", "step-6", "v6", "0x6", "6 (1)"),
        *(".6", "+6"),
        *("6.0", "\u0666", "6e1", "array_metadatas_6", "-6"),
    ],
)
def test_only_a_managers_own_names_are_steps(tmp_path, name):
    for step in ("4", "5"):
        save(tmp_path / step / "default", {"w": np.full(2, float(step), np.float32)})
    save(tmp_path / name / "default", {"w": np.full(2, -1.0, np.float32)})

    assert find_item(tmp_path) == epath.Path(tmp_path / "5" / "default")
    assert restore(tmp_path, {"w": shape(2)})["w"].tolist() == [5, 5]


def packed(dtype, content):
    return msgpack.ExtType(1, msgpack.packb([[2], dtype, content]))


NO_ARRAYS = {
    "an unknown type": (msgpack.ExtType(77, b"zz"), "a value of msgpack's type 77"),
    "a time": (msgpack.Timestamp(5), "a value of the type Timestamp"),
    "bytes": (b"ab", "a value of the type bytes"),
    "objects": (packed("O", bytes(16)), "values of dtype object"),
    "text": (packed("U2", bytes(16)), "values of dtype <U2"),
    "text of bytes": (packed("S4", b"abcdefgh"), "values of dtype |S4"),
    "raw bytes": (packed("V3", b"abcdef"), "values of dtype |V3"),
    "fields": (packed("f4,f4", bytes(16)), "values of dtype [('f0', '<f4'), ('f1', '<f4')]"),
    "times": (packed("M8[s]", bytes(16)), "values of dtype datetime64[s]"),
    "128 bits": (packed("longdouble", bytes(32)), f"values of dtype {np.dtype('longdouble')}"),
    "complex numbers": (packed("clongdouble", bytes(64)), f"values of dtype {np.dtype('clongdouble')}"),
}


@pytest.mark.parametrize("name", ["flax_model.msgpack", "checkpoint"])
@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_a_value_of_msgpack_that_is_no_array_is_refused_where_it_is_wanted(tmp_path, capsys, kind, name):
    value, what = NO_ARRAYS[kind]
    (tmp_path / name).write_bytes(msgpack.packb({"w": value, "v": packed("float32", bytes(8))}))

    assert restore(tmp_path, {"v": shape(2)})["v"].tolist() == [0, 0]
    for wanted in (shape(2), {"0": shape(), "1": shape(2)}):
        for dtype in (None, "stored"):
            with pytest.raises(UnreadableLeafError) as raised:
                restore(tmp_path, {"v": shape(2), "w": wanted}, policy="warn", dtype=dtype)
            assert raised.value.paths == (("w",),)
            assert what in str(raised.value)
            assert str(tmp_path / name) in str(raised.value)
    assert cli.main(["tree", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["foreign"]["w"].startswith(what)
    assert cli.main(["diff", str(tmp_path), str(tmp_path), "--values", "--json"]) == 1
    assert what in json.loads(capsys.readouterr().out)["error"]["message"]


@pytest.mark.parametrize("dtype", [np.longdouble, np.clongdouble])
@pytest.mark.parametrize("cast", [None, "stored"])
def test_numbers_of_more_bits_than_jax_has_are_refused_wherever_they_lie(tmp_path, dtype, cast):
    np.savez(tmp_path / "a.npz", w=np.ones(2, dtype))

    with pytest.raises(
        UnreadableLeafError, match=rf"w\s+values of the type {np.dtype(dtype)}, which JAX does not have"
    ):
        restore(tmp_path / "a.npz", {"w": shape(2)}, dtype=cast)
    with pytest.raises(UnreadableLeafError, match=f"params/w +values of dtype {np.dtype(dtype)}"):
        from_linen({"params": {"w": np.ones(2, dtype)}}, {"w": shape(2)}, dtype=cast)
