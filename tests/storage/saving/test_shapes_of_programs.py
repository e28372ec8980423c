"""Train states as programs hold them: each comes back into its own target, element by element."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from orbax_nnx_handler import plan_restore, restore, save
from tests.sampled import checkered

TX = optax.adam(0.1)


class Net(nnx.Module):
    def __init__(self, width: int = 2):
        self.first = nnx.Linear(3, width, rngs=nnx.Rngs(0))
        self.last = nnx.Linear(width, 1, rngs=nnx.Rngs(1))


class Wrapped(nnx.Module):
    """A network whose only child has the names of another whole network."""

    def __init__(self) -> None:
        self.qs = Net(5)


class Own(nnx.Variable[Any]):
    """A type of a program's own."""


class Part(nnx.Module):
    """A network with a Variable that is a parameter in another one."""

    def __init__(self, kind: type[nnx.Variable[Any]]):
        self.table, self.scale = kind(jnp.zeros((2, 3))), nnx.Param(jnp.zeros(3))


class WithAverage(TrainState):
    ema_params: Any


def optimizer(model: nnx.Module) -> nnx.Optimizer[Any]:
    return nnx.Optimizer(model, TX, wrt=nnx.Param)


def with_its_optimizer(width: int) -> dict[str, Any]:
    model = Net(width)
    return {"model": model, "optimizer": optimizer(model)}


def fields(**more: Any) -> dict[str, Any]:
    """Returns a train state of States and optax's own containers, as functional programs keep it."""
    params = nnx.state(Net())
    return {"params": params, "opt_state": TX.init(params), **more}


def flax_state(kind: type[TrainState] = TrainState, **more: Any) -> TrainState:
    state = kind.create(apply_fn=len, params=nnx.state(Net()), tx=TX, **more)
    return state.replace(step=jnp.int32(0))


def side_by_side(*names: str, trained: Callable[[], nnx.Module] = Net) -> dict[str, Any]:
    model = trained()
    return {names[0]: model, **{name: trained() for name in names[1:]}, "opt": optimizer(model)}


def actor_and_critic(**more: Any) -> dict[str, Any]:
    actor, critic = Net(), Wrapped()
    pair = {"actor": actor, "critic": critic}
    return pair | {"actor_opt": optimizer(actor), "critic_opt": optimizer(critic)} | more


def own_types() -> dict[str, Any]:
    gen, disc = Part(Own), Part(nnx.Param)
    return {"gen": gen, "disc": disc, "gen_opt": optimizer(gen), "disc_opt": optimizer(disc)}


def lists() -> dict[str, Any]:
    nets = [Net(), Net(4)]
    return {"nets": nets, "optimizers": [optimizer(net) for net in nets]}


def one_each(kind: Callable[[Any], Any], *more: Any) -> dict[str, Any]:
    """Returns a list, or another group, of one network, and one of its optimizer."""
    net = Net()
    return {"nets": kind((net, *more)), "optimizers": kind((optimizer(net),))}


def deeper(*names: str, beside: bool = False) -> dict[str, Any]:
    """Returns networks in one group, and each optimizer below a level of its own in another."""
    nets = {name: Net() for name in names}
    optimizers = {name: {"optimizer": optimizer(net)} for name, net in nets.items()}
    return {
        "optimizers": optimizers,
        **(nets if beside else {"nets": {key: {"core": nets[key]} for key in nets}}),
    }


def one_for_all_of_a_group() -> dict[str, Any]:
    nets = {"enc": Net(), "dec": Net()}
    return {"nets": nets, "training": {"optimizer": optimizer(nnx.Dict(nets))}}


def optimizers_alone(item: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in item.items() if name.endswith(("opt", "optimizers"))}


class Encoder(nnx.Module):
    """Layers that a Linen program calls `layers_0` and `layers_1`."""

    def __init__(self) -> None:
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=nnx.Rngs(0)) for _ in range(2)])


class Head(nnx.Module):
    """A network on an encoder that another one may have as well."""

    def __init__(self, encoder: Encoder, name: str) -> None:
        self.encoder = encoder
        setattr(self, name, nnx.Linear(3, 1, rngs=nnx.Rngs(0)))


def two_heads(*, nested: bool) -> dict[str, Any]:
    encoder = Encoder()
    heads = {"actor": Head(encoder, "policy"), "critic": Head(encoder, "value")}
    if nested:
        return {name: {"model": head, "optimizer": optimizer(head)} for name, head in heads.items()}
    return heads | {f"{name}_opt": optimizer(head) for name, head in heads.items()}


class Recurrent(nnx.Module):
    """A network of the cells whose gates Linen stores one by one."""

    def __init__(self) -> None:
        self.lstm, self.gru = (cell(2, 3, rngs=nnx.Rngs(0)) for cell in (nnx.LSTMCell, nnx.GRUCell))


def one_of_both(key: str, network: Callable[[], nnx.Module] = Net) -> dict[str, Any]:
    both = nnx.Dict({"a": network(), "b": network()})
    return {"a": both["a"], "b": both["b"], key: {"opt": optimizer(both)}}


def among_trainings() -> dict[str, Any]:
    trained = with_its_optimizer(2)
    return {"enc": (enc := Net()), "opts": {"0": optimizer(enc)}, "trainings": {"1": trained}}


PROGRAMS: Mapping[str, Callable[[], Any]] = {
    "functional, a step in a Variable": lambda: fields(step=nnx.Variable(jnp.int32(0))),
    "functional, a step in a Param": lambda: fields(step=nnx.Param(jnp.int32(0))),
    "functional, with an average": lambda: fields(ema_params=nnx.state(Net())),
    "functional, with a target": lambda: fields(target_params=nnx.state(Net())),
    "functional, two": lambda: {"actor": fields(), "critic": fields()},
    "functional, below a key": lambda: {"agent": fields()},
    "flax, two": lambda: {"actor": flax_state(), "critic": flax_state()},
    "flax, with an average": lambda: flax_state(WithAverage, ema_params=nnx.state(Net())),
    "ModelAndOptimizer, two": lambda: {key: nnx.ModelAndOptimizer(Net(), TX, wrt=nnx.Param) for key in "ab"},
    "a network and its average": lambda: side_by_side("agent", "ema"),
    "two that no name tells apart": lambda: side_by_side("online", "target"),
    "two called networks": lambda: side_by_side("q_network", "target_network"),
    "one wraps another": actor_and_critic,
    "one wraps another, and its target": lambda: actor_and_critic(target_critic=Wrapped()),
    "a tuple with another network": lambda: (model := Net(), optimizer(model), Net()),
    "a name that is a parameter's in one network": own_types,
    "two on one encoder": lambda: two_heads(nested=False),
    "train states on one encoder": lambda: two_heads(nested=True),
    "lists": lists,
    "below a key, with an average": lambda: {"agent": side_by_side("net", "ema")},
    "nnx.Lists": lambda: {key: nnx.List(found) for key, found in lists().items()},
    "lists of one": lambda: one_each(list),
    "tuples of one": lambda: one_each(tuple),
    "nnx.Lists of one": lambda: one_each(nnx.List),
    "groups of one": lambda: one_each(lambda parts: dict(zip("ab", parts, strict=False))),
    "lists, one of two trained": lambda: one_each(list, Net()),
    "a network, its optimizer in a list": lambda: {"net": (net := Net()), "optimizers": [optimizer(net)]},
    "an optimizer below another key": lambda: {
        "net": (net := Net()),
        "ema": Net(),
        "training": {"optimizer": optimizer(net), "step": jnp.int32(0)},
    },
    "optimizers a level deeper": lambda: deeper("gen", "disc", beside=True),
    "networks and optimizers a level deeper": lambda: deeper("gen", "disc"),
    "one of each a level deeper": lambda: deeper("gen"),
    "a train state beside an optimizer that lies apart": lambda: {
        "gen": with_its_optimizer(2),
        **deeper("disc", beside=True),
    },
    "one optimizer of a whole group": one_for_all_of_a_group,
    "optimizers alone": lambda: optimizers_alone(actor_and_critic()),
    "optimizers of layers alone": lambda: optimizers_alone(two_heads(nested=False)),
    "optimizers alone in a list": lambda: optimizers_alone(lists()),
    "one optimizer of both below a key": lambda: one_of_both("training"),
    "one of several is a train state in a group": among_trainings,
    "one of both below a key, with cells": lambda: one_of_both("training", Recurrent),
    "one of both at unlike levels, with cells": lambda: {
        "model": (both := nnx.Dict({"a": Recurrent(), "net": Recurrent()}))["a"],
        "nets": {"net": both["net"]},
        "opt": optimizer(both),
    },
    "a network, and others by numbers": lambda: {
        "model": (net := Net()),
        "1": {"model": Net()},
        "opt": optimizer(net),
    },
    "train states below a key called params": lambda: {
        "params": {"gen": with_its_optimizer(2), "disc": with_its_optimizer(4)}
    },
    "lists of train states": lambda: {"agents": [with_its_optimizer(2), with_its_optimizer(4)]},
}


def numbered(item: Any) -> Any:
    """Returns the item with a number of its own in every element."""
    graph, state = nnx.split(item)
    counter = iter(range(1, 10_000))
    fill = jax.tree.map(
        lambda leaf: np.array([next(counter) for _ in range(leaf.size)], leaf.dtype).reshape(leaf.shape),
        state,
    )
    return nnx.merge(graph, fill)


def elements(item: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in jax.tree.leaves_with_path(nnx.state(item))
    }


@functools.cache
def built(program: str) -> tuple[Any, Any]:
    """Returns a program's item and its target, once for all layouts."""
    return numbered(PROGRAMS[program]()), nnx.eval_shape(PROGRAMS[program])


@pytest.mark.parametrize(("program", "layout"), checkered(PROGRAMS, ["linen", "maxtext"]))
def test_a_program_gets_its_own_train_states_back(program: str, layout: Any, tmp_path: Path) -> None:
    item, target = built(program)
    save(tmp_path / "item", item, layout=layout)

    found = restore(tmp_path / "item", target)

    np.testing.assert_equal(elements(found), elements(item))


def test_the_plan_says_what_is_read_as_a_save_of_the_target(tmp_path: Path) -> None:
    save(tmp_path / "item", one_of_both("training"))

    plan = plan_restore(tmp_path / "item", nnx.eval_shape(lambda: one_of_both("training")))

    assert plan.fits
    assert {item.evidence.words for item in plan.restored.values()} == {
        "where a save of the target stores it"
    }


@pytest.mark.parametrize("policy", ["error", "warn"])
def test_a_save_of_another_program_is_not_read_as_one_of_the_target(policy: Any, tmp_path: Path) -> None:
    item = one_of_both("training")
    save(tmp_path / "item", numbered(item))

    other = {"a": item["a"], "c": item["b"], "training": item["training"]}
    plan = plan_restore(tmp_path / "item", nnx.eval_shape(lambda: other), policy=policy)

    assert not any(path[0] == "c" for path in plan.restored)


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("nested", [False, True])
def test_moments_of_what_another_network_holds_are_named_as_their_own_optimizers_others(
    layout: Any, nested: bool, tmp_path: Path
) -> None:
    save(tmp_path / "item", two_heads(nested=nested), layout=layout)

    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.restore(tmp_path / "item")

    for name, own in (("actor", "policy"), ("critic", "value")):
        moments = stored[name if nested else f"{name}_opt"]["opt_state"][0]["mu"]
        moments = moments["params"] if layout == "maxtext" else moments
        assert moments.keys() == {"encoder", own}
        assert moments["encoder"].keys() == {"layers_0", "layers_1"}
