"""What rests on an order alone, and what cannot be compared by itself, is proved otherwise by outputs."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import UnstackLayers, plan_restore, suggest, verify
from orbax_nnx_handler.planning.core.recipes import reads

D = 8
X, ACTIONS, IDS = (
    np.random.default_rng(1).normal(size=(8, 6)).astype("f"),
    np.random.default_rng(2).normal(size=(8, 2)).astype("f"),
    np.random.default_rng(3).integers(0, 20, size=(2, 9)),
)


def save(path: pathlib.Path, program: nn.Module, *inputs: Any) -> pathlib.Path:
    """Saves weights of which no two are alike."""
    keys = iter(jax.random.split(jax.random.key(7), 1000))
    started = program.init(jax.random.key(0), *inputs)
    variables = jax.tree.map(lambda x: x + 0.1 * jnp.abs(jax.random.normal(next(keys), x.shape)), started)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, variables)
    return path


# Networks of which the one program joins the inputs outside, and the other one inside.


class LinenCritic(nn.Module):
    @nn.compact
    def __call__(self, x, action):
        both = jnp.concatenate([x, action], -1)
        return nn.Dense(1, name="two")(nn.relu(nn.Dense(D, name="one")(both)))


class LinenCritics(nn.Module):
    @nn.compact
    def __call__(self, x, action):
        return LinenCritic(name="q1")(x, action), LinenCritic(name="q2")(x, action)


class LinenEnsemble(nn.Module):
    @nn.compact
    def __call__(self, x, action):
        axes: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
        return tuple(nn.vmap(LinenCritic, axis_size=2, **axes)(name="both")(x, action))


class Critic(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, 1, rngs=rngs)

    def __call__(self, both):
        return self.two(nnx.relu(self.one(both)))


class Critics(nnx.Module):
    def __init__(self, rngs):
        self.q1, self.q2 = Critic(rngs), Critic(rngs)

    def __call__(self, x, action):
        both = jnp.concatenate([x, action], -1)
        return self.q1(both), self.q2(both)


class Backwards(nnx.Module):
    """Whose names tell nothing, and whose order is the other one."""

    def __init__(self, rngs):
        self.a, self.b = Critic(rngs), Critic(rngs)

    def __call__(self, x, action):
        both = jnp.concatenate([x, action], -1)
        return self.b(both), self.a(both)


@pytest.mark.parametrize(
    ("program", "rules"),
    [
        (LinenCritics(), [("q1", "q2"), ("q2", "q1")]),
        (LinenEnsemble(), [UnstackLayers("both", "e{i}", axis=0), ("e0", "q2"), ("e1", "q1")]),
    ],
    ids=["two", "an ensemble"],
)
def test_whole_networks_are_exchanged_though_their_inputs_cannot_be_compared(
    program: nn.Module, rules: list[Any], tmp_path: pathlib.Path
):
    path, target = save(tmp_path / "c", program, X, ACTIONS), nnx.eval_shape(lambda: Critics(nnx.Rngs(0)))
    found = verify(path, target, program.apply, lambda model, *xs: model(*xs), (X, ACTIONS), renames=rules)

    assert found.first is not None
    assert found.first.proved == "q1 and q2 have each other's weights"
    assert found.first.path == "q1/one"
    assert "it is none of the modules" not in str(found)


def test_a_guess_by_order_is_taken_back_where_networks_are_exchanged(tmp_path: pathlib.Path):
    path = save(tmp_path / "c", LinenCritics(), X, ACTIONS)
    run = LinenCritics().apply, lambda model, *xs: model(*xs), (X, ACTIONS)
    found = suggest(path, nnx.eval_shape(lambda: Backwards(nnx.Rngs(0))), verify=run)

    assert found.confidence == "certain", found
    assert sorted(map(str, found.renames)) == ["('q1', 'b')", "('q2', 'a')"]


# What no module shows.


class LinenOwn(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="one")(x * self.param("gain", nn.initializers.ones, (6,)))


class Own(nnx.Module):
    def __init__(self, rngs):
        self.gain, self.one = nnx.Param(jnp.ones(6)), nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        return self.one(x * self.gain + 1)


def test_what_no_module_shows_may_be_to_blame_too(tmp_path: pathlib.Path):
    path, target = save(tmp_path / "c", LinenOwn(), X), nnx.eval_shape(lambda: Own(nnx.Rngs(0)))
    found = str(verify(path, target, LinenOwn().apply, lambda model, x: model(x), (X,)))

    assert "it is none of the modules that are compared, but another part, or what" in " ".join(found.split())


# Parts that are numbered on through the layers, and what lies before and behind these.


class LinenPart(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D)(nn.gelu(nn.Dense(2 * D)(x)))


class LinenShifted(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.RMSNorm()(nn.Embed(20, D)(ids))
        for _ in range(3):
            x = x + LinenPart()(nn.RMSNorm()(x))
        return nn.Dense(5)(nn.RMSNorm()(x))


class Part(nnx.Module):
    def __init__(self, rngs):
        self.fc1, self.fc2 = nnx.Linear(D, 2 * D, rngs=rngs), nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.gelu(self.fc1(x)))


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.scaled, self.part = nnx.RMSNorm(D, rngs=rngs), Part(rngs)

    def __call__(self, x):
        return x + self.part(self.scaled(x))


class Shifted(nnx.Module):
    def __init__(self, rngs):
        self.table, self.alpha = nnx.Embed(20, D, rngs=rngs), nnx.RMSNorm(D, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(3)])
        self.omega, self.out = nnx.RMSNorm(D, rngs=rngs), nnx.Linear(D, 5, rngs=rngs)

    def __call__(self, ids):
        x = self.alpha(self.table(ids))
        for layer in self.layers:
            x = layer(x)
        return self.out(self.omega(x))


class LinenGated(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate, up = (nn.Dense(2 * D, use_bias=False)(x) for _ in range(2))
        return nn.Dense(6, use_bias=False)(nn.silu(gate) * up)


class LinenLast(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = x + LinenGated()(nn.RMSNorm()(x))
        return nn.RMSNorm()(x)


class Gated(nnx.Module):
    def __init__(self, rngs):
        self.up, self.gate = (nnx.Linear(6, 2 * D, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(2 * D, 6, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class GatedLayer(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.ff = nnx.RMSNorm(6, rngs=rngs), Gated(rngs)

    def __call__(self, x):
        return x + self.ff(self.norm(x))


class Last(nnx.Module):
    """Which of its projections is which is asked, and of the norms one is left over."""

    def __init__(self, rngs):
        self.layers = nnx.List([GatedLayer(rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(6, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class LinenEncoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6, name="fc1")(x))
        return nn.Dense(6, name="fc2_mean")(x), nn.Dense(6, name="fc2_logvar")(x)


class LinenDecoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="fc2")(nn.relu(nn.Dense(6, name="fc1")(x)))


class LinenCoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        mean, variance = LinenEncoder(name="encoder")(x)
        return LinenDecoder(name="decoder")(mean), variance


class Coder(nnx.Module):
    """One choice of its questions leaves a part without a source: a logarithm is no variance by its name."""

    def __init__(self, rngs):
        self.enc_hidden, self.enc_var, self.enc_mu = (nnx.Linear(6, 6, rngs=rngs) for _ in range(3))
        self.dec_out, self.dec_hidden = (nnx.Linear(6, 6, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        x = nnx.relu(self.enc_hidden(x))
        return self.dec_out(nnx.relu(self.dec_hidden(self.enc_mu(x)))), self.enc_var(x)


class LinenSquare(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6)(nn.gelu(nn.Dense(6)(x)))


class LinenMixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = x + LinenSquare()(nn.LayerNorm()(x).swapaxes(1, 2)).swapaxes(1, 2)
            x = x + LinenSquare()(nn.LayerNorm()(x))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(1))


class Square(nnx.Module):
    def __init__(self, rngs):
        self.lin1, self.lin2 = (nnx.Linear(6, 6, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.lin2(nnx.gelu(self.lin1(x)))


class MixerBlock(nnx.Module):
    def __init__(self, rngs):
        self.channel_mlp, self.token_mlp = Square(rngs), Square(rngs)
        self.ln_channel, self.ln_token = (nnx.LayerNorm(6, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        x = x + self.token_mlp(self.ln_token(x).swapaxes(1, 2)).swapaxes(1, 2)
        return x + self.channel_mlp(self.ln_channel(x))


class Mixer(nnx.Module):
    """Of more orders than a question lists."""

    def __init__(self, rngs):
        self.blocks = nnx.List([MixerBlock(rngs) for _ in range(2)])
        self.norm, self.head = nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize(
    ("program", "port", "inputs", "sources"),
    [
        (
            LinenShifted(),
            Shifted,
            IDS,
            {("alpha", "scale"): "RMSNorm_0", ("layers", 2, "scaled", "scale"): "RMSNorm_3"},
        ),
        (LinenLast(), Last, X, {("norm", "scale"): "RMSNorm_2", ("layers", 0, "norm", "scale"): "RMSNorm_0"}),
        (
            LinenCoder(),
            Coder,
            X,
            {("enc_var", "bias"): "fc2_logvar", ("dec_out", "bias"): "fc2"},
        ),
        (
            LinenMixer(),
            Mixer,
            np.random.default_rng(4).normal(size=(2, 6, 6)).astype("f"),
            {
                ("blocks", 0, "ln_token", "scale"): "LayerNorm_0",
                ("blocks", 1, "token_mlp", "lin2", "bias"): "Dense_0",
            },
        ),
    ],
    ids=["a shift", "one that is left over", "a choice without a source", "too many orders"],
)
def test_what_lies_where_by_the_calls_of_both_programs_is_proved(
    program: nn.Module,
    port: Callable[[nnx.Rngs], Any],
    inputs: Any,
    sources: Mapping[tuple[Any, ...], str],
    tmp_path: pathlib.Path,
):
    path, target = save(tmp_path / "c", program, inputs), nnx.eval_shape(lambda: port(nnx.Rngs(0)))
    found = suggest(path, target, verify=(program.apply, lambda model, x: model(x), (inputs,)))

    assert found.confidence == "certain", found
    assert found.is_proved
    plan = plan_restore(path, target, renames=found.renames)
    assert {leaf: str(reads(plan.restored[leaf].recipe)[0][-2]) for leaf in sources} == sources
