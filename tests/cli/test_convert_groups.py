"""`convert --scan`, `--unscan` and `--to` without a factory: planned as a restore is, under the same laws."""

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from tests.cli.conftest import stock
from tests.laws.worlds import Numbers, check, flat, write

ADAM = optax.adam(1e-3)


def train_state(numbers, params, **beside):
    return {
        "params": params,
        "opt_state": numbers.optimizer(ADAM, params),
        "step": numbers(1, dtype=np.int32),
    } | beside


def apart(tree, group, axis=0):
    """Returns a dict with the group's stack as one subtree a layer, by NumPy alone."""
    layers = tree[group]
    count = next(iter(flat(layers).values())).shape[axis]
    rest = {key: part for key, part in tree.items() if key != group}
    return rest | {f"{group}_{at}": _layer(layers, axis, at) for at in range(count)}


def _layer(tree, axis, at):
    if isinstance(tree, dict):
        return {key: _layer(part, axis, at) for key, part in tree.items()}
    return np.take(tree, at, axis)


def moved(state, change):
    """Returns a train state with a change made to its parameters and to each of their moments."""
    first, *others = state["opt_state"]
    adam = first | {name: change(first[name]) for name in ("mu", "nu")}
    return state | {"params": change(state["params"]), "opt_state": [adam, *others]}


def test_moments_follow_their_own_parameter_where_a_module_is_called_mu(cli, tmp_path) -> None:
    numbers = Numbers()
    params = {"mu": {"layers": {"w": numbers(3, 4, 5)}}, "layers": {"w": numbers(3, 4, 5)}}
    state = train_state(numbers, params)
    path = write(tmp_path, state)

    said = cli("convert", path, tmp_path / "out", "--unscan", "layers", "--axis", 0)

    assert said.status == 0, said.err
    check(stock(tmp_path / "out"), moved(stock(path), lambda tree: apart(tree, "layers")))


def test_a_group_within_a_group_is_taken_apart_after_it(cli, tmp_path) -> None:
    numbers = Numbers()
    state = train_state(numbers, {"layers": {"blocks": {"w": numbers(2, 3, 4)}, "b": numbers(2, 7)}})
    path = write(tmp_path, state)

    groups = ("--unscan", "layers", "--unscan", "layers_0/blocks", "--axis", 0)
    said = cli("convert", path, tmp_path / "out", *groups)

    assert said.status == 0, said.err

    def change(tree):
        tree = apart(tree, "layers")
        return tree | {"layers_0": apart(tree["layers_0"], "blocks")}

    check(stock(tmp_path / "out"), moved(stock(path), change))


def test_statistics_and_copies_are_taken_apart_each_from_its_own_collection(cli, tmp_path) -> None:
    numbers = Numbers()
    params = {"layers": {"w": numbers(3, 4)}}
    beside = {
        "batch_stats": {"layers": {"mean": numbers(3, 4)}},
        "ema_params": {"layers": {"w": numbers(3, 4)}},
        "cache": {"layers": {"index": numbers(3, 2)}},
    }
    path = write(tmp_path, train_state(numbers, params, **beside))

    said = cli("convert", path, tmp_path / "out", "--unscan", "layers", "--axis", 0)

    assert said.status == 0, said.err
    found = stock(tmp_path / "out")
    check({name: found[name] for name in beside}, {n: apart(tree, "layers") for n, tree in beside.items()})


def test_a_layer_that_is_stored_twice_is_refused(cli, tmp_path) -> None:
    numbers = Numbers()
    path = write(tmp_path, {"params": {name: {"w": numbers(4)} for name in ("h_0", "h_00", "h_1")}})

    said = cli("convert", path, tmp_path / "out", "--scan", "h", "--axis", 0)

    assert said.status == 1
    assert "layers cannot be stacked on axis 0" in said.err
    assert "params/h_00/w" in said.err


def test_a_stack_beside_layers_of_its_name_is_refused(cli, tmp_path) -> None:
    numbers = Numbers()
    params = {"h_0": {"w": numbers(4)}, "h_1": {"w": numbers(4)}, "h": {"w": numbers(2, 4)}}
    path = write(tmp_path, {"params": params})

    for way in ("--scan", "--unscan"):
        said = cli("convert", path, tmp_path / "out", way, "h", "--axis", 0)
        assert said.status == 1
        assert "would be written to a path that another leaf has" in said.err


def test_two_train_states_keep_their_owners_in_another_layout(cli, tmp_path) -> None:
    numbers = Numbers()
    tree = {name: train_state(numbers, {"head": {"w": numbers(2, 3)}}) for name in ("gen", "disc")}
    path = write(tmp_path, tree)

    said = cli("convert", path, tmp_path / "out", "--to", "maxtext")
    back = cli("convert", tmp_path / "out", tmp_path / "back", "--to", "linen", "--layout", "maxtext")

    assert (said.status, back.status) == (0, 0), said.err + back.err
    source, found = stock(path), stock(tmp_path / "out")
    for name in tree:
        check(found[name]["params"], {"params": source[name]["params"]})
        moments = {key: {"params": source[name]["opt_state"][0][key]} for key in ("mu", "nu")}
        check({key: found[name]["opt_state"][0][key] for key in moments}, moments)
    assert cli("diff", path, tmp_path / "back", "--values").status == 0


def test_a_train_state_below_a_key_moves_as_a_whole(cli, tmp_path) -> None:
    numbers = Numbers()
    state = train_state(numbers, {"head": {"w": numbers(2, 3)}})
    path = write(tmp_path, {"model": state, "data": {"position": np.int32(5)}})

    said = cli("convert", path, tmp_path / "out", "--to", "linen")

    assert said.status == 0, said.err
    found, source = stock(tmp_path / "out"), stock(path)
    assert found.keys() == {"params", "opt_state", "step", "data"}
    check(
        {key: found[key] for key in ("params", "step")}, {k: source["model"][k] for k in ("params", "step")}
    )
    assert len(found["opt_state"]) == len(source["model"]["opt_state"])


@pytest.mark.parametrize("beside", [(), ("head",)])
def test_a_module_called_params_or_a_collection_is_a_question_that_its_hint_answers(
    cli, tmp_path, beside
) -> None:
    numbers = Numbers()
    params = {name: {"kernel": numbers(2, 3)} for name in ("params", *beside)}
    path = write(tmp_path, {"params": params})

    said = cli("convert", path, tmp_path / "out", "--to", "linen")
    modules = cli("convert", path, tmp_path / "modules", "--to", "linen", "--layout", "variables")
    collections = cli("convert", path, tmp_path / "collections", "--to", "linen", "--layout", "maxtext")

    assert said.status == 1
    assert said.err.endswith("hint: --layout maxtext or --layout variables says which.\n")
    assert (modules.status, collections.status) == (0, 0)
    check(stock(tmp_path / "modules"), {"params": params})
    check(stock(tmp_path / "collections"), params)


def test_an_optimizer_that_optax_did_not_arrange_is_refused_with_a_way_out(cli, tmp_path) -> None:
    numbers = Numbers()
    layers = {"layers": {"kernel": numbers(3, 4, 5)}}
    states = {"layers": {"kernel": {"m": numbers(3, 4, 5), "v": numbers(3, 4, 5)}}}
    tree = {"target": layers, "state": {"step": np.int32(3), "param_states": states}}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "in", tree)
    words = ("convert", tmp_path / "in", tmp_path / "out", "--unscan", "layers", "--axis", 0)

    said = cli(*words)
    weights = cli(*words, "--weights-only")

    assert said.status == 1
    assert said.err.endswith("hint: pass --weights-only.\n")
    assert weights.status == 0, weights.err
    check(stock(tmp_path / "out"), {"target": apart(layers, "layers")})


def test_numbers_of_a_regrouped_tree_are_those_of_the_source(cli, tmp_path) -> None:
    numbers = Numbers()
    params = {f"h_{at}": {"kernel": numbers(3, 3), "bias": numbers(3)} for at in range(3)}
    path = write(tmp_path, train_state(numbers, params))

    cli("convert", path, tmp_path / "there", "--scan", "h", "--axis", 1)
    said = cli("convert", tmp_path / "there", tmp_path / "back", "--unscan", "h", "--axis", 1)

    assert said.status == 0, said.err
    check(stock(tmp_path / "back"), stock(path))
    layers = [params[f"h_{at}"]["kernel"] for at in range(3)]
    np.testing.assert_array_equal(stock(tmp_path / "there")["params"]["h"]["kernel"], np.stack(layers, 1))


@pytest.mark.parametrize("group", ["layers", "mu"])
@pytest.mark.parametrize("model", ["model", "net"])
def test_an_nnx_state_is_regrouped_with_its_moments(cli, tmp_path, model, group) -> None:
    numbers = Numbers()
    params = {group: {"w": numbers(3, 4, 5), "b": numbers(3, 5)}, "out": numbers.dense()}
    moments = {"0": {name: numbers.like(params) for name in ("mu", "nu")} | {"count": numbers(1)}}
    state = {model: params, "optimizer": {"opt_state": moments, "step": numbers(1)}}
    path = write(tmp_path, state)

    said = cli("convert", path, tmp_path / "out", "--unscan", f"{model}/{group}", "--axis", 0)

    assert said.status == 0, said.err
    found = stock(tmp_path / "out")
    check(found[model], apart(params, group))
    for name in ("mu", "nu"):
        check(found["optimizer"]["opt_state"]["0"][name], apart(moments["0"][name], group))

    again = cli("convert", tmp_path / "out", tmp_path / "again", "--scan", f"{model}/{group}", "--axis", 0)

    assert again.status == 0, again.err
    check(stock(tmp_path / "again"), state)


def test_what_adafactor_does_not_use_is_one_zero_of_a_stack_as_of_a_layer(cli, tmp_path) -> None:
    numbers, tx = Numbers(), optax.adafactor(1e-2, min_dim_size_to_factor=4)
    params = {"layers": {"w": numbers(3, 4, 5), "b": numbers(3, 5)}}
    state = numbers.optimizer(tx, params)
    state = jax.tree.map(lambda leaf: np.zeros_like(leaf) if leaf.shape == (1,) else leaf, state)
    path = write(tmp_path, {"params": params, "opt_state": state, "step": numbers(1, dtype=np.int32)})

    said = cli("convert", path, tmp_path / "out", "--unscan", "layers", "--axis", 0)

    assert said.status == 0, said.err
    found = stock(tmp_path / "out")
    expected = jax.eval_shape(tx.init, apart(params, "layers"))
    assert {path: leaf.shape for path, leaf in flat(found["opt_state"]).items()} == {
        path: leaf.shape for path, leaf in flat(expected).items()
    }
    for at in range(3):
        check(found["opt_state"][0]["v_row"][f"layers_{at}"]["w"], state[0].v_row["layers"]["w"][at])
        check(found["opt_state"][0]["v"][f"layers_{at}"]["b"], state[0].v["layers"]["b"][at])

    again = cli("convert", tmp_path / "out", tmp_path / "again", "--scan", "layers", "--axis", 0)

    assert again.status == 0, again.err
    check(stock(tmp_path / "again"), stock(path))


@pytest.mark.parametrize("columns", [6, 7, 5])
def test_factored_moments_of_layers_on_the_second_axis_keep_the_axis_that_optax_factors(
    cli, tmp_path, columns
) -> None:
    numbers, tx = Numbers(), optax.adafactor(1e-2, min_dim_size_to_factor=4)
    params = {"layers": {"w": numbers(6, 3, columns), "b": numbers(5, 3)}}
    state = numbers.optimizer(tx, params)
    state = jax.tree.map(lambda leaf: np.zeros_like(leaf) if leaf.shape == (1,) else leaf, state)
    path = write(tmp_path, {"params": params, "opt_state": state, "step": numbers(1, dtype=np.int32)})
    names = {"v_row": "w", "v_col": "w", "v": "b"}
    axes = {name: getattr(state[0], name)["layers"][leaf].shape.index(3) for name, leaf in names.items()}
    assert sorted(axes[name] for name in ("v_row", "v_col")) == [0, 1]

    said = cli("convert", path, tmp_path / "out", "--unscan", "layers", "--axis", 1)

    assert said.status == 0, said.err
    found = stock(tmp_path / "out")
    for name, leaf in names.items():
        whole = getattr(state[0], name)["layers"][leaf]
        for at in range(3):
            layer = np.take(whole, at, axes[name])
            check(found["opt_state"][0][name][f"layers_{at}"][leaf], layer)

    again = cli("convert", tmp_path / "out", tmp_path / "again", "--scan", "layers", "--axis", 1)

    assert again.status == 0, again.err
    check(stock(tmp_path / "again"), stock(path))


def test_factored_moments_that_lack_the_axis_of_the_layers_are_refused_and_the_weights_alone_are_not(
    cli, tmp_path
) -> None:
    numbers, tx = Numbers(), optax.adafactor(1e-2, min_dim_size_to_factor=4)
    params = {f"layers_{at}": {"w": numbers(4, 4)} for at in range(4)}
    path = write(
        tmp_path, {"params": params, "opt_state": numbers.optimizer(tx, params), "step": np.int32(3)}
    )

    said = cli("convert", path, tmp_path / "out", "--scan", "layers", "--axis", 1)

    assert said.status == 1
    assert "1 moment cannot follow its layers on this axis" in said.err
    assert "hint: pass --weights-only." in said.err
    said = cli("convert", path, tmp_path / "out", "--scan", "layers", "--axis", 1, "--weights-only")
    assert said.status == 0, said.err
    stacked = np.stack([params[f"layers_{at}"]["w"] for at in range(4)], 1)
    check(stock(tmp_path / "out")["params"]["layers"]["w"], stacked)


FACTORED, BY_AXES = optax.adafactor(1e-2, min_dim_size_to_factor=2), optax.sm3(1e-2)


@pytest.mark.parametrize(
    ("tx", "way"),
    [(FACTORED, "unscan"), (BY_AXES, "scan"), (BY_AXES, "unscan")],
    ids=["adafactor", "sm3", "sm3 back"],
)
def test_moments_that_one_arrangement_alone_has_are_refused_and_the_weights_alone_are_not(
    cli, tmp_path, tx, way
) -> None:
    numbers = Numbers()
    layers = {f"h_{at}": {"w": numbers(4, 4), "b": numbers(4)} for at in range(3)}
    stack = {"h": jax.tree.map(lambda *parts: np.stack(parts), *layers.values())}
    params, other = (layers, stack) if way == "scan" else (stack, layers)
    state = {"params": params, "opt_state": numbers.optimizer(tx, params), "step": np.int32(3)}
    words = ("convert", write(tmp_path, state), tmp_path / "out", f"--{way}", "h", "--axis", 0)

    said = cli(*words)
    weights = cli(*words, "--weights-only")

    assert said.status == 1
    assert "cannot follow" in said.err
    assert "on this axis" in said.err
    assert said.err.endswith("hint: pass --weights-only.\n")
    assert weights.status == 0, weights.err
    check(stock(tmp_path / "out")["params"], other)


@pytest.mark.parametrize("spelt", ["gen/layers", "gen/params/layers"])
def test_a_group_of_one_of_several_networks_is_taken_apart_and_stacked_alone(cli, tmp_path, spelt) -> None:
    numbers = Numbers()
    state = {
        name: train_state(numbers, {"layers": {"w": numbers(3, 3, 5)}, "out": {"w": numbers(3, 4)}})
        for name in ("gen", "disc")
    }
    path = write(tmp_path, state)

    said = cli("convert", path, tmp_path / "apart", "--unscan", spelt, "--axis", 1)
    back = cli("convert", tmp_path / "apart", tmp_path / "back", "--scan", spelt, "--axis", 1)

    assert (said.status, back.status) == (0, 0), said.err + back.err
    before = stock(path)
    wanted = before | {"gen": moved(before["gen"], lambda tree: apart(tree, "layers", axis=1))}
    check(stock(tmp_path / "apart"), wanted)
    assert flat(stock(tmp_path / "apart")).keys() == flat(wanted).keys()
    check(stock(tmp_path / "back"), before)
    assert flat(stock(tmp_path / "back")).keys() == flat(before).keys()


def test_statistics_are_stacked_on_the_axis_that_is_said_where_their_shapes_fit_others(cli, tmp_path) -> None:
    numbers = Numbers()
    layers = {f"layers_{at}": {"norm": {"mean": numbers(3)}} for at in range(3)}
    weights = {f"layers_{at}": {"norm": {"scale": numbers(3)}} for at in range(3)}
    path = write(tmp_path, {"params": weights, "batch_stats": layers})

    said = cli("convert", path, tmp_path / "out", "--scan", "layers", "--axis", 0)

    assert said.status == 0, said.err
    found = stock(tmp_path / "out")
    for collection, right in (("params", weights), ("batch_stats", layers)):
        check(apart(found[collection], "layers"), right)


def test_an_axis_that_shapes_leave_open_is_asked_for_with_the_checkpoint_named(cli, tmp_path) -> None:
    numbers = Numbers()
    params = {"layers": {"w": numbers(4, 4, 5)}}
    path = write(tmp_path, {"params": params, "batch_stats": {"layers": {"mean": numbers(4, 4)}}})

    said = cli("convert", path, tmp_path / "out", "--to", "linen", "--unscan", "layers", "--axis", 0)

    assert said.status == 1
    assert "the layers of 'batch_stats/layers' can be stacked on axis 0 or 1" in said.err
    assert f"checkpoint: {path}" in said.err.replace("\n            ", "")


@pytest.mark.parametrize("maxtext", [False, True])
def test_statistics_and_a_copy_beside_the_parameters_are_stacked_and_taken_apart(
    cli, tmp_path, maxtext
) -> None:
    numbers = Numbers()

    def model():
        layers = {f"layers_{at}": {"up": {"w": numbers(5, 7)}} for at in range(3)}
        return {"decoder": layers | {"decoder_norm": {"scale": numbers(5)}}}

    def statistics():
        return {"decoder": {f"layers_{at}": {"norm": {"mean": numbers(5)}} for at in range(3)}}

    params = {"params": model()} if maxtext else model()
    state = train_state(numbers, params, ema_params=model())
    (params if maxtext else state)["batch_stats"] = statistics()
    path = write(tmp_path, state)

    said = cli("convert", path, tmp_path / "out", "--scan", "decoder/layers", "--axis", 1)
    back = cli("convert", tmp_path / "out", tmp_path / "back", "--unscan", "decoder/layers", "--axis", 1)

    assert (said.status, back.status) == (0, 0), said.err + back.err
    before, found = flat(stock(path)), flat(stock(tmp_path / "out"))
    groups = {}
    for at, value in before.items():
        name = tuple("layers" if str(key).startswith("layers_") else key for key in at)
        groups.setdefault(name, []).append(value)
    stacked = {at: np.stack(parts, 1) if "layers" in at else parts[0] for at, parts in groups.items()}
    check(found, stacked)
    assert found.keys() == stacked.keys()
    check(stock(tmp_path / "back"), stock(path))
    assert flat(stock(tmp_path / "back")).keys() == before.keys()


def test_a_collection_whose_shapes_do_not_tell_its_axis_is_taken_apart_where_it_is_named(
    cli, tmp_path
) -> None:
    numbers = Numbers()
    params = {"layers": {"scale": numbers(3, 3), "w": numbers(4, 3, 5)}}
    state = train_state(numbers, params, batch_stats={"layers": {"mean": numbers(3, 3)}})
    path = write(tmp_path, state)
    asked = ("--unscan", "layers", "--axis", 1)

    said = cli("convert", path, tmp_path / "out", *asked)

    assert said.status == 1
    assert "the layers of 'batch_stats/layers' can be stacked on axis 0 or 1" in said.err
    assert "add --unscan batch_stats/layers if the program stacked that collection on axis 1 too" in said.err
    assert "renames=" not in said.err

    both = cli("convert", path, tmp_path / "both", *asked, "--unscan", "batch_stats/layers")
    alone = cli("convert", path, tmp_path / "alone", "--unscan", "batch_stats/layers", "--axis", 0)

    assert (both.status, alone.status) == (0, 0), both.err + alone.err
    before = stock(path)
    wanted = moved(before, lambda tree: apart(tree, "layers", axis=1))
    check(stock(tmp_path / "both"), wanted | {"batch_stats": apart(before["batch_stats"], "layers", axis=1)})
    check(stock(tmp_path / "alone"), before | {"batch_stats": apart(before["batch_stats"], "layers")})
    assert flat(stock(tmp_path / "alone")["params"]).keys() == flat(before["params"]).keys()
