"""`convert --to linen` of what an NNX program saved with stock Orbax: as its Linen program stores it."""

import functools
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from orbax_nnx_handler import save
from tests.cli.conftest import stock
from tests.sampled import checkered
from tests.zoo.modules import PAIRS
from tests.zoo.pairs import path_of, restored_module, saved, stored_variables

FACTORY = "tests.cli.zoo_program:make"
# One of each kind whose NNX form is another than Linen's, and those with names that renames undo.
SHOWN = (
    "Sequential-Sequential-gaps_between_layers",
    "list_and_dict_attributes-List,_Dict-eleven_layers,_nested_lists",
    "BatchNorm-BatchNorm",
    "MultiHeadAttention-MultiHeadAttention-normalised_queries_and_keys",
    "MultiHeadAttention-MultiHeadAttention-dropout_with_its_own_random_state",
    "LSTMCell-LSTMCell",
    "LSTMCell-OptimizedLSTMCell",
    "OptimizedLSTMCell-OptimizedLSTMCell",
    "GRUCell-GRUCell",
    "SimpleCell-SimpleCell",
    "Bidirectional-Bidirectional",
    "RNN,_Bidirectional-RNN,_Bidirectional-automatic_names",
    "WeightNorm-WeightNorm",
    "SpectralNorm-SpectralNorm",
    "scan-scan-batch_statistics_stacked_too",
    "several_collections-bridge.ToNNX-inside_an_NNX_model",
    "custom_collections-custom_Variables",
)
SHOWN_PAIRS = [pair for pair in PAIRS if str(pair) in SHOWN]


def differing(expected: object, actual: object) -> list[str]:
    """Returns the paths at which two trees hold other values; their structures must agree."""
    pairs = jax.tree_util.tree_map_with_path(
        lambda keys, left, right: None if np.array_equal(left, right) else path_of(keys), expected, actual
    )
    return jax.tree.leaves(pairs)


def save_state(path: Path, module: nnx.Module, *, pure: bool) -> None:
    """Saves as an NNX program does, with stock Orbax alone."""
    state = nnx.state(module)
    tree = nnx.to_pure_dict(state) if pure else state
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


@pytest.fixture(scope="module")
def restored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pair, its Linen variables, what a Linen program makes of them, and its NNX module that holds them."""
    pair = request.param
    variables = stored_variables(pair)
    linen = jax.jit(functools.partial(pair.linen.apply, **pair.linen_kwargs))
    return (
        pair,
        variables,
        linen,
        restored_module(pair, saved(variables, tmp_path_factory.mktemp("x") / "linen")),
    )


@pytest.mark.parametrize(
    ("restored", "pure"), checkered(SHOWN_PAIRS, [False, True]), indirect=["restored"], ids=str
)
def test_linen_reads_what_nnx_saved(cli, tmp_path: Path, restored: Any, pure: bool) -> None:
    pair, expected, linen, module = restored
    save_state(tmp_path / "nnx", module, pure=pure)
    renames = [word for stored, wanted in pair.renames for word in ("--rename", f"{stored}={wanted}")]

    said = cli(
        "convert", tmp_path / "nnx", tmp_path / "out", f"{FACTORY}({str(pair)!r})", "--to", "linen", *renames
    )

    assert said.status == 0, said.err
    with ocp.StandardCheckpointer() as checkpointer:
        actual = checkpointer.restore(tmp_path / "out", jax.eval_shape(lambda: expected))
    assert differing(expected, actual) == []
    assert differing(linen(expected, *pair.inputs), linen(actual, *pair.inputs)) == []


class Tagger(nnx.Module):
    """A recurrent model with a normalisation, as its Linen counterpart `LinenTagger` names them."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(3, 4, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return self.rnn(self.norm(x))


class LinenTagger(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for number in range(2):
            x = nn.Dense(3, name=f"layers_{number}")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        return nn.RNN(nn.OptimizedLSTMCell(4), name="rnn")(x)


def make_tagger() -> dict[str, object]:
    """The factory: a train state in the middle of its training."""
    model = Tagger(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)
    return {"model": model, "optimizer": optimizer}


def trained_tagger() -> dict[str, object]:
    state = make_tagger()

    @nnx.jit
    def step(model: Tagger, optimizer: nnx.Optimizer) -> None:
        x = jnp.linspace(-1, 1, 30).reshape(2, 5, 3)
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model))

    for _ in range(3):
        step(state["model"], state["optimizer"])
    return state


@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16")], ids=["as it is", "bfloat16"])
def test_a_train_state_goes_on_in_linen(cli, tmp_path: Path, options: tuple[str, ...]) -> None:
    trained = trained_tagger()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nnx", {name: nnx.state(part) for name, part in trained.items()})
    x = jnp.linspace(-1, 1, 30).reshape(2, 5, 3)
    variables = jax.jit(LinenTagger().init)(jax.random.key(0), x)

    # The cell that `nn.RNN` is given belongs to the module around it.
    words = ("--to", "linen", "--rename", "OptimizedLSTMCell_0=rnn/cell", *options)
    said = cli("convert", tmp_path / "nnx", tmp_path / "out", f"{__name__}:make_tagger", *words)

    assert said.status == 0, said.err
    state = TrainState.create(apply_fn=None, params=variables["params"], tx=optax.adamw(0.1))
    item = {"params": state.params, "opt_state": state.opt_state, "step": jnp.int32(0)}
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "out", item={**item, "batch_stats": variables["batch_stats"]})
    assert int(found["step"]) == 3
    assert found["step"].dtype == np.int32
    weights = {"params": found["params"], "batch_stats": found["batch_stats"]}
    outputs = jax.jit(LinenTagger().apply)(weights, x)
    expected = nnx.jit(Tagger.__call__)(trained["model"], x)
    np.testing.assert_allclose(outputs, expected, rtol=0.05 if options else 1e-6)
    gates = found["opt_state"][0].mu["OptimizedLSTMCell_0"]
    moment = trained["optimizer"].opt_state[0].mu["rnn"]["cell"]
    np.testing.assert_array_equal(gates["hf"]["kernel"], moment["dense_h"]["kernel"][...][:, 4:8])
    assert gates["hf"]["kernel"].dtype == np.float32


def test_names_of_nnx_without_a_factory_are_refused(cli, tmp_path: Path) -> None:
    ocp.PyTreeCheckpointer().save(
        tmp_path / "in", nnx.to_pure_dict(nnx.state(Tagger(nnx.Rngs(0)), nnx.Param))
    )

    said = cli("convert", tmp_path / "in", tmp_path / "out", "--to", "linen")
    forced = cli("convert", tmp_path / "in", tmp_path / "forced", "--to", "linen", "--layout", "params")

    assert said.status == 1
    assert said.err == (
        "RestoreError: 7 leaves are named as NNX names them, so parameters and statistics cannot be told "
        "apart:\n"
        "  layers/{0..1}/bias\n"
        "  layers/{0..1}/kernel\n"
        "  rnn/cell/dense_h/bias\n"
        "  rnn/cell/dense_h/kernel\n"
        "  rnn/cell/dense_i/kernel\n"
        "hint: give the factory of the model too (SRC DST MODULE:FACTORY --to linen); "
        "--layout params where a Linen program wrote this all the same.\n"
    )
    assert forced.status == 0


def test_bare_params_of_a_linen_program_need_no_factory(cli, tmp_path: Path) -> None:
    params = LinenTagger().init(jax.random.key(0), jnp.ones((1, 2, 3)))["params"]
    ocp.PyTreeCheckpointer().save(tmp_path / "in", params)

    said = cli("convert", tmp_path / "in", tmp_path / "out", "--to", "linen")

    assert said.status == 0, said.err
    assert differing({"params": params}, stock(tmp_path / "out")) == []


class InSetup(nn.Module):
    """Its wrapper owns the layer."""

    def setup(self) -> None:
        self.norm = nn.WeightNorm(nn.Dense(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x)


class InCompact(nn.Module):
    """The layer of its wrapper belongs to this module."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.WeightNorm(nn.Dense(4), name="norm")(x)


class Wrapped(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.WeightNorm(nnx.Linear(3, 4, rngs=rngs), rngs=rngs)


def make_wrapped() -> Wrapped:
    return Wrapped(nnx.Rngs(0))


NOTE = (
    "normalising wrappers are written with their layer inside (layer_instance): norm. Linen reads that where "
    "setup() makes the wrapper: self.norm = nn.WeightNorm(nn.Dense(4)). Under @nn.compact the layer is kept "
    "beside the wrapper (Dense_0), and that program does not find these values."
)


def test_a_wrapper_that_linen_reads_in_one_of_its_two_forms_alone_is_said_so(cli, tmp_path: Path) -> None:
    x = jnp.ones((2, 3))
    ocp.PyTreeCheckpointer().save(tmp_path / "in", InCompact().init(jax.random.key(0), x))

    said = cli("convert", tmp_path / "in", tmp_path / "out", f"{__name__}:make_wrapped", "--to", "linen")
    as_nnx = cli("convert", tmp_path / "in", tmp_path / "nnx", f"{__name__}:make_wrapped")

    assert said.status == as_nnx.status == 0
    assert f"  note       {NOTE}\n" in said.out
    assert "note" not in as_nnx.out
    written = stock(tmp_path / "out")
    InSetup().apply(written, x)
    with pytest.raises(flax.errors.FlaxError):
        InCompact().apply(written, x)


def test_a_save_of_a_wrapper_warns_of_its_other_form(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_wrapped()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    save(tmp_path / "linen", {"model": model, "optimizer": optimizer})

    assert [record.getMessage() for record in caplog.records if record.name == "absl"] == [NOTE]


def test_statistics_that_are_kept_aside_for_maxtext_need_the_factory_of_the_model(cli, tmp_path) -> None:
    model = nnx.Dict(
        dense=nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
        norm=nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
        drop=nnx.Dropout(0.5, rngs=nnx.Rngs(1)),
    )
    item = {"model": model, "ema": nnx.clone(model)}
    save(tmp_path / "item", item, layout="maxtext")

    said = cli("convert", tmp_path / "item", tmp_path / "out", "--to", "linen", "--layout", "maxtext")

    assert said.status == 1
    assert "2 leaves are kept aside" in said.err
    assert "nnx_aux/model/norm/mean" in said.err
    assert "give the factory" in said.err
    assert not (tmp_path / "out").exists()
