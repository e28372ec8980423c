"""A hint is followed to the letter: what it tells to pass makes the restore succeed."""

import ast
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import orbax_nnx_handler
from orbax_nnx_handler import (
    Cast,
    Copy,
    DtypeMismatchError,
    RestoreError,
    from_linen,
    plan_restore,
    restore,
    suggest,
)
from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.planning.rules import as_rules
from tests.gallery import cases
from tests.gallery.cases import GALLERY, Broken
from tests.planning.diagnosis import mistakes
from tests.planning.diagnosis.mistakes import MISTAKES, Mistake, flat
from tests.planning.models import abstract, model, plan

NAMES = {name: getattr(orbax_nnx_handler, name) for name in orbax_nnx_handler.__all__} | {"nnx": nnx}
FOR_A_PERSON = {
    "fewer_scanned_layers": "restore into a model with 4 layers",
    "hole_in_the_layers": "restore another step",
    "scanned_and_wider": "correct the sizes first",
    "other_width": "build the target",
    "other_vocabulary": "build the target",
    "other_heads": "build the target",
    "other_experts": "build the target",
    "automatic_names": "orbax-nnx suggest",
    "another_model": "orbax-nnx tree",
    "lost_weight": "restore another step",
    "quantised": "the stored kind",
    "quantised_with_scales": "dequantise",
    "other_keys": "jax_default_prng_impl",
    "cut_off": "copy it again",
    "damaged": "copy it again",
    "gone": "copy it again",
    "everything": "build the target",
    "empty_target": "pass the module",
    "indivisible": "shard a dimension",
    "pickled": "load it where it was written",
    "interrupted": "has to save again",
    "no_weights": "another item or step",
}
"""What only a person can do: the name of the case, and the words that tell it."""
IN_WORDS_ONLY = {"unused_filter", "unused_rename", "two_to_one"}
"""Whose way out depends on what was passed: a rule to correct or to take out."""


def hints_of(error: RestoreError) -> list[str]:
    """Returns the hints, each on one line."""
    joined = re.sub(r"\n {6}(?=\S)", " ", str(error))
    return [line.removeprefix("hint: ") for line in joined.splitlines() if line.startswith("hint: ")]


def python_after(text: str, word: str) -> list[str]:
    """Returns each expression that stands behind `word=`."""
    found: list[str] = []
    for match in re.finditer(rf"{word}=(?=[\[{{'\"])", text):
        rest = text[match.end() :]
        for end in range(1, len(rest) + 1):
            try:
                ast.parse(rest[:end], mode="eval")
            except SyntaxError:
                continue
            found.append(rest[:end])
            break
    return found


def values_of(target: Any) -> Any:
    """Returns a target with arrays in the place of descriptions: what a program's `init` would build."""

    def value(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(value, target)


def told(hints: list[str], path: Any, target: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the path and the arguments that the hints tell to pass."""
    arguments: dict[str, Any] = {}
    for hint in hints:
        for word in ("policy", "renames", "layout", "item", "unexpected"):
            for expression in python_after(hint, word)[:1]:
                arguments[word] = eval(expression, dict(NAMES))
        if "init=..." in hint:
            arguments["init"] = lambda: values_of(target)
        if "take it out" in hint:
            arguments |= {"renames": (), "policy": "error"}
        if "leave layout=... out" in hint:
            arguments["layout"] = "auto"
        for pattern in (r"the item (/\S+?)[;,] pass that", r"^(/\S+) is (?:a manager's root|an item)"):
            path = next((found[1] for found in [re.search(pattern, hint)] if found), path)
        if found := re.search(r"pass one of them: (\w+)", hint):
            path = pathlib.Path(path) / found[1]
        if found := re.search(r"^(/\S+) holds the steps? (\d+)", hint):
            path = pathlib.Path(found[1]) / found[2]
    return path, arguments


def proposed(error: RestoreError, path: Any, target: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the path and the arguments that the hints propose as values."""
    arguments: dict[str, Any] = {}
    for hint in error.hints:
        arguments |= hint.arguments
        if hint.needs_init:
            arguments["init"] = lambda: values_of(target)
    return arguments.pop("path", path), arguments


@pytest.mark.parametrize("case", GALLERY, ids=lambda case: case.provoke.__name__)
def test_what_a_hint_tells_to_pass_makes_the_restore_succeed(
    case: Broken, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, followed = cases.restore, list[list[str]]()

    def restore(wrong: Any, target: Any, *args: Any, **given: Any) -> Any:
        path = wrong
        with pytest.raises(RestoreError) as error:
            really(wrong, target, *args, **given)
        followed.append(hints_of(error.value))
        if case.provoke.__name__ not in FOR_A_PERSON:
            path, arguments = told(followed[0], path, target)
            # An ellipsis in a list stands for the rules that were passed before.
            if ... in arguments.get("renames", ()):
                arguments["renames"] = [*arguments["renames"][:-1], *given["renames"]]
            assert arguments or "pass that" in followed[0][0] or "holds" in followed[0][0]
            really(path, target, *args, **given | arguments)
            if case.provoke.__name__ not in IN_WORDS_ONLY:
                there, values = proposed(error.value, wrong, target)
                assert values or there != wrong
                really(there, target, *args, **given | values)

    monkeypatch.setattr(cases, "restore", restore)

    case.provoke(tmp_path)

    (hints,) = followed
    assert FOR_A_PERSON.get(case.provoke.__name__, "") in "\n".join(hints)


def test_the_cases_for_a_person_are_cases() -> None:
    assert FOR_A_PERSON.keys() | IN_WORDS_ONLY <= {case.provoke.__name__ for case in GALLERY}


def test_what_is_to_be_dropped_is_the_whole_stored_path_and_the_copy_stays():
    names = {"dense/kernel": (4, 3), "dense/bias": (3,)}
    stored = {f"{top}/{name}": shape for top in ("params", "ema_params") for name, shape in names.items()}
    rule = ("ema_params", "params")

    error = plan(stored, names, renames=[rule]).error()
    (told_rules,) = python_after(hints_of(error)[0], "renames")
    rules = [rule if each is ... else each for each in eval(told_rules, dict(NAMES))]
    followed = plan(stored, names, renames=rules)

    assert followed.fits, followed
    assert [Read(("ema_params", "dense", "bias")), Read(("ema_params", "dense", "kernel"))] == [
        item.recipe for _, item in sorted(followed.restored.items())
    ]


def test_integers_of_another_width_come_with_the_rule_that_casts_them(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "item", {"params": {"seen": np.array([1, 300], np.int32)}})
    wide, narrow = (jax.ShapeDtypeStruct((2,), dtype) for dtype in ("int16", "int8"))

    with pytest.raises(DtypeMismatchError) as error:
        restore(tmp_path / "item", {"seen": wide})
    found = restore(tmp_path / "item", {"seen": wide}, **error.value.hints[0].arguments)

    assert "renames=[Cast('params/seen', 'int16')]" in str(error.value)
    assert found["seen"].tolist() == [1, 300]
    with pytest.raises(RestoreError, match="300"):
        restore(tmp_path / "item", {"seen": narrow}, renames=[Cast("params/seen", "int8")])


def test_a_policy_to_be_passed_keeps_what_was_chosen_for_other_leaves():
    stored, wanted = model(2), model(4, "") | {"gate/scale": (4,)}
    given = {
        nnx.All(nnx.PathContains("layers_2"), nnx.PathContains("up")): "init",
        nnx.PathContains("gate"): "warn",
        ...: "error",
    }

    refused = plan(stored, wanted, policy=given)
    (fill,) = (hint for hint in refused.error().hints if hint.fills)
    followed = plan(stored, wanted, **fill.arguments)

    assert fill.words.endswith(" to initialise these 4 leaves as well as what was filled already.")
    assert {path: item.policy for path, item in followed.missing.items()} == {
        path: "warn" if path == ("gate", "scale") else "init" for path in refused.missing
    }


def test_a_policy_that_fills_nothing_else_says_so():
    error = plan(model(2), model(3, "")).error()
    (fill,) = (hint for hint in error.hints if hint.fills)

    assert fill.words.endswith(" to initialise these 3 leaves and nothing else.")


STEPS = 4
"""Hints that somebody follows one after the other."""


def followed(given: Mistake) -> list[dict[str, np.ndarray]]:
    """Returns what is restored at the end of each way that hints lead, the text of which is followed."""
    target, reached = nnx.eval_shape(given.make), list[dict[str, np.ndarray]]()
    waiting: list[tuple[dict[str, Any], int]] = [(dict(given.options), 0)]
    while waiting:
        options, steps = waiting.pop(0)
        try:
            reached.append(flat(from_linen(given.tree, target, **options)))
        except RestoreError as error:
            ways = [way for hint in hints_of(error) for way in read(hint, options, given, target)]
            waiting += [(options | way, steps + 1) for way in ways if steps < STEPS]
    return reached


def read(hint: str, options: dict[str, Any], given: Mistake, target: Any) -> list[dict[str, Any]]:
    """Returns what a hint tells to pass, for each thing that it leaves to a person."""
    passed = list(options.get("renames", ()))
    if "suggest(variables, target)" in hint:
        return [{"renames": rules}] if (rules := list(suggest(given.tree, target).renames)) else []
    ways = [{"policy": eval(text, dict(NAMES))} for text in python_after(hint, "policy")]
    ways = [way | {"init": lambda: values_of(target)} for way in ways]
    for text in python_after(hint, "renames"):
        rules = eval(text, dict(NAMES))
        rules = [*passed, *rules] if "behind the rules passed so far" in hint else rules
        ways.append(
            {"renames": [*rules, *passed] if "in front of the rules passed so far" in hint else rules}
        )
    return ways


@pytest.mark.parametrize("name", MISTAKES)
def test_hints_that_are_read_and_followed_lead_to_the_right_values(name: str) -> None:
    given = MISTAKES[name]()

    reached = followed(given)

    assert any(
        all(path in found and np.array_equal(found[path], value) for path, value in given.truth.items())
        for found in reached
    ), len(reached)


def test_optimizers_by_network_below_one_opt_state_are_not_begun_anew() -> None:
    given = mistakes.two(("actor", "critic"), ("actor", "critic"), ("actor_opt", "critic_opt"))
    states = given.tree
    tree = {
        field: {name: state[field] for name, state in states.items()} for field in ("params", "opt_state")
    } | {"step": np.int32(7)}

    error = plan_restore(tree, nnx.eval_shape(given.make)).error()
    parts = {"opt_state": tree["opt_state"]["actor"], "params": tree["params"]["actor"], "step": tree["step"]}
    whole = nnx.eval_shape(given.make)
    found = flat(from_linen(parts, {name: whole[name] for name in ("actor", "actor_opt")}))

    assert "is stored below 'opt_state/actor' and 'opt_state/critic'" in " ".join(str(error).split())
    assert "'opt_state': tree['opt_state']['actor'], 'step': tree['step']" in str(error)
    assert not any(hint.fills for hint in error.hints)
    assert all(np.array_equal(found[path], given.truth[path]) for path in found if path != "actor_opt/step")


def test_no_hint_begins_statistics_anew_that_are_stored_once_for_a_model_and_its_average() -> None:
    given = MISTAKES["statistics_stored_once_for_an_average_that_has_the_name_it_is_stored_by"]()

    error = plan_restore(given.tree, nnx.eval_shape(given.make)).error()

    assert [hint.arguments for hint in error.hints] == [{"renames": [Copy("batch_stats", "ema_params")]}]
    (cause,) = error.causes
    assert cause.text == (
        "the parameters of the wanted 'ema_params' are those of a copy, and its 2 statistics would be in "
        "'batch_stats', which is stored once, for averages and what they are of."
    )


def test_statistics_stored_once_are_given_to_averages_whose_modules_are_renamed() -> None:
    stored = {f"{top}/{name}": (4,) for top in ("params", "ema_params") for name in ("bn/scale", "bn/bias")}
    wanted = {f"{top}/norm/{name}": (4,) for top in ("model", "ema") for name in ("scale", "bias")}
    for name in ("mean", "var"):
        stored[f"batch_stats/bn/{name}"] = (4,)
        wanted |= {f"{top}/norm/{name}": nnx.BatchStat(abstract((4,))) for top in ("model", "ema")}
    rules = [("ema_params", "ema"), ("bn", "norm")]

    error = plan(stored, wanted, renames=rules).error()

    assert [hint.arguments for hint in error.hints] == [
        {"renames": [*as_rules(rules), Copy("batch_stats", "ema")]}
    ]
    assert plan(stored, wanted, **error.hints[0].arguments).fits


def test_averages_that_are_the_only_parameters_are_called_so() -> None:
    given = MISTAKES["averages_beside_statistics_and_no_parameters"]()

    error = plan_restore(given.tree, nnx.eval_shape(given.make)).error()

    assert [hint.arguments for hint in error.hints] == [{"renames": [("ema_params", "params")]}]
    assert "lie below 'ema_params', the name of averages;" in " ".join(str(error).split())


def test_no_hint_fills_networks_while_others_of_the_same_weights_lie_unused() -> None:
    numbers = mistakes.Numbers()
    tree = {name: numbers.state(mistakes.mlp(numbers)) for name in ("one", "two", "three", "four", "five")}
    target = nnx.eval_shape(lambda: tuple(mistakes.Mlp() for _ in tree))

    for renames in ([], [("one/params", "0")]):
        error = plan_restore(tree, target, renames=renames).error()

        assert not any(hint.fills for hint in error.hints)
        assert any("suggest(" in hint.words for hint in error.hints)


@pytest.mark.parametrize("beside", [False, True])
def test_the_hint_of_a_new_head_is_for_a_copy_of_the_network_as_well(beside: bool) -> None:
    numbers = mistakes.Numbers()
    state = mistakes.copied(numbers)
    tree: dict[str, Any] = state
    if beside:
        copy = state.pop("target_params")
        tree = {"actor": numbers.state(mistakes.mlp(numbers, 6)), "critic": state, "target_critic": copy}

    def make() -> dict[str, Any]:
        network, copy = mistakes.Mlp(), mistakes.Mlp()
        for each in (network, copy):
            each.fc2 = nnx.Linear(4, 7, rngs=nnx.Rngs(0))
        return {"critic": network, "target_critic": copy} if beside else {"q": network, "target_params": copy}

    target = nnx.eval_shape(make)
    error = plan_restore(tree, target).error()
    hint = next(hint for hint in error.hints if "policy" in hint.arguments)
    restored = from_linen(tree, target, init=make, **hint.arguments)

    found = flat(restored)
    first, second = restored
    params, copy = (state["params"], tree["target_critic"] if beside else state["target_params"])
    for network, stored in ((first, params), (second, copy)):
        for name, value in stored["fc1"].items():
            assert np.array_equal(found[f"{network}/fc1/{name}"], value)
        assert found[f"{network}/fc2/kernel"].shape == (4, 7)


def test_a_wanted_leaf_and_those_that_may_be_it_have_their_own_shapes():
    names = ("query", "key", "value")
    stored = {f"params/l_{i}/self/attention/{x}/kernel": (8, 8) for i in range(2) for x in names}
    stored |= {f"params/l_{i}/out/kernel": (8, 8) for i in range(2)} | {"params/norm/scale": (8,)}
    wanted = {f"b/{i}/qkv/kernel": (8, 24) for i in range(2)} | {f"b/{i}/o/kernel": (8, 8) for i in range(2)}
    wanted |= {"final/scale": (8,)}

    text = str(plan(stored, wanted, renames=[("l_{i}", "b/{i}"), ("out", "o")]))

    sources = ", ".join(f"params/l_{{0..1}}/self/attention/{x}/kernel" for x in sorted(names))
    assert text[text.index("closest") : text.index("\nhint")] == (
        "closest unexpected:\n"
        f"  b/{{0..1}}/qkv/kernel   (8, 24) float32\n      <- {sources} (8, 8) float32 each\n"
        "  final/scale           (8,) float32      <- params/norm/scale"
    )


def test_rows_of_many_layers_with_parts_of_several_shapes_are_one_row():
    parts = {"query": (8, 8), "key": (8, 4), "value": (8, 4)}
    stored = {f"params/l_{i}/self/{x}/kernel": shape for i in range(12) for x, shape in parts.items()}
    stored |= {"params/embed/embedding": (9, 8)}
    wanted = {f"b/{i}/qkv/kernel": (8, 16) for i in range(12)} | {"embed/embedding": (9, 8)}

    text = str(plan(stored, wanted, renames=[("l_{i}", "b/{i}")]))

    assert text.partition("closest unexpected")[2].count("b/{0..11}/qkv/kernel") == 1
