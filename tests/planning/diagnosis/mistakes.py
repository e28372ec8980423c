"""What engineers get wrong between a Linen program and an NNX program: trees in memory, and what is right.

No element of a tree is like another, so that a value tells where it comes from.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

ADAM = optax.adam(1e-3)


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A stored tree and a target that does not fit it.

    Attributes:
        tree: What the Linen program stored.
        make: Builds the target.
        truth: The right value of each wanted leaf, by its path.
        options: What was passed already.
    """

    tree: Mapping[str, Any]
    make: Callable[[], Any]
    truth: Mapping[str, Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])


MISTAKES: dict[str, Callable[[], Mistake]] = {}


def mistake(build: Callable[[], Mistake]) -> Callable[[], Mistake]:
    MISTAKES[build.__name__] = build
    return build


class Numbers:
    """Arrays no two elements of which are alike."""

    def __init__(self) -> None:
        self.next = 1

    def __call__(self, *shape: int, dtype: Any = "float32") -> np.ndarray:
        first, self.next = self.next, self.next + int(np.prod(shape))
        return np.arange(first, self.next).reshape(shape).astype(dtype)

    def like(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: self(*leaf.shape, dtype=leaf.dtype), tree)

    def dense(self, rows: int, columns: int) -> dict[str, np.ndarray]:
        return {"kernel": self(rows, columns), "bias": self(columns)}

    def state(self, params: Any, tx: optax.GradientTransformation = ADAM) -> dict[str, Any]:
        return {"params": params, "opt_state": self.like(tx.init(params)), "step": self(dtype="int32")}


def flat(tree: Any, at: str = "") -> dict[str, np.ndarray]:
    """Returns the arrays of a tree by path, below a prefix."""
    found: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
        keys = keys[:-1] if keys[-1:] == ["value"] else keys
        found["/".join([*([at] if at else []), *keys])] = np.asarray(leaf)
    return found


class Mlp(nnx.Module):
    def __init__(self, width: int = 4) -> None:
        self.fc1 = nnx.Linear(3, width, rngs=nnx.Rngs(0))
        self.fc2 = nnx.Linear(width, 5, rngs=nnx.Rngs(0))


def mlp(numbers: Numbers, width: int = 4) -> dict[str, Any]:
    return {"fc1": numbers.dense(3, width), "fc2": numbers.dense(width, 5)}


def optimizer(network: nnx.Module) -> nnx.Optimizer[Any]:
    return nnx.Optimizer(network, ADAM, wrt=nnx.Param)


def two(stored: tuple[str, str], networks: tuple[str, str], optimizers: tuple[str, str]) -> Mistake:
    """Returns two train states, and their optimizers beside the networks under names of their own."""
    numbers = Numbers()
    states = [numbers.state(mlp(numbers, width)) for width in (4, 6)]

    def make() -> dict[str, Any]:
        made = [Mlp(4), Mlp(6)]
        return dict(zip(networks, made, strict=True)) | {
            name: optimizer(one) for name, one in zip(optimizers, made, strict=True)
        }

    truth: dict[str, Any] = {}
    for state, network, its in zip(states, networks, optimizers, strict=True):
        truth |= flat(state["params"], network) | flat(state["opt_state"], f"{its}/opt_state")
        truth[f"{its}/step"] = state["step"]
    return Mistake(dict(zip(stored, states, strict=True)), make, truth)


@mistake
def optimizers_called_after_first_letters() -> Mistake:
    networks = ("generator", "discriminator")
    return two(networks, networks, ("g_optimizer", "d_optimizer"))


@mistake
def optimizers_called_after_shortened_names() -> Mistake:
    networks = ("encoder", "decoder")
    return two(networks, networks, ("enc_opt", "dec_opt"))


@mistake
def optimizers_whose_names_tell_nothing() -> Mistake:
    networks = ("actor", "critic")
    return two(networks, networks, ("pi_opt", "q_opt"))


@mistake
def an_optimizer_called_optimizer_beside_two_networks() -> Mistake:
    numbers = Numbers()
    actor, critic = mlp(numbers), mlp(numbers, 6)
    opt_state = numbers.like(ADAM.init(actor))
    tree = {"actor_params": actor, "critic_params": critic, "actor_opt_state": opt_state}

    def make() -> dict[str, Any]:
        made = Mlp()
        return {"actor": made, "critic": Mlp(6), "optimizer": optimizer(made)}

    truth = flat(actor, "actor") | flat(critic, "critic") | flat(opt_state, "optimizer/opt_state")
    return Mistake(tree | {"step": np.int32(7)}, make, truth | {"optimizer/step": np.uint32(7)})


@mistake
def optimizers_in_fields_by_network() -> Mistake:
    numbers = Numbers()
    actor, critic = mlp(numbers), mlp(numbers)
    kept = {name: numbers.like(ADAM.init(actor)) for name in ("actor_opt_state", "critic_opt_state")}
    tree = {"actor_params": actor, "critic_params": critic, **kept}

    def make() -> dict[str, Any]:
        made = [Mlp(), Mlp()]
        names = ("actor", "critic", "actor_tx", "critic_tx")
        return dict(zip(names, [*made, *map(optimizer, made)], strict=True))

    truth = flat(actor, "actor") | flat(critic, "critic")
    for network in ("actor", "critic"):
        truth |= flat(kept[f"{network}_opt_state"], f"{network}_tx/opt_state")
        truth[f"{network}_tx/step"] = np.uint32(0)
    return Mistake(tree, make, truth)


def trained(name: str) -> Callable[[], Any]:
    """Returns what builds a network and its optimizer, as most programs of NNX keep them."""

    def make() -> dict[str, Any]:
        network = Mlp()
        return {name: network, "optimizer": optimizer(network)}

    return make


def truth_of(state: Mapping[str, Any], network: str, its: str) -> dict[str, Any]:
    """Returns the right values of a train state whose network and optimizer have these names."""
    opt_state = flat(state["opt_state"], f"{its}/opt_state")
    return flat(state["params"], network) | opt_state | {f"{its}/step": state["step"]}


@mistake
def one_of_two_train_states() -> Mistake:
    numbers = Numbers()
    states = {name: numbers.state(mlp(numbers)) for name in ("gen", "disc")}
    return Mistake(states, trained("model"), truth_of(states["disc"], "model", "optimizer"))


@mistake
def train_states_under_other_names() -> Mistake:
    numbers = Numbers()
    states = {name: numbers.state(mlp(numbers)) for name in ("g", "d")}
    names = {"g": "generator", "d": "discriminator"}
    truth: dict[str, Any] = {}
    for short, name in names.items():
        truth |= truth_of(states[short], f"{name}/model", f"{name}/optimizer")
    return Mistake(states, lambda: {name: trained("model")() for name in names.values()}, truth)


@mistake
def one_of_two_train_states_whose_layers_are_stacked_in_the_target() -> Mistake:
    numbers = Numbers()
    layers = {name: [numbers.dense(4, 4) for _ in range(3)] for name in ("gen", "disc")}
    tree = {
        name: {"params": {f"layers_{at}": layer for at, layer in enumerate(each)}, "step": np.int32(1)}
        for name, each in layers.items()
    }
    make = nnx.vmap(lambda rngs: nnx.Dict(layers=nnx.Linear(4, 4, rngs=rngs)))
    stacked = {key: np.stack([layer[key] for layer in layers["gen"]]) for key in ("kernel", "bias")}
    return Mistake(tree, lambda: make(nnx.Rngs(0).fork(split=3)), flat(stacked, "layers"))


@mistake
def a_target_network_of_one_of_two_train_states() -> Mistake:
    numbers = Numbers()
    actor, critic, copy = (mlp(numbers) for _ in range(3))
    tree = {"actor": {"params": actor}, "critic": {"params": critic, "target_params": copy}}
    truth = flat(actor, "actor") | flat(critic, "critic") | flat(copy, "target_critic")
    return Mistake(tree, lambda: {name: Mlp() for name in ("actor", "critic", "target_critic")}, truth)


class Stack(nnx.Module):
    """Layers one by one or scanned, and a head."""

    def __init__(self, count: int, *, scanned: bool = False) -> None:
        rngs = nnx.Rngs(0)
        if scanned:
            self.layers = nnx.vmap(lambda rngs: nnx.Linear(4, 6, rngs=rngs))(rngs.fork(split=count))
        else:
            self.layers = nnx.List([nnx.Linear(4, 6, rngs=rngs) for _ in range(count)])
        self.head = nnx.Linear(6, 5, rngs=rngs)


def stack(numbers: Numbers, count: int, first: int = 0) -> dict[str, Any]:
    layers = {f"layers_{at}": numbers.dense(4, 6) for at in range(first, first + count)}
    return layers | {"head": numbers.dense(6, 5)}


def stack_truth(params: Mapping[str, Any], *, scanned: bool = False, at: str = "") -> dict[str, Any]:
    """Returns what a stack of the stored layers is, in their order, whatever their numbers are."""
    layers = [params[name] for name in sorted(params.keys() - {"head"})]
    held: Any = dict(enumerate(layers))
    if scanned:
        held = jax.tree.map(lambda *each: np.stack(each), *layers)
    return flat(params["head"], f"{at}head") | flat(held, f"{at}layers")


def numbered_from_one(*, scanned: bool) -> Mistake:
    numbers = Numbers()
    state = numbers.state(stack(numbers, 4, 1))

    def make() -> dict[str, Any]:
        network = Stack(4, scanned=scanned)
        return {"model": network, "optimizer": optimizer(network)}

    truth = stack_truth(state["params"], scanned=scanned, at="model/")
    for slot in ("mu", "nu"):
        moments = getattr(state["opt_state"][0], slot)
        truth |= stack_truth(moments, scanned=scanned, at=f"optimizer/opt_state/0/{slot}/")
    return Mistake(state, make, truth)


@mistake
def layers_numbered_from_one() -> Mistake:
    return numbered_from_one(scanned=False)


@mistake
def layers_numbered_from_one_into_a_stack_on_an_axis_that_shapes_leave_open() -> Mistake:
    return numbered_from_one(scanned=True)


@mistake
def layers_numbered_from_one_beside_others_that_are_not() -> Mistake:
    numbers = Numbers()
    params = {"encoder": stack(numbers, 3, 1), "decoder": stack(numbers, 3)}
    truth = stack_truth(params["encoder"], scanned=True, at="encoder/")
    truth |= stack_truth(params["decoder"], at="decoder/")
    make = lambda: {"encoder": Stack(3, scanned=True), "decoder": Stack(3)}  # noqa: E731
    return Mistake({"params": params}, make, truth)


@mistake
def layers_numbered_from_one_below_one_name() -> Mistake:
    params = stack(Numbers(), 3, 1)
    nested = {"layers": {str(at): params[f"layers_{at}"] for at in (1, 2, 3)}, "head": params["head"]}
    return Mistake({"params": nested}, lambda: Stack(3), stack_truth(params))


class Trainer(nnx.Module):
    """A model, its average, and the optimizer of one of them."""

    def __init__(self) -> None:
        self.model, self.ema = Mlp(), Mlp()
        self.optimizer = nnx.Optimizer(self.model, ADAM, wrt=nnx.Param)


@mistake
def a_train_state_below_a_key_beside_an_average() -> Mistake:
    numbers = Numbers()
    state, average = numbers.state(mlp(numbers)), mlp(numbers)
    truth = flat(state["params"], "model") | flat(average, "ema") | {"optimizer/step": state["step"]}
    truth |= flat(state["opt_state"], "optimizer/opt_state")
    return Mistake({"train_state": state, "ema": {"params": average}}, Trainer, truth)


def more_layers(*, scanned: tuple[bool, bool], options: Mapping[str, Any] | None = None) -> Mistake:
    """Five stored layers where three are wanted, each side one by one or stacked."""
    numbers = Numbers()
    params = stack(numbers, 5)

    def held(tree: Mapping[str, Any]) -> dict[str, Any]:
        layers = [tree[f"layers_{at}"] for at in range(5)]
        return {"layers": jax.tree.map(lambda *each: np.stack(each), *layers), "head": tree["head"]}

    state = numbers.state(params)
    adam = state["opt_state"][0]
    every = {"": params, "optimizer/opt_state/0/mu/": adam.mu, "optimizer/opt_state/0/nu/": adam.nu}
    truth: dict[str, Any] = {}
    for at, tree in every.items():
        kept = {name: tree[name] for name in ("layers_0", "layers_1", "layers_2", "head")}
        truth |= stack_truth(kept, scanned=scanned[1], at=at or "model/")
    if scanned[0]:
        moments = adam._replace(mu=held(adam.mu), nu=held(adam.nu))
        state |= {"params": held(params), "opt_state": (moments, *state["opt_state"][1:])}

    def make() -> dict[str, Any]:
        network = Stack(3, scanned=scanned[1])
        return {"model": network, "optimizer": optimizer(network)}

    return Mistake(state, make, truth, options or {})


@mistake
def more_layers_one_by_one_that_nothing_may_be_left_of() -> Mistake:
    return more_layers(scanned=(False, False), options={"unexpected": "error"})


@mistake
def more_layers_one_by_one_than_a_stack_holds() -> Mistake:
    return more_layers(scanned=(False, True))


@mistake
def more_stacked_layers_than_single_ones() -> Mistake:
    return more_layers(scanned=(True, False))


@mistake
def more_stacked_layers_than_a_stack_holds() -> Mistake:
    return more_layers(scanned=(True, True))


class Normed(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))


def normed(numbers: Numbers) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns parameters and statistics of a network with a norm."""
    params = {**mlp(numbers), "norm": {"scale": numbers(4), "bias": numbers(4)}}
    return params, {"norm": {"mean": numbers(4), "var": numbers(4)}}


def averaged(name: str) -> Callable[[], dict[str, Any]]:
    """Returns what builds a network, its optimizer and its average below a name."""

    def make() -> dict[str, Any]:
        network = Normed()
        return {"model": network, "optimizer": optimizer(network), name: Normed()}

    return make


@mistake
def an_average_of_the_parameters_and_of_the_statistics() -> Mistake:
    numbers = Numbers()
    params, statistics = normed(numbers)
    state = {**numbers.state(params), "batch_stats": statistics}
    copies = {f"ema_{name}": numbers.like(state[name]) for name in ("params", "batch_stats")}
    own = flat(params, "model") | flat(statistics, "model")
    return Mistake(
        state | copies,
        averaged("ema"),
        own | flat(copies["ema_params"], "ema") | flat(copies["ema_batch_stats"], "ema"),
    )


def statistics_stored_once(copy: str, below: str, networks: Mapping[str, str]) -> Mistake:
    """Returns a network and a copy of its parameters, both of which run on the same statistics."""
    numbers = Numbers()
    params, statistics = normed(numbers)
    tree = {**numbers.state(params), "batch_stats": statistics, copy: numbers.like(params)}
    truth = {
        path: value
        for name, field in networks.items()
        for path, value in (flat(tree[field], below + name) | flat(statistics, below + name)).items()
    }

    def make() -> dict[str, Any]:
        found = averaged("ema")() if networks.keys() == {"model", "ema"} else {n: Normed() for n in networks}
        return {below.rstrip("/"): found} if below else found

    return Mistake(tree, make, truth)


@mistake
def statistics_stored_once_for_a_model_and_its_average() -> Mistake:
    return statistics_stored_once("ema_params", "", {"model": "params", "ema": "ema_params"})


@mistake
def statistics_stored_once_for_a_model_and_its_average_below_a_level() -> Mistake:
    return statistics_stored_once("ema_params", "state/", {"model": "params", "ema": "ema_params"})


@mistake
def statistics_stored_once_for_an_average_that_has_the_name_it_is_stored_by() -> Mistake:
    return statistics_stored_once("ema_params", "", {"model": "params", "ema_params": "ema_params"})


@mistake
def statistics_stored_once_for_an_average_that_is_wanted_alone() -> Mistake:
    return statistics_stored_once("ema_params", "", {"ema": "ema_params"})


@mistake
def statistics_stored_once_for_a_network_and_the_one_that_follows_it() -> Mistake:
    return statistics_stored_once("target_params", "", {"online": "params", "target": "target_params"})


@mistake
def averages_beside_statistics_and_no_parameters() -> Mistake:
    numbers = Numbers()
    params, statistics = normed(numbers)
    truth = flat(params, "model") | flat(statistics, "model")
    return Mistake({"ema_params": params, "batch_stats": statistics}, lambda: {"model": Normed()}, truth)


def copied(numbers: Numbers) -> dict[str, Any]:
    """Returns a train state that keeps a copy of its network."""
    params = mlp(numbers)
    return {**numbers.state(params), "target_params": numbers.like(params)}


def truth_of_copied(state: Mapping[str, Any], network: str, copy: str, its: str) -> dict[str, Any]:
    return truth_of(state, network, its) | flat(state["target_params"], copy)


@mistake
def a_copy_below_a_level() -> Mistake:
    state = copied(Numbers())

    def make() -> dict[str, Any]:
        network = Mlp()
        return {"agent": {"q": network, "target": Mlp(), "optimizer": optimizer(network)}}

    return Mistake(state, make, truth_of_copied(state, "agent/q", "agent/target", "agent/optimizer"))


@mistake
def a_copy_in_a_tuple() -> Mistake:
    state = copied(Numbers())

    def make() -> tuple[Any, ...]:
        network = Mlp()
        return network, Mlp(), optimizer(network)

    return Mistake(state, make, truth_of_copied(state, "0", "1", "2"))


@mistake
def networks_and_a_copy_beside_them_in_a_tuple() -> Mistake:
    numbers = Numbers()
    networks = {"actor": mlp(numbers, 6), "critic": mlp(numbers)}
    tree = {name: numbers.state(params) for name, params in networks.items()}
    tree["target_critic"] = numbers.like(networks["critic"])
    parts = [networks["actor"], networks["critic"], tree["target_critic"]]
    truth = {path: leaf for at, part in enumerate(parts) for path, leaf in flat(part, str(at)).items()}
    return Mistake(tree, lambda: (Mlp(6), Mlp(), Mlp()), truth)
