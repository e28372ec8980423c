"""docs/errors.md shows the real message of each broken restore."""

import ast

import pytest

from tests.gallery.cases import GALLERY, Broken
from tests.gallery.page import PAGE, error_of, page


def test_the_page_is_what_the_suite_generates():
    assert PAGE.read_text() == page(), "run `python -m tests.gallery`"


def test_the_gallery_has_fifteen_broken_restores_and_more():
    assert len(GALLERY) >= 15
    assert len({case.title for case in GALLERY}) == len(GALLERY)


def _name(case: Broken) -> str:
    return case.provoke.__name__


@pytest.mark.parametrize("case", [c for c in GALLERY if c.topic != "Paths"], ids=_name)
def test_an_error_carries_its_paths_and_is_of_all_the_types_that_it_names(case):
    error, _ = error_of(case)

    named = type(error).__name__.split(" + ")
    assert set(named) <= {kind.__name__ for kind in type(error).__mro__}
    assert {type(problem).__name__ for problem in error.problems} == set(named)
    assert error.paths or case.topic in ("Targets", "Rules and policies")


@pytest.mark.parametrize("case", GALLERY, ids=_name)
def test_a_message_has_a_way_out_that_python_can_read(case):
    _, message = error_of(case)

    for line in message.replace("\n      ", " ").splitlines():
        for opening in ("policy={", "renames=["):
            if line.startswith("hint:") and opening in line:
                call = line[line.index(opening) :]
                closing = {"{": "}", "[": "]"}[opening[-1]]
                ast.parse(f"f({call[: call.rindex(closing) + 1]})")


def test_a_restore_that_does_not_fail_is_no_part_of_the_gallery():
    fits = Broken(title="", topic="", story="", provoke=lambda _: None)

    with pytest.raises(AssertionError, match="nothing was raised"):
        error_of(fits)
