"""DESIGN's tables of policies and of what may be absent, row by row."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orbax_nnx_handler import (
    KeyMismatchError,
    MissingParamError,
    MissingParamRestoreArgs,
    NNXLinenHandler,
    NNXLinenRestore,
    RestoreError,
    RestorePlan,
    ShapeMismatchError,
    UnexpectedParamError,
    UnusedRuleError,
    plan_restore,
    restore,
)
from tests.handler.programs import (
    CLASSES,
    HIDDEN,
    Net,
    abstract_net,
    linen_state,
    make_net,
    save_stock,
    train_target,
)


class WithHead(nnx.Module):
    """The net with a head, a cache and an adapter that no checkpoint of it holds."""

    def __init__(self, rngs: nnx.Rngs):
        self.net = Net(rngs)
        self.head = nnx.Linear(CLASSES, 3, rngs=rngs)
        self.adapter = nnx.LoRA(HIDDEN, 2, CLASSES, rngs=rngs)


def make_with_head() -> WithHead:
    return WithHead(nnx.Rngs(5))


@pytest.fixture
def item(tmp_path):
    return save_stock(tmp_path / "item", linen_state())


HEAD = {("head", "kernel"), ("head", "bias")}
ADAPTER = {("adapter", "lora_a"), ("adapter", "lora_b")}


def test_error_names_every_missing_weight(item) -> None:
    target = nnx.eval_shape(make_with_head)

    with pytest.raises(MissingParamError) as caught:
        restore(item, target)

    assert set(caught.value.paths) == HEAD | ADAPTER
    for text in ("head/kernel", "(4, 3)", "adapter/lora_a", "(16, 2)", "float32"):
        assert text in str(caught.value)


def test_warn_fills_zeros_and_says_so_once(item, caplog) -> None:
    caplog.set_level(logging.WARNING, logger="absl")

    model = restore(item, nnx.eval_shape(make_with_head), policy="warn", unexpected="ignore")

    assert not np.any(model.head.kernel.get_value())
    assert not np.any(model.adapter.lora_a.get_value())
    assert np.all(model.net.up.kernel.get_value())
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([text for text in warnings if "head" in text and "lora_a" in text]) == 1


def test_init_computes_the_values_that_the_model_itself_would_have(item) -> None:
    model = restore(item, nnx.eval_shape(make_with_head), policy="init", init=make_with_head)

    fresh = make_with_head()
    np.testing.assert_array_equal(model.head.kernel.get_value(), fresh.head.kernel.get_value())
    np.testing.assert_array_equal(model.adapter.lora_a.get_value(), fresh.adapter.lora_a.get_value())
    stored = linen_state().params["up"]["kernel"]
    np.testing.assert_array_equal(model.net.up.kernel.get_value(), stored)


def test_init_takes_a_concrete_targets_own_value_and_leaves_the_target_alone(item) -> None:
    target = make_with_head()
    target.head.kernel.set_value(jnp.full((CLASSES, 3), 9.0))
    before = jax.tree.map(
        lambda leaf: np.asarray(jax.random.key_data(leaf)) if _is_key(leaf) else np.array(leaf),
        nnx.state(target),
    )

    model = restore(item, target, policy="init")

    np.testing.assert_array_equal(model.head.kernel.get_value(), np.full((CLASSES, 3), 9.0))
    assert model.head.kernel.get_value() is not target.head.kernel.get_value()
    after = jax.tree.map(
        lambda leaf: np.asarray(jax.random.key_data(leaf)) if _is_key(leaf) else np.array(leaf),
        nnx.state(target),
    )
    jax.tree.map(np.testing.assert_array_equal, before, after)


def _host(module: nnx.Module) -> Any:
    """Returns copies of all values on the host."""

    def copy(leaf: jax.Array) -> Any:
        return np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf)

    return jax.tree.map(copy, nnx.state(module))


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def test_init_without_a_source_is_an_error_that_says_what_to_pass(item) -> None:
    with pytest.raises(MissingParamError, match="init=") as caught:
        restore(item, nnx.eval_shape(make_with_head), policy="init")

    assert set(caught.value.paths) == HEAD | ADAPTER


def test_an_init_that_builds_another_model_is_refused(item) -> None:
    with pytest.raises(RestoreError, match="init does not build"):
        restore(item, nnx.eval_shape(make_with_head), policy="init", init=make_net)


def test_an_init_that_is_the_model_itself_is_said_to_be_no_function(item) -> None:
    with pytest.raises(
        RestoreError, match=r"init is a \w+, not a function\.\nhint: pass the function that builds"
    ):
        restore(item, nnx.eval_shape(make_with_head), policy="init", init=make_with_head())  # pyright: ignore


def test_filters_choose_the_policy_leaf_by_leaf_and_the_first_match_wins(item) -> None:
    policy = {nnx.LoRAParam: "init", nnx.PathContains("head"): "warn", nnx.Param: "error", ...: "error"}

    model = restore(item, nnx.eval_shape(make_with_head), policy=policy, init=make_with_head)

    fresh = make_with_head()
    np.testing.assert_array_equal(model.adapter.lora_a.get_value(), fresh.adapter.lora_a.get_value())
    assert not np.any(model.head.kernel.get_value())


def test_what_no_filter_matches_is_an_error(item) -> None:
    with pytest.raises(MissingParamError) as caught:
        restore(item, nnx.eval_shape(make_with_head), policy={nnx.LoRAParam: "warn"})

    assert set(caught.value.paths) == HEAD


@pytest.mark.parametrize("where", ["restore", "plan", "handler"])
def test_a_filter_that_matches_nothing_is_an_error(item, where: str) -> None:
    policy = {nnx.PathContains("haed"): "init", ...: "error"}
    target = nnx.eval_shape(make_with_head)
    calls = {
        "restore": lambda: restore(item, target, policy=policy),
        "plan": lambda: plan_restore(item, target, policy=policy),
        "handler": lambda: NNXLinenHandler(policy).restore(item, args=NNXLinenRestore(target)),
    }

    with pytest.raises(UnusedRuleError, match="haed"):
        calls[where]()


def test_restore_args_of_a_leaf_override_the_policy(item) -> None:
    target = nnx.state(nnx.eval_shape(make_with_head))
    args = jax.tree.map(lambda _: MissingParamRestoreArgs(policy="warn"), target)

    state = restore(item, target, args)

    assert not np.any(state["head"]["kernel"].get_value())


def test_an_unknown_policy_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="'raise'"):
        NNXLinenHandler("raise")  # type: ignore[arg-type]


def test_filled_weights_are_computed_on_their_own_devices(item, mesh: Mesh) -> None:
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    target = nnx.state(nnx.eval_shape(make_with_head))

    def place(path: Any, leaf: Any) -> Any:
        return (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) if leaf.shape == (4, 3) else leaf
        )

    target = jax.tree_util.tree_map_with_path(place, target)

    for policy in ("warn", "init"):
        state = restore(item, target, policy=policy, init=make_with_head)
        assert state["head"]["kernel"].get_value().sharding.is_equivalent_to(sharding, 2)


def test_random_state_keeps_a_concrete_targets_value(item) -> None:
    target = make_net()

    model = restore(item, target)

    _same_key(model.drop.rngs.key, target.drop.rngs.key)


def test_random_state_comes_from_init_when_the_target_is_abstract(item) -> None:
    model = restore(item, abstract_net(), init=make_net)

    _same_key(model.drop.rngs.key, make_net().drop.rngs.key)


@pytest.mark.parametrize("source", ["target", "init"])
def test_counts_go_on_where_their_stream_is_kept(item, source: str) -> None:
    def used() -> Any:
        net = make_net()
        net.drop.rngs()
        net.drop.rngs()
        return net

    model = restore(item, used()) if source == "target" else restore(item, abstract_net(), init=used)

    assert int(model.drop.rngs.count.get_value()) == 2


def test_init_is_traced_and_never_run(item) -> None:
    seen: list[bool] = []

    def init() -> Any:
        model = make_with_head()
        seen.extend(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(nnx.state(model)))
        return model

    restore(item, nnx.eval_shape(make_with_head), policy="init", init=init)

    assert seen
    assert all(seen)


def _same_key(left: Any, right: Any) -> None:
    bits = [jax.random.key_data(key.get_value()) for key in (left, right)]
    np.testing.assert_array_equal(*bits)


class TwoDropouts(nnx.Module):
    """Two streams; and weights whose names look like random state."""

    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.key = nnx.Linear(2, 2, rngs=rngs)
        self.rngs = nnx.Linear(2, 2, rngs=rngs)
        self.dropout = nnx.Linear(2, 2, rngs=rngs)


def _named_like_random_state() -> dict[str, Any]:
    return {name: {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for name in ("key", "rngs", "dropout")}


def test_derived_keys_differ_by_path_and_counts_are_zero(tmp_path) -> None:
    item = save_stock(tmp_path / "item", {"params": _named_like_random_state()})

    model = restore(item, nnx.eval_shape(lambda: TwoDropouts(nnx.Rngs(0))))
    again = restore(item, nnx.eval_shape(lambda: TwoDropouts(nnx.Rngs(0))))

    first, second = (jax.random.key_data(d.rngs.key.get_value()) for d in (model.first, model.second))
    assert not np.array_equal(first, second)
    assert int(model.first.rngs.count.get_value()) == 0
    _same_key(model.first.rngs.key, again.first.rngs.key)


@pytest.mark.parametrize("name", ["key", "rngs", "dropout"])
def test_a_weight_that_is_called_like_random_state_is_still_a_weight(tmp_path, name: str) -> None:
    weights = {
        other: {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for other in ("key", "rngs", "dropout")
    }
    del weights[name]["kernel"]
    item = save_stock(tmp_path / "item", {"params": weights})

    with pytest.raises(MissingParamError) as caught:
        restore(item, nnx.eval_shape(lambda: TwoDropouts(nnx.Rngs(0))))

    assert caught.value.paths == ((name, "kernel"),)


class Transient(nnx.Module):
    """A weight beside a cache and an intermediate."""

    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.ones(3))
        self.cache = nnx.Cache(jnp.full((2,), 5.0))
        self.seen = nnx.Intermediate(jnp.full((2,), 6.0))


def test_caches_and_intermediates_may_be_absent(tmp_path) -> None:
    item = save_stock(tmp_path / "item", {"params": {"weight": jnp.arange(3.0)}})

    abstract = restore(item, nnx.eval_shape(Transient))
    from_init = restore(item, nnx.eval_shape(Transient), init=Transient)
    from_target = restore(item, Transient())

    for model, cache, seen in ((abstract, 0, 0), (from_init, 5, 6), (from_target, 5, 6)):
        np.testing.assert_array_equal(model.cache.get_value(), np.full(2, cache))
        np.testing.assert_array_equal(model.seen.get_value(), np.full(2, seen))


def test_a_plan_says_how_zeros_in_the_place_of_a_cache_become_what_the_program_computes(tmp_path) -> None:
    item = save_stock(tmp_path / "item", {"params": {"weight": jnp.arange(3.0)}})
    target = nnx.eval_shape(Transient)

    def said(plan: RestorePlan) -> list[str]:
        lines = str(plan).splitlines()
        return [" ".join(line.split()) for line in lines[lines.index("  defaulted") + 1 :]][:1]

    assert said(plan_restore(item, target)) == [
        "cache zeros never in a Linen checkpoint, and computed by init=... if that is passed"
    ]
    assert said(plan_restore(item, target, init=Transient)) == [
        "cache computed by init never in a Linen checkpoint"
    ]


class Custom(nnx.Variable[Any]):
    """A Variable type of the program's own."""


@pytest.mark.parametrize(
    "kind", [nnx.Param, nnx.BatchStat, nnx.LoRAParam, nnx.OptState, nnx.OptVariable, Custom]
)
def test_every_other_variable_type_is_a_weight(tmp_path, kind: type[nnx.Variable[Any]]) -> None:
    target = nnx.State({"a": nnx.Param(jnp.ones(3)), "b": kind(jnp.ones(2))})
    item = save_stock(tmp_path / "item", {"params": {"a": jnp.ones(3)}})

    with pytest.raises(MissingParamError) as caught:
        restore(item, target)

    assert caught.value.paths == (("b",),)


def test_missing_statistics_are_missing_weights(tmp_path) -> None:
    state = linen_state()
    item = save_stock(tmp_path / "item", {"params": state.params})

    with pytest.raises(MissingParamError) as caught:
        restore(item, abstract_net())

    assert set(caught.value.paths) == {("norm", "mean"), ("norm", "var")}


def test_a_missing_step_is_a_missing_weight(tmp_path) -> None:
    state = linen_state(optax.adam(1e-3))
    item = save_stock(
        tmp_path / "item",
        {"params": state.params, "batch_stats": state.batch_stats, "opt_state": state.opt_state},
    )

    with pytest.raises(MissingParamError) as caught:
        restore(item, train_target(optax.adam(1e-3)))

    assert caught.value.paths == ((1, "step"),)


def test_a_smoothed_copy_of_the_weights_never_stands_in_for_a_missing_weight(tmp_path) -> None:
    state = linen_state()
    params = {name: dict(value) for name, value in state.params.items()}
    ema = {name: dict(value) for name, value in state.params.items()}
    del params["up"]["kernel"]
    item = save_stock(
        tmp_path / "item", {"params": params, "ema_params": ema, "batch_stats": state.batch_stats}
    )

    with pytest.raises(MissingParamError) as caught:
        restore(item, abstract_net())

    assert caught.value.paths == (("up", "kernel"),)


def test_unexpected_leaves_are_an_error_a_warning_or_nothing(tmp_path, caplog) -> None:
    state = linen_state()
    params = {**state.params, "relic": {"kernel": jnp.ones(2)}}
    item = save_stock(tmp_path / "item", {"params": params, "batch_stats": state.batch_stats})
    caplog.set_level(logging.WARNING, logger="absl")

    with pytest.raises(UnexpectedParamError) as caught:
        restore(item, abstract_net(), unexpected="error")
    restore(item, abstract_net(), unexpected="ignore")
    quiet = len(caplog.records)
    restore(item, abstract_net(), unexpected="warn")

    assert caught.value.paths == (("params", "relic", "kernel"),)
    assert quiet == 0
    assert "relic" in caplog.records[-1].getMessage()


def test_a_weights_only_target_passes_over_the_optimizer_without_a_word(item, caplog) -> None:
    caplog.set_level(logging.WARNING, logger="absl")

    restore(item, abstract_net(), unexpected="error")

    assert not caplog.records


def test_a_key_of_another_implementation_is_an_error(tmp_path) -> None:
    state = nnx.State(
        {"a": nnx.Param(jnp.ones(2)), "r": nnx.RngKey(jax.random.key(3, impl="rbg"), tag="default")}
    )
    item = save_stock(tmp_path / "item", nnx.to_pure_dict(state))
    target = nnx.State({"a": nnx.Param(jnp.ones(2)), "r": nnx.RngKey(jax.random.key(3), tag="default")})

    with pytest.raises(KeyMismatchError, match="rbg"):
        restore(item, target)


def test_a_key_of_another_shape_is_an_error(tmp_path) -> None:
    keys = jax.random.split(jax.random.key(3), 2)
    item = save_stock(tmp_path / "item", {"a": jnp.ones(2), "r": keys})
    target = nnx.State({"a": nnx.Param(jnp.ones(2)), "r": nnx.RngKey(jax.random.key(3), tag="default")})

    with pytest.raises(KeyMismatchError):
        restore(item, target)


def test_stored_random_state_comes_back(tmp_path) -> None:
    model = make_net()
    model.drop(jnp.ones(3))
    item = save_stock(tmp_path / "item", nnx.to_pure_dict(nnx.state(model)))

    restored = restore(item, abstract_net(), unexpected="error")

    _same_key(restored.drop.rngs.key, model.drop.rngs.key)
    assert int(restored.drop.rngs.count.get_value()) == int(model.drop.rngs.count.get_value()) == 1


def test_random_state_of_an_older_flax_comes_back(tmp_path) -> None:
    tree = nnx.to_pure_dict(nnx.state(make_net()))
    stream = tree["drop"].pop("rngs")
    stream["count"] = jnp.asarray(4, jnp.uint32)
    tree["drop"]["rngs"] = {"default": stream}
    item = save_stock(tmp_path / "item", tree)

    restored = restore(item, abstract_net())

    assert int(restored.drop.rngs.count.get_value()) == 4


def test_missing_layers_of_a_stack_are_named_and_only_they_are_filled(tmp_path) -> None:
    layers = {f"layers_{n}": {"kernel": jnp.full((3, 5), 1.0 + n)} for n in (0, 1, 3)}
    item = save_stock(tmp_path / "item", {"params": layers})
    target = nnx.State({"layers": nnx.State({"kernel": nnx.Param(jnp.full((4, 3, 5), 7.0))})})

    with pytest.raises(MissingParamError, match="layer 2 missing") as caught:
        restore(item, target)
    zeros = restore(item, target, policy="warn")
    own = restore(item, target, policy="init")

    assert caught.value.paths == (("layers", "kernel"),)
    expected = np.stack([np.full((3, 5), value) for value in (1.0, 2.0, 0.0, 4.0)])
    np.testing.assert_array_equal(zeros["layers"]["kernel"].get_value(), expected)
    expected[2] = 7.0
    np.testing.assert_array_equal(own["layers"]["kernel"].get_value(), expected)


def test_a_longer_stack_is_never_cut(tmp_path) -> None:
    item = save_stock(tmp_path / "item", {"params": {"layers": {"kernel": jnp.ones((6, 3, 5))}}})
    target = nnx.State({f"layers_{n}": nnx.State({"kernel": nnx.Param(jnp.ones((3, 5)))}) for n in range(4)})

    with pytest.raises(ShapeMismatchError, match="2 more layers"):
        restore(item, target)


def test_a_dtype_in_the_place_of_a_choice_is_answered_with_where_it_belongs(tmp_path):
    for wrong in ("bfloat16", jnp.bfloat16, np.dtype("float32")):
        with pytest.raises(
            ValueError, match=r"one of 'target', 'stored', not .*\nhint: .*param_dtype=jnp.bfloat16"
        ):
            plan_restore(tmp_path, abstract_net(), dtype=wrong)
