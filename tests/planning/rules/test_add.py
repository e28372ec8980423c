"""A constant that a norm adds to its weight on one side: numbers against the Linen program."""

from pathlib import Path
from typing import Any, NamedTuple

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
    Add,
    MissingParamError,
    RuleError,
    Transpose,
    from_linen,
    invert,
    plan_restore,
    restore,
    save,
    to_linen,
)

WIDTH = 6


class LinenNorm(nn.Module):
    """RMSNorm as Gemma writes it: its weight begins at zero, and one is added."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("scale", nn.initializers.zeros, (WIDTH,))
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * (1 + weight)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return LinenNorm(name="norm")(nn.Dense(WIDTH, name="up")(x))


class Model(nnx.Module):
    def __init__(self) -> None:
        self.up = nnx.Linear(4, WIDTH, rngs=nnx.Rngs(0))
        self.norm = nnx.RMSNorm(WIDTH, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.up(x))


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
}


class Train(nnx.Module):
    def __init__(self, optimizer: str) -> None:
        self.model = Model()
        self.optimizer = nnx.Optimizer(self.model, OPTIMIZERS[optimizer](), wrt=nnx.Param)


X = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)


def trained(optimizer: str = "adam") -> TrainState:
    model = LinenModel()
    params = model.init(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=OPTIMIZERS[optimizer]())
    for _ in range(3):
        state = _step(state)
    return state


@jax.jit
def _step(state: TrainState) -> TrainState:
    return state.apply_gradients(
        grads=jax.grad(lambda p: jnp.sum((state.apply_fn({"params": p}, X) - 1) ** 2))(state.params)
    )


@nnx.jit
def _nnx_step(train: Train) -> None:
    grads = nnx.grad(lambda model: jnp.sum((model(X) - 1) ** 2))(train.model)
    train.optimizer.update(train.model, grads)


def write(path: Path, tree: Any) -> Path:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


RULES = [Add("norm/scale", 1.0)]


def test_the_model_computes_what_the_linen_program_computes(tmp_path: Path) -> None:
    state = trained()
    path = write(tmp_path / "c", {"params": state.params})

    model = restore(path, nnx.eval_shape(Model), renames=RULES)

    np.testing.assert_array_equal(
        model.norm.scale[...], np.float32(1) + np.asarray(state.params["norm"]["scale"])
    )
    np.testing.assert_allclose(model(X), state.apply_fn({"params": state.params}, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_as_in_the_linen_program(tmp_path: Path, optimizer: str) -> None:
    state = trained(optimizer)
    path = write(tmp_path / "c", state)

    train = restore(path, nnx.eval_shape(lambda: Train(optimizer)), renames=RULES)
    for _ in range(2):
        state = _step(state)
        _nnx_step(train)

    # Of weight decay and of steps that scale with the weight, the constant would be a part.
    if optimizer in ("adam", "momentum"):
        np.testing.assert_allclose(
            train.model.norm.scale[...], 1 + state.params["norm"]["scale"], rtol=1e-5, atol=1e-5
        )
    np.testing.assert_allclose(train.model.up.kernel[...], state.params["up"]["kernel"], rtol=2e-2, atol=2e-2)


def test_moments_follow_as_they_are_and_copies_get_the_constant(tmp_path: Path) -> None:
    state = trained("schedule_free")
    path = write(tmp_path / "c", state)

    restored = restore(path, nnx.eval_shape(lambda: Train("schedule_free")), renames=RULES)
    have = {
        "/".join(map(str, path)): value
        for path, value in nnx.to_flat_state(nnx.state(restored.optimizer))
        if "norm" in path
    }

    copies = [value for path, value in have.items() if "/z/" in path]
    np.testing.assert_array_equal(
        copies[0][...], np.float32(1) + np.asarray(state.opt_state.z["norm"]["scale"])
    )
    others = [np.asarray(value[...]) for path, value in have.items() if "/z/" not in path]
    stored = [leaf for path, leaf in _norms(state.opt_state) if ".z[" not in path]
    assert len(others) == len(stored) > 0
    for value in others:
        assert any(np.array_equal(value, leaf) for leaf in stored)


def _norms(tree: Any) -> list[tuple[str, np.ndarray]]:
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in pairs if "norm" in str(path)]


def test_saved_with_the_same_rule_the_constant_is_subtracted(tmp_path: Path) -> None:
    state = trained()
    train = restore(write(tmp_path / "c", state), nnx.eval_shape(lambda: Train("adam")), renames=RULES)

    save(tmp_path / "back", train, renames=RULES)

    with ocp.PyTreeCheckpointer() as checkpointer:
        back = checkpointer.restore(tmp_path / "back")
    exact = (np.float32(1) + np.asarray(state.params["norm"]["scale"])) - np.float32(1)
    np.testing.assert_array_equal(back["params"]["norm"]["scale"], exact)
    np.testing.assert_array_equal(
        back["opt_state"][0]["mu"]["norm"]["scale"], state.opt_state[0].mu["norm"]["scale"]
    )
    again = restore(tmp_path / "back", nnx.eval_shape(lambda: Train("adam")), renames=RULES)
    np.testing.assert_array_equal(again.model.norm.scale[...], train.model.norm.scale[...])


def test_the_plan_says_what_is_added(tmp_path: Path) -> None:
    path = write(tmp_path / "c", {"params": trained().params})

    assert "Add(pattern='norm/scale', constant=1.0), add 1" in str(
        plan_restore(path, nnx.eval_shape(Model), renames=RULES)
    )


def test_it_is_undone_by_its_negative() -> None:
    assert invert([Add("norm/scale", 1), Transpose("a", (1, 0))]) == (
        Transpose("a", (1, 0)),
        Add("norm/scale", -1.0),
    )


@pytest.mark.parametrize("constant", [float("inf"), float("nan")])
def test_a_constant_is_finite(constant: float) -> None:
    with pytest.raises(RuleError, match="not finite"):
        Add("norm/scale", constant)


def test_integers_have_to_be_cast_first(tmp_path: Path) -> None:
    path = write(tmp_path / "c", {"params": {"a": np.ones(3, np.int32)}})

    with pytest.raises(RuleError, match="int32 cannot be added to; cast them first"):
        plan_restore(path, {"a": jax.ShapeDtypeStruct((3,), np.int32)}, renames=[Add("a", 1.0)])


def _restored(tx: Any, params: Any, state: Any) -> tuple[Any, Any]:
    """Returns parameters and optax state after a restore into an NNX model and its optimizer."""

    def make() -> tuple[Any, nnx.Optimizer]:
        model = nnx.Dict({name: nnx.Dict(jax.tree.map(nnx.Param, part)) for name, part in params.items()})
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    linen = {"params": params, "opt_state": state, "step": 3}
    model, optimizer = from_linen(linen, nnx.eval_shape(make), renames=RULES)
    pure = [dict(nnx.to_flat_state(nnx.state(part))) for part in (model, optimizer)]

    def own(flat: Any, path: Any, *above: str) -> Any:
        keys = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path]
        return flat[(*above, *keys)][...]

    return (
        jax.tree.map_with_path(lambda path, _: own(pure[0], path), params),
        jax.tree.map_with_path(lambda path, _: own(pure[1], path, "opt_state"), state),
    )


def test_every_field_of_optax_goes_on_as_in_the_linen_program() -> None:
    contrib, rng = optax.contrib, np.random.default_rng(1)
    chains: list[Any] = [
        *(contrib.acprop(1e-2), contrib.ademamix(1e-2), contrib.adopt(1e-2), contrib.cocob(), contrib.dog()),
        *(contrib.dadapt_adamw(1.0), contrib.dowg(), contrib.madgrad(1e-2), contrib.prodigy()),
        *(contrib.mechanize(optax.adam(1e-2)), contrib.schedule_free_sgd(0.1), contrib.galore(1e-2, rank=2)),
        *(contrib.sam(optax.sgd(0.1), optax.sgd(0.1)), contrib.simplified_ademamix(1e-2)),
        *(optax.adadelta(1e-2), optax.adan(1e-2), optax.amsgrad(1e-2), optax.lion(1e-2), optax.rprop(1e-2)),
        *(optax.optimistic_gradient_descent(1e-2), optax.rmsprop(1e-2, centered=True), optax.novograd(1e-2)),
        *(optax.apply_every(2), optax.MultiSteps(contrib.prodigy(), 2), optax.adagrad(1e-2)),
        *(optax.chain(optax.zero_nans(), optax.ema(0.9)), optax.scale_by_distance_over_gradients()),
    ]
    params = {"up": {"kernel": jnp.ones((4, WIDTH))}, "norm": {"scale": jnp.zeros(WIDTH)}}

    def gradients() -> Any:
        return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)

    def stepped(tx: Any, weights: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    for tx in chains:
        own = params, tx.init(params)
        for _ in range(3):
            own = stepped(tx, *own, gradients())
        ours = _restored(tx, own[0], own[1])
        for grads in (gradients(), gradients(), gradients()):
            own, ours = stepped(tx, *own, grads), stepped(tx, *ours, grads)
        moved = {**own[0], "norm": {"scale": own[0]["norm"]["scale"] + 1}}
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), ours[0], moved)


class Average(NamedTuple):
    count: Any
    average: Any


def _averaging() -> optax.GradientTransformation:
    """Keeps an average of the parameters, as programs write it; nothing in its name tells of what."""
    return optax.GradientTransformation(
        lambda params: Average(jnp.zeros((), "int32"), params),
        lambda updates, state, _=None: (updates, state),
    )


@pytest.mark.parametrize(
    ("chain", "lost", "why"),
    [
        (
            _averaging,
            "average/norm/scale",
            "nothing tells whether 'average' is computed of gradients or holds",
        ),
        (optax.contrib.momo, "gamma", "gamma is the mean of the products of gradients and parameters"),
    ],
)
def test_what_may_depend_on_the_constant_is_asked_for(chain: Any, lost: str, why: str) -> None:
    params = {"norm": {"scale": jnp.zeros(WIDTH)}}

    with pytest.raises(MissingParamError) as caught:
        _restored(chain(), params, chain().init(params))

    assert f"  1/opt_state/{lost}" in str(caught.value)
    assert why in " ".join(str(caught.value).split())


def test_history_in_axes_of_its_own_is_saved_as_it_is_where_a_constant_is_added() -> None:
    def make() -> dict[str, Any]:
        model = Model()
        return {"model": model, "optimizer": nnx.Optimizer(model, optax.lbfgs(memory_size=3), wrt=nnx.Param)}

    params = LinenModel().init(jax.random.key(0), X)["params"]
    linen = TrainState.create(apply_fn=None, params=params, tx=optax.lbfgs(memory_size=3))

    back = to_linen(from_linen(linen, nnx.eval_shape(make), renames=RULES), renames=RULES)

    for field in ("params", "diff_params_memory", "diff_updates_memory"):
        stored = getattr(linen.opt_state[0], field)
        jax.tree.map(np.testing.assert_array_equal, back["opt_state"][0][field], stored)


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_a_save_subtracts_nothing_from_moments_in_any_layout(layout: Any) -> None:
    def make() -> dict[str, Any]:
        model = Model()
        return {"model": model, "optimizer": nnx.Optimizer(model, optax.contrib.prodigy(), wrt=nnx.Param)}

    params = LinenModel().init(jax.random.key(0), X)["params"]
    params = {"params": params} if layout == "maxtext" else params
    linen = TrainState.create(apply_fn=None, params=params, tx=optax.contrib.prodigy())

    back = to_linen(from_linen(linen, nnx.eval_shape(make), renames=RULES), layout, renames=RULES)

    for field in ("params0", "exp_avg", "exp_avg_sq", "grad_sum"):
        jax.tree.map(np.testing.assert_array_equal, back["opt_state"][field], getattr(linen.opt_state, field))
