"""A Linen tree in memory becomes what Linen computes with it, and what the same tree on disk becomes."""

import contextlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import freeze
from flax.serialization import to_state_dict
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from orbax_nnx_handler import (
    Copy,
    DtypeMismatchError,
    Fuse,
    KeyMismatchError,
    NotACheckpointError,
    RestoreError,
    Scale,
    StackLayers,
    Transpose,
    UnmappedValueError,
    UnreadableLeafError,
    UnstackLayers,
    from_linen,
    plan_restore,
    restore,
    suggest,
    to_linen,
)
from orbax_nnx_handler.planner import look_at
from tests.sampled import sampled

X = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)


class LinenNet(nn.Module):
    boxed: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = nn.initializers.lecun_normal()
        if self.boxed:
            init = nn.with_partitioning(init, (None, "x"))
        for layer in range(3):
            x = jnp.tanh(nn.Dense(8, name=f"layers_{layer}", kernel_init=init)(x))
        return nn.BatchNorm(use_running_average=True, name="norm")(x)


class ScannedNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        def body(layer: Any, x: Any) -> Any:
            return jnp.tanh(layer(x)), None

        scan = nn.scan(body, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        return scan(nn.Dense(8, name="layers"), x)[0]


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, norm: bool = True):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs) if norm else None

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x if self.norm is None else self.norm(x)


def target(**options: Any) -> Net:
    return nnx.eval_shape(lambda: Net(nnx.Rngs(0), **options))


def variables(net: Any = None) -> Any:
    return (net or LinenNet()).init(jax.random.key(0), X)


def on_disk(tree: Any, path: Any) -> Any:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def leaves(state: Any) -> dict[Any, Any]:
    flat = nnx.to_flat_state(nnx.state(state) if isinstance(state, nnx.Module) else state)
    return {path: variable.get_value() for path, variable in flat}


def assert_equal(left: Any, right: Any) -> None:
    assert left.dtype == right.dtype
    bits = jax.random.key_data if jnp.issubdtype(left.dtype, jax.dtypes.prng_key) else np.asarray
    np.testing.assert_array_equal(bits(left), bits(right))


def assert_same_state(left: Any, right: Any) -> None:
    one, other = leaves(left), leaves(right)
    assert one.keys() == other.keys()
    for path in one:
        assert_equal(one[path], other[path])


FORMS = {
    "on devices": lambda tree: tree,
    "NumPy": lambda tree: jax.tree.map(np.asarray, tree),
    "frozen": freeze,
    "half NumPy": lambda tree: {**tree, "params": jax.tree.map(np.asarray, tree["params"])},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_result_computes_what_linen_computes(form: Any) -> None:
    model = from_linen(form(variables()), target(), unexpected="error")

    assert isinstance(model, Net)
    np.testing.assert_allclose(model(X), LinenNet().apply(variables(), X), rtol=1e-6)


def test_boxed_parameters_and_bare_ones_are_read_alike() -> None:
    boxed = variables(LinenNet(boxed=True))
    assert isinstance(boxed["params"]["layers_0"]["kernel"], nn.Partitioned)

    assert_same_state(from_linen(boxed, target()), from_linen(nn.unbox(boxed), target()))


FLAT = {"tuples": flatten_dict, "slashes": lambda tree: flatten_dict(tree, sep="/")}


@pytest.mark.parametrize("flat", FLAT.values(), ids=FLAT)
@pytest.mark.parametrize("boxed", [False, True])
def test_a_flat_dict_is_the_tree_that_its_names_spell(flat: Any, boxed: bool) -> None:
    tree = variables(LinenNet(boxed=boxed))

    assert_same_state(from_linen(flat(tree), target(), unexpected="error"), from_linen(tree, target()))


@pytest.mark.parametrize("flat", FLAT.values(), ids=FLAT)
def test_a_flat_train_state_is_restored_with_its_optimizer_and_step(flat: Any) -> None:
    net, tx = LinenNet(), optax.adam(1e-2)
    params = variables()["params"]
    state = TrainState.create(apply_fn=net.apply, params=params, tx=tx).apply_gradients(grads=params)
    nested = {"params": state.params, "opt_state": to_state_dict(state.opt_state), "step": state.step}

    def abstract() -> Any:
        model = Net(nnx.Rngs(0), norm=False)
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    nested["params"] = {name: part for name, part in params.items() if name != "norm"}
    for field in ("mu", "nu"):
        nested["opt_state"]["0"][field].pop("norm")
    one, other = (from_linen(tree, nnx.eval_shape(abstract)) for tree in (flat(nested), nested))

    for left, right in zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(other)), strict=True):
        assert_equal(left, right)


def test_names_of_a_flat_dict_may_hold_numbers_beside_texts() -> None:
    tree = {("layers", 0, "w"): jnp.ones(2), ("layers", "b"): jnp.zeros(3)}

    plan = plan_restore(tree, {"layers": {"0": {"w": jnp.zeros(2)}, "b": jnp.zeros(3)}})

    assert plan.fits, plan


def test_slashes_in_the_keys_of_a_tree_that_is_not_flat_stay_in_them() -> None:
    tree = {"net/block": {"w/scale": jnp.ones(2)}}

    assert set(plan_restore(tree, tree).restored) == {("net/block", "w/scale")}
    assert list(look_at(tree, None).leaves) == [("net/block", "w/scale")]


def test_an_array_that_is_wanted_as_it_is_is_the_trees_own() -> None:
    tree = variables()

    model = from_linen(tree, target())

    assert model.layers[1].kernel.get_value() is tree["params"]["layers_1"]["kernel"]
    assert model.norm.mean.get_value() is tree["batch_stats"]["norm"]["mean"]


def test_no_two_leaves_of_the_result_share_an_array() -> None:
    tree = nn.unbox(variables())
    tree["params"]["layers_1"] = tree["params"]["layers_0"]

    model = from_linen(tree, target())
    pair = from_linen(
        {"params": {"a": {"kernel": jnp.ones((2, 2))}}},
        nnx.eval_shape(lambda: {n: nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0)) for n in "ab"}),
        renames=[Copy("a/kernel", "b/kernel")],
    )

    double = jax.jit(lambda state: jax.tree.map(lambda x: 2 * x, state), donate_argnums=0)
    expected = 2 * np.asarray(model.layers[0].kernel.get_value())
    doubled = double(nnx.state(model))
    np.testing.assert_array_equal(doubled["layers"][1]["kernel"].get_value(), expected)
    assert double(nnx.state(pair))["b"]["kernel"].get_value()[0, 0] == 2.0


def ones_at(offset: int, shape: tuple[int, int]) -> np.ndarray:
    """Returns ones that begin so many bytes after a multiple of 64."""
    size = 4 * shape[0] * shape[1]
    memory = np.zeros(size + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    array = memory[start : start + size].view(np.float32).reshape(shape)
    array[:] = 1
    return array


@pytest.mark.parametrize("offset", [0, 16], ids=["as JAX would take it over", "as it would not"])
@pytest.mark.parametrize("spec", [None, PartitionSpec(), PartitionSpec("fsdp")], ids=str)
def test_numpy_memory_is_copied(offset: int, spec: Any, mesh: Any) -> None:
    kernel = ones_at(offset, (64, 64))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if spec is None else NamedSharding(mesh, spec)
    target = {"kernel": nnx.Param(jax.ShapeDtypeStruct((64, 64), np.float32, sharding=place))}

    state = from_linen({"params": {"kernel": kernel}}, nnx.State(target))
    kernel[:] = 7

    value = state["kernel"].get_value()
    assert value.sharding == place
    assert float(value.sum()) == 64 * 64


def test_numpy_memory_is_copied_without_a_program_for_each_shape(caplog: pytest.LogCaptureFixture) -> None:
    tree = {f"w{width}": ones_at(0, (3, width)) for width in range(101, 106)}
    target = nnx.State({name: nnx.Param(jax.ShapeDtypeStruct(w.shape, w.dtype)) for name, w in tree.items()})

    with jax.log_compiles():
        from_linen({"params": tree}, target)

    assert "Compiling" not in caplog.text


def test_a_scanned_tree_is_taken_apart_on_its_devices() -> None:
    tree = variables(ScannedNet())

    model = from_linen(tree, target(norm=False))

    np.testing.assert_allclose(model(X), ScannedNet().apply(tree, X), rtol=1e-6)


def sharded(spec: Any, mesh: Any) -> Any:
    def shape(path: Any, leaf: Any) -> Any:
        own = spec if len(leaf.shape) == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, own))

    return jax.tree_util.tree_map_with_path(shape, target(norm=False))


@pytest.mark.parametrize("source", ["one device", "sharded", "NumPy", "another mesh"])
@pytest.mark.parametrize("net", [LinenNet(), ScannedNet()], ids=["layers", "scanned"])
def test_the_targets_shardings_hold_wherever_the_tree_is(source: str, net: Any, mesh: Any) -> None:
    tree = nn.unbox(variables(net))
    expected = net.apply(tree, X) if isinstance(net, ScannedNet) else None
    tree = {"params": {name: part for name, part in tree["params"].items() if name != "norm"}}
    other = jax.sharding.Mesh(np.array(jax.devices()[::-1]), ("rows",))
    places = {
        "one device": SingleDeviceSharding(jax.devices()[3]),
        "sharded": NamedSharding(mesh, PartitionSpec()),
        "another mesh": NamedSharding(other, PartitionSpec()),
    }
    tree = jax.tree.map(np.asarray, tree) if source == "NumPy" else jax.device_put(tree, places[source])
    wanted = sharded(PartitionSpec(mesh.axis_names[0]), mesh)

    model = from_linen(tree, wanted)

    asked = leaves(wanted)
    assert all(value.sharding == asked[path].sharding for path, value in leaves(model).items())
    plain = from_linen(jax.tree.map(np.asarray, tree), target(norm=False))
    assert_same_state(model, plain)
    if expected is not None:
        np.testing.assert_allclose(plain(X), expected, rtol=1e-6)


def test_without_a_sharding_of_the_target_arrays_stay_where_they_are(mesh: Any) -> None:
    there = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names[0]))
    tree = jax.device_put(variables(ScannedNet()), NamedSharding(mesh, PartitionSpec()))
    tree["params"]["layers"]["bias"] = jax.device_put(np.zeros((8, 3), np.float32), jax.devices()[2])
    whole = {"params": {"kernel": jax.device_put(np.ones((8, 8), np.float32), there), "bias": np.zeros(8)}}

    layer = from_linen(whole, nnx.eval_shape(lambda: nnx.Linear(8, 8, rngs=nnx.Rngs(0))))
    model = from_linen(tree, target(norm=False))

    assert layer.kernel.get_value() is whole["params"]["kernel"]
    assert layer.bias.get_value().sharding == NamedSharding(mesh, PartitionSpec())
    assert model.layers[0].kernel.get_value().sharding.device_set == there.device_set
    # Not on the mesh that the others are on: it goes where a restore would put it.
    assert model.layers[0].bias.get_value().sharding == NamedSharding(mesh, PartitionSpec())


def test_parts_on_several_devices_become_one_array() -> None:
    class Stacked(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.kernel = nnx.Param(rngs.normal((3, 8, 8)))

    tree = {"params": {f"layers_{i}": {"kernel": np.full((8, 8), i, np.float32)} for i in range(3)}}
    for number, layer in enumerate(tree["params"].values()):
        layer["kernel"] = jax.device_put(layer["kernel"], jax.devices()[number])

    found = from_linen(tree, nnx.eval_shape(lambda: {"layers": Stacked(nnx.Rngs(0))}))

    value = found["layers"].kernel.get_value()
    np.testing.assert_array_equal(value, np.arange(3.0)[:, None, None] * np.ones((3, 8, 8)))


@pytest.mark.parametrize("net", [LinenNet(), ScannedNet()], ids=["layers", "scanned"])
def test_it_works_under_jit(net: Any) -> None:
    tree, wanted = nn.unbox(variables(net)), target(norm=isinstance(net, LinenNet))

    traced = jax.jit(lambda tree: from_linen(tree, wanted))(tree)
    described = jax.eval_shape(lambda tree: from_linen(tree, wanted), tree)

    assert_same_state(traced, from_linen(tree, wanted))
    assert {path: leaf.shape for path, leaf in leaves(described).items()} == {
        path: leaf.shape for path, leaf in leaves(wanted).items()
    }


def test_under_jit_the_targets_shardings_hold_and_what_is_missing_is_filled(mesh: Any) -> None:
    tree = jax.device_put(variables(ScannedNet()), NamedSharding(mesh, PartitionSpec()))
    wanted = sharded(PartitionSpec(mesh.axis_names[0]), mesh)
    del tree["params"]["layers"]["bias"]

    traced = jax.jit(lambda tree: from_linen(tree, wanted, policy="warn"))(tree)

    assert (
        traced.layers[0]
        .kernel.get_value()
        .sharding.is_equivalent_to(wanted.layers[0].kernel.get_value().sharding, 2)
    )
    assert float(abs(traced.layers[2].bias.get_value()).sum()) == 0


@pytest.mark.parametrize(
    ("source", "axes", "in_force"),
    sampled(
        [("x", "y"), ("y", "x"), (), None],
        [(AxisType.Explicit,) * 2, (AxisType.Explicit, AxisType.Auto)],
        [False, True],
    ),
)
def test_under_jit_the_targets_shardings_hold_on_a_mesh_of_explicit_axes_too(
    source: tuple[str, ...] | None, axes: tuple[AxisType, ...], in_force: bool
) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=axes)

    def there(*spec: str | None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*spec))

    def placed(start: int, spec: tuple[str, ...] | None) -> Any:
        value = np.arange(start, start + 64, dtype=np.float32).reshape(8, 8)
        return value if spec is None else jax.device_put(value, there(*spec))

    def like(shape: tuple[int, ...], *spec: str | None, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=there(*spec))

    names = ["same", "cast", "turned", "layers_0", "layers_1", "q", "k"]
    other = None if source is None else source[::-1]
    tree = {
        "params": {
            name: {"kernel": placed(64 * at, other if at % 2 else source)} for at, name in enumerate(names)
        }
    }
    wanted = {
        "same": {"kernel": like((8, 8), "x", "y")},
        "cast": {"kernel": like((8, 8), "x", "y", dtype=jnp.bfloat16)},
        "turned": {"kernel": like((8, 8), "y", "x")},
        "layers": {"kernel": like((2, 8, 8), "y", "x")},
        "qk": {"kernel": like((8, 16), None, "x")},
        "new": {"kernel": like((8, 8), "x", "y")},
    }
    rules = [
        Transpose("turned/kernel", (1, 0)),
        StackLayers("layers_{i}", "layers", axis=0),
        Fuse(("q", "k"), "qk", axis=1),
    ]

    def init() -> Any:
        return jax.tree.map(lambda leaf: jnp.ones(leaf.shape), wanted)

    def run(tree: Any) -> Any:
        return from_linen(tree, wanted, renames=rules, policy="init", init=init)

    with jax.set_mesh(mesh) if in_force else contextlib.nullcontext():
        found = jax.jit(run)(tree)

    stored = {name: np.asarray(part["kernel"]) for name, part in tree["params"].items()}
    expected = {
        "same": stored["same"],
        "cast": stored["cast"].astype(jnp.bfloat16),
        "turned": stored["turned"].T,
        "layers": np.stack([stored["layers_0"], stored["layers_1"]]),
        "qk": np.concatenate([stored["q"], stored["k"]], axis=1),
        "new": np.ones((8, 8)),
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name]["kernel"], value)
        asked = wanted[name]["kernel"].sharding
        assert found[name]["kernel"].sharding.is_equivalent_to(asked, value.ndim)


def test_random_state_is_made_under_jit_as_outside_of_it() -> None:
    wanted = nnx.eval_shape(
        lambda: {"net": nnx.Linear(8, 8, rngs=nnx.Rngs(0)), "drop": nnx.Dropout(0.5, rngs=nnx.Rngs(1))}
    )
    tree = {"params": {"net": nn.unbox(variables())["params"]["layers_0"]}}

    assert_same_state(
        nnx.state(jax.jit(lambda tree: from_linen(tree, wanted))(tree)), nnx.state(from_linen(tree, wanted))
    )


def training() -> dict[str, Any]:
    model = Net(nnx.Rngs(0))
    return {"model": model, "optimizer": nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)}


def test_to_linen_is_undone_under_jit_too() -> None:
    state = training()
    wanted = nnx.eval_shape(training)

    def there_and_back(state: Any) -> Any:
        return from_linen(to_linen(state), wanted)

    assert_same_state(nnx.state(there_and_back(state)), nnx.state(state))
    assert_same_state(nnx.state(jax.jit(there_and_back)(state)), nnx.state(state))


def test_a_sharded_state_goes_to_linen_and_back_on_its_devices(mesh: Any) -> None:
    there = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    graph, state = nnx.split(Net(nnx.Rngs(0), norm=False))
    model = nnx.merge(graph, jax.device_put(state, there))
    rules = [Transpose("layers_0/kernel", (1, 0))]

    tree = to_linen(model, renames=rules)
    back = from_linen(tree, sharded(PartitionSpec(mesh.axis_names[0]), mesh), renames=rules)

    assert tree["params"]["layers_0"]["kernel"].sharding.device_set == there.device_set
    assert_same_state(back, model)
    assert back.layers[0].kernel.get_value().sharding == there


def test_a_train_state_is_restored_with_its_optimizer() -> None:
    tree = variables()
    state = TrainState.create(apply_fn=LinenNet().apply, params=tree["params"], tx=optax.adamw(1e-3))
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, tree["params"]))

    found = from_linen(
        {"state": state, "batch_stats": tree["batch_stats"]}["state"],
        nnx.eval_shape(training),
        policy={nnx.BatchStat: "warn", ...: "error"},
    )

    model, optimizer = found["model"], found["optimizer"]
    assert_equal(model.layers[2].kernel.get_value(), state.params["layers_2"]["kernel"])
    assert_equal(
        optimizer.opt_state[0].mu.layers[2].kernel.get_value(), state.opt_state[0].mu["layers_2"]["kernel"]
    )
    assert optimizer.step.get_value() == 1
    assert optimizer.step.get_value().dtype == jnp.uint32


class Norm(nnx.Module):
    def __init__(self) -> None:
        self.dense = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))


ADAM = optax.adam(1e-3)


def trained() -> tuple[Norm, nnx.Optimizer[Norm]]:
    model = Norm()
    return model, nnx.Optimizer(model, ADAM, wrt=nnx.Param)


CALLED = "an optimizer that is called opt_state"
ITEMS = {
    "a model and more of them below a key": lambda: (Norm(), {"x": Norm()}),
    "a model and a list of models": lambda: (Norm(), [Norm(), Norm()]),
    "models side by side": lambda: [Norm(), Norm()],
    "states of one model": lambda: tuple(nnx.state(Norm(), nnx.Param, ...)),
    "what nnx.split returns": lambda: tuple(nnx.split(Norm(), nnx.Param, ...)),
    "a trained model below a key beside another": lambda: {"a": trained(), "b": Norm()},
    "a train state below a key beside a model": lambda: {
        "train": dict(zip(("model", "optimizer"), trained(), strict=True)),
        "eval": Norm(),
    },
    "an array beside a model": lambda: (Norm(), jnp.zeros((2, 3))),
    # A level that is called `params` names a collection, and MaxText keeps statistics beside it.
    CALLED: lambda: dict(zip(("params", "opt_state"), trained(), strict=True)),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (name, layout)
        for name in ITEMS
        for layout in ("linen", "maxtext")
        if (name, layout) != (CALLED, "maxtext")
    ],
)
def test_what_a_save_takes_a_restore_takes(name: str, layout: Any) -> None:
    numbers = iter(range(1000))
    item = jax.tree.map(lambda x: jnp.full(x.shape, next(numbers), x.dtype), ITEMS[name]())

    tree = to_linen(item, layout)
    plan = plan_restore(tree, nnx.eval_shape(ITEMS[name]))
    result = from_linen(tree, nnx.eval_shape(ITEMS[name]))

    jax.tree.map(np.testing.assert_array_equal, result, item)
    again = to_linen(result, layout, renames=plan)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


@pytest.mark.parametrize("kept", ["params", "stats"])
def test_statistics_in_another_collection_are_said_to_be_there(kept: str) -> None:
    params = to_linen(Norm())["params"]
    stats = {"norm": {"mean": jnp.full(3, 7.0), "var": jnp.full(3, 8.0)}}
    if kept == "params":
        params["norm"] |= stats["norm"]
    tree = {"params": params} if kept == "params" else {"params": params, kept: stats}

    with pytest.raises(RestoreError, match=f"are stored in '{kept}'") as raised:
        from_linen(tree, nnx.eval_shape(Norm))
    result = from_linen(tree, nnx.eval_shape(Norm), **raised.value.hints[0].arguments)

    assert_equal(result.norm.mean.get_value(), tree[kept]["norm"]["mean"])
    assert_equal(result.norm.var.get_value(), tree[kept]["norm"]["var"])


def test_policies_fill_what_is_missing() -> None:
    tree = nn.unbox(variables())
    del tree["params"]["layers_1"]["bias"]

    with pytest.raises(RestoreError, match="layers/1/bias"):
        from_linen(tree, target())
    own = from_linen(tree, Net(nnx.Rngs(3)), policy="init")
    made = from_linen(tree, target(), policy="init", init=lambda: Net(nnx.Rngs(3)))
    zeros = from_linen(tree, target(), policy="warn")

    assert_same_state(own, made)
    assert float(zeros.layers[1].bias.get_value().sum()) == 0
    assert_equal(own.layers[1].kernel.get_value(), tree["params"]["layers_1"]["kernel"])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_rules_compute_in_the_wider_type_as_a_restore_does(form: Any, tmp_path: Any) -> None:
    tree = form({"params": {"w": {"kernel": jnp.linspace(-3, 3, 64, dtype=jnp.bfloat16).reshape(8, 8)}}})
    rules = [Scale("w/kernel", 1 / 3), Transpose("w/kernel", (1, 0))]
    wanted = {"w": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float16)}}

    in_memory = from_linen(tree, wanted, renames=rules)
    restored = restore(on_disk(dict(tree), tmp_path / "tree"), wanted, renames=rules)

    assert_equal(in_memory["w"]["kernel"], restored["w"]["kernel"])


@pytest.mark.parametrize("form", [jnp.asarray, np.asarray], ids=["on devices", "NumPy"])
def test_a_value_that_the_wanted_type_cannot_hold_is_an_error(form: Any) -> None:
    wanted = {"w": jax.ShapeDtypeStruct((2,), jnp.float16)}

    with pytest.raises(DtypeMismatchError, match=r"holds 1000000\.0, which float16 cannot hold"):
        from_linen({"w": form(np.array([1.0, 1e6], np.float32))}, wanted)


def test_numbers_of_64_bits_must_fit_into_32() -> None:
    wanted = {"seen": jax.ShapeDtypeStruct((), jnp.int32)}

    assert int(from_linen({"seen": 3}, wanted)["seen"]) == 3
    with pytest.raises(DtypeMismatchError, match="seen"):
        from_linen({"seen": 2**40}, wanted)


@pytest.mark.parametrize("form", [jnp.asarray, np.asarray], ids=["on devices", "NumPy"])
def test_counts_and_leftovers_are_looked_at(form: Any) -> None:
    cell = nn.GRUCell(4).init(jax.random.key(0), jnp.zeros((1, 4)), jnp.zeros((1, 3)))
    cell = jax.tree.map(form, nn.unbox(cell))
    gru = nnx.eval_shape(lambda: nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)))
    step = {"step": form(np.int32(-1)), **cell}
    from_linen(cell, gru)

    cell["params"]["hn"]["bias"] = form(np.ones(4, np.float32))
    with pytest.raises(UnmappedValueError, match="hn/bias"):
        from_linen(cell, gru)
    jax.eval_shape(lambda tree: from_linen(tree, gru), cell)  # Nothing is looked at while it is traced.
    del step["params"]["hn"]["bias"]
    optimizer = nnx.eval_shape(
        lambda: nnx.Optimizer(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), optax.sgd(0.1), wrt=nnx.Param)
    )
    with pytest.raises(DtypeMismatchError, match="-1"):
        from_linen(step, {"step": optimizer.step})


class BiasedGRUCell(nnx.GRUCell):
    """Linen's: with a bias of the candidate gate within what the reset gate multiplies."""

    def __init__(self, size: int, hidden: int, *, rngs: nnx.Rngs):
        super().__init__(size, hidden, rngs=rngs)
        self.hn_bias = nnx.Param(jnp.zeros(hidden))

    def __call__(self, carry: Any, inputs: Any) -> Any:
        of_inputs, of_carry = jnp.split(self.dense_i(inputs), 3, -1), jnp.split(self.dense_h(carry), 3, -1)
        reset, update = (nnx.sigmoid(of_inputs[at] + of_carry[at]) for at in (0, 1))
        new = nnx.tanh(of_inputs[2] + reset * (of_carry[2] + self.hn_bias[...]))
        return (carry := (1 - update) * new + update * carry), carry


def test_a_bias_that_no_weight_can_take_in_has_a_variable_of_its_own_named_as_the_hint_says() -> None:
    linen, (carry, inputs) = nn.GRUCell(4), np.random.default_rng(0).normal(size=(2, 3, 4)).astype("f")
    cell = jax.tree.map(lambda leaf: leaf + 0.3, linen.init(jax.random.key(0), carry, inputs))
    with pytest.raises(UnmappedValueError) as raised:
        from_linen(cell, nnx.eval_shape(lambda: nnx.GRUCell(4, 4, rngs=nnx.Rngs(0))))
    assert "name these by rules, ('hn/bias', 'hn_bias'); or " in str(raised.value)

    target = nnx.eval_shape(lambda: BiasedGRUCell(4, 4, rngs=nnx.Rngs(0)))
    found = from_linen(cell, target, renames=[("hn/bias", "hn_bias")])

    np.testing.assert_allclose(found(carry, inputs)[0], linen.apply(cell, carry, inputs)[0], rtol=1e-6)


def test_random_keys_are_restored_as_they_are() -> None:
    class Dropping(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    state = nnx.state(Dropping(nnx.Rngs(7)))
    tree = nnx.to_pure_dict(state)

    found = from_linen(tree, nnx.eval_shape(lambda: Dropping(nnx.Rngs(0))))

    assert_same_state(found, state)


def test_a_part_of_a_stack_that_is_missing_is_filled_beside_what_is_there() -> None:
    class Layers(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.kernel = nnx.Param(rngs.normal((3, 8, 8)))

    tree = nn.unbox(variables())["params"]
    tree = {"params": {f"layers_{i}": {"kernel": tree[f"layers_{i}"]["kernel"]} for i in (0, 2)}}

    found = from_linen(tree, nnx.eval_shape(lambda: {"layers": Layers(nnx.Rngs(0))}), policy="warn")

    value = found["layers"].kernel.get_value()
    assert_equal(value[2], tree["params"]["layers_2"]["kernel"])
    assert float(abs(value[1]).sum()) == 0


BROKEN = {
    "missing": (lambda tree: tree["params"].pop("layers_1"), {}),
    "another shape": (lambda tree: tree["params"]["layers_1"].update(kernel=np.ones((8, 9), np.float32)), {}),
    "another kind": (lambda tree: tree["params"]["layers_1"].update(bias=np.ones(8, np.int32)), {}),
    "unexpected": (lambda tree: tree["params"].update(more={"kernel": np.ones(2)}), {"unexpected": "error"}),
    "unused rule": (dict, {"renames": [("nothing", "here")]}),
    "a filter": (dict, {"policy": {nnx.PathContains("nothing"): "init", ...: "error"}}),
    "no such layout": (dict, {"layout": "mine"}),
}


@pytest.mark.parametrize(("spoil", "options"), BROKEN.values(), ids=BROKEN)
def test_errors_are_those_of_a_restore(spoil: Any, options: Any, tmp_path: Any) -> None:
    tree = nn.unbox(variables())
    spoil(tree)
    path = on_disk(tree, tmp_path / "tree")

    with pytest.raises(RestoreError) as restored:
        restore(path, target(), **options)
    with pytest.raises(RestoreError) as found:
        from_linen(tree, target(), **options)

    assert type(found.value) is type(restored.value)
    expected = str(restored.value).replace(str(path), "a tree in memory")
    expected = expected.replace("`orbax-nnx suggest CHECKPOINT MODULE:FACTORY`", "suggest(variables, target)")
    assert str(found.value) == expected
    with pytest.raises(type(restored.value)):
        jax.eval_shape(lambda tree: from_linen(tree, target(), **options), tree)


def test_a_leaf_without_a_value_is_an_error_where_it_is_needed() -> None:
    tree = nn.unbox(variables())
    described = jax.eval_shape(lambda: tree)

    with pytest.raises(UnreadableLeafError) as error:
        from_linen(described, target())
    assert "the tree has 10 leaves without values" in str(error.value)
    assert "a jax.ShapeDtypeStruct" in str(error.value)

    tree["params"]["more"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    from_linen(tree, target(), unexpected="ignore")
    tree["params"]["norm"]["scale"].delete()
    with pytest.raises(UnreadableLeafError, match=r"params/norm/scale   a deleted jax\.Array"):
        from_linen(tree, target(), policy="init", init=lambda: Net(nnx.Rngs(0)))


@pytest.mark.parametrize("impl", ["threefry2x32", "unsafe_rbg"])
def test_the_shapes_of_a_tree_with_random_keys_tell_what_becomes_of_it(impl: str) -> None:
    described = jax.eval_shape(lambda: {"drop": {"rngs": {"key": jax.random.key(0, impl=impl)}}})

    class Dropping(nnx.Module):
        def __init__(self):
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(jax.random.key(1, impl="threefry2x32")))

    plan = plan_restore(described, nnx.eval_shape(Dropping))
    with pytest.raises(UnreadableLeafError if impl == "threefry2x32" else KeyMismatchError):
        plan.check()


def test_a_path_in_the_place_of_the_target_is_told_the_order(tmp_path: Any) -> None:
    with pytest.raises(RestoreError, match=r"hint: the path comes first, the target second"):
        suggest({"params": {"w": jnp.ones(2)}}, tmp_path)


@pytest.mark.parametrize("nothing", [{}, "/a/path", None, {"params": {}}], ids=str)
def test_a_tree_without_leaves_is_refused(nothing: Any) -> None:
    with pytest.raises(NotACheckpointError, match="holds no leaf"):
        from_linen(nothing, target())


def test_strings_and_functions_beside_the_model_are_left() -> None:
    tree = {**variables(), "config": {"name": "net", "act": jnp.tanh}}

    assert_same_state(from_linen(tree, target()), from_linen(variables(), target()))


def test_rules_hold_for_a_tree_in_memory() -> None:
    tree = {"params": {"block": variables(ScannedNet())["params"]["layers"]}}

    model = from_linen(tree, target(norm=False), renames=[UnstackLayers("block", "layers/{i}", axis=1)])

    np.testing.assert_array_equal(model.layers[2].kernel.get_value(), tree["params"]["block"]["kernel"][:, 2])


def test_plan_and_proposal_are_to_be_had_of_a_tree_in_memory_and_hints_say_so() -> None:
    def make() -> Any:
        shapes = {"encode": (4, 8), "head": (8, 3)}
        return {name: nnx.Linear(*shape, rngs=nnx.Rngs(0)) for name, shape in shapes.items()}

    wanted, own = nnx.eval_shape(make), to_linen(make())["params"]
    tree = {"params": {"Dense_0": own["encode"], "Dense_1": own["head"]}}

    with pytest.raises(RestoreError) as error:
        from_linen(tree, wanted)
    assert "suggest(variables, target) proposes " in str(error.value)
    found = suggest(tree, wanted, init=make)
    assert plan_restore(tree, wanted, renames=found.renames).fits
    assert_same_state(nnx.state(from_linen(tree, wanted, renames=found.renames)), nnx.state(make()))
    with pytest.raises(RestoreError) as error:
        from_linen({"params": {"other": {"kernel": np.ones((3, 5))}}}, target())
    assert "look at what is stored with jax.tree.map(jnp.shape, variables), and check it" in str(error.value)
    assert "CHECKPOINT" not in str(error.value)


class Noisy(nnx.Linear):
    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(4, 8, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_target_of_the_mesh_in_force_is_filled_under_jit_as_outside_of_it(axes: AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axes, axes))
    tree = {"params": {"kernel": jnp.arange(32.0).reshape(4, 8), "bias": jnp.arange(8.0)}}

    with jax.set_mesh(mesh):
        wanted = nnx.eval_shape(lambda: Noisy(nnx.Rngs(0)))
        eager = nnx.state(from_linen(tree, wanted))
        compiled = jax.jit(lambda tree: nnx.state(from_linen(tree, wanted)))(tree)

    assert_same_state(compiled, eager)
    np.testing.assert_array_equal(compiled["kernel"][...], tree["params"]["kernel"])
