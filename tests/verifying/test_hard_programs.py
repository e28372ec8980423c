"""Programs that are hard to compare: structures, loops, heads that borrow weights, other methods."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from orbax_nnx_handler import (
    Drop,
    Rename,
    Transpose,
    UnstackLayers,
    Verification,
    VerificationError,
    suggest,
    verify,
)
from orbax_nnx_handler.planning.core.paths import render
from orbax_nnx_handler.verifying.recording import run_linen
from tests.processes import Forked

X = np.random.default_rng(0).normal(size=(2, 4)).astype("f")


class Linen(nn.Module):
    def setup(self):
        self.a, self.b = nn.Dense(4), nn.Dense(4)

    def __call__(self, x):
        return self.b(nn.tanh(self.a(x)))


class Port(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("hard") / "c"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, weights(Linen().init(jax.random.key(0), X)))
    return path


def weights(variables: Any) -> Any:
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + 0.3 * random.normal(size=leaf.shape).astype("f"), variables)


def compared(
    path: pathlib.Path,
    linen_apply: Callable[..., Any] | None = None,
    nnx_apply: Callable[..., Any] = lambda model, x: model(x),
    port: type = Port,
    inputs: Any = (X,),
) -> Verification:
    target = nnx.eval_shape(lambda: port(nnx.Rngs(0)))
    return verify(path, target, linen_apply or Linen().apply, nnx_apply, inputs)


@dataclasses.dataclass
class Output:
    logits: Any
    hidden: Any = None


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda y: (y, None),
        lambda y: {"logits": y, "again": [y, 1.0]},
        lambda y: Output(logits=y),
        lambda y: [Output(logits=y, hidden={"y": y})],
    ],
)
def test_outputs_may_be_any_structure_of_arrays(wrapped: Callable[[Any], Any], saved: pathlib.Path):
    right = compared(saved, lambda v, x: wrapped(Linen().apply(v, x)), lambda model, x: wrapped(model(x)))
    wrong = compared(saved, lambda v, x: wrapped(Linen().apply(v, x)), lambda model, x: wrapped(model(2 * x)))

    assert right.equal
    assert not wrong.equal


@pytest.mark.parametrize(
    ("linen_apply", "inputs", "said"),
    [
        (lambda v, x: Linen().apply(v, x) * np.nan, (X,), "linen_apply returns no finite number"),
        (lambda v, x: Linen().apply(v, x), (X[:0],), "linen_apply returns no finite number"),
        (
            lambda v, x: (Linen().apply(v, x), "text"),
            (X,),
            "a program returns a str, which cannot be compared",
        ),
        (
            lambda v, x: (Linen().apply(v, x), jax.random.key(0)),
            (X,),
            "a program returns a PRNGKeyArray, which cannot be compared",
        ),
        (lambda v, x: Linen().apply(v, x), X, "both programs are called with a tuple"),
        (
            jax.jit(lambda v, x: Linen().apply(v, x))
            .lower(jax.eval_shape(Linen().init, jax.random.key(0), X), X)
            .compile(),
            (X,),
            "pass the function that was compiled",
        ),
    ],
)
def test_what_tells_nothing_is_refused(linen_apply: Any, inputs: Any, said: str, saved: pathlib.Path):
    with pytest.raises(VerificationError) as raised:
        compared(saved, linen_apply, inputs=inputs)

    assert said in str(raised.value)


def test_another_method_than_call_is_looked_into(saved: pathlib.Path):
    def encode(model: Any, x: Any) -> Any:
        return model.b(nnx.relu(model.a(x)))

    found = compared(saved, lambda v, x: Linen().apply(v, x, method=Linen.__call__), encode)

    assert found.first is not None
    assert found.first.path == "(root)"
    assert found.first.after is not None
    assert found.first.before is not None
    assert (render(found.first.after.path), render(found.first.before.path)) == ("a", "b")


def test_a_difference_between_two_calls_of_one_module_is_not_in_it(saved: pathlib.Path):
    class Again(Port):
        def __call__(self, x):
            return self.a(nnx.relu(self.a(x)))

    def twice(variables: Any, x: Any) -> Any:
        return Linen().apply(variables, x, method=lambda m, x: m.a(nn.tanh(m.a(x))))

    found = compared(saved, twice, port=Again)

    assert found.first is not None
    assert found.first.path == "(root)", found


def test_a_difference_in_a_head_tied_to_an_embedding_is_said_to_be_in_no_module(tmp_path: pathlib.Path):
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(7, 4, name="embed")
            return embed.attend(nn.Dense(4, name="dense")(embed(tokens)))

    class Port(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.dense = nnx.Embed(7, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, tokens):
            return 0.5 * self.dense(self.embed(tokens)) @ self.embed.embedding[...].T

    tokens = np.arange(6).reshape(2, 3)
    path = tmp_path / "tied"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, Tied().init(jax.random.key(0), tokens))
    target = nnx.eval_shape(lambda: Port(nnx.Rngs(0)))
    found = verify(path, target, Tied().apply, lambda model, x: model(x), (tokens,))

    assert found.first is not None
    assert found.first.path == "(root)"
    assert "in the model's own __call__, where a head tied to an embedding is one" in " ".join(
        str(found).split()
    )


def test_programs_may_differentiate_themselves(saved: pathlib.Path):
    linen = lambda v, x: jax.grad(lambda x: Linen().apply(v, x).sum())(x)  # noqa: E731
    port = lambda model, x: jax.grad(lambda x: model(x).sum())(x)  # noqa: E731

    found = compared(saved, linen, port)

    assert found.equal
    assert {render(one.nnx.path) for one in found.modules} == {"a", "b", "(root)"}


def test_axes_in_another_order_are_the_same_arrays(tmp_path: pathlib.Path):
    class First(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Inner(name="inner")(x)

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.moveaxis(nn.Conv(2, (3, 3), name="conv")(jnp.moveaxis(x, 1, -1)), -1, 1)

    class Last(nnx.Module):
        def __init__(self, rngs):
            self.inner = LastInner(rngs)

        def __call__(self, x):
            return jnp.moveaxis(self.inner(jnp.moveaxis(x, 1, -1)), -1, 1)

    class LastInner(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 2, (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.conv(x)

    x = np.random.default_rng(0).normal(size=(1, 3, 4, 5)).astype("f")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", weights(First().init(jax.random.key(0), x)))

    found = compared(tmp_path / "c", First().apply, port=Last, inputs=(x,))

    assert found.equal
    assert {render(one.nnx.path): one.outputs.relative < 1e-6 for one in found.modules} == {
        "inner/conv": True,
        "inner": True,
        "(root)": True,
    }


def test_masks_and_positions_are_compared_with_nothing_where_there_are_floats(saved: pathlib.Path):
    class Masked(Port):
        def __call__(self, x, positions):
            return super().__call__(x + 0 * positions[:, None])

    class LinenMasked(Linen):
        def __call__(self, x, mask, positions):
            return self.b(nn.relu(self.a(x + 0 * (mask + positions)[:, None])))

    ones, positions = np.ones(2, int), np.arange(2)
    found = compared(
        saved,
        lambda v, x: LinenMasked().apply(v, x, ones, positions),
        lambda model, x: model(x, positions),
        port=Masked,
    )

    assert found.first is not None
    assert found.first.path == "(root)"


def test_a_head_that_is_applied_with_an_embedding_is_not_the_root(tmp_path: pathlib.Path):
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(5, 4, name="a")
            x = nn.Dense(4, name="b")(embed(tokens))
            return nn.Dense(5, use_bias=False, parent=None).apply(
                {"params": {"kernel": embed.embedding.T}}, x
            )

    class Port(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Embed(5, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, tokens):
            return self.a.attend(self.b(self.a(tokens)))

    tokens = np.array([[1, 2, 3]])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", weights(Tied().init(jax.random.key(0), tokens)))

    found = compared(tmp_path / "c", Tied().apply, port=Port, inputs=(tokens,))

    assert found.equal
    assert [render(one.nnx.path) for one in found.modules] == ["a", "b", "(root)"]


def test_another_epsilon_is_named_also_where_it_changes_no_more_than_rounding(tmp_path: pathlib.Path):
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm(1e-12, name="norm")(x)

    class Port(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(4, epsilon=1e-6, rngs=rngs)

        def __call__(self, x):
            return self.norm(x)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", weights(Norm().init(jax.random.key(0), X)))

    x = np.array([[1, -1, 1, -1], [-2, 2, 2, -2]], "f")
    found = compared(tmp_path / "c", Norm().apply, port=Port, inputs=(x,))

    assert found.equal
    assert found.first is not None
    assert found.first.settings == {"epsilon": (1e-12, 1e-6)}
    assert found.remarks == ("the outputs are within the tolerance, and norm still differs in its settings.",)


def test_a_configuration_may_have_slots(saved: pathlib.Path):
    @dataclasses.dataclass(frozen=True, slots=True)
    class Config:
        rate: float = 0.5

    class Configured(Port):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.config = Config()

    assert compared(saved, port=Configured).equal


@pytest.mark.parametrize("hole", [np.nan, -np.inf, -1e30])
def test_numbers_that_are_none_hide_no_other_difference(hole: float, saved: pathlib.Path):
    def masked(y: Any) -> Any:
        return jnp.where(jnp.arange(4) < 2, y, hole)

    def run(factor: float) -> Verification:
        return compared(
            saved, lambda v, x: masked(Linen().apply(v, x)), lambda model, x: masked(factor * model(x))
        )

    assert run(1.0).equal
    assert not run(1.5).equal


@pytest.mark.parametrize("mask", [np.ones((2, 4), bool), np.ones((2, 4), "f"), np.zeros((2, 4), int)])
def test_a_mask_that_is_the_same_throughout_is_no_remark(mask: np.ndarray, saved: pathlib.Path):
    found = compared(
        saved,
        lambda v, x, mask: Linen().apply(v, x) * (1 + mask),
        lambda model, x, mask: model(x) * (1 + mask),
        inputs=(np.tile(X, (8, 1)) * np.arange(1, 17, dtype="f")[:, None], np.tile(mask, (8, 1))),
    )

    assert (found.equal, found.remarks) == (True, ())


def test_a_mask_of_large_numbers_says_nothing_of_how_large_inputs_are(saved: pathlib.Path):
    inputs = (np.random.default_rng(2).normal(size=(16, 4)).astype("f"), np.full((16, 4), -1e9, "f"))
    inputs[1][::2] = 0
    found = compared(saved, lambda v, x, _: Linen().apply(v, x), lambda model, x, _: model(x), inputs=inputs)

    assert (found.equal, found.remarks) == (True, ())


def test_complex_outputs_tell_of_the_weights_as_floats_do(saved: pathlib.Path):
    def waves(y: Any) -> Any:
        return jnp.fft.rfft(y, axis=-1)

    def run(factor: float) -> Verification:
        return compared(
            saved, lambda v, x: waves(Linen().apply(v, x)), lambda model, x: waves(factor * model(x))
        )

    assert (run(1.0).equal, run(1.0).remarks) == (True, ())
    assert not run(1.5).equal


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(4, name="up")(jnp.tanh(x)), None


class LinenLayers(nn.Module):
    """Nothing but a scan."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(LinenLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="blocks")(x, None)[0]


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return x + self.up(jnp.tanh(x))


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Layer(rngs) for _ in range(3)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_layers_in_another_order_are_found_in_a_model_that_is_a_scan_alone(tmp_path: pathlib.Path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", weights(LinenLayers().init(jax.random.key(0), X)))

    found = verify(
        tmp_path / "c",
        nnx.eval_shape(lambda: Layers(nnx.Rngs(0))),
        LinenLayers().apply,
        lambda model, x: model(x),
        (X,),
        renames=[
            UnstackLayers("blocks", "blocks/{i}", axis=0),
            ("blocks/0", "blocks/2"),
            ("blocks/2", "blocks/0"),
        ],
    )

    assert found.first is not None
    assert found.first.path == "blocks/0/up"
    assert "needs those that blocks/2 was given" in found.first.proved


class ScannedLayers(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.vmap(Layer, in_axes=0, out_axes=0)(rngs.fork(split=3))

    def __call__(self, x):
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.blocks)


def test_a_numpy_array_may_be_what_a_scan_carries(tmp_path: pathlib.Path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", weights(LinenLayers().init(jax.random.key(0), X)))

    assert compared(tmp_path / "c", LinenLayers().apply, port=ScannedLayers).equal


class LinenNorms(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="n1")(nn.Dense(4, name="a")(x))
        return nn.BatchNorm(use_running_average=True, name="n2")(nn.Dense(4, name="b")(jnp.tanh(x)))


class Norms(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.n1 = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.n2 = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.n2(self.b(jnp.tanh(self.n1(self.a(x)))))


def test_statistics_that_are_another_norm_s_are_proved_to_be(tmp_path: pathlib.Path):
    variables = weights(LinenNorms().init(jax.random.key(0), X))
    variables["batch_stats"] = jax.tree.map(abs, variables["batch_stats"])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", variables)

    exchanged = [("batch_stats/n1", "batch_stats/n2"), ("batch_stats/n2", "batch_stats/n1")]
    target = nnx.eval_shape(lambda: Norms(nnx.Rngs(0)))
    run = LinenNorms().apply, lambda model, x: model(x), (X,)
    found = verify(tmp_path / "c", target, *run, renames=exchanged)

    assert found.first is not None
    assert found.first.path == "n1"
    assert found.first.proved == "n1/mean, n1/var and n2/mean, n2/var are exchanged"


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_the_same_layer_by_layer(reverse: bool):
    stack = {"a": np.arange(12.0, dtype="f").reshape(4, 3), "n": np.arange(4)}

    def program(x: Any) -> Any:
        layer = lambda carry, one: (carry * 2 + one["a"].sum(), carry + one["n"])  # noqa: E731
        return jax.lax.scan(layer, x, stack, reverse=reverse)

    expected = program(jnp.float32(1))
    found, _ = run_linen(program, jnp.float32(1), owner=lambda _: ())
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


_OF_NINE_LAYERS = """
import jax, numpy as np
from orbax_nnx_handler.verifying.recording import (run_linen)

first, stack = np.ones((5, 7), np.float32), np.ones((9, 5, 7), np.float32)
if {on_device}:
    stack = jax.device_put(stack)
with jax.log_compiles():
    run_linen(lambda x: jax.lax.scan(lambda x, w: (x + w, None), x, stack), first, owner=lambda _: ())
"""


@pytest.mark.parametrize(("on_device", "most"), [(False, 1), (True, 0)])
def test_at_most_one_operation_takes_every_layer_out_of_a_stack(on_device: bool, most: int):
    # In a process of its own: the suite changes what is compiled. NumPy takes what JAX holds on the host.
    made = Forked(_OF_NINE_LAYERS.format(on_device=on_device))
    assert made.wait() == 0, made.stderr
    compiled = re.findall(r"Finished XLA compilation of jit\((\w*slice)\)", made.stderr)
    assert len(compiled) == most


class LinenHeads(nn.Module):
    """Two heads of one shape on one body."""

    returned: Callable[[Any, Any], Any]

    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(8, name="body")(x))
        return self.returned(nn.Dense(8, name="mean")(hidden), nn.Dense(8, name="logvar")(hidden))


class Heads(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, returned: Callable[[Any, Any], Any], names: tuple[str, str]):
        self.body = nnx.Linear(8, 8, rngs=rngs)
        for name in sorted(names):
            setattr(self, name, nnx.Linear(8, 8, rngs=rngs))
        self.returned, self.names = returned, names

    def __call__(self, x):
        hidden = nnx.relu(self.body(x))
        return self.returned(*(getattr(self, name)(hidden) for name in self.names))


class LinenWithHeads(nn.Module):
    returned: Callable[[Any, Any], Any]
    used: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x):
        return self.used(LinenHeads(self.returned, name="heads")(x))


class WithHeads(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, returned: Callable[[Any, Any], Any], used: Callable[[Any], Any]):
        self.heads, self.used = Heads(rngs, returned, ("mean", "logvar")), used

    def __call__(self, x):
        return self.used(self.heads(x))


def in_a_tuple(mean: Any, logvar: Any) -> Any:
    return mean, logvar


def in_a_dict(mean: Any, logvar: Any) -> Any:
    return {"mean": mean, "logvar": logvar}


HEADS_INPUT = jax.random.normal(jax.random.key(1), (4, 6, 8))
HEADS_EXCHANGED = [("mean", "logvar"), ("logvar", "mean")]


def heads(path: pathlib.Path, linen: nn.Module, target: Any, **given: Any) -> Any:
    variables = linen.init(jax.random.key(0), HEADS_INPUT)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", variables)
    programs = {"linen_apply": linen.apply, "nnx_apply": lambda model, x: model(x), "inputs": (HEADS_INPUT,)}
    return verify(path / "checkpoint", nnx.eval_shape(lambda: target(nnx.Rngs(0))), **programs | given)


@pytest.mark.parametrize("returned", [in_a_tuple, in_a_dict, lambda *parts: [*parts, sum(parts)]])
def test_two_outputs_that_change_places_are_told(tmp_path: pathlib.Path, returned: Any):
    def target(rngs: nnx.Rngs) -> Heads:
        return Heads(rngs, returned, ("mean", "logvar"))

    found = heads(tmp_path, LinenHeads(returned), target, renames=HEADS_EXCHANGED)

    assert not found.equal
    assert {found.first.path} <= {"mean", "logvar"}
    assert "mean and logvar have each other's weights" in found.first.proved
    *_, last = str(found).splitlines()
    assert last.split()[:4] == ["(root)", "inputs", "0", "outputs"]
    assert "differs" in last


def test_what_the_caller_runs_after_the_whole_model_is_a_part_of_the_program(tmp_path: pathlib.Path):
    class Body(Heads):
        def __call__(self, x):
            return nnx.relu(self.body(x))

    def both(model: Any, x: Any) -> Any:
        hidden = model(x)
        return model.mean(hidden), model.logvar(hidden)

    found = heads(
        tmp_path,
        LinenHeads(in_a_tuple),
        lambda rngs: Body(rngs, in_a_tuple, ("mean", "logvar")),
        nnx_apply=both,
        renames=HEADS_EXCHANGED,
    )

    assert "mean and logvar have each other's weights" in found.first.proved


@pytest.mark.parametrize("renames", [(), HEADS_EXCHANGED], ids=["right", "exchanged"])
def test_arrays_of_one_size_in_another_structure_are_taken_for_neither(tmp_path: pathlib.Path, renames: Any):
    linen = LinenWithHeads(in_a_dict, lambda parts: parts["mean"] - 2 * parts["logvar"])
    found = heads(
        tmp_path,
        linen,
        lambda rngs: WithHeads(rngs, in_a_tuple, lambda parts: parts[0] - 2 * parts[1]),
        renames=renames,
    )

    (module,) = (one for one in found.modules if one.nnx.path == ("heads",))
    assert module.outputs.compared == 0
    assert found.equal == (not renames)
    assert found.first is None or found.first.path.startswith("heads")


def test_names_of_a_proposal_that_tell_nothing_are_settled_by_two_outputs(tmp_path: pathlib.Path):
    linen = LinenHeads(in_a_tuple)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", linen.init(jax.random.key(0), HEADS_INPUT))
    target = nnx.eval_shape(lambda: Heads(nnx.Rngs(0), in_a_tuple, ("omega", "alpha")))
    given = linen.apply, lambda model, x: model(x), (HEADS_INPUT,)
    found = suggest(tmp_path / "checkpoint", target, verify=given)

    assert found.confidence == "certain"
    assert {(rule.pattern, rule.replacement) for rule in found.renames} == {
        ("mean", "omega"),
        ("logvar", "alpha"),
    }


class LinenFlat(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(7, name="a")(x))


class Flat(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a = nnx.Linear(5, 7, rngs=rngs)
        self.norm = nnx.BatchNorm(7, use_running_average=True, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.norm(self.a(x))


def test_keys_that_flatten_dict_joined_are_nested_for_the_linen_program(tmp_path: pathlib.Path):
    x = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    variables = weights(LinenFlat().init(jax.random.key(0), x))
    flat = {name: flatten_dict(tree, sep="/") for name, tree in variables.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "flat", flat)
    target = nnx.eval_shape(lambda: Flat(nnx.Rngs(0)))
    found = verify(tmp_path / "flat", target, LinenFlat().apply, lambda model, x: model(x), (x,))
    assert found.equal, found
    assert {module.to_dict()["linen"] for module in found.modules} == {"(root)", "a", "norm"}


class LinenNested(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(4, name="normed"), name="norm")(LinenFlat(name="inner")(x))
        return nn.Dense(3, name="head")(x)


class Nested(nnx.Module):
    def __init__(self, rngs):
        self.inner, self.head = Flat(rngs), nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.WeightNorm(nnx.Linear(7, 4, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.inner(x)))


@pytest.mark.parametrize("joined", ["leaves", "modules", "some"])
def test_keys_that_are_joined_in_a_part_of_the_tree_are_nested_for_the_linen_program(
    tmp_path: pathlib.Path, joined: str
):
    x = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    variables = weights(LinenNested().init(jax.random.key(0), x))
    for name, tree in variables.items():
        inner = tree.pop("inner")
        if joined == "leaves":
            tree["inner"] = flatten_dict(inner, sep="/")
        elif joined == "modules":
            tree |= {f"inner/{module}": held for module, held in inner.items()}
        else:
            tree |= {"inner": {"a": {"bias": inner["a"].pop("bias")}}} if name == "params" else {}
            tree |= flatten_dict({"inner": inner}, sep="/")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", variables)
    target = nnx.eval_shape(lambda: Nested(nnx.Rngs(0)))

    found = verify(tmp_path / "half", target, LinenNested().apply, lambda model, x: model(x), (x,))

    assert found.equal, found
    assert {"inner/a", "inner/norm", "head"} <= {module.to_dict()["linen"] for module in found.modules}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path, params = tmp_path_factory.mktemp("averaged") / "c", Linen().init(jax.random.key(0), X)["params"]
    averages = jax.tree.map(lambda leaf: 1.5 * leaf + 0.1, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"params": weights(params), "ema_params": averages})
    return path


def test_averages_in_the_place_of_the_parameters_are_told(averaged: pathlib.Path):
    rules = [Drop("params", "not meant"), ("ema_params", "params")]
    target = nnx.eval_shape(lambda: Port(nnx.Rngs(0)))

    def of_averages(variables: Any, x: Any) -> Any:
        return Linen().apply({"params": variables["ema_params"]}, x)

    wrong = verify(averaged, target, Linen().apply, lambda model, x: model(x), (X,), renames=rules)
    right = verify(averaged, target, of_averages, lambda model, x: model(x), (X,), renames=rules)

    assert wrong.first is not None
    assert wrong.unused == (("ema_params",),)
    assert wrong.first.proved == (
        "a, b: filled from ema_params, which the Linen program does not use, while params, in what it calls "
        "and of the same sizes, fills nothing: no rules are needed"
    )
    assert right.equal
    assert {module.to_dict()["linen"] for module in right.modules} >= {"ema/a", "ema/b"}


def test_of_a_model_and_its_averages_the_programs_run_the_same_one(averaged: pathlib.Path):
    rules = [("params", "model"), ("ema_params", "ema")]
    target = {name: nnx.eval_shape(lambda: Port(nnx.Rngs(0))) for name in ("model", "ema")}
    found = {
        name: verify(
            averaged, target, Linen().apply, lambda both, x, name=name: both[name](x), (X,), renames=rules
        )
        for name in target
    }

    assert found["model"].equal
    assert {"model/a", "model/b"} <= {module.to_dict()["nnx"] for module in found["model"].modules}
    assert found["ema"].remarks[0] == (
        "nnx_apply runs ema, whose weights linen_apply does not call, and linen_apply those of model, which "
        "nnx_apply does not run: let both run the same."
    )


class LinenCast(nn.Module):
    is_cast: bool = False

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(4, name="a")(x)
        y = nn.softmax(y.astype(jnp.bfloat16 if self.is_cast else y.dtype)).astype(jnp.float32)
        return nn.Dense(4, name="b")(y)


class Cast(nnx.Module):
    def __init__(self, rngs, is_cast):
        self.a, self.b = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self._is_cast = is_cast

    def __call__(self, x):
        y = self.a(x)
        y = nnx.softmax(y.astype(jnp.bfloat16 if self._is_cast else y.dtype)).astype(jnp.float32)
        return self.b(y)


@pytest.mark.parametrize(("linen", "ours"), [(True, False), (False, True), (True, True)])
def test_a_cast_inside_of_one_program_is_told_as_other_code(saved: pathlib.Path, linen: bool, ours: bool):
    port = functools.partial(Cast, is_cast=ours)
    found = compared(saved, LinenCast(linen).apply, port=port)

    assert found.equal == (linen == ours)
    if found.equal:
        return
    assert found.first is not None
    causes = [line.text for line in found.first.sentences if line.word == "cause"]
    name = "linen_apply" if linen else "nnx_apply"
    assert causes == [f"the code differs: {name} casts to bfloat16 in it, and the other program does not."]


@pytest.mark.parametrize("above", ["", "params."])
def test_keys_that_dots_join_are_nested_for_the_linen_program(tmp_path: pathlib.Path, above: str):
    class Program(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="two")(nn.relu(nn.Dense(4, name="one")(x)))

    class Port(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = nnx.Linear(6, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.two(nnx.relu(self.one(x)))

    x = jax.random.normal(jax.random.key(0), (4, 6))
    params = Program().init(jax.random.key(1), x)["params"]
    flat = {above + name: leaf for name, leaf in flatten_dict(params, sep=".").items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", flat)
    found = verify(
        tmp_path / "checkpoint",
        nnx.eval_shape(lambda: Port(nnx.Rngs(0))),
        Program().apply,
        lambda model, x: model(x),
        (x,),
        renames=[Rename("\\.", "/", regex=True)],
    )

    assert found.equal, found


class LinenImages(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
        return nn.Dense(3, name="head")(nn.relu(nn.Conv(4, (3, 3), name="second")(x)).mean((1, 2)))


class Images(nnx.Module):
    def __init__(self, padding):
        rngs = nnx.Rngs(0)
        self.first = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.second = nnx.Conv(4, 4, (3, 3), padding=padding, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))).mean((1, 2)))


@pytest.mark.parametrize(
    ("padding", "shape"), [("VALID", "(2, 4, 4, 4)"), (((2, 2), (2, 2)), "(2, 8, 8, 4)")]
)
def test_a_module_that_returns_an_array_of_other_lengths_is_named(padding, shape, tmp_path):
    images = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype("f")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", weights(LinenImages().init(jax.random.key(0), images)))

    found = verify(
        tmp_path / "c",
        nnx.eval_shape(lambda: Images(padding)),
        LinenImages().apply,
        lambda model, x: model(x),
        (images,),
    )

    assert not found.equal
    told = " ".join(str(found).split())
    assert (
        f"second is called with the same and returns {shape} where Linen's module returns (2, 6, 6, 4)"
        in told
    )


def test_of_several_leaves_of_one_name_in_a_module_it_is_said_which_one_is_wrong(tmp_path: pathlib.Path):
    class Affine(nn.Module):
        @nn.compact
        def __call__(self, x):
            normal = nn.initializers.normal(1.0)
            return x @ self.param("w", normal, (4, 4)) + self.param("b", normal, (4,))

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Affine(name="second")(nn.tanh(Affine(name="first")(x)))

    class Held(nnx.Module):
        def __init__(self):
            self.w, self.b = nnx.Param(jnp.zeros((4, 4))), nnx.Param(jnp.zeros(4))

    class Port(nnx.Module):
        def __init__(self):
            self.first, self.second = Held(), Held()

        def __call__(self, x):
            first, second = self.first, self.second
            return jnp.tanh(x @ first.w[...] + first.b[...]) @ second.w[...] + second.b[...]

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", Two().init(jax.random.key(0), X))
    target = nnx.eval_shape(Port)
    run = lambda model, x: model(x)  # noqa: E731
    found = verify(tmp_path / "c", target, Two().apply, run, (X,), renames=[Transpose("second/w", (1, 0))])

    assert found.first is not None
    assert found.first.proved == "second/w is transposed: as it is stored"
