"""Pairs that were written without a look at the search, each with its own truth: how many leaves come out.

`unseen_pairs.json` holds names and shapes of both sides, and of each wanted leaf a digest of what must
come: the stored leaves are counted through, so that no element is like another one.
`python -m tests.planning.suggesting.unseen` takes all pairs.
"""

import os
import subprocess
import sys

import pytest

from tests.planning.suggesting.pairs import (
    OPEN,
    UNSEEN,
    proposed,
    target_of,
    wrong_under,
)
from tests.planning.suggesting.settled import part_of_its_own, spoilt
from tests.planning.suggesting.unseen import SAMPLE, faults_of_proposal, faults_of_save, restored_of
from tests.processes import ROOT
from tests.sampled import every


@pytest.fixture(scope="module", params=SAMPLE)
def restored(request):
    """A pair's name and what is restored under the rules that are proposed for it: once for both tests."""
    return request.param, restored_of(request.param)


def test_an_unseen_pair_is_right_but_for_what_stays_open_and_never_wrong(restored):
    assert faults_of_proposal(*restored) == []


def test_the_rules_for_an_unseen_pair_save_back_what_was_stored(restored):
    name, state = restored
    if OPEN.get(name) == len(UNSEEN[name]["wanted"]):
        pytest.skip("nothing of it is restored")

    assert faults_of_save(name, state) == []


# InternLM2: a settled output tells nothing of how one array holds queries, keys and values.
@pytest.mark.parametrize("name", sorted({*every(5, SAMPLE), "internlm2"}))
def test_a_part_of_the_rules_for_an_unseen_pair_is_built_upon_and_nothing_becomes_wrong(name):
    tree, found = proposed(name)

    part = part_of_its_own(name, [*UNSEEN])

    assert not spoilt(name, part, target_of(UNSEEN[name]["wanted"]), tree, found.renames)


def test_each_array_of_queries_keys_and_values_that_stays_open_is_a_question():
    tree, found = proposed("guided_diffusion")

    for question in found.questions:
        assert question.choices[:2] == ("side by side", "head by head, 2 heads")
    rules = found.answered([0] * len(found.questions))
    assert wrong_under(rules, tree, UNSEEN["guided_diffusion"]) == set()


@pytest.mark.parametrize("name", ["bloom", "bloom_fused"])
def test_arrays_that_may_be_head_by_head_are_one_question_and_one_answer_is_right(name):
    pair, (tree, found) = UNSEEN[name], proposed(name)

    (question,) = found.questions

    assert question.choices[:2] == ("side by side", "head by head, 2 heads")
    right = [wrong_under(rules, tree, pair) == set() for rules in question.alternatives]
    assert right.count(True) == 1


def test_how_keys_and_values_lie_in_an_array_without_a_name_is_asked():
    _, found = proposed("segformer")

    assert found.questions
    assert {question.choices[0] for question in found.questions} == {"side by side"}
    left = {path[-2] for path in found.unmatched_wanted}
    assert left == {"key", "value"}


@pytest.mark.parametrize("name", ["evoformer", "perceiver"])
def test_one_answer_to_each_question_restores_all_that_was_open(name):
    pair, (tree, found) = UNSEEN[name], proposed(name)
    answers: list[int | None] = [None] * len(found.questions)

    for at, question in enumerate(found.questions):
        asked = {"/".join(map(str, path)) for path in question.wanted}
        answers[at] = next(
            choice
            for choice in range(len(question.choices))
            if not asked
            & wrong_under(found.answered([*answers[:at], choice, *answers[at + 1 :]]), tree, pair)
        )

    assert len(answers) <= 4
    assert wrong_under(found.answered(answers), tree, pair) == set()


def test_which_of_two_numbered_layers_of_one_shape_is_the_gate_is_one_question():
    pair, (tree, found) = UNSEEN["qwen2"], proposed("qwen2")

    (question,) = found.questions

    assert {path[-2] for path in found.unmatched_wanted} == {"w1", "w2"}
    right = [wrong_under(rules, tree, pair) == set() for rules in question.alternatives]
    assert sorted(right) == [False, True]


def test_which_of_two_attentions_comes_first_is_one_question_for_all_stages():
    pair, (tree, found) = UNSEEN["maxvit"], proposed("maxvit")

    (question,) = found.questions

    assert set(question.wanted) == set(found.unmatched_wanted)
    right = [wrong_under(rules, tree, pair) == set() for rules in question.alternatives]
    assert sorted(right) == [False, True]


SAID = """
import sys
from tests.planning.suggesting.pairs import proposed
print("\\n".join(str(proposed(name)[1]) for name in sys.argv[1:]))
"""


def test_a_process_of_another_order_of_sets_proposes_the_same_in_the_same_order():
    names = ["bart", "deeplab", "gpt_oss"]
    seed = 2 if os.environ.get("PYTHONHASHSEED") == "1" else 1

    other = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SAID, *names],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": str(seed), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=240,
        check=True,
    ).stdout

    here = "\n".join(str(proposed(name)[1]) for name in names)
    assert "Reshape" in here
    assert here + "\n" == other
