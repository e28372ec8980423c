"""Rules on several networks: what lies in one of them, and the optimizer and the step of each."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import UnstackLayers
from tests.planning.plans import Numbers, leaves_of, plan_of, values_of

tx = optax.adam(1e-3)


class Tower(nnx.Module):
    """Layers that Linen stacks, and a layer beside them."""

    def __init__(self, layers: str = "layers", head: str = "head") -> None:
        rngs = nnx.Rngs(0)
        setattr(self, layers, nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)]))
        setattr(self, head, nnx.Linear(8, 2, rngs=rngs))


def stacked(numbers: Numbers) -> dict[str, Any]:
    layers = {"kernel": numbers.array(3, 8, 8), "bias": numbers.array(3, 8)}
    return {"layers": layers, "head": {"kernel": numbers.array(8, 2), "bias": numbers.array(2)}}


def apart(tree: dict[str, Any], layers: str = "layers", head: str = "head") -> dict[str, Any]:
    """Returns what `Tower` has of a stacked tree."""
    return {
        layers: [jax.tree.map(lambda leaf, at=at: leaf[at], tree["layers"]) for at in range(3)],
        head: tree["head"],
    }


def adam(numbers: Numbers) -> list[Any]:
    return [
        {"count": numbers.array(1).astype(np.int32)[0], "mu": stacked(numbers), "nu": stacked(numbers)},
        None,
    ]


def trained(model: nnx.Module) -> dict[str, Any]:
    return {"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param)}


def assert_restored(target: Any, stored: Any, rules: Any, expected: Any) -> None:
    plan = plan_of(nnx.eval_shape(target), stored, rules, unexpected="error")
    plan.check()
    values = values_of(plan, stored)
    leaves = {"/".join(map(str, path)): leaf for path, leaf in leaves_of(expected).items()}
    assert sorted(values) == sorted(leaves)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(values[path], leaf, err_msg=path)


@pytest.mark.parametrize("copy", ["target_params", "ema_params"])
@pytest.mark.parametrize("model", ["online", "online/params"])
def test_a_copy_that_a_rule_makes_a_network_is_unstacked_as_the_model_is(copy: str, model: str) -> None:
    numbers = Numbers()
    stored = {"online": {"params": stacked(numbers), copy: stacked(numbers)}}

    assert_restored(
        lambda: {"q": Tower(), "q_target": Tower()},
        stored,
        [(f"online/{copy}", "q_target"), (model, "q")],
        {"q": apart(stored["online"]["params"]), "q_target": apart(stored["online"][copy])},
    )


@pytest.mark.parametrize("others", [(), ("target_params",)], ids=["alone", "beside another"])
@pytest.mark.parametrize(
    "rules",
    [
        [],
        [UnstackLayers("layers", "blocks/{i}", axis=0)],
        [UnstackLayers("layers", "blocks/{i}", axis=0), ("head", "out")],
    ],
    ids=["none", "unstacking", "every name"],
)
def test_a_missing_copy_is_pointed_out_under_the_rules_of_its_model(rules: Any, others: Any) -> None:
    numbers = Numbers()
    stored = {name: stacked(numbers) for name in ("params", "ema_params", *others)}
    names = ("blocks" if rules else "layers", "out" if len(rules) > 1 else "head")
    target = nnx.eval_shape(lambda: {"model": Tower(*names), "ema": Tower(*names)})

    error = plan_of(target, stored, rules).error()
    assert error is not None
    (hint,) = error.hints
    followed = plan_of(target, stored, **hint.arguments)

    expected = {"model": apart(stored["params"], *names), "ema": apart(stored["ema_params"], *names)}
    values = values_of(followed, stored)
    for path, leaf in leaves_of(expected).items():
        np.testing.assert_array_equal(values["/".join(map(str, path))], leaf, err_msg=str(path))


def fields(numbers: Numbers, names: Any = ("gen", "disc")) -> dict[str, Any]:
    """Returns one `params` with a network for each name, and an optimizer and a step for each beside it."""
    steps = {f"{name}_step": np.int32(5 + at) for at, name in enumerate(names)}
    stored = {"params": {name: stacked(numbers) for name in names}}
    return stored | {f"{name}_opt_state": adam(numbers) for name in names} | steps


def state(stored: dict[str, Any], name: str, step: str, layers: str, head: str) -> dict[str, Any]:
    """Returns what the target has of one of these networks, trained."""
    (chain, _) = stored[f"{name}_opt_state"]
    moments = {slot: apart(chain[slot], layers, head) for slot in ("mu", "nu")}
    optimizer = {"opt_state": [{"count": chain["count"], **moments}], "step": stored[step]}
    return {"model": apart(stored["params"][name], layers, head), "optimizer": optimizer}


EVERY_WEIGHT_RENAMED: dict[str, list[Any]] = {
    "both by name": [("layers", "blocks"), ("head", "out")],
    "both by name, from the network down": [
        (f"{name}/params/{old}", f"{name}/params/{new}")
        for name in ("gen", "disc")
        for old, new in (("layers", "blocks"), ("head", "out"))
    ],
    "the layers taken apart": [("head", "out"), UnstackLayers("layers", "blocks/{i}", axis=0)],
    "nothing": [],
}


@pytest.mark.parametrize("rules", EVERY_WEIGHT_RENAMED.values(), ids=EVERY_WEIGHT_RENAMED)
@pytest.mark.parametrize("optimizer", ["", "optimizer/"])
def test_an_optimizer_goes_to_its_network_also_where_rules_rename_every_weight(
    rules: Any, optimizer: str
) -> None:
    stored = fields(Numbers())
    layers, head = ("blocks", "out") if rules else ("layers", "head")
    networks = [(f"params/{name}", f"{name}/params") for name in ("gen", "disc")]
    networks += [
        (f"{name}_{field}", f"{name}/{optimizer}{field}")
        for name in ("gen", "disc")
        for field in ("opt_state", "step")
    ]

    assert_restored(
        lambda: {name: trained(Tower(layers, head)) for name in ("gen", "disc")},
        stored,
        networks + rules,
        {name: state(stored, name, f"{name}_step", layers, head) for name in ("gen", "disc")},
    )


@pytest.mark.parametrize(
    "renames",
    [
        [("layers", "blocks")],
        [UnstackLayers("layers", "blocks/{i}", axis=0)],
        [(f"{name}/params/layers", f"{name}/params/blocks") for name in ("gen", "disc")],
    ],
    ids=["by name", "taken apart", "from the network down"],
)
def test_an_optimizer_goes_to_the_network_that_lies_where_it_is_wanted_and_has_a_part_renamed(
    renames: Any,
) -> None:
    stored = fields(Numbers())
    params = stored.pop("params")
    stored |= {name: {"params": tree} for name, tree in params.items()}
    rules = [
        (f"{name}_{field}", f"{name}/{field}") for name in ("gen", "disc") for field in ("opt_state", "step")
    ]

    def target() -> Any:
        return {name: trained(Tower("blocks")) for name in ("gen", "disc")}

    error = plan_of(nnx.eval_shape(target), stored, renames).error()

    assert error is not None
    (hint,) = [hint for hint in error.hints if "renames" in hint.arguments]
    expected = {
        name: state(stored | {"params": params}, name, f"{name}_step", "blocks", "head")
        for name in ("gen", "disc")
    }
    for every in (hint.arguments["renames"], [*renames, *rules], [*rules, *renames]):
        assert_restored(target, stored, every, expected)


def test_an_optimizer_goes_to_its_network_of_one_module_that_a_rule_renames() -> None:
    numbers = Numbers()
    stored = fields(numbers)
    stored["params"] = {name: {"dense": tree["head"]} for name, tree in stored["params"].items()}
    for name in ("gen", "disc"):
        for slot in ("mu", "nu"):
            chain = stored[f"{name}_opt_state"][0]
            chain[slot] = {"dense": chain[slot]["head"]}
        del stored[f"{name}_step"]

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.up = nnx.Linear(8, 2, rngs=nnx.Rngs(0))

    def target() -> Any:
        models = {name: Net() for name in ("gen", "disc")}
        return {
            name: {"model": model, "optimizer": {"opt_state": trained(model)["optimizer"].opt_state}}
            for name, model in models.items()
        }

    rules = [(f"params/{name}", f"{name}/params") for name in ("gen", "disc")]
    rules += [(f"{name}_opt_state", f"{name}/opt_state") for name in ("gen", "disc")]

    def renamed(tree: Any) -> Any:
        return {"up": tree["dense"]}

    expected = {}
    for name in ("gen", "disc"):
        chain = stored[f"{name}_opt_state"][0]
        moments = {slot: renamed(chain[slot]) for slot in ("mu", "nu")}
        expected[name] = {
            "model": renamed(stored["params"][name]),
            "optimizer": {"opt_state": [{"count": chain["count"], **moments}]},
        }
    assert_restored(target, stored, [*rules, ("dense", "up")], expected)


@pytest.mark.parametrize("end", ["step", "optimizer/step"])
def test_one_step_beside_all_networks_is_given_to_one_and_leaves_each_its_optimizer(end: str) -> None:
    numbers = Numbers()
    stored = fields(numbers) | {"step": np.int32(7)}
    del stored["gen_step"]
    rules = [(f"params/{name}", f"{name}/params") for name in ("gen", "disc")]
    rules += [(f"{name}_opt_state", f"{name}/opt_state") for name in ("gen", "disc")]

    assert_restored(
        lambda: {name: trained(Tower()) for name in ("gen", "disc")},
        stored,
        [*rules, ("step", f"gen/{end}"), ("disc_step", "disc/step")],
        {
            "gen": state(stored, "gen", "step", "layers", "head"),
            "disc": state(stored, "disc", "disc_step", "layers", "head"),
        },
    )


@pytest.mark.parametrize(
    "left_out", [{"disc_opt_state"}, {"gen_step", "disc_step"}, {"gen_opt_state"}, {"gen", "disc"}]
)
def test_fields_that_are_stored_and_named_by_no_rule_are_proposed_and_never_begun_anew(
    left_out: set[str],
) -> None:
    stored = fields(Numbers())
    moved = [(f"params/{name}", f"{name}/params") for name in ("gen", "disc")]
    for name in ("gen", "disc"):
        pairs = [(f"{name}_{field}", f"{name}/{field}") for field in ("opt_state", "step")]
        moved += [pair for pair in pairs if not left_out & {name, pair[0]}]
    rules = [*moved, ("head", "out")]

    def target() -> Any:
        return {name: trained(Tower(head="out")) for name in ("gen", "disc")}

    error = plan_of(nnx.eval_shape(target), stored, rules).error()

    assert error is not None
    assert not any(hint.fills for hint in error.hints)
    (more,) = [hint.arguments["renames"] for hint in error.hints if "renames" in hint.arguments]
    assert_restored(
        target,
        stored,
        more,
        {name: state(stored, name, f"{name}_step", "layers", "out") for name in ("gen", "disc")},
    )


def in_one_opt_state(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns a tree with the optimizers of all networks in one field, each below its network's name."""
    optimizers = {name: stored[f"{name}_opt_state"] for name in ("gen", "disc")}
    others = {field: leaf for field, leaf in stored.items() if not field.endswith("_opt_state")}
    return others | {"opt_state": optimizers}


STEPS = [("gen_step", "gen/step"), ("disc_step", "disc/step")]


def divided(networks: dict[str, str]) -> list[tuple[str, str]]:
    """Returns rules that give each network the fields of another or its own."""
    kinds = ("params", "opt_state")
    return [(f"{kind}/{old}", f"{new}/{kind}") for old, new in networks.items() for kind in kinds]


@pytest.mark.parametrize(
    ("rules", "of"),
    [
        (divided({"gen": "gen", "disc": "disc"}), ("gen", "disc")),
        (divided({"{name}": "{name}"}), ("gen", "disc")),
        (divided({"gen": "disc", "disc": "gen"}), ("disc", "gen")),
    ],
    ids=["each by its name", "all by a place", "crossed"],
)
def test_rules_divide_one_opt_state_with_an_optimizer_for_each_network(rules: Any, of: Any) -> None:
    stored = fields(Numbers())

    assert_restored(
        lambda: {name: trained(Tower()) for name in ("gen", "disc")},
        in_one_opt_state(stored),
        [*rules, *STEPS],
        {
            name: state(stored, old, f"{name}_step", "layers", "head")
            for name, old in zip(("gen", "disc"), of, strict=True)
        },
    )


def test_rules_divide_one_opt_state_beside_networks_that_keep_their_place() -> None:
    stored = fields(Numbers())
    apart_from = in_one_opt_state(stored)
    networks = {name: {"params": tree} for name, tree in apart_from.pop("params").items()}

    assert_restored(
        lambda: {name: trained(Tower()) for name in ("gen", "disc")},
        apart_from | networks,
        [("opt_state/{name}", "{name}/opt_state"), *STEPS],
        {name: state(stored, name, f"{name}_step", "layers", "head") for name in ("gen", "disc")},
    )


def test_a_part_of_an_opt_state_that_no_rule_names_is_not_lent_to_another_network() -> None:
    stored = in_one_opt_state(fields(Numbers()))
    rules = [(f"params/{name}", f"{name}/params") for name in ("gen", "disc")]

    def target() -> Any:
        return {name: trained(Tower()) for name in ("gen", "disc")}

    plan = plan_of(nnx.eval_shape(target), stored, [*rules, ("opt_state/gen", "gen/opt_state")])

    assert any(path[:2] == ("gen", "optimizer") for path in plan.restored)
    assert not any(path[:2] == ("disc", "optimizer") for path in plan.restored)
