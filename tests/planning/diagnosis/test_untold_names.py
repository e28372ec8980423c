"""Leaves of one shape under names of other meanings are not said to differ in their names alone."""

import pytest

from tests.planning.models import kinds, plan

STORED = {"params/body/kernel": (4, 5), "params/body/bias": (5,)}
WANTED = {"body/kernel": (4, 5), "body/bias": (5,)}


def dense(name, above=""):
    return {f"{above}{name}/kernel": (5, 3), f"{above}{name}/bias": (3,)}


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("actor", "critic"), ("query", "key"), ("encoder", "decoder"), ("mean_head", "log_std_head")],
)
def test_opposites_differ_in_more_than_names(stored, wanted):
    found = plan(STORED | dense(stored, "params/"), WANTED | dense(wanted))

    (cause,) = found.causes
    assert cause.kind == "OtherNames"
    assert cause.text == (
        "for each of the 2 missing weights there is an unexpected stored leaf of the same shape and dtype, "
        "but no name says that they are the same."
    )
    assert "renames" not in cause.way.arguments


def test_what_names_tell_in_part_is_counted():
    stored = {"params/a/kernel": (4, 5), "params/mean/kernel": (5, 3), "params/b/kernel": (3, 2)}
    wanted = {"x/kernel": (4, 5), "log_std/kernel": (5, 3), "y/kernel": (3, 2)}

    (cause,) = plan(stored, wanted).causes

    assert cause.text.endswith("shape and dtype, and for 2 of them names or shapes tell which it is.")


def test_where_names_tell_all_only_they_differ():
    (cause,) = plan(STORED | {"params/scale": (5,)}, WANTED | {"weight": (5,)}).causes

    assert cause.text.endswith("of the same shape and dtype: only names differ.")


def test_one_layer_of_another_number_is_told_as_one():
    found = plan(STORED | dense("fc1", "params/"), WANTED | dense("fc2"))

    assert kinds(found.causes) == ["LayersShifted"]
    assert found.causes[0].text == "the one layer of 'fc' is number 1 in the checkpoint and 2 in the target."
    hint = found.causes[0].way
    assert hint.words == "if it is the same layer, pass renames=[('fc1', 'fc2')]."
    assert plan(STORED | dense("fc1", "params/"), WANTED | dense("fc2"), **hint.arguments).fits
