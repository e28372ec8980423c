"""The tree that a Linen program would store, from every container that NNX state comes in."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler.planning.core.paths import tree_of
from orbax_nnx_handler.storage.saving.arrange import Arranged, arrange, is_nnx


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([Block(rngs), Block(rngs)])


class Train(nnx.Module):
    def __init__(self, model: nnx.Module, optimizer: nnx.Optimizer | None):
        self.model = model
        self.optimizer = optimizer


class Averaged(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.model = Net(rngs)
        self.average = Net(rngs)
        self.optimizer = nnx.Optimizer(self.model, optax.adam(0.1), wrt=nnx.Param)
        self.rngs = rngs


class Counted(nnx.Variable):
    pass


@flax.struct.dataclass
class FunctionalTrainState:
    step: int
    params: Any
    opt_state: Any


def to_linen_tree(item: Any, layout: Any = "linen", tx: Any = None) -> Any:
    """Returns the tree whose leaves are the item's own values: before cells, rules and steps."""
    arranged = arrange(item, layout, tx)
    values = {at: leaf.value for at, leaf in arranged.leaves.items()}
    return tree_of({**arranged.empty, **values}, lists=True)


def placed(arranged: Arranged) -> set[str]:
    return {"/".join(map(str, at)) for at in (*arranged.leaves, *arranged.empty)}


def net() -> Net:
    return Net(nnx.Rngs(0))


def adam(model: nnx.Module) -> nnx.Optimizer:
    return nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)


def with_optimizer() -> tuple[Net, nnx.Optimizer]:
    model = net()
    return model, adam(model)


def paths(tree: Any) -> set[str]:
    """Returns the paths of a tree's leaves, None and empty containers included."""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is None or not node_has_children(node)
    )
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat}


def node_has_children(node: Any) -> bool:
    return isinstance(node, dict | list) and bool(node)


BLOCK = {"dense/bias", "dense/kernel", "norm/bias", "norm/scale"}
PARAMS = {f"layers_{i}/{leaf}" for i in (0, 1) for leaf in BLOCK}
STATISTICS = {f"batch_stats/layers_{i}/norm/{leaf}" for i in (0, 1) for leaf in ("mean", "var")}
MODEL = {f"params/{leaf}" for leaf in PARAMS} | STATISTICS
ADAM = {"opt_state/0/count"} | {f"opt_state/0/{slot}/{leaf}" for slot in ("mu", "nu") for leaf in PARAMS}
RANDOM = {("model", "layers", i, "drop", "rngs", leaf) for i in "01" for leaf in ("count", "key")}


CONTAINERS: dict[str, Callable[[], Any]] = {
    "a tuple": with_optimizer,
    "a list": lambda: [*with_optimizer()],
    "a dict": lambda: dict(zip(("model", "optimizer"), with_optimizer(), strict=True)),
    "a dict of other names": lambda: dict(zip(("net", "opt"), with_optimizer(), strict=True)),
    "a module": lambda: Train(*with_optimizer()),
    "ModelAndOptimizer": lambda: nnx.ModelAndOptimizer(net(), optax.adam(0.1)),
}


@pytest.mark.parametrize("form", ["module", "state", "abstract module", "abstract state"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_of_model_and_optimizer_gives_the_same_train_state(name: str, form: str) -> None:
    item = nnx.eval_shape(CONTAINERS[name]) if "abstract" in form else CONTAINERS[name]()
    if "state" in form:
        item = nnx.state(item)

    arranged = arrange(item, "linen")

    assert arranged.certain == ("module" in form)
    # A State has forgotten the empty state that ends `adam`.
    ending = {"opt_state/1"} if arranged.certain else set()
    assert placed(arranged) == MODEL | ADAM | ending | {"step"}
    assert set(arranged.random) == RANDOM


def test_a_dict_of_states_is_read_like_a_dict_of_modules() -> None:
    model, optimizer = with_optimizer()

    tree = to_linen_tree({"model": nnx.state(model), "optimizer": nnx.state(optimizer)})

    assert paths(tree) == MODEL | ADAM | {"step"}


def test_states_split_by_variable_type_are_one_model() -> None:
    graph_and_states = nnx.split(net(), nnx.Param, ...)

    arranged = arrange(graph_and_states)

    assert placed(arranged) == MODEL
    assert set(arranged.random) == RANDOM


def test_a_model_alone_is_a_variables_dict() -> None:
    assert paths(to_linen_tree(net())) == MODEL
    assert paths(to_linen_tree(nnx.state(net(), nnx.Param))) == {f"params/{leaf}" for leaf in PARAMS}


def test_an_optimizer_alone_keeps_its_moments_lists_apart_from_its_chains() -> None:
    _, optimizer = with_optimizer()

    assert paths(to_linen_tree(optimizer)) == ADAM | {"opt_state/1", "step"}
    assert paths(to_linen_tree(nnx.state(optimizer))) == ADAM | {"step"}


def test_a_linen_train_state_around_nnx_state_keeps_optax_own_containers() -> None:
    params = nnx.state(net(), nnx.Param)
    item = FunctionalTrainState(step=3, params=params, opt_state=optax.adam(0.1).init(params))

    arranged = arrange(item)

    assert arranged.certain
    assert placed(arranged) == {f"params/{leaf}" for leaf in PARAMS} | ADAM | {"opt_state/1", "step"}


def test_maxtext_keeps_weights_two_levels_down_and_everything_else_aside() -> None:
    model, optimizer = with_optimizer()

    arranged = arrange(Train(model, optimizer), "maxtext")

    moments = {f"opt_state/0/{slot}/params/{leaf}" for slot in ("mu", "nu") for leaf in PARAMS}
    aside = {f"nnx_aux/model/layers/{i}/norm/{leaf}" for i in (0, 1) for leaf in ("mean", "var")}
    aside |= {"nnx_aux/" + "/".join(path) for path in RANDOM}
    weights = {f"params/params/{leaf}" for leaf in PARAMS}
    assert placed(arranged) == weights | moments | aside | {"opt_state/0/count", "opt_state/1", "step"}
    assert not arranged.random


def test_maxtext_without_an_optimizer_still_strips_the_models_attribute() -> None:
    tree = to_linen_tree(Train(net(), None), "maxtext")

    assert set(tree["params"]["params"]) == {"layers_0", "layers_1"}
    assert set(tree["nnx_aux"]) == {"model"}


def test_what_lies_beside_model_and_optimizer_keeps_its_path_under_nnx_aux() -> None:
    arranged = arrange(Averaged(nnx.Rngs(0)))

    aside = {f"nnx_aux/average/{leaf.replace('layers_', 'layers/')}" for leaf in PARAMS}
    aside |= {f"nnx_aux/average/layers/{i}/norm/{leaf}" for i in (0, 1) for leaf in ("mean", "var")}
    assert placed(arranged) == MODEL | ADAM | {"opt_state/1", "step"} | aside
    assert {path[0] for path in arranged.random} == {"model", "average", "rngs"}


def test_of_several_models_that_fit_an_optimizer_its_own_is_told_by_name() -> None:
    model, optimizer = with_optimizer()
    kernel = model.layers[0].dense.kernel.get_raw_value()

    for name in ("model", "net"):  # The other one is called an average.
        named = to_linen_tree({"ema": net(), name: model, "opt": optimizer})
        assert named["params"]["layers_0"]["dense"]["kernel"] is kernel

    unnamed = to_linen_tree({"other": net(), "net": model, "opt": optimizer})
    assert unnamed["net"]["params"]["layers_0"]["dense"]["kernel"] is kernel
    assert {"other", "net", "opt"} <= unnamed.keys()


def test_values_pass_through_untouched() -> None:
    model, optimizer = with_optimizer()

    tree = to_linen_tree((model, optimizer))

    assert tree["params"]["layers_0"]["dense"]["kernel"] is model.layers[0].dense.kernel.get_raw_value()
    assert tree["opt_state"][0]["count"] is optimizer.opt_state[0].count.get_raw_value()
    assert tree["step"] is optimizer.step.get_raw_value()


def test_caches_and_intermediates_are_not_stored() -> None:
    model = net()
    model.seen = nnx.Intermediate(jnp.ones(2))
    model.cache = nnx.Cache(jnp.ones(2))

    for flavour in ("linen", "maxtext"):
        tree = to_linen_tree(model, flavour)

        assert not any("seen" in path or "cache" in path for path in paths(tree))


def test_a_custom_variable_is_its_own_collection_for_linen_and_aside_for_maxtext() -> None:
    model = net()
    model.layers[1].seen = Counted(jnp.ones(2))

    linen, maxtext = to_linen_tree(model), to_linen_tree(model, "maxtext")

    assert paths(linen) == MODEL | {"Counted/layers_1/seen"}
    assert "nnx_aux/model/layers/1/seen" in paths(maxtext)


def test_an_array_outside_any_variable_has_no_home_in_linen() -> None:
    model = net()
    model.mask = jnp.ones(3)

    assert paths(to_linen_tree(model)) == MODEL | {"nnx_aux/model/mask"}


def test_a_nested_list_and_a_gate_called_if_get_their_linen_names() -> None:
    state = nnx.from_flat_state(
        [
            (("grid", 0, 1, "kernel"), nnx.Param(jnp.ones(1))),
            (("cell", "if_", "kernel"), nnx.Param(jnp.ones(1))),
            (("scales", ("kernel", "g")), nnx.Param(jnp.ones(1))),
        ]
    )

    tree = to_linen_tree(state)

    assert paths(tree) == {"params/grid_0_1/kernel", "params/cell/if/kernel", "params/scales/kernel/g"}


def test_an_inner_list_of_the_model_is_no_chain_of_the_optimizer() -> None:
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    for item in ((model, optimizer), nnx.state((model, optimizer)), optimizer, nnx.state(optimizer)):
        tree = to_linen_tree(item)

        assert set(tree["opt_state"][0]["trace"]["layers_0"]) == {"kernel", "bias"}


def test_a_module_called_opt_state_is_no_optimizer() -> None:
    model = net()
    model.opt_state = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    for item in (model, nnx.state(model)):
        assert paths(to_linen_tree(item)) == MODEL | {"params/opt_state/kernel", "params/opt_state/bias"}


def test_a_parameter_that_the_optimizer_leaves_alone_has_no_moment() -> None:
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = optax.masked(optax.adam(0.1), lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree))

    tree = to_linen_tree((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))

    assert tree["opt_state"]["inner_state"][0]["mu"]["bias"] is None
    assert tree["opt_state"]["inner_state"][0]["mu"]["kernel"].shape == (2, 2)


def test_two_leaves_of_one_linen_name_are_refused() -> None:
    state = nnx.from_flat_state(
        [(("layers", 0, "w"), nnx.Param(jnp.ones(1))), (("layers_0", "w"), nnx.Param(jnp.ones(1)))]
    )

    with pytest.raises(ValueError, match="would both be stored") as caught:
        to_linen_tree(state)

    assert str(caught.value) == (
        "layers/0/w and layers_0/w would both be stored at params/layers_0/w.\n"
        "hint: a Linen program tells its variables apart by name; save the parts as items of their own, "
        "or rename one of the two."
    )


def test_a_leaf_inside_another_leaf_is_refused_in_either_order() -> None:
    leaves = [(("a", 0), nnx.Param(jnp.ones(1))), (("a_0", "w"), nnx.Param(jnp.ones(1)))]

    for order in (leaves, leaves[::-1]):
        with pytest.raises(ValueError, match="would both be stored"):
            to_linen_tree(nnx.from_flat_state(order))


def test_random_state_alone_is_stored_in_the_tree() -> None:
    state = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))

    assert paths(to_linen_tree(state)) == {"nnx_aux/model/rngs/count", "nnx_aux/model/rngs/key"}
    assert not arrange(state).random


def test_a_lone_variable_is_refused_and_what_the_hint_says_works() -> None:
    with pytest.raises(ValueError, match="a lone Param has no name to be stored under"):
        to_linen_tree(nnx.Param(jnp.ones(2)))

    assert paths(to_linen_tree({"name": nnx.Param(jnp.ones(2))})) == {"params/name"}


def test_models_and_optimizers_side_by_side_are_each_stored_below_their_key() -> None:
    gen, disc = net(), net()

    tree = to_linen_tree({"gen": gen, "disc": disc, "g_opt": adam(gen), "d_opt": adam(disc)})

    both = to_linen_tree({"model": gen, "optimizer": adam(gen)})
    for model, optimizer in (("gen", "g_opt"), ("disc", "d_opt")):
        assert paths(tree[model]) | paths(tree[optimizer]) == paths(both)
        assert tree[optimizer].keys() == {"opt_state", "step"}


def test_what_the_error_says_of_optimizers_without_a_model_works() -> None:
    gen, disc = net(), net()

    with pytest.raises(ValueError, match="2 optimizers") as raised:
        to_linen_tree({"words": nnx.Embed(3, 2, rngs=nnx.Rngs(0)), "g_opt": adam(gen), "d_opt": adam(disc)})

    assert str(raised.value) == (
        "the item holds 2 optimizers (d_opt, g_opt), a Linen train state just one.\n"
        "hint: put each beside its model, below a key of their own ({'gen': {'model': ..., 'optimizer': "
        "...}, ...}), or save each with its model as an item of its own (ocp.args.Composite)."
    )
    one = {"model": gen, "optimizer": adam(gen)}
    both = to_linen_tree({"gen": one, "disc": {"model": disc, "optimizer": adam(disc)}})
    assert paths(both["gen"]) == paths(both["disc"]) == paths(to_linen_tree(one))


def test_two_models_without_names_are_refused() -> None:
    with pytest.raises(ValueError, match="two parts of the item hold"):
        to_linen_tree((nnx.state(net()), nnx.state(net())))


def test_a_transformation_of_another_optimizer_is_refused() -> None:
    state = nnx.state(with_optimizer())

    with pytest.raises(ValueError, match="in the item, not in tx's state"):
        to_linen_tree(state, tx=optax.sgd(0.1))


def test_a_transformation_completes_a_state_of_part_of_the_parameters() -> None:
    model = nnx.LoRA(3, 2, 2, base_module=nnx.Linear(3, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    tx = optax.adamw(0.1)
    item = (model, nnx.Optimizer(model, tx, wrt=nnx.LoRAParam))

    completed, real = to_linen_tree(nnx.state(item), tx=tx), to_linen_tree(item)

    assert paths(completed) == paths(real)
    assert len(completed["opt_state"]) == 3


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (net(), True),
        (nnx.state(net()), True),
        ({"model": net()}, True),
        ((1, nnx.Param(jnp.ones(1))), True),
        ({"a": np.ones(2)}, False),
        ([], False),
        (None, False),
        (nnx.to_pure_dict(nnx.state(net())), False),
    ],
)
def test_nnx_state_is_told_from_everything_else(item: Any, expected: bool) -> None:
    assert is_nnx(item) is expected
