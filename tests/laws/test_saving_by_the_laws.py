"""Saving obeys the laws backwards: every element once, to a place of its own, or the save is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import Fuse, RestoreError, RuleError, from_linen, plan_restore, restore, save, to_linen
from tests.laws import worlds
from tests.laws.worlds import Branch, Numbers, check, pure_target, write
from tests.sampled import sampled


def _saved_or_refused(path, state, **options):
    try:
        save(path, state, **options)
    except ValueError:
        return None
    with ocp.PyTreeCheckpointer() as reader:
        return worlds.flat(reader.restore(path))


@pytest.mark.parametrize("gates", [("i", "h"), ("ii", "hi"), ("i", "h", "g")])
def test_modules_called_like_gates_beside_fused_ones_are_all_written(tmp_path, gates):
    numbers = Numbers()
    tree = {"cell": {name: numbers.dense() for name in ("dense_i", "dense_h", *gates)}}
    model = Branch(tree, {})
    worlds.put(model, worlds.flat(tree))
    stored = _saved_or_refused(tmp_path / "saved", model)
    if stored is not None:
        elements = {float(value) for leaf in stored.values() for value in np.ravel(leaf)}
        wanted = {float(value) for leaf in worlds.flat(tree).values() for value in np.ravel(leaf)}
        assert wanted <= elements


class RandomOnly(nnx.Module):
    def __init__(self):
        self.rngs = nnx.Rngs(dropout=3)


def test_a_module_of_random_state_only_is_saved_or_refused_by_name(tmp_path):
    state = RandomOnly()
    state.rngs.dropout()
    try:
        save(tmp_path / "saved", state)
    except ValueError:
        return
    result = restore(tmp_path / "saved", nnx.eval_shape(RandomOnly))
    assert int(result.rngs.dropout.count[...]) == 1


class Adapted(nnx.Module):
    def __init__(self):
        self.dense = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
        self.bn = nnx.BatchNorm(4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "kinds", [(nnx.LoRAParam, nnx.BatchStat), (nnx.LoRAParam,), (nnx.BatchStat,), (nnx.Param,)]
)
def test_a_part_of_a_state_comes_back_from_its_own_save(tmp_path, kinds):
    state = nnx.state(Adapted(), nnx.Any(*kinds))
    expected = Numbers().like(worlds.flat(state))
    worlds.put(state, expected)
    save(tmp_path / "saved", state)
    check(restore(tmp_path / "saved", state), expected)


@pytest.mark.parametrize("order", ["qkv", "kqv", "vkq"])
def test_a_plan_lists_parts_in_the_order_in_which_they_are_joined(tmp_path, order):
    numbers = Numbers()
    path = write(tmp_path, {"params": {name: {"kernel": numbers(3, 2)} for name in "qkv"}})
    rules = [Fuse(tuple(order), "qkv", 1)]
    target = pure_target({"qkv": {"kernel": np.zeros((3, 6), np.float32)}})
    text = str(plan_restore(path, target, renames=rules)).replace("/", " ").replace(",", " ")
    shown = [word for word in text.split("<-")[1].split()[:12] if word in tuple("qkv")]
    assert shown[:3] == list(order)


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("name", ["layers", "blocks", "params", "0", "layer_1"])
def test_lists_and_odd_names_come_back_from_their_own_save(tmp_path, name, layout):
    numbers, tx = Numbers(), optax.adam(1e-3)
    tree = {name: {at: numbers.dense() for at in range(3)}, "head": numbers.dense()}
    state = worlds.Training(tree, tx, {})
    expected = numbers.like(worlds.flat(state))
    worlds.put(state, expected)
    save(tmp_path / "saved", state, layout=layout)
    check(restore(tmp_path / "saved", worlds.training_target(tree, tx)), expected)


def test_a_step_that_fits_is_stored_in_int32_as_linen_has_it(tmp_path):
    state = worlds.Training({"dense": Numbers().dense()}, optax.adam(1e-3), {})
    state.optimizer.step[...] = jnp.uint32(2**31 - 1)
    save(tmp_path / "saved", state)
    with ocp.PyTreeCheckpointer() as reader:
        assert int(reader.restore(tmp_path / "saved")["step"]) == 2**31 - 1


class Clock(nnx.Variable):
    """A type of a program's own."""


def _networks(tx, other):
    """Returns two networks and their optimizers side by side, as GANs have them."""
    numbers = Numbers()
    layers = {"layers": {at: numbers.dense() for at in range(2)}, "mu": numbers.dense()}
    extra = {"bn": {"scale": numbers(4), "mean": numbers(4)}, "clock": numbers(3)}
    gen, disc = (Branch(tree, {"clock": Clock}) for tree in (layers | extra, layers))
    optimizers = {
        name: nnx.Optimizer(model, tx, wrt=nnx.Param)
        for name, model, tx in (("g_opt", gen, tx), ("d_opt", disc, other))
    }
    return {"gen": gen, "disc": disc, **optimizers}


class SideBySide(nnx.Module):
    def __init__(self, tx, other):
        for name, part in _networks(tx, other).items():
            setattr(self, name, part)
        self.epoch = nnx.Variable(jnp.asarray(7))


TXS = {
    "adam": optax.adam(0.1),
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "scheduled": optax.sgd(optax.constant_schedule(0.1)),
    "chain": optax.chain(optax.clip(1.0), optax.adamw(optax.constant_schedule(0.1)), optax.ema(0.9)),
}


@pytest.mark.parametrize(
    ("layout", "names", "form"),
    sampled(
        ["linen", "maxtext"],
        [
            ("adam", "adam"),
            ("chain", "momentum"),
            ("adam", "sgd"),
            ("sgd", "sgd"),
            ("scheduled", "chain"),
            ("scheduled", "scheduled"),
        ],
        ["dict", "states", "module", "state"],
    ),
)
def test_optimizers_beside_their_models_come_back_each_with_its_count_and_step(form, names, layout):
    txs = [TXS[name] for name in names]
    item = SideBySide(*txs) if form in ("module", "state") else _networks(*txs)
    item = nnx.state(item) if form == "state" else item
    if form == "states":
        item = {name: nnx.state(part) for name, part in item.items()}
    numbers = Numbers()
    parts = item if isinstance(item, dict) else {"": item}
    expected = {}
    for name, part in parts.items():
        state = part if isinstance(part, nnx.State) else nnx.state(part)
        values = numbers.like(worlds.flat(state))
        worlds.put(state, values)
        if state is not part:
            nnx.update(part, state)
        expected |= {(name, *path): value for path, value in values.items()}

    tree = to_linen(item, layout)
    found = from_linen(tree, item, unexpected="error")

    parts = found if isinstance(found, dict) else {"": found}
    flat = {
        (name, *path): value
        for name, part in parts.items()
        for path, value in worlds.flat(part if isinstance(part, nnx.State) else nnx.state(part)).items()
    }
    check(flat, expected)
    assert tree["g_opt"]["step"] != tree["d_opt"]["step"]


def _in_keys(*names):
    return lambda *parts: dict(zip(names, parts, strict=True))


@pytest.mark.parametrize("name", TXS)
@pytest.mark.parametrize(
    "held",
    [lambda *parts: parts, lambda *parts: parts[::-1], _in_keys("model", "optimizer"), _in_keys("net", "tx")],
)
def test_the_state_of_an_optimizer_beside_its_model_comes_back(tmp_path, held, name):
    def make():
        model = Branch({"dense": Numbers().dense()}, {})
        return model, nnx.state(nnx.Optimizer(model, TXS[name], wrt=nnx.Param))

    parts, numbers = make(), Numbers()
    for part in parts:
        worlds.put(part, numbers.like(worlds.flat(part)))
    item = held(*parts)

    save(tmp_path / "saved", item)
    found = restore(tmp_path / "saved", nnx.eval_shape(lambda: held(*make())))

    assert {"params", "step"} <= ocp.PyTreeCheckpointer().restore(tmp_path / "saved").keys()
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(item), strict=True):
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.parametrize("gates", [1, 3, 4])
def test_moments_of_a_part_of_a_cell_are_split_as_the_cell_is(gates):
    bias = "dense_h" if gates == 4 else "dense_i"
    numbers = Numbers()
    cell = {"dense_i": {"kernel": numbers(2, 3 * gates)}, "dense_h": {"kernel": numbers(3, 3 * gates)}}
    cell[bias]["bias"] = numbers(3 * gates)

    def label(params):
        return jax.tree.map(lambda leaf: "weights" if leaf.ndim > 1 else "others", params)

    tx = optax.multi_transform({"weights": TXS["adam"], "others": TXS["momentum"]}, label)
    item = worlds.Training({"cell": cell, "out": numbers.dense()}, tx, {})
    state = nnx.state(item)
    expected = numbers.like(_arrays(state))
    for path, leaf in nnx.to_flat_state(state):
        if tuple(path) in expected:
            leaf.set_value(jnp.asarray(expected[tuple(path)]))

    tree = to_linen(state)

    assert "dense_i" not in tree["params"]["cell"]
    assert "dense_i" not in tree["opt_state"]["inner_states"]["weights"]["inner_state"][0]["mu"]["cell"]
    found = from_linen(tree, state, unexpected="error")
    check(_arrays(found), expected)


def _arrays(state):
    """Returns the arrays of a state; what `optax.masked` leaves out has none."""
    pairs = ((tuple(path), leaf.get_value()) for path, leaf in nnx.to_flat_state(state))
    return {path: np.asarray(value) for path, value in pairs if hasattr(value, "shape")}


class _Decoder(nnx.Module):
    def __init__(self):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))
        self.attention.init_cache((1, 4, 8))


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_a_decoder_s_cache_is_not_saved_and_is_the_target_s_again(tmp_path, layout):
    model = _Decoder()
    for at in range(3):
        model.attention(jnp.full((1, 1, 8), at + 1.0))
    save(tmp_path / "saved", model, layout=layout)
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(tmp_path / "saved").item_metadata.tree
    names = {str(key) for path, _ in jax.tree_util.tree_flatten_with_path(stored)[0] for key in path}
    assert not any("cache" in name for name in names)
    # What the target holds stays, and an abstract target begins with an empty cache.
    kept, fresh = restore(tmp_path / "saved", model), restore(tmp_path / "saved", nnx.eval_shape(_Decoder))
    for result, index in ((kept, 3), (fresh, 0)):
        assert int(result.attention.cache_index[...]) == index
        for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            have = dict(nnx.to_flat_state(nnx.state(result, nnx.Param)))[path]
            np.testing.assert_array_equal(have[...], value[...])
    np.testing.assert_array_equal(kept.attention.cached_key[...], model.attention.cached_key[...])
    assert not np.any(np.asarray(fresh.attention.cached_key[...]))


class _Cells(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.OptimizedLSTMCell(4, 4, rngs=nnx.Rngs(0)) for _ in range(3)])
        self.out = nnx.Linear(4, 6, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("form", ["scanned", "listed"])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_cells_under_adafactor_are_saved_as_the_checkpoint_had_them(tmp_path, form, momentum):
    numbers, tx = Numbers(), optax.adafactor(1e-3, min_dim_size_to_factor=2, momentum=momentum)
    cells = [
        {f"i{gate}": {"kernel": numbers(4, 4)} for gate in "ifgo"}
        | {f"h{gate}": numbers.dense(4, 4) for gate in "ifgo"}
        for _ in range(3)
    ]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *cells)
    layers = {"layers": stack} if form == "scanned" else {f"layers_{at}": c for at, c in enumerate(cells)}
    params = layers | {"out": numbers.dense(4, 6)}

    def number(leaf):
        return leaf if leaf.shape == (1,) else numbers(*leaf.shape, dtype=leaf.dtype)

    opt_state = jax.tree.map(number, jax.tree.map(np.asarray, tx.init(params)))
    tree = {"params": params, "opt_state": opt_state, "step": np.int32(3)}
    path = write(tmp_path, tree)

    def make():
        model = _Cells()
        return {"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param)}

    target = nnx.eval_shape(make)
    weights = restore(path, {"model": nnx.eval_shape(_Cells)})["model"]
    np.testing.assert_array_equal(
        weights.layers[1].dense_h.bias[...], np.concatenate([cells[1]["h" + gate]["bias"] for gate in "ifgo"])
    )
    try:
        plan = plan_restore(path, target)
        result = restore(path, target)
        save(tmp_path / "back", result, renames=plan)
    except RestoreError as error:
        # Factors of one gate do not tell those of the fused gates.
        said = str(error)
        assert "v_row" in said or "v_col" in said
        return
    with ocp.PyTreeCheckpointer() as checkpointer:
        have = worlds.flat(checkpointer.restore(tmp_path / "back"))
    want = worlds.flat(jax.tree.map(np.asarray, tree))
    assert {tuple(map(str, path)) for path in have} == {tuple(map(str, path)) for path in want}


class _Plain(nnx.Module):
    def __init__(self, size, use_bias=True):
        layers = [nnx.Linear(4, 5, use_bias=use_bias, rngs=nnx.Rngs(0)) for _ in range(size)]
        self.layers = nnx.List(layers)


def test_listed_layers_under_adafactor_that_became_a_stack_go_back_with_all_their_zeros(tmp_path):
    numbers, tx = Numbers(), optax.adafactor(1e-3, min_dim_size_to_factor=2)
    params = {f"layers_{at}": {"kernel": numbers(4, 5)} for at in range(3)}

    def number(leaf):
        return leaf if leaf.shape == (1,) else numbers(*leaf.shape, dtype=leaf.dtype)

    opt_state = jax.tree.map(number, jax.tree.map(np.asarray, tx.init(params)))
    path = write(tmp_path, {"params": params, "opt_state": opt_state, "step": np.int32(3)})
    stack = {"layers": {"kernel": np.zeros((3, 4, 5), np.float32)}}
    target = worlds.training_target(stack, tx)
    plan, result = plan_restore(path, target), restore(path, target)
    save(tmp_path / "back", result, renames=plan)
    with ocp.PyTreeCheckpointer() as checkpointer:
        back = checkpointer.restore(tmp_path / "back")
    check(
        {"params": back["params"], "v": back["opt_state"][0]}, {"params": params, "v": opt_state[0]._asdict()}
    )


@pytest.mark.parametrize("use_bias", [False, True])
def test_scanned_layers_under_adafactor_go_back_to_one_stack(tmp_path, use_bias):
    numbers, tx = Numbers(), optax.adafactor(1e-3, min_dim_size_to_factor=2)
    params = {"layers": {"kernel": numbers(3, 4, 5)} | ({"bias": numbers(3, 5)} if use_bias else {})}

    def number(leaf):
        return leaf if leaf.shape == (1,) else numbers(*leaf.shape, dtype=leaf.dtype)

    opt_state = jax.tree.map(number, jax.tree.map(np.asarray, tx.init(params)))
    path = write(tmp_path, {"params": params, "opt_state": opt_state, "step": np.int32(3)})

    def make():
        model = _Plain(3, use_bias)
        return {"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param)}

    target = nnx.eval_shape(make)
    # The stacked bias (3, 5) has factors, a layer's (5,) has a moment: those are missing, by name.
    policy = {nnx.PathContains("bias"): "warn", ...: "error"} if use_bias else "error"
    result, plan = restore(path, target, policy=policy), plan_restore(path, target, policy=policy)
    if use_bias:
        # Beside the bias of the stack no restore would look for the moments of one layer's.
        with pytest.raises(RuleError, match="9 leaves of the state would not be found again"):
            save(tmp_path / "back", result, renames=plan)
        return
    save(tmp_path / "back", result, renames=plan)
    with ocp.PyTreeCheckpointer() as checkpointer:
        back = checkpointer.restore(tmp_path / "back")
    np.testing.assert_array_equal(back["params"]["layers"]["kernel"], params["layers"]["kernel"])
    for name in ("v_row", "v_col", "v"):
        want = getattr(opt_state[0], name)["layers"]["kernel"]
        np.testing.assert_array_equal(back["opt_state"][0][name]["layers"]["kernel"], want)


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_a_module_that_two_networks_share_is_shared_again(tmp_path, layout):
    def make():
        embed = nnx.Embed(6, 4, rngs=nnx.Rngs(0))

        class Net(nnx.Module):
            def __init__(self, seed):
                self.embed, self.out = embed, nnx.Linear(4, 3, rngs=nnx.Rngs(seed))

        return {"gen": Net(1), "disc": Net(2)}

    nets = make()
    try:
        save(tmp_path / "saved", nets, layout=layout)
    except ValueError as error:
        said = str(error)
        assert "embed" in said
        return
    result = restore(tmp_path / "saved", nnx.eval_shape(make))
    for name, net in nets.items():
        np.testing.assert_array_equal(result[name].out.kernel[...], net.out.kernel[...])
        np.testing.assert_array_equal(result[name].embed.embedding[...], net.embed.embedding[...])
    assert result["gen"].embed.embedding is result["disc"].embed.embedding


class Normed(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.bn = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(4))


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_a_functional_train_state_comes_back_with_statistics_and_random_state(tmp_path, layout):
    def make():
        model = Normed()
        return {
            "params": model,
            "opt_state": optax.trace(0.9).init(nnx.to_pure_dict(nnx.state(model, nnx.Param))),
        }

    item, numbers = make(), Numbers()
    nnx.update(item["params"], numbers.like(nnx.state(item["params"])))
    save(tmp_path / "saved", item, layout=layout)

    result = restore(tmp_path / "saved", nnx.eval_shape(make))

    want, have = (worlds.flat(nnx.state(each["params"])) for each in (item, result))
    assert want.keys() == have.keys()
    for path, value in want.items():
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value, have[path] = map(jax.random.key_data, (value, have[path]))
        np.testing.assert_array_equal(have[path], value, err_msg=str(path))
