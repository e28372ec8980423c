"""Every hint is followed to the letter, and again where it leads: never away from what is stored."""

import pathlib
from typing import Any

import pytest

from orbax_nnx_handler import RestoreError, plan_restore
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from tests.gallery import cases
from tests.gallery.cases import GALLERY
from tests.planning.diagnosis.following import FOREIGN, SHOWN, complaints, complaints_without, left_out, pair
from tests.sampled import every

PAIRS = [*SHOWN, *FOREIGN]


@pytest.mark.parametrize("name", every(2, PAIRS))
def test_no_hint_leads_to_fewer_right_leaves_or_to_a_fit_without_what_is_stored(name: str) -> None:
    given = pair(name)

    assert list(complaints(given, [])) == []


@pytest.mark.parametrize("name", every(2, PAIRS, 1))
def test_nor_does_one_that_is_met_under_rules_of_which_one_is_left_out(name: str) -> None:
    at = list(PAIRS).index(name)
    for left in left_out(name)[at % 3 :][:1]:
        assert complaints_without(name, left) == [], pair(name).rules[left]


def test_a_hint_that_fills_what_is_stored_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from orbax_nnx_handler.planning.diagnosis import evidence

    given = pair("whisper")
    monkeypatch.setattr(evidence.Evidence, "perhaps_stored", frozenset())

    assert any("fits, and" in said for said in complaints(given, []))


@pytest.mark.parametrize("case", every(3, GALLERY), ids=lambda case: case.provoke.__name__)
def test_no_hint_of_the_gallery_leads_to_a_fit_beside_unused_weights_of_those_shapes(
    case: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[RestorePlan] = []

    def restore(path: Any, target: Any, *args: Any, **passed: Any) -> Any:
        with pytest.raises(RestoreError) as raised:
            really(path, target, *args, **passed)
        for hint in raised.value.hints:
            arguments = {**passed, **hint.arguments}
            if hint.arguments and not args:
                plans.append(plan_restore(arguments.pop("path", path), target, **arguments))

    really = cases.restore
    monkeypatch.setattr(cases, "restore", restore)

    case.provoke(tmp_path)

    for plan in plans:
        unused = {tuple(sorted(item.shape)) for item in plan.unexpected.values()}
        filled = [path for path, item in plan.missing.items() if tuple(sorted(item.wanted.shape)) in unused]
        assert not (plan.fits and filled), filled
