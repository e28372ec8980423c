"""What a save keeps aside goes where the weights of its network go: another level, fields or layers."""

from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import Drop, UnusedRuleError, plan_restore, restore, save
from orbax_nnx_handler.planning.restore_plan import RestoreReport
from orbax_nnx_handler.planning.verdict.laws import Known, certify
from tests.laws.worlds import flat
from tests.sampled import sampled
from tests.storage.saving.layered import Model, assert_alike, numbered

LAYOUTS = pytest.mark.parametrize("layout", ["linen", "maxtext"])


class Net(nnx.Module):
    def __init__(self, seed: int = 0, out: int = 2):
        rngs = nnx.Rngs(seed, dropout=seed + 1)
        self.dense = nnx.Linear(3, out, rngs=rngs)
        self.norm = nnx.BatchNorm(out, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def trained(model: Any) -> dict[str, Any]:
    return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)}


def nested(gen: str = "gen", disc: str = "disc") -> dict[str, Any]:
    return {gen: trained(Net(1)), disc: trained(Net(5, out=3))}


def side_by_side(make: Any = Net) -> dict[str, Any]:
    gen, disc = trained(make(1)), trained(make(5))
    return {
        "gen": gen["model"],
        "disc": disc["model"],
        "gen_opt": gen["optimizer"],
        "disc_opt": disc["optimizer"],
    }


def values(item: Any) -> dict[tuple[str, ...], np.ndarray]:
    found: dict[tuple[str, ...], np.ndarray] = {}
    for key, value in item.items():
        below = values(value) if isinstance(value, dict) else flat(value)
        found |= {(key, *map(str, path)): np.asarray(leaf) for path, leaf in below.items()}
    return found


def assert_moved(restored: Any, source: Any, moved: Any) -> None:
    have, want = values(restored), {moved(path): value for path, value in values(source).items()}
    assert have.keys() == want.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(have[path], value, "/".join(path))


@LAYOUTS
def test_of_networks_below_another_level_streams_and_statistics_come_along(
    tmp_path: Path, layout: Literal["linen", "maxtext"]
) -> None:
    source, below = numbered(nested()), numbered({"trainer": nested()})
    save(tmp_path / "item", source, layout=layout)
    save(tmp_path / "below", below, layout=layout)

    gained = restore(tmp_path / "item", nnx.eval_shape(lambda: {"trainer": nested()}))
    lost = restore(tmp_path / "below", nnx.eval_shape(nested))

    assert_moved(gained, source, lambda path: ("trainer", *path))
    assert_moved(lost, below, lambda path: path[1:])


@LAYOUTS
def test_of_networks_beside_their_optimizers_they_come_along_into_train_states(
    tmp_path: Path, layout: Literal["linen", "maxtext"]
) -> None:
    def moved(path: tuple[str, ...]) -> tuple[str, ...]:
        name = path[0].removesuffix("_opt")
        return (name, "model" if name == path[0] else "optimizer", *path[1:])

    def target() -> dict[str, Any]:
        return {"gen": trained(Net(1)), "disc": trained(Net(5))}

    source = numbered(side_by_side())
    save(tmp_path / "item", source, layout=layout)
    rules = [(f"{name}_opt/opt_state", f"{name}/optimizer/opt_state") for name in ("gen", "disc")]

    restored = restore(tmp_path / "item", nnx.eval_shape(target), renames=rules)

    assert_moved(restored, source, moved)


@LAYOUTS
@pytest.mark.parametrize(("saved", "wanted"), [("list", "scan"), ("scan", "list")])
def test_of_networks_beside_their_optimizers_they_follow_their_layers(
    tmp_path: Path, saved: str, wanted: str, layout: Literal["linen", "maxtext"]
) -> None:
    def item(form: str) -> dict[str, Any]:
        return side_by_side(lambda seed: Model(form, seed))

    source = numbered(item(saved))
    save(tmp_path / "item", source, layout=layout)

    restored = restore(tmp_path / "item", nnx.eval_shape(lambda: item(wanted)))

    for key in ("gen", "disc"):
        assert_alike(nnx.state(restored[key]), nnx.state(source[key]))


@LAYOUTS
def test_they_follow_weights_that_rules_alone_rename(
    tmp_path: Path, layout: Literal["linen", "maxtext"]
) -> None:
    source = numbered(nested())
    save(tmp_path / "item", source, layout=layout)
    names = {"gen": "generator", "disc": "critic"}
    fields = (
        ("params", "batch_stats", "opt_state", "step")
        if layout == "linen"
        else ("params", "opt_state", "step")
    )
    rules = [(f"{old}/{field}", f"{new}/{field}") for old, new in names.items() for field in fields]

    restored = restore(
        tmp_path / "item", nnx.eval_shape(lambda: nested("generator", "critic")), renames=rules
    )

    assert_moved(restored, source, lambda path: (names[path[0]], *path[1:]))


@LAYOUTS
def test_the_laws_refuse_what_lies_aside_of_another_network(
    tmp_path: Path, layout: Literal["linen", "maxtext"]
) -> None:
    def target() -> dict[str, Any]:
        return {"nets": {"gen": trained(Net(1)), "disc": trained(Net(5))}}

    save(tmp_path / "item", {name: trained(Net(1)) for name in ("gen", "disc")}, layout=layout)
    plan = plan_restore(tmp_path / "item", nnx.eval_shape(target))
    sources = {
        path: (plan.sides.wanted[path], made.recipe, made.evidence) for path, made in plan.restored.items()
    }
    exchanged = {
        path: ("nets", "disc" if path[1] == "gen" else "gen", *path[2:]) for path in sources if "rngs" in path
    }
    assert len(exchanged) == 4
    for path, other in exchanged.items():
        changed = sources | {path: (sources[path][0], *sources[other][1:])}
        broken = certify([*plan.sides.wanted.values()], plan.sides.placements, [*changed.values()], Known())
        assert path in {fault.wanted for fault in broken if fault.law == 10}
    assert not certify(
        [*plan.sides.wanted.values()], plan.sides.placements, [*sources.values()], Known(scan_axis=1)
    )


class Dropping(Net):
    def __init__(self, name: str, norm: str = "norm"):
        super().__init__()
        for old, new in (("drop", name), ("norm", norm)):
            part = getattr(self, old)
            delattr(self, old)
            setattr(self, new, part)


@LAYOUTS
def test_a_stream_under_another_name_is_told_with_a_rule_for_its_key_and_its_count(
    tmp_path: Path, layout: Literal["linen", "maxtext"]
) -> None:
    source = numbered({name: trained(Dropping("drop")) for name in ("gen", "disc")})
    save(tmp_path / "item", source, layout=layout)
    target = nnx.eval_shape(lambda: {name: trained(Dropping("dropout")) for name in ("gen", "disc")})

    plan = plan_restore(tmp_path / "item", target)
    rules = [rule for cause in plan.causes for rule in cause.hint.arguments["renames"]]
    restored = restore(tmp_path / "item", target, renames=rules)

    assert "that stream starts afresh" in RestoreReport(plan=plan, seconds=1, nbytes=1).warning
    assert rules == [(f"nnx_aux/{n}/model/drop/rngs", f"{n}/model/dropout/rngs") for n in ("disc", "gen")]
    assert_moved(restored, source, lambda path: tuple("dropout" if key == "drop" else key for key in path))


def test_statistics_that_lie_aside_under_another_name_are_not_said_not_to_be_saved(tmp_path: Path) -> None:
    save(tmp_path / "item", trained(Dropping("drop")), layout="maxtext")
    target = nnx.eval_shape(lambda: trained(Dropping("drop", norm="other")))

    error = plan_restore(tmp_path / "item", target).error()

    assert error is not None
    assert "not saved" not in str(error)


@LAYOUTS
def test_networks_of_other_names_are_proposed_whatever_lies_aside_of_them(
    tmp_path: Path, layout: Literal["linen", "maxtext"]
) -> None:
    source, names = numbered(nested()), {"gen": "generator", "disc": "discriminator"}
    save(tmp_path / "item", source, layout=layout)
    target = nnx.eval_shape(lambda: nested(*names.values()))

    (cause,) = plan_restore(tmp_path / "item", target).causes
    restored = restore(tmp_path / "item", target, renames=cause.hint.arguments["renames"])

    assert_moved(restored, source, lambda path: (names[path[0]], *path[1:]))


@LAYOUTS
@pytest.mark.parametrize(
    "kinds", [("params", "batch_stats", "rest"), ("params", "rest"), ("params", "state", "rngs")]
)
@pytest.mark.parametrize("make", [Net, lambda: trained(Net())])
def test_a_split_that_is_kept_in_a_dict_gets_its_streams_and_statistics(
    tmp_path: Path, make: Any, kinds: tuple[str, ...], layout: Literal["linen", "maxtext"]
) -> None:
    source = numbered(make())
    save(tmp_path / "item", source, layout=layout)
    model = source["model"] if isinstance(source, dict) else source
    filters = (nnx.Param, nnx.BatchStat, ...) if len(kinds) == 3 else (nnx.Param, ...)
    parts = dict(zip(kinds, nnx.split(model, *filters)[1:], strict=True))
    target = jax.eval_shape(lambda: parts)

    restored = restore(tmp_path / "item", target, unexpected="ignore")

    for kind, part in parts.items():
        have, want = flat(restored[kind]), flat(part)
        assert have.keys() == want.keys()
        for path, value in want.items():
            np.testing.assert_array_equal(have[path], value, str(path))


@pytest.mark.parametrize(
    ("layout", "form", "moved"),
    sampled(
        ["linen", "maxtext"],
        ["list", "scan"],
        [(("", "ema"), ("agent", "ema")), (("agent", "ema"), ("", "ema")), (("", "ema"), ("", "ema_model"))],
    ),
)
def test_an_average_follows_below_another_level_and_is_proposed_under_a_longer_name(
    tmp_path: Path, moved: Any, form: str, layout: Literal["linen", "maxtext"]
) -> None:
    saved, wanted = moved

    def item(level: str, name: str) -> dict[str, Any]:
        inner = {**trained(Model(form)), name: Model(form, seed=1)}
        return {level: inner} if level else inner

    source = numbered(item(*saved))
    save(tmp_path / "item", source, layout=layout)
    target = nnx.eval_shape(lambda: item(*wanted))

    hints = [cause.hint for cause in plan_restore(tmp_path / "item", target).causes]
    renames = [rule for hint in hints for rule in hint.arguments["renames"]]
    restored = restore(tmp_path / "item", target, renames=renames)

    assert bool(renames) == (saved[1] != wanted[1] or saved[0] != "")
    here, there = restored.get(wanted[0], restored), source.get(saved[0], source)
    assert_alike(nnx.state(here["model"]), nnx.state(there["model"]))
    assert_alike(nnx.state(here[wanted[1]]), nnx.state(there[saved[1]]))


@LAYOUTS
@pytest.mark.parametrize("average", [False, True])
def test_rules_that_number_layers_anew_take_along_what_lies_aside(
    tmp_path: Path, average: bool, layout: Literal["linen", "maxtext"]
) -> None:
    def item(layers: int) -> dict[str, Any]:
        more = {"ema": Model("list", seed=1, layers=layers)} if average else {}
        return trained(Model("list", layers=layers)) | more

    source = numbered(item(3))
    save(tmp_path / "item", source, layout=layout)
    pruned = [Drop("layers_0", "pruned"), ("layers_1", "layers_0"), ("layers_2", "layers_1")]

    restored = restore(tmp_path / "item", nnx.eval_shape(lambda: item(2)), renames=pruned)

    for name in {"model", "ema"} & restored.keys():
        for at in (0, 1):
            have, want = restored[name].layers[at], source[name].layers[at + 1]
            for path, value in flat(nnx.state(want)).items():
                np.testing.assert_array_equal(flat(nnx.state(have))[path], value, str((name, at, path)))
    moments, before = (tree["optimizer"].opt_state[0].mu for tree in (restored, source))
    np.testing.assert_array_equal(
        moments["layers"][0]["dense"]["kernel"][...], before["layers"][1]["dense"]["kernel"][...]
    )


@LAYOUTS
def test_a_rule_that_reaches_the_streams_of_layers_alone_is_told_how_their_weights_are_numbered(
    tmp_path: Path, layout: Literal["linen", "maxtext"]
) -> None:
    def item() -> Any:
        return Model("list", layers=2)

    save(tmp_path / "item", numbered(item()), layout=layout)
    exchanged = [("layers/0", "layers/1"), ("layers/1", "layers/0")]

    for renames in (exchanged, exchanged[:1]):
        with pytest.raises(UnusedRuleError, match="layers_0"):
            restore(tmp_path / "item", nnx.eval_shape(item), renames=renames)
