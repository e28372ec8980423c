"""Open questions of a proposal, settled by running both programs: each at the smallest module that tells.

Each program runs under the first answer to every question. Then modules run by themselves, on what
Linen's were called with, with their weights made in each of the possible ways. What the first module that
still differs proves of its weights becomes a rule too, and both programs run again. Where a few answers are
left, the whole model runs under each: the only one under which the programs are equal is proved.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from orbax_nnx_handler.planner import decide
from orbax_nnx_handler.planning.core.errors import RestoreError, UnreadableLeafError, VerificationError
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Add, Recipe, reads
from orbax_nnx_handler.planning.core.regions import of_all_layers
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.suggesting import Proposal, Question, Remade, Suggestion
from orbax_nnx_handler.planning.target import Target
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint
from orbax_nnx_handler.verifying import Programs, agree, compare_inputs, lent
from orbax_nnx_handler.verifying.comparison import compared, exchanges_tell, leaving_out, misfilled, run_both
from orbax_nnx_handler.verifying.pairing import by_path, compare_outputs, layers_of
from orbax_nnx_handler.verifying.proved_rules import (
    in_words,
    made_as_called,
    rules_remaking,
    rules_to_blame,
    tells,
    why_open,
)
from orbax_nnx_handler.verifying.runs import Compared, Runs
from orbax_nnx_handler.verifying.verification import FirstDifference, Verification
from orbax_nnx_handler.verifying.weights import LinenRun, Misfilled, on_one_device

_MOST_TOGETHER, _MOST_CALLS = 64, 3
_MOST_RUNS, _MOST_WHOLE = 16, 6

_Ways = Mapping[int, Mapping[Path, Recipe]]
"""For each answer to a question the leaves that are made in another way than under the first."""


@dataclasses.dataclass(kw_only=True)
class Settling:
    """Settles what a proposal leaves open.

    Attributes:
        checkpoint: What is stored.
        target: What the caller wants.
        options: The settled rules among them.
        suggestion: The proposal.
        programs: Both programs.
        init: Builds the target with real values, for what is not stored.
        tolerance: What outputs may be apart, as `verify` takes it.
        allowed: The answers to each question that are still possible; programs run under the first.
        wrong: What is filled from what the Linen program does not use, once that was looked for.
        as_called: What is made otherwise from the start: of what is called in the same place by Linen.
        remade: Rules behind all others: what outputs prove and those cannot say of how leaves are made.
        plan: The last plan under which both programs ran.
        is_equal: Whether they returned the same when they were compared last.
        runs: That run of both.
    """

    checkpoint: Checkpoint
    target: Any
    options: RestoreOptions
    suggestion: Suggestion
    programs: Programs
    init: Callable[[], Any] | None = None
    tolerance: float | None = None
    allowed: list[Sequence[int]] = dataclasses.field(init=False)
    wrong: Misfilled | None = None
    as_called: tuple[Remade, ...] = ()
    remade: tuple[Rule, ...] = ()
    plan: RestorePlan | None = dataclasses.field(default=None, init=False)
    is_equal: bool = dataclasses.field(default=False, init=False)
    runs: Runs | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        self.allowed = [range(len(question.choices)) for question in self.suggestion.questions]

    def settled(self) -> Suggestion:
        """Returns the proposal with its questions answered, and its leaves made, as the outputs tell.

        What nothing but an order tells is open to be proved otherwise.

        Raises:
            VerificationError: One of the programs fails, or their outputs cannot be compared.
            UnreadableLeafError: Stored bytes are absent or damaged.
        """
        found = self._settled()
        is_wrong = found.confidence == "open" and not self.is_equal
        if is_wrong and not self.as_called and (made := self._as_called()):
            again = dataclasses.replace(self, as_called=made, remade=())._settled()
            return again if again.confidence != "open" else found
        return found

    def _as_called(self) -> tuple[Remade, ...]:
        """Returns what is missing, asked about or told by an order, by what Linen calls in its place."""
        if (plan := self.plan) is None or (runs := self.runs) is None:
            return ()
        both = runs.runner.calls, by_path(runs.linen.calls)
        orders = [{path: some[0].order for path, some in calls.items()} for calls in both]
        asked = {path for question in self.suggestion.questions for path in question.wanted}
        ordered = {each.rule.quoted for each in self.suggestion.proposals if each.grounds == "order"}
        return made_as_called(asked, ordered, plan, runs.linen.weights.location, *orders)

    def _settled(self) -> Suggestion:
        made = {each.leaf for each in self.as_called}
        answers = [0 if made.issuperset(each.wanted) else None for each in self.suggestion.questions]
        changes = [*self.as_called]
        kept = answers[:], changes[:]
        rules, restored = self._rules(answers, changes), frozenset[Path]()
        verification = linen = None
        for _ in range(_MOST_RUNS):
            try:
                plan, parts = self._decided(rules)
                if not plan.restored or not plan.restored.keys() >= restored:
                    # A proof of one module is none where another loses its own.
                    return self._with(*kept, verification)
                runs = run_both(self.checkpoint, plan, parts, self.programs, self.init, linen)
                self.plan, self.runs = plan, runs
            except (VerificationError, UnreadableLeafError):
                raise
            except RestoreError as error:  # The rules do not go together, or leave a value that counts.
                if restored:
                    return self._with(*kept, verification)
                words = [str(error).splitlines()[0].rstrip(":."), *(hint.words for hint in error.hints[:1])]
                return dataclasses.replace(self.suggestion, proof=f"not run: {'; '.join(words)}")
            restored, kept, linen = frozenset(plan.restored), (answers[:], changes[:]), runs.linen
            ways = self._answer(answers, changes, plan, runs)
            verification = None
            if (found := self._rules(answers, changes)) == rules:
                verification = compared(runs, plan, self.tolerance)
                self.is_equal = verification.equal
                if again := self._without_unused(verification, plan, runs):
                    return again
                self._answer_by_inputs(verification, answers, plan, runs)
                first = None if verification.equal else verification.first
                found = self._corrected(first, answers, changes, ways, plan, runs) if first else rules
                if found == rules:
                    break
            rules = found
        if None in answers and linen is not None and not (self.plan and self.plan.missing):
            verification = self._answer_whole(answers, changes, linen) or verification
        return self._with(answers, changes, verification)

    def _without_unused(self, found: Verification, plan: RestorePlan, runs: Runs) -> Suggestion | None:
        """Returns what is proved where leaves that the Linen program does not use are not meant."""
        if found.equal or self.wrong or (wrong := misfilled(runs, plan)) is None:
            return None
        self.wrong, options = wrong, dataclasses.replace(self.options, init=self.init)
        with contextlib.suppress(RestoreError):
            other = leaving_out(wrong.unused, self.checkpoint, self.target, options)
            again = dataclasses.replace(self, suggestion=other).settled()
            return again if again.confidence != "open" else None
        return None

    def _answer_whole(
        self, answers: list[int | None], changes: Sequence[Remade], linen: LinenRun
    ) -> Verification | None:
        """Answers what is left as the whole model tells, where one of few answers alone makes it equal."""
        pairs = zip(answers, self.allowed, strict=True)
        each = [possible if answer is None else (answer,) for answer, possible in pairs]
        equal = list[tuple[tuple[int, ...], Verification]]()
        for tried in itertools.product(*each) if math.prod(map(len, each)) <= _MOST_WHOLE else ():
            with contextlib.suppress(RestoreError):
                plan, parts = self._decided(self._rules(tried, changes))
                runs = run_both(self.checkpoint, plan, parts, self.programs, self.init, linen)
                if (found := compared(runs, plan, self.tolerance)).equal:
                    equal.append((tried, found))
        answers[:], verification = equal[0] if len(equal) == 1 else (answers[:], None)
        return verification

    def _corrected(
        self,
        first: FirstDifference,
        answers: list[int | None],
        changes: list[Remade],
        ways: Mapping[int, _Ways],
        plan: RestorePlan,
        runs: Runs,
    ) -> tuple[Rule, ...]:
        """Returns the rules with what outputs prove of the first module that differs, if any says it."""
        rules = self._rules(answers, changes)
        # What was changed, was changed in a model under the answers so far.
        free = {at: way for at, way in ways.items() if not self._is_changed(at, changes)}
        self._answer_by(first, answers, free, runs)
        if (found := self._rules(answers, changes)) == rules:
            layer, runner = first.layer, runs.runner
            for leaf, recipe in first.made_otherwise(plan.restored).items():
                axis = runner.axes.get(leaf, 0)
                whole = None if layer is None else of_all_layers(recipe, axis, layer, runner.shapes)
                changes.append(Remade(leaf=leaf, layer=None if whole else layer, recipe=whole or recipe))
            found = self._rules(answers, changes)
            left = self._unchanged(first.changes, plan, found)
            made = {leaf: first.changes[leaf] for leaf in left}
            self.remade += rules_remaking(made, plan.restored, runner.axes, runner.recipe, runner.shapes)
        return self._rules(answers, changes)

    def _unchanged(self, leaves: Iterable[Path], plan: RestorePlan, rules: tuple[Rule, ...]) -> list[Path]:
        """Returns the leaves that are made under other rules as they were under a plan's."""
        try:
            other, _ = self._decided(rules, check=False)
        except RestoreError:
            return []
        pairs = ((leaf, plan.restored.get(leaf), other.restored.get(leaf)) for leaf in leaves)
        return [leaf for leaf, one, two in pairs if one and two and one.recipe == two.recipe]

    def _rules(self, answers: Sequence[int | None], changes: Sequence[Remade]) -> tuple[Rule, ...]:
        """Returns all rules, the first possible answer taken to what has none yet."""
        pairs = zip(answers, self.allowed, strict=True)
        first = [possible[0] if answer is None else answer for answer, possible in pairs]
        return (*self.options.renames, *self.suggestion.answered(first, changes), *self.remade)

    def _decided(self, rules: tuple[Rule, ...], *, check: bool = True) -> tuple[RestorePlan, Target]:
        options = dataclasses.replace(self.options, renames=rules, init=self.init)
        return decide(self.checkpoint, self.target, on_one_device(self.target), options, check=check)

    def _answer(
        self, answers: list[int | None], changes: Sequence[Remade], plan: RestorePlan, runs: Runs
    ) -> Mapping[int, _Ways]:
        """Answers what modules by themselves tell; returns the ways of each question that had no answer."""
        ways = {
            number: self._ways(number, answers, changes, plan)
            for number, answer in enumerate(answers)
            if answer is None
        }
        for one in self._modules(runs) if ways else ():
            about = [
                number
                for number in ways
                if answers[number] is None and _touches(one, ways[number]) and self._may_tell(one, number)
            ]
            if not about or not all(_stays_within(one, ways[number], plan) for number in about):
                continue
            if math.prod(len(ways[number]) for number in about) > _MOST_TOGETHER:
                continue
            calls = [call for call in runs.compared if call.pair is one.pair][:_MOST_CALLS]
            # A cell's first call begins with a carry of zeros, which hides what it is multiplied with.
            told = (self._chosen(runs, call, [ways[number] for number in about]) for call in calls)
            for number, answer in zip(about, next(filter(None, told), ()), strict=False):
                answers[number] = answer if answer >= 0 else None
        return ways

    def _may_tell(self, one: Compared, number: int) -> bool:
        """Tells whether a module may answer a question: not one whose outputs come in another order too."""
        question = self.suggestion.questions[number]
        return question.about != "how" or not any(leaf[:-1] == one.path for leaf in question.wanted)

    def _ways(
        self, number: int, answers: Sequence[int | None], changes: Sequence[Remade], plan: RestorePlan
    ) -> _Ways:
        """Returns what each answer to one question changes, the others answered as the plan has them."""
        question, possible = self.suggestion.questions[number], self.allowed[number]
        found: dict[int, Mapping[Path, Recipe]] = {possible[0]: {}}
        if len(question.choices) == 1:  # Whatever else it might be: outputs have to depend on it.
            known = [leaf for leaf in question.wanted if leaf in plan.restored]
            found[-1] = {leaf: Add(plan.restored[leaf].recipe, 1.0) for leaf in known}
        for answer in possible[1:]:
            others = [answer if at == number else given for at, given in enumerate(answers)]
            try:
                other, _ = self._decided(self._rules(others, changes), check=False)
            except RestoreError:
                continue
            found[answer] = {
                leaf: item.recipe
                for leaf, item in other.restored.items()
                if leaf in plan.restored and item.recipe != plan.restored[leaf].recipe
            }
        return found

    @staticmethod
    def _modules(runs: Runs) -> Iterator[Compared]:
        """Yields each module once, smaller ones first, those of one size in the order of the run."""
        first: dict[Path, Compared] = {}
        for one in runs.compared:
            if one.found.is_certain:
                first.setdefault(one.path, one)
        yield from sorted(first.values(), key=lambda one: (-len(one.path), one.nnx.call.order))

    def _chosen(self, runs: Runs, one: Compared, ways: Sequence[_Ways]) -> tuple[int, ...] | None:
        """Returns the answers under which a module returns what Linen's does; None where none does."""
        apart: dict[tuple[int, ...], float] = {}
        try:
            layer = runs.runner.layer_at(one.path, one.nnx.call)
            inputs = lent(one.nnx.inputs, one.linen.inputs, whatever=True)
            for answers in itertools.product(*ways):
                changed = {
                    leaf: runs.runner.layered(leaf, recipe, layer)
                    for way, answer in zip(ways, answers, strict=True)
                    for leaf, recipe in way[answer].items()
                    if leaf[: len(one.path)] == one.path
                }
                outputs = runs.runner.run(one.path, layer, one.nnx.call, inputs, changed)
                found = compare_outputs(one.linen, one.nnx, outputs)
                apart[answers] = found.relative if found.compared else math.inf
        # The caller's module may fail in any way when it is called outside of its program.
        except Exception:
            return None
        best, *others = sorted(apart, key=apart.__getitem__)
        next_ = min((apart[other] for other in others), default=math.inf)
        return best if tells(apart[best], next_, one.found.outputs.coarse) else None

    def _answer_by(
        self, first: FirstDifference, answers: list[int | None], ways: Mapping[int, _Ways], runs: Runs
    ) -> None:
        """Strikes out the answers that were run with, and runs next with one that makes what outputs prove.

        Several may make it: of three modules that are called with the same, each is right there by itself.
        """
        layer = first.layer
        for number, changed in ways.items():
            fitting = list[int]()
            for answer, made in changed.items():
                some = (leaf for leaf in first.changes if leaf in made)
                recipes = {leaf: runs.runner.layered(leaf, made[leaf], layer) for leaf in some}
                if recipes and recipes == dict(first.changes):
                    fitting.append(answer)
            if fitting and answers[number] is None:
                rest = [answer for answer in self.allowed[number][1:] if answer not in fitting]
                self.allowed[number] = [*fitting, *rest]
                answers[number] = fitting[0] if not fitting[1:] + rest else None

    def _is_changed(self, number: int, changes: Sequence[Remade]) -> bool:
        return any(change.leaf in self.suggestion.questions[number].wanted for change in changes)

    def _answer_by_inputs(
        self, verification: Verification, answers: list[int | None], plan: RestorePlan, runs: Runs
    ) -> None:
        """Answers as a model that is right was made, where what modules are called with tells them apart."""
        for number, question in enumerate(self.suggestion.questions if verification.equal else ()):
            is_open, apart = answers[number] is None and question.about == "which", verification.relative
            if is_open and (_are_told(question, plan, runs) or exchanges_tell(question.wanted, runs, apart)):
                answers[number] = self.allowed[number][0]

    def _with(
        self, answers: Sequence[int | None], changes: Sequence[Remade], verification: Verification | None
    ) -> Suggestion:
        """Returns the proposal under the answers, and what both programs return under its rules."""
        questions = self.suggestion.questions
        rules = (*self.suggestion.answered(answers, changes), *self.remade)
        plan, _ = self._decided((*self.options.renames, *rules), check=False)
        left = [question for question, answer in zip(questions, answers, strict=True) if answer is None]
        answered = partial(self._answered, answers, changes)
        where = verification.first.path if verification and verification.first else ""
        is_equal = verification is not None and verification.equal
        missing = [*self.plan.missing] if self.plan else []
        proof = why_open(missing, where, is_equal=is_equal) if left else ""
        is_fewer = verification is not None and self.runs is not None and self.runs.digits.are_fewer
        fewer = verification.remarks[:1] if verification and is_fewer and (left or not is_equal) else ()
        if left or plan.error() is not None:
            verification = None
        if verification and self.runs:
            blamed = verification.first, plan.restored, self.runs.runner, self.options.renames
            proof = proof or in_words(verification, plan, rules_to_blame(*blamed), self.wrong)
        wanted, stored = self.suggestion.unmatched_wanted, self.suggestion.unmatched_stored
        return dataclasses.replace(
            self.suggestion,
            proposals=tuple(self._proposals(rules, plan, is_equal=is_equal)),
            questions=tuple(_with_one(question, at, len(left), answered) for at, question in enumerate(left)),
            unmatched_wanted=tuple(path for path in wanted if path not in plan.restored),
            unmatched_stored=tuple(path for path in stored if path in plan.unexpected),
            problem="\n".join(str(fault) for fault in plan.faults),
            proof=" ".join(filter(None, [proof, *fewer])),
            is_proved=verification is not None and verification.equal and not verification.remarks,
            is_untold=verification is not None
            and bool(rules and verification.equal and verification.remarks),
            is_refuted=verification is not None and not verification.equal,
            settle=answered,
        )

    def _answered(
        self,
        known: Sequence[int | None],
        changes: Sequence[Remade],
        more: Sequence[int | None],
        others: Sequence[Remade],
    ) -> tuple[Rule, ...]:
        """Returns the rules with answers to the questions that outputs leave open too."""
        rest = iter(more)
        answers = [next(rest) if answer is None else answer for answer in known]
        return (*self.suggestion.answered(answers, (*changes, *others)), *self.remade)

    def _proposals(self, rules: Iterable[Rule], plan: RestorePlan, *, is_equal: bool) -> Iterator[Proposal]:
        """Yields the rules with what each rests on: outputs prove one if they show all that it makes."""
        known = {proposal.rule: proposal for proposal in self.suggestion.proposals}
        is_fewer = self.runs is not None and self.runs.digits.are_fewer
        is_equal, runs = is_equal and not is_fewer, None if is_equal or is_fewer else self.runs
        recipes, shown = (runs.runner.recipes, runs.shown) if runs else (dict[Path, Recipe](), set[Path]())
        right = {leaf for leaf, item in plan.restored.items() if recipes.get(leaf) == item.recipe}
        right = {leaf for leaf in right if any(leaf[:depth] in shown for depth in range(len(leaf)))}
        for rule in rules:
            made = {leaf for leaf, item in plan.restored.items() if rule.quoted in item.reason.split("; ")}
            is_proved = is_equal or (made & recipes.keys() and made & recipes.keys() <= right)
            yield known.get(rule) or Proposal(rule=rule, grounds="outputs" if is_proved else "tried")


def _with_one(
    question: Question,
    at: int,
    count: int,
    answered: Callable[[Sequence[int | None], Sequence[Remade]], tuple[Rule, ...]],
) -> Question:
    """Returns one of the questions that are left, answered beside what outputs tell of the others."""

    def settled(answer: int) -> tuple[Rule, ...]:
        return answered([answer if each == at else None for each in range(count)], ())

    return dataclasses.replace(question, settle=settled)


def _touches(one: Compared, ways: _Ways) -> bool:
    return any(leaf in changed for changed in ways.values() for leaf in one.pair.leaves)


def _stays_within(one: Compared, ways: _Ways, plan: RestorePlan) -> bool:
    """Tells whether a module holds the same stored elements under every answer, so that its pair stays."""
    now = {leaf: plan.restored[leaf].recipe for leaf in one.pair.leaves}
    made = ([layers_of(changed.get(leaf, now[leaf])) for leaf in now] for changed in ways.values())
    return len({frozenset(itertools.chain(*itertools.chain(*each))) for each in made}) == 1


def _are_told(question: Question, plan: RestorePlan, runs: Runs) -> bool:
    """Tells whether Linen calls each module of a question with something else than all others that it may be.

    Of two that change places, the first one in the order of the run would be called as in the model that
    is right, and not with what Linen calls the other one with.
    """
    location, called = runs.linen.weights.location, by_path(runs.linen.calls)
    linen = {source: called.get(location.get(source, ())[:-1], ()) for source in question.stored}
    for leaf in question.wanted:
        own = {*reads(plan.restored[leaf].recipe)} if leaf in plan.restored else set[Path]()
        calls = runs.runner.calls.get(leaf[:-1], ())
        if len(own) != 1 or len(calls) != 1 or not own <= linen.keys():
            return False
        for source, others in linen.items():
            is_own = location[source][:-1] == location[next(iter(own))][:-1]
            if len(others) != 1 or agree(compare_inputs(others[0].inputs, calls[0].inputs)) != is_own:
                return False
    return len(question.choices) > 1
