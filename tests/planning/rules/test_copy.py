"""One stored leaf that two wanted leaves are: a tied embedding and a head of its own, there and back."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from orbax_nnx_handler import (
    AmbiguousMappingError,
    Copy,
    Drop,
    RestoreError,
    RuleError,
    Split,
    Transpose,
    UnusedRuleError,
    invert,
    plan_restore,
    restore,
    save,
    to_linen,
)

WORDS, WIDTH = 7, 4
TOKENS = np.array([[0, 3, 6], [1, 1, 5]])
RULES = (Copy("embed/embedding", "head/kernel"), Transpose("head/kernel", (1, 0)))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(WORDS, WIDTH, name="embed")
        return embed.attend(nn.Dense(WIDTH, name="up")(embed(tokens)))


class Model(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, WORDS, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.head(self.up(self.embed(tokens)))


class Train(nnx.Module):
    def __init__(self) -> None:
        self.model = Model()
        self.optimizer = nnx.Optimizer(self.model, optax.adam(1e-2), wrt=nnx.Param)


@pytest.fixture(scope="module")
def state() -> TrainState:
    model = Tied()
    params = model.init(jax.random.key(0), TOKENS)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-2))
    grads = jax.grad(lambda p: jnp.sum(model.apply({"params": p}, TOKENS) ** 2))(params)
    # A Python number, and NumPy's, would be stored in 64 bits.
    return state.apply_gradients(grads=grads).replace(step=jnp.int32(1))


@pytest.fixture
def path(state: TrainState, tmp_path: Path) -> Path:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", state)
    return tmp_path / "c"


def read(path: Path) -> dict[str, np.ndarray]:
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(path)
    return {
        jax.tree_util.keystr(keys): np.asarray(x) for keys, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert sorted(one) == sorted(other)
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
        assert value.dtype == other[name].dtype


def test_the_head_computes_what_the_tied_program_computes(path: Path, state: TrainState) -> None:
    model = restore(path, nnx.eval_shape(Model), renames=RULES)

    np.testing.assert_array_equal(model.head.kernel[...], np.asarray(state.params["embed"]["embedding"]).T)
    np.testing.assert_array_equal(model.embed.embedding[...], state.params["embed"]["embedding"])
    np.testing.assert_allclose(
        model(TOKENS), state.apply_fn({"params": state.params}, TOKENS), rtol=1e-5, atol=1e-6
    )


def test_moments_follow_on_both_sides(path: Path, state: TrainState) -> None:
    train = restore(path, nnx.eval_shape(Train), renames=RULES, unexpected="error")

    moments = train.optimizer.opt_state[0]
    for slot in ("mu", "nu"):
        stored = np.asarray(getattr(state.opt_state[0], slot)["embed"]["embedding"])
        np.testing.assert_array_equal(getattr(moments, slot)["embed"]["embedding"][...], stored)
        np.testing.assert_array_equal(getattr(moments, slot)["head"]["kernel"][...], stored.T)


@pytest.mark.parametrize("by", ["rules", "plan"])
def test_it_saves_back_as_the_one_leaf_that_it_was(path: Path, tmp_path: Path, by: str) -> None:
    train = restore(path, nnx.eval_shape(Train), renames=RULES)
    undone: Any = RULES if by == "rules" else plan_restore(path, nnx.eval_shape(Train), renames=RULES)

    save(tmp_path / "back", train, renames=undone)

    assert_same(read(tmp_path / "back"), read(path))


@pytest.mark.parametrize("by", ["rules", "plan"])
@pytest.mark.parametrize("part", ["weight", "moment"])
def test_it_is_not_saved_once_the_two_differ(path: Path, tmp_path: Path, by: str, part: str) -> None:
    train = restore(path, nnx.eval_shape(Train), renames=RULES)
    moments = train.optimizer.opt_state[0].mu
    leaf = train.model.head.kernel if part == "weight" else moments["head"]["kernel"]
    leaf.set_value(leaf[...].at[0, 0].add(1e-3))
    undone: Any = RULES if by == "rules" else plan_restore(path, nnx.eval_shape(Train), renames=RULES)

    with pytest.raises(RuleError) as raised:
        save(tmp_path / "back", train, renames=undone)

    said = str(raised.value)
    assert said.startswith(
        "the rules or the plan say that 1 leaf is a copy of another, and the values differ:\n"
    )
    assert "head/kernel" in said
    assert not (tmp_path / "back").exists()
    # The hint, followed.
    save(tmp_path / "own", train)
    again = restore(tmp_path / "own", nnx.eval_shape(Train))
    for have, want in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(train)), strict=True):
        np.testing.assert_array_equal(have, want)


def test_not_a_number_equals_itself_in_a_copy(path: Path) -> None:
    model = restore(path, nnx.eval_shape(Model), renames=RULES)
    model.embed.embedding.set_value(model.embed.embedding[...].at[2, 1].set(jnp.nan))
    model.head.kernel.set_value(model.head.kernel[...].at[1, 2].set(jnp.nan))

    tree = to_linen(model, renames=RULES)

    assert sorted(tree["params"]) == ["embed", "up"]


def test_a_copy_may_be_split_and_have_another_dtype(tmp_path: Path) -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3) / 7
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"params": {"table": table}})
    target = {
        "table": jax.ShapeDtypeStruct((4, 3), np.float32),
        "left": jax.ShapeDtypeStruct((1, 3), jnp.bfloat16),
        "right": jax.ShapeDtypeStruct((3, 3), jnp.bfloat16),
    }
    rules = [Copy("table", "both"), Split("both", ("left", "right"), axis=0, sizes=(1, 3))]

    found = restore(tmp_path / "c", target, renames=rules)

    np.testing.assert_array_equal(found["table"], table)
    np.testing.assert_array_equal(found["left"], table[:1].astype(jnp.bfloat16))
    np.testing.assert_array_equal(found["right"], table[1:].astype(jnp.bfloat16))


def test_without_the_rule_one_stored_leaf_is_never_two(path: Path) -> None:
    for rules in ([("embed/embedding", "head/kernel"), Transpose("head/kernel", (1, 0))], []):
        with pytest.raises(RestoreError):
            restore(path, nnx.eval_shape(Model), renames=rules)


def test_a_copy_that_nobody_wants_is_an_error(path: Path) -> None:
    with pytest.raises(UnusedRuleError, match=r"Copy\(pattern='up/kernel', into='nowhere'\)"):
        restore(path, nnx.eval_shape(Model), renames=[*RULES, Copy("up/kernel", "nowhere")])


def test_a_copy_onto_a_stored_name_is_two_claims(path: Path) -> None:
    with pytest.raises(AmbiguousMappingError, match="claimed by several"):
        restore(path, nnx.eval_shape(Model), renames=[*RULES, Copy("up/bias", "up/kernel")])


def test_its_inverse_leaves_the_copy_behind() -> None:
    assert invert(RULES) == (
        Transpose("head/kernel", (1, 0)),
        Drop("head/kernel", "a copy of embed/embedding"),
    )


@pytest.mark.parametrize("given", [("", "a"), ("a", ""), ("a", "a"), ("a", "{i}")])
def test_a_copy_without_a_meaning_cannot_be_made(given: tuple[str, str]) -> None:
    with pytest.raises(RuleError):
        Copy(*given)
