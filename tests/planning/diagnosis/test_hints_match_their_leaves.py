"""What a hint proposes changes the leaves that it is about, and no other."""

import jax
import numpy as np
import pytest

from orbax_nnx_handler import (
    Drop,
    Fuse,
    Reshape,
    RestoreError,
    StackLayers,
    Transpose,
    UnstackLayers,
    UnusedRuleError,
    from_linen,
)
from orbax_nnx_handler.planning.core.errors import as_python


def _numbers(start, *shape):
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


def _target(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _refused(variables, wanted, **options):
    with pytest.raises(RestoreError) as caught:
        from_linen(variables, _target(wanted), **options)
    return caught.value


def _rules(error):
    return [rule for hint in error.hints for rule in hint.arguments.get("renames", ())]


def _check(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_a_leaf_at_the_root_is_told_from_one_of_its_name_in_a_module():
    stored = {"up": {"kernel": _numbers(0, 8, 16)}, "b": {"up": {"kernel": _numbers(900, 8, 4)}}}
    wanted = {"up": {"kernel": stored["up"]["kernel"].T}, "b": stored["b"]}

    rules = _rules(_refused({"params": stored}, wanted))

    assert rules == [Transpose("params/up/kernel", (1, 0))]
    _check(from_linen({"params": stored}, _target(wanted), renames=rules), wanted)


def test_a_reshape_at_the_root_leaves_one_of_its_name_as_it_is():
    stored = {"q": {"kernel": _numbers(0, 8, 2, 4)}, "b": {"q": {"kernel": _numbers(900, 8, 2, 4)}}}
    wanted = {"q": {"kernel": stored["q"]["kernel"].reshape(8, 8)}, "b": stored["b"]}

    rules = _rules(_refused({"params": stored}, wanted))

    assert rules == [Reshape("params/q/kernel", (8, 8))]
    _check(from_linen({"params": stored}, _target(wanted), renames=rules), wanted)


def _stack_beside_layers():
    layers = {f"l_{at}": {"kernel": _numbers(16 * at, 4, 4)} for at in range(4)}
    stored = {"params": {**layers, "l": {"kernel": _numbers(900, 4, 4, 4)}}}
    return stored, {"l": {at: layers[f"l_{at}"] for at in range(4)}}


def test_a_stack_that_is_the_rival_of_many_layers_is_left_behind_by_one_rule():
    stored, wanted = _stack_beside_layers()

    error = _refused(stored, wanted)

    assert "renames=[Drop('params/l/kernel', 'why')]" in str(error)
    _check(from_linen(stored, _target(wanted), renames=[Drop("params/l/kernel", "why")]), wanted)


def test_layers_that_are_the_rivals_of_a_stack_are_left_behind_all_at_once():
    layers = {f"l_{at}": {"kernel": _numbers(16 * at, 4, 4)} for at in range(3)}
    stored = {"params": {**layers, "l": {"kernel": _numbers(900, 3, 4, 4)}}}
    wanted = {"l": stored["params"]["l"]}

    error = _refused(stored, wanted)

    drops = [Drop(f"params/l_{at}/kernel", "why") for at in range(3)]
    text = ", ".join(f"Drop({rule.pattern!r}, 'why')" for rule in drops)
    assert f"pass renames=[{text}] to leave" in " ".join(str(error).split())
    _check(from_linen(stored, _target(wanted), renames=drops), wanted)


def test_a_rule_that_repeats_another_is_not_corrected_to_another_leaf():
    stored, wanted = _stack_beside_layers()
    rule = Drop("params/l/kernel", "why")

    error = _refused(stored, wanted, renames=[rule, rule])

    assert isinstance(error, UnusedRuleError)
    assert "the same rule in front of it has matched all that it is for" in str(error)
    assert "take out the repetition" in str(error)
    assert "l_0" not in str(error)


def test_a_module_that_is_stored_under_its_own_name_is_not_passed_over_for_another_one():
    stored = {
        "policy": {
            name: {"kernel": _numbers(100 * at, 4, 4)} for at, name in enumerate(("Dense_0", "Dense_1"))
        },
        "value": {name: {"kernel": _numbers(500 + 100 * at, 4, 4)} for at, name in enumerate(("up", "down"))},
    }
    wanted = {"policy": {"up": stored["policy"]["Dense_0"], "down": stored["policy"]["Dense_1"]}}

    assert not _rules(_refused({"params": stored}, wanted))
    alone = {"value": stored["value"]}
    assert _rules(_refused({"params": alone}, wanted)) == [("value", "policy")]


@pytest.mark.parametrize("beside", [False, True], ids=["all of it", "with a leaf of its own"])
def test_a_collection_of_which_a_rule_brings_another_is_left_behind_as_a_level(beside: bool):
    weights = {f"l_{at}": {"kernel": _numbers(9 * at, 3, 3)} for at in range(12)}
    averages = jax.tree.map(lambda value: value + 1000, weights)
    more = {"other": {"kernel": _numbers(700, 2)}} if beside else {}
    state = {"count": np.int32(3), "mu": {"params": weights}, "nu": {"params": weights}}
    stored = {"params": {**weights, **more}, "ema_params": averages, "opt_state": [state]}
    wanted = {"l": {at: averages[f"l_{at}"] for at in range(12)}}
    rule = ("ema_params", "params")

    error = _refused(stored, wanted, renames=[rule])

    text = " ".join(str(error).split())
    assert len(str(error).splitlines()) < 8
    assert "l/{0..11}/kernel (3, 3) by ('ema_params', 'params') <- ema_params/l_{0..11}/kernel" in text
    if beside:
        assert "Drop('params/l_2/kernel', 'why') and so on for each of them in front of" in text
    else:
        assert "renames=[Drop('params', 'why'), ...] in front of the other rules" in text
        _check(from_linen(stored, _target(wanted), renames=[Drop("params", "why"), rule]), wanted)


def _layers(start):
    return {"kernel": _numbers(start, 3, 4, 6), "bias": _numbers(start + 900, 3, 6)}


def _each(stack):
    return [{name: leaf[at] for name, leaf in stack.items()} for at in range(3)]


_A, _B = _layers(0), _layers(5000)
_FUSE = Fuse(("a", "b"), "ab", axis=1)


def _unstack(name, axis):
    return UnstackLayers(name, f"{name}s/{{i}}", axis=axis)


@pytest.mark.parametrize(
    ("stored", "wanted", "wrong", "right", "way"),
    [
        ({"a": _A}, {"as": _each(_A)}, [_unstack("a", 1)], [_unstack("a", 0)], "pass {} instead of {}."),
        (
            {"a": _A, "b": _B},
            {"as": _each(_A), "bs": _each(_B)},
            [_unstack("a", 1), _unstack("b", 1)],
            [_unstack("a", 0), _unstack("b", 0)],
            "pass {} and {} instead of {} and {}.",
        ),
        (
            {f"l_{at}": layer for at, layer in enumerate(_each(_A))},
            {"l": _A},
            [StackLayers("l_{i}", "l", axis=1)],
            [StackLayers("l_{i}", "l", axis=0)],
            "pass {} instead of {}.",
        ),
        (
            {"l": {"a": {"w": _A["kernel"]}, "b": {"w": _B["kernel"]}}},
            {
                "ls": [
                    {"ab": {"w": np.concatenate(two, 1)}}
                    for two in zip(_A["kernel"], _B["kernel"], strict=True)
                ]
            },
            [_FUSE, _unstack("l", 0)],
            [_unstack("l", 0), _FUSE],
            "put {} in front of the other rules.",
        ),
    ],
)
def test_a_rule_of_layers_that_does_not_fit_is_shown_as_it_does(stored, wanted, wrong, right, way):
    (cause,) = _refused({"params": stored}, wanted, renames=wrong).causes

    assert cause.kind == "RuleOfLayers"
    assert cause.way.words == way.format(*map(as_python, [*right, *wrong]))
    _check(from_linen({"params": stored}, _target(wanted), renames=right), wanted)


def test_layers_that_a_rule_made_are_counted_by_nobody():
    wanted = {"as": [{"up": {"kernel": np.ones((8, 6)), "bias": np.ones(8)}}] * 4}
    stored, rules = {"params": {"a": {"up": _A}}}, [_unstack("a", 1)]

    found = [cause.kind for cause in _refused(stored, wanted, renames=rules, unexpected="ignore").causes]

    assert found
    assert "LayerCount" not in found
