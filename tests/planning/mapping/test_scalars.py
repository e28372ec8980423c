"""A count belongs to its state: it goes where the state goes, and to nobody else."""

from collections.abc import Iterable

import pytest

from orbax_nnx_handler.planning.core.paths import canonical
from orbax_nnx_handler.planning.mapping.optimizer_pairs import PairedStates, pair_states
from orbax_nnx_handler.planning.mapping.optimizer_states import (
    OptimizerLeaf,
    OptimizerState,
    read_states,
)

PARAMETERS = {("w",): ("w",), ("b",): ("b",)}


def states(paths: Iterable[str]) -> list[OptimizerState]:
    split = [tuple(path.split("/")) for path in paths]
    leaves = [OptimizerLeaf(path=path, tokens=canonical(path), shape=()) for path in split]
    return read_states(leaves, PARAMETERS)


def pairing(wanted: Iterable[str], stored: Iterable[str]) -> PairedStates:
    return pair_states(states(wanted), states(stored), lambda parameter: (parameter,))


def paired(wanted: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    return {
        "/".join(map(str, leaf.path)): "/".join(map(str, there.scalars[field].path))
        for here, there in pairing(wanted, stored).pairs
        for field, leaf in here.scalars.items()
    }


ADAM = ("mu/w", "nu/w", "count")
EMA = ("ema/w", "count")
PLATEAU = ("scale", "best_value", "count")
FALLING = ("count",)


def at(place: str, state: Iterable[str]) -> list[str]:
    return [f"{place}/{leaf}" for leaf in state]


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        ([*at("0", ADAM), *at("1", FALLING)], {"0/count": "0/count", "1/count": "1/count"}),
        ([*at("1/0", ADAM), *at("1/1", FALLING)], {"0/count": "1/0/count", "1/count": "1/1/count"}),
        (
            [*at("inner_state/0", ADAM), *at("inner_state/1", FALLING)],
            {"0/count": "inner_state/0/count", "1/count": "inner_state/1/count"},
        ),
    ],
    ids=["same", "in a chain", "injected"],
)
def test_counts_follow_the_states_that_they_are_in(stored: list[str], found: dict[str, str]) -> None:
    assert paired([*at("0", ADAM), *at("1", FALLING)], stored) == found


def test_counts_of_swapped_states_are_a_question() -> None:
    wanted, stored = [*at("0", ADAM), *at("1", EMA)], [*at("1", ADAM), *at("0", EMA)]

    assert paired(wanted, stored) == {}


def test_a_count_of_other_fields_is_not_taken_by_place_or_name() -> None:
    assert paired(at("0", FALLING), at("0", ADAM)) == {}
    assert paired(at("0", ADAM), at("0", FALLING)) == {}
    assert paired(at("0", PLATEAU), at("0", FALLING)) == {}
    # One more part in front: everything moves by one place.
    wanted = [*at("1", ADAM), *at("2", FALLING), *at("3", PLATEAU)]
    stored = [*at("0", ADAM), *at("1", FALLING), *at("2", PLATEAU)]
    assert paired(wanted, stored)["2/count"] == "1/count"
    assert paired(wanted, stored)["3/count"] == "2/count"


def test_a_count_whose_moments_are_not_stored_takes_no_other() -> None:
    assert paired([*at("0", ADAM), *at("1", FALLING)], at("7", FALLING)) == {"1/count": "7/count"}


def test_what_stands_between_two_others_tells_two_alike_apart() -> None:
    wanted = [*at("0", ADAM), *at("1", FALLING)]
    stored = [*at("0", FALLING), *at("1", ADAM), *at("2", FALLING)]

    assert paired(wanted, stored) == {"0/count": "1/count", "1/count": "2/count"}


def test_where_two_alike_may_be_meant_neither_is_taken() -> None:
    found = pairing(at("0", FALLING), [*at("1", FALLING), *at("2", FALLING)])

    assert found.pairs == []
    (undecided,) = found.undecided
    assert str(undecided.wanted) == "0 {count}"
    assert [str(state) for state in undecided.stored] == ["1 {count}", "2 {count}"]


def test_what_has_no_counterpart_is_named_whole() -> None:
    found = pairing([*at("0", ADAM), *at("1", PLATEAU)], [*at("0", ADAM), *at("1/inner_state", EMA)])

    assert [str(state) for state in found.missing] == ["1 {best_value, count, scale}"]
    assert [str(state) for state in found.unexpected] == ["1/inner_state {count, ema}"]


def test_a_count_beside_inner_states_is_the_wrappers() -> None:
    steps = ["mini_step", "gradient_step", "acc_grads/w"]
    wanted = [*steps, *at("inner_opt_state/0", ADAM), *at("inner_opt_state/1", FALLING)]
    stored = [*at("0", ADAM), *at("1", FALLING)]

    assert paired(wanted, stored) == {
        "inner_opt_state/0/count": "0/count",
        "inner_opt_state/1/count": "1/count",
    }
    assert set(paired(stored, wanted).values()) == {"inner_opt_state/0/count", "inner_opt_state/1/count"}


def test_the_count_of_an_injected_schedule_is_no_other_schedules() -> None:
    injected = ["count", "hyperparams/learning_rate", "hyperparams_states/learning_rate/count"]

    assert paired(at("1", FALLING), [*injected, *at("inner_state/0", ADAM)]) == {}


def test_states_below_a_label_stay_below_it() -> None:
    def labelled(label: str) -> list[str]:
        return at(f"inner_states/{label}/inner_state", FALLING)

    both = [*labelled("a"), *labelled("b_1")]

    assert paired(both, both) == {path: path for path in both}
    assert paired(labelled("b_1"), both) == {path: path for path in labelled("b_1")}
    assert len(pairing(labelled("c"), both).undecided) == 1


def test_an_optimizer_under_a_name_of_the_programs_own_is_another() -> None:
    assert paired(at("disc/0", FALLING), at("gen/0", FALLING)) == {}
    assert paired(at("gen/0", FALLING), at("gen/1/0", FALLING)) == {"gen/0/count": "gen/1/0/count"}
