"""A damaged leaf is never taken for a missing one, whatever the policy and the rules."""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import Drop, UnreadableLeafError, restore
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path as Names
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import make_plan
from orbax_nnx_handler.planning.target import flatten_target
from orbax_nnx_handler.planning.verdict.leaf_verdicts import Unreadable


def write(path: Path, tree: Any) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
    return path


def target(name: str, layers: int = 3) -> Any:
    return {"l": {name: jax.ShapeDtypeStruct((layers, 4, 3), jnp.float32)}}


def fresh() -> Any:
    return {"l": {"kernel": jnp.full((3, 4, 3), 9.0)}}


@pytest.mark.parametrize("policy", ["warn", "init", "error"])
@pytest.mark.parametrize(
    "rules",
    [
        [("l_{i}/w", "l_{i}/kernel")],
        [("w", "kernel")],
        [("l_1/w", "l_1/kernel"), ("l_0/w", "l_0/kernel"), ("l_2/w", "l_2/kernel")],
    ],
)
def test_a_damaged_layer_that_a_rule_renames_is_not_filled(tmp_path: Path, policy: Any, rules: Any) -> None:
    path = write(tmp_path / "c", {"params": {f"l_{i}": {"w": jnp.full((4, 3), 5.0)} for i in range(3)}})
    os.truncate(path / "params.l_1.w" / ".zarray", 40)

    with pytest.raises(UnreadableLeafError, match=r"params/l_1/w"):
        restore(path, target("kernel"), policy=policy, init=fresh, renames=rules)


class Model(nnx.Module):
    def __init__(self) -> None:
        self.dense = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(4))


@pytest.mark.parametrize("leaf", ["key", "count"])
def test_damaged_random_state_is_not_begun_anew(tmp_path: Path, leaf: str) -> None:
    path = write(tmp_path / "c", nnx.state(Model()))
    shutil.rmtree(path / f"drop.rngs.{leaf}.value")

    with pytest.raises(UnreadableLeafError, match=f"drop/rngs/{leaf}"):
        restore(path, nnx.eval_shape(Model))


def test_a_damaged_stream_in_another_flaxs_layout_is_not_begun_anew(tmp_path: Path) -> None:
    tree = nnx.to_pure_dict(nnx.state(Model()))
    tree["drop"]["rngs"] = {"default": tree["drop"]["rngs"]}
    path = write(tmp_path / "c", tree)
    shutil.rmtree(path / "drop.rngs.default.key")

    with pytest.raises(UnreadableLeafError, match="drop/rngs/default/key"):
        restore(path, nnx.eval_shape(Model))


def test_what_is_damaged_and_not_wanted_does_not_matter(tmp_path: Path) -> None:
    tree = {"params": {"l": {"kernel": jnp.ones((3, 4, 3))}, "other": jnp.ones(3)}}
    path = write(tmp_path / "c", tree)
    shutil.rmtree(path / "params.other")

    assert restore(path, target("kernel"))["l"]["kernel"].sum() == 36


@pytest.mark.parametrize("policy", ["warn", "init", "error"])
@pytest.mark.parametrize("kind", ["lost", "damaged"])
def test_a_wanted_leaf_that_a_rule_leaves_behind_is_not_missing_if_it_is_damaged(
    policy: Any, kind: str
) -> None:
    path: Names = ("params", "l", "kernel")
    stored = {name: StoredLeaf(path=name, shape=(3, 4, 3), dtype=np.dtype("f")) for name in (path, OTHER)}
    leaves = stored if kind == "damaged" else {OTHER: stored[OTHER]}
    rules = [Drop("l/kernel", "it is damaged")]
    options = RestoreOptions.of(policy=policy, init=fresh, unexpected="ignore", renames=rules)
    broken = Unreadable(**{kind: {path: "no bytes"}})

    with pytest.raises(UnreadableLeafError, match="params/l/kernel"):
        make_plan(flatten_target(target("kernel")), leaves, options, broken=broken).check()

    unwanted = {"other": jax.ShapeDtypeStruct((3, 4, 3), jnp.float32)}
    make_plan(flatten_target(unwanted), leaves, options, broken=broken).check()


@pytest.mark.parametrize("policy", ["warn", "init", "error"])
@pytest.mark.parametrize("shape", [(3, 4, 3), ()])
def test_a_chunk_that_is_gone_is_not_missing_though_a_rule_leaves_its_leaf_behind(
    tmp_path: Path, policy: Any, shape: tuple[int, ...]
) -> None:
    path = write(tmp_path / "c", {"params": {"l": {"kernel": jnp.ones(shape)}, "other": jnp.ones(3)}})
    wanted = {"l": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}, "other": jnp.zeros(3)}
    rules = [Drop("l/kernel", "it is damaged")]
    options = {"policy": policy, "init": lambda: {"l": {"kernel": jnp.zeros(shape)}, "other": jnp.zeros(3)}}
    if policy == "init":  # What is whole may be left behind.
        assert restore(path, wanted, renames=rules, **options)["other"].sum() == 3
    (chunk,) = [file for file in (path / "params.l.kernel").iterdir() if file.name[0] != "."]
    chunk.unlink()

    with pytest.raises(UnreadableLeafError, match="params/l/kernel"):
        restore(path, wanted, renames=rules, **options)


OTHER: Names = ("params", "other")
