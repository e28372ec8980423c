"""What a save keeps aside, restored into another arrangement of layers: statistics, streams, an average."""

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct

from orbax_nnx_handler import plan_restore, restore, save
from tests.sampled import sampled
from tests.storage.saving.layered import LAYERS, Model, assert_alike, numbered

MODELS = pytest.mark.parametrize(("saved", "wanted"), [("list", "scan"), ("scan", "list"), ("list", "list")])


@MODELS
@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_statistics_and_streams_follow_their_layers(
    tmp_path: Path, saved: str, wanted: str, layout: Literal["linen", "maxtext"]
) -> None:
    model = numbered(Model(saved))
    save(tmp_path / "item", model, layout=layout)
    target = nnx.eval_shape(lambda: Model(wanted))

    plan = plan_restore(tmp_path / "item", target)

    assert not plan.defaulted
    assert not plan.unexpected
    assert_alike(nnx.state(restore(tmp_path / "item", target)), nnx.state(model))


@pytest.mark.parametrize(
    ("layout", "level", "names"),
    sampled(["linen", "maxtext"], ["", "agent"], [("gen", "disc"), ("net_0", "net_1"), ("net_10", "net_2")]),
)
def test_statistics_and_streams_of_several_networks_follow_their_layers(
    tmp_path: Path, names: tuple[str, str], level: str, layout: Literal["linen", "maxtext"]
) -> None:
    models = numbered({name: Model("list", seed=at) for at, name in enumerate(names)})
    save(tmp_path / "item", {level: models} if level else models, layout=layout)
    target: Any = nnx.eval_shape(lambda: {name: Model("scan") for name in names})
    target = {level: target} if level else target

    plan = plan_restore(tmp_path / "item", target)

    assert not plan.defaulted
    restored = restore(tmp_path / "item", target)
    restored = restored[level] if level else restored
    for name in names:
        assert_alike(nnx.state(restored[name]), nnx.state(models[name]))


class Renamed(nnx.Module):
    def __init__(self, form: str):
        self.blocks = Model(form).layers


@MODELS
@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_statistics_and_streams_of_several_networks_follow_a_rule_for_their_layers(
    tmp_path: Path, saved: str, wanted: str, layout: Literal["linen", "maxtext"]
) -> None:
    models = numbered({name: Model(saved, seed=at) for at, name in enumerate(("gen", "disc"))})
    save(tmp_path / "item", models, layout=layout)
    target = nnx.eval_shape(lambda: {name: Renamed(wanted) for name in models})
    rule = ("layers", "blocks") if saved == "scan" else ("layers_{i}", "blocks_{i}")

    plan = plan_restore(tmp_path / "item", target, renames=[rule])

    assert not plan.defaulted
    restored = restore(tmp_path / "item", target, renames=[rule])
    for name, model in models.items():
        assert_alike({"layers": nnx.state(restored[name])["blocks"]}, nnx.state(model))


def test_streams_of_fewer_layers_than_are_wanted_are_said_to_be_so(tmp_path: Path) -> None:
    save(tmp_path / "item", Model("list", layers=2))
    target = nnx.eval_shape(lambda: Model("scan"))

    plan = plan_restore(tmp_path / "item", target, policy="init", init=lambda: Model("scan"))

    assert {item.reason for item in plan.defaulted.values()} == {
        "random state of which not all layers are stored"
    }


@pytest.mark.parametrize(
    ("layout", "trained", "forms"), sampled(["linen", "maxtext"], [False, True], MODELS.args[1])
)
def test_an_average_beside_the_model_follows_its_layers(
    tmp_path: Path, forms: tuple[str, str], trained: bool, layout: Literal["linen", "maxtext"]
) -> None:
    saved, wanted = forms

    def item(form: str) -> dict[str, Any]:
        model = Model(form)
        optimizer = {"optimizer": nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)} if trained else {}
        return {"model": model, "ema": Model(form, seed=1), **optimizer}

    source = numbered(item(saved))
    save(tmp_path / "item", source, layout=layout)

    restored = restore(tmp_path / "item", nnx.eval_shape(lambda: item(wanted)))

    for key in ("model", "ema"):
        assert_alike(nnx.state(restored[key]), nnx.state(source[key]))
    if trained:
        assert_alike(restored["optimizer"].opt_state[0].nu, source["optimizer"].opt_state[0].nu)


class WithHead(nnx.Module):
    def __init__(self, form: str, layers: int = LAYERS):
        if form == "scan":
            self.layers: Any = nnx.Dict(kernel=nnx.Param(jnp.zeros((layers, 5, 7))))
        else:
            self.layers = nnx.List([nnx.Dict(kernel=nnx.Param(jnp.zeros((5, 7)))) for _ in range(layers)])
        self.head = nnx.Linear(5, 5, rngs=nnx.Rngs(0))


@MODELS
@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_an_average_of_which_a_part_has_its_own_path_is_restored_whole(
    tmp_path: Path, saved: str, wanted: str, layout: Literal["linen", "maxtext"]
) -> None:
    source = numbered({key: WithHead(saved) for key in ("model", "ema")})
    save(tmp_path / "item", source, layout=layout)
    target = nnx.eval_shape(lambda: {key: WithHead(wanted) for key in ("model", "ema")})

    restored = restore(tmp_path / "item", target)

    for key in ("model", "ema"):
        assert_alike(nnx.state(restored[key]), nnx.state(source[key]))
        np.testing.assert_array_equal(restored[key].head.kernel[...], source[key].head.kernel[...])


def test_what_is_kept_aside_under_another_name_is_not_said_to_be_begun_anew(tmp_path: Path) -> None:
    save(tmp_path / "item", numbered({key: WithHead("list") for key in ("model", "ema")}))
    target = nnx.eval_shape(lambda: {"model": WithHead("list"), "averages": WithHead("list")})

    error = plan_restore(tmp_path / "item", target).error()

    assert error is not None
    assert "nothing is stored" not in str(error)
    assert not any(hint.fills for hint in error.hints)


@struct.dataclass
class TrainState:
    params: Any
    opt_state: Any
    step: Any
    batch_stats: Any


@pytest.mark.parametrize("kind", [TrainState, dict])
@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_the_statistics_of_a_functional_train_state_are_restored(
    tmp_path: Path, kind: type[Any], layout: Literal["linen", "maxtext"]
) -> None:
    model = numbered(Model("list"))
    params, statistics = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    opt_state = optax.adam(1e-3).init(params)
    item = kind(params=params, opt_state=opt_state, step=jnp.int32(7), batch_stats=statistics)
    save(tmp_path / "item", item, layout=layout)

    restored = restore(tmp_path / "item", jax.eval_shape(lambda: item))

    assert jax.tree.all(jax.tree.map(np.array_equal, item, restored))


class Dropping(nnx.Module):
    def __init__(self, name: str):
        self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        setattr(self, name, nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=5)))


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("make", [Dropping, lambda name: nnx.Dict(model=Dropping(name))])
def test_a_rule_that_is_for_random_state_alone_saves_back(
    tmp_path: Path, make: Any, layout: Literal["linen", "maxtext"]
) -> None:
    rules = [("stored", "drop")]
    source = numbered(make("drop"))
    save(tmp_path / "back", source, layout=layout, renames=rules)

    stored = restore(tmp_path / "back", nnx.eval_shape(lambda: make("stored")))
    again = restore(tmp_path / "back", nnx.eval_shape(lambda: make("drop")), renames=rules)

    (count,) = jax.tree.leaves(nnx.state(source, nnx.RngCount))
    assert int(count) > 0
    for item in (stored, again):
        assert jax.tree.leaves(nnx.state(item, nnx.RngCount)) == [count]


@pytest.mark.parametrize(
    ("layout", "trained", "wanted", "other"),
    sampled(["linen", "maxtext"], [False, True], ["list", "scan"], ["teacher", "ema"]),
)
def test_what_is_kept_aside_is_restored_alone_under_its_own_name(
    tmp_path: Path, other: str, wanted: str, trained: bool, layout: Literal["linen", "maxtext"]
) -> None:
    model = Model("list")
    optimizer = {"optimizer": nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)} if trained else {}
    source = numbered({"model": model, other: Model("list", seed=1), **optimizer})
    save(tmp_path / "item", source, layout=layout)

    restored = restore(tmp_path / "item", nnx.eval_shape(lambda: {other: Model(wanted)}), unexpected="ignore")

    assert_alike(nnx.state(restored[other]), nnx.state(source[other]))


class Statistics(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(4, use_scale=False, use_bias=False, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def test_the_models_statistics_and_streams_are_not_given_to_an_average(tmp_path: Path) -> None:
    class Net(Statistics):
        def __init__(self, rngs: nnx.Rngs):
            super().__init__(rngs)
            self.dense = nnx.Linear(4, 4, rngs=rngs)

    save(tmp_path / "item", numbered({"model": Net(nnx.Rngs(0))}), layout="maxtext")
    target = nnx.eval_shape(lambda: {"ema": Statistics(nnx.Rngs(1))})

    error = plan_restore(tmp_path / "item", target).error()

    assert error is not None
    assert {path[0] for path in error.paths} == {"ema"}


@pytest.mark.parametrize(
    ("layout", "other", "trained"), sampled(["linen", "maxtext"], ["ema", "teacher"], [False, True])
)
def test_a_model_is_restored_beside_an_average_that_begins(
    tmp_path: Path, trained: bool, other: str, layout: Literal["linen", "maxtext"]
) -> None:
    def item(**others: Any) -> dict[str, Any]:
        model = Model("list")
        optimizer = {"optimizer": nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)} if trained else {}
        return {"model": model, **others, **optimizer}

    def target() -> dict[str, Any]:
        return item(**{other: Model("list", seed=1)})

    source = numbered(item())
    save(tmp_path / "item", source, layout=layout)

    policy = {nnx.PathContains(other): "init", ...: "error"}
    restored = restore(tmp_path / "item", nnx.eval_shape(target), policy=policy, init=target)

    assert_alike(nnx.state(restored["model"]), nnx.state(source["model"]))
    assert_alike(nnx.state(restored[other], nnx.Param), nnx.state(target()[other], nnx.Param))
