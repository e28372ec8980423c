"""Several networks, each with params and an optimizer of its own, under other names in the target."""

import itertools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import from_linen, plan_restore, suggest
from tests.planning.suggesting.proposals import Model

TX = optax.adam(1e-3)
SIZES = {"actor": {"hidden": (5, 8), "logits": (8, 3)}, "critic": {"hidden": (5, 8), "value": (8, 1)}}
NAMES = {"hidden": "body", "logits": "policy", "value": "out"}


class Network(nnx.Module):
    def __init__(self, sizes, rngs):
        for name, (features, outputs) in sizes.items():
            setattr(self, NAMES[name], nnx.Linear(features, outputs, rngs=rngs))


def stored(keys):
    """Returns two train states in which no element is like another one."""
    numbers = itertools.count()

    def counted(leaf):
        if not leaf.ndim:
            return leaf
        return np.asarray([next(numbers) for _ in range(leaf.size)], "f").reshape(leaf.shape)

    tree = {}
    for step, (key, sizes) in enumerate(zip(keys, SIZES.values(), strict=True), 3):
        params = {n: {"kernel": np.zeros(shape), "bias": np.zeros(shape[1:])} for n, shape in sizes.items()}
        params = jax.tree.map(counted, params)
        tree[key] = {"params": params, "opt_state": jax.tree.map(counted, TX.init(params)), "step": step}
    return tree


def in_tuples():
    pairs = {}
    for key, sizes in zip(("policy_net", "value_net"), SIZES.values(), strict=True):
        model = Network(sizes, nnx.Rngs(0))
        pairs[key] = (model, nnx.Optimizer(model, TX, wrt=nnx.Param))
    return pairs


def in_dicts():
    return {
        key: {"model": model, "optimizer": optimizer}
        for key, (model, optimizer) in zip(SIZES, in_tuples().values(), strict=True)
    }


@pytest.mark.parametrize("keys", [("actor", "critic"), ("pi", "vf")], ids="/".join)
@pytest.mark.parametrize("make", [in_tuples, in_dicts])
def test_each_network_and_its_optimizer_are_found_under_other_names(keys, make):
    tree, target = stored(keys), nnx.eval_shape(make)

    found = suggest(tree, target)

    assert found.unmatched_wanted == ()
    assert found.confidence == "likely"
    restored = from_linen(tree, target, renames=found.renames)
    for state, (key, own) in zip(tree.values(), restored.items(), strict=True):
        model, optimizer = own.values() if isinstance(own, dict) else own
        for name in state["params"]:
            layer, moments = getattr(model, NAMES[name]), optimizer.opt_state[0]
            np.testing.assert_array_equal(layer.kernel, state["params"][name]["kernel"], err_msg=key)
            np.testing.assert_array_equal(
                moments.mu[NAMES[name]].kernel, state["opt_state"][0].mu[name]["kernel"], err_msg=key
            )
        assert int(optimizer.step[...]) == state["step"]


@pytest.mark.parametrize("other", ["logits", "hidden"])
def test_names_that_networks_use_otherwise_are_renamed_by_network(other, monkeypatch):
    monkeypatch.setitem(SIZES, "critic", {"hidden": (5, 8), "value": (8, 1)})
    tree = stored(("actor", "critic"))
    tree["critic"]["params"] = {
        {"hidden": other, "value": "hidden" if other == "logits" else "value"}[name]: leaf
        for name, leaf in tree["critic"]["params"].items()
    }
    tree["critic"]["opt_state"] = TX.init(tree["critic"]["params"])

    found = suggest(tree, nnx.eval_shape(in_dicts))

    assert found.unmatched_wanted == ()
    restored = from_linen(tree, nnx.eval_shape(in_dicts), renames=found.renames)
    body = restored["critic"]["model"].body.kernel
    np.testing.assert_array_equal(body, tree["critic"]["params"][other]["kernel"])


def test_the_place_of_a_list_of_layers_in_a_tuple_is_no_number_of_a_layer() -> None:
    def made():
        model = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(0))])
        return model, nnx.Optimizer(model, TX, wrt=nnx.Param)

    params = {
        str(at): {"kernel": np.zeros(shape, "f"), "bias": np.zeros(shape[1], "f")}
        for at, shape in enumerate([(2, 3), (3, 4)])
    }

    found = suggest({"params": params, "opt_state": TX.init(params), "step": 1}, nnx.eval_shape(made))

    assert (
        found.confidence != "certain"
    )  # Numbers of two levels; which are the layers' is not asked of anyone.


def fused(tree, made):
    """Returns the weights or moments of a network as the target has them."""
    qkv = [np.concatenate([tree["layers"][name]["kernel"][at] for name in "qkv"], 1) for at in range(2)]
    layers = {("blocks", at, "qkv", "kernel"): value for at, value in enumerate(qkv)}
    return {("inp", "kernel"): tree["embed"]["kernel"], **layers} | {
        (ours, "kernel"): tree[theirs]["kernel"] for ours, theirs in made.items()
    }


def trained(width, names, numbers):
    """Returns a train state with queries, keys and values in stacked layers, no element like another one."""
    shapes = {"embed": (3, width), **dict.fromkeys(names, (width, width))}
    params = {name: {"kernel": np.zeros(shape, "f")} for name, shape in shapes.items()}
    params["layers"] = {name: {"kernel": np.zeros((2, width, width), "f")} for name in "qkv"}

    def counted(leaf):
        return np.asarray([next(numbers) for _ in range(np.size(leaf))], leaf.dtype).reshape(leaf.shape)

    params = jax.tree.map(counted, params)
    return {"params": params, "opt_state": jax.tree.map(counted, TX.init(params)), "step": width}


@pytest.mark.parametrize("made", [{}, {"one": "foo", "two": "bar"}], ids=["fused", "asked"])
def test_optimizers_follow_what_is_fused_and_what_answers_a_question(made):
    numbers, widths = itertools.count(1), {"gen": 8, "disc": 6}
    tree = {name: trained(width, [*made.values()], numbers) for name, width in widths.items()}

    def make():
        states = {}
        for name, width in zip(("generator", "discriminator"), widths.values(), strict=True):
            blocks = {at: {"qkv": {"kernel": (width, 3 * width)}} for at in range(2)}
            others = {ours: {"kernel": (width, width)} for ours in made}
            model = Model({"inp": {"kernel": (3, width)}, "blocks": blocks, **others})
            states[name] = {"model": model, "optimizer": nnx.Optimizer(model, TX, wrt=nnx.Param)}
        return states

    found = suggest(tree, nnx.eval_shape(make), init=make)

    one = [None] * len(found.questions)
    for answers in itertools.product([0, 1], repeat=len(found.questions)):
        state = nnx.state(from_linen(tree, nnx.eval_shape(make), renames=found.answered(answers)))
        values = dict(nnx.to_flat_state(state))
        # In the order of the questions, those of `disc` and then those of `gen`.
        for (name, other), answer in zip(
            (("disc", "discriminator"), ("gen", "generator")), answers or (1, 1), strict=True
        ):
            adam = tree[name]["opt_state"][0]
            pairs = made if answer else dict(zip(made, [*made.values()][::-1], strict=True))
            for above, held in (
                (("model",), tree[name]["params"]),
                (("optimizer", "opt_state", 0, "mu"), adam.mu),
                (("optimizer", "opt_state", 0, "nu"), adam.nu),
            ):
                for path, value in fused(held, pairs).items():
                    np.testing.assert_array_equal(values[(other, *above, *path)].get_value(), value)
            assert values[other, "optimizer", "step"].get_value() == tree[name]["step"]
        one = [*answers[:1], *one[1:]]
        plan = plan_restore(tree, nnx.eval_shape(make), renames=found.answered(one))
        assert {path[0] for path in plan.missing} == ({"generator"} if answers else set())
