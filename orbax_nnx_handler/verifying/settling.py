"""Open questions of a proposal, settled by running both programs: each at the smallest module that tells.

Each program runs once, under the first answer to every question. Then modules run by themselves, on what
Linen's were called with, with their weights made in each of the possible ways.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from orbax_nnx_handler.decide import decide
from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.lines import counted
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Recipe
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.suggesting import Proposal, Suggestion
from orbax_nnx_handler.planning.target.target import Target
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint
from orbax_nnx_handler.verifying.pairing import layers_of
from orbax_nnx_handler.verifying.programs import on_one_device
from orbax_nnx_handler.verifying.runs import Compared, Programs, Runs, run_both
from orbax_nnx_handler.verifying.single_module import lent
from orbax_nnx_handler.verifying.verification import Verification, compare
from orbax_nnx_handler.verifying.verify import verified

_MOST_TOGETHER = 64
_EQUAL, _NEAR = 1e-4, 1e-2
_NEARER = 30
"""How much nearer than any other answer one has to be where the code differs a little too."""

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
    """

    checkpoint: Checkpoint
    target: Any
    options: RestoreOptions
    suggestion: Suggestion
    programs: Programs
    init: Callable[[], Any] | None = None

    def settled(self) -> Suggestion:
        """Returns the proposal with its questions answered as far as the outputs tell.

        Raises:
            VerificationError: One of the programs fails, or their outputs cannot be compared.
        """
        answers: list[int | None] = [None] * len(self.suggestion.questions)
        try:
            plan, parts = self._decided(self._rules([0] * len(answers)))
        except RestoreError as error:
            return dataclasses.replace(self.suggestion, proof=f"not run: {str(error).splitlines()[0]}")
        if answers:
            self._answer(answers, plan, run_both(self.checkpoint, plan, parts, self.programs, self.init))
        return self._with(answers)

    def _rules(self, answers: Sequence[int | None]) -> tuple[Rule, ...]:
        return (*self.options.renames, *self.suggestion.answered(answers))

    def _decided(self, rules: tuple[Rule, ...], *, check: bool = True) -> tuple[RestorePlan, Target]:
        options = dataclasses.replace(self.options, renames=rules)
        return decide(self.checkpoint, self.target, on_one_device(self.target), options, check=check)

    def _answer(self, answers: list[int | None], plan: RestorePlan, runs: Runs) -> None:
        ways = [self._ways(number, plan) for number in range(len(answers))]
        for one in self._modules(runs):
            left = [number for number, answer in enumerate(answers) if answer is None]
            about = [number for number in left if _touches(one, ways[number])]
            if not about or not all(_stays_within(one, ways[number], plan) for number in about):
                continue
            if math.prod(len(ways[number]) for number in about) > _MOST_TOGETHER:
                continue
            chosen = self._chosen(runs, one, [ways[number] for number in about])
            for number, answer in zip(about, chosen or (), strict=False):
                answers[number] = answer

    def _ways(self, number: int, plan: RestorePlan) -> _Ways:
        """Returns what each answer to one question changes, the others answered as the plan has them."""
        found: dict[int, Mapping[Path, Recipe]] = {0: {}}
        for answer in range(1, len(self.suggestion.questions[number].choices)):
            answers = [answer if at == number else 0 for at in range(len(self.suggestion.questions))]
            try:
                other, _ = self._decided(self._rules(answers), check=False)
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
                found = compare(one.linen.outputs, outputs)
                apart[answers] = found.relative if found.compared else math.inf
        # The caller's module may fail in any way when it is called outside of its program.
        except Exception:
            return None
        best, *others = sorted(apart, key=apart.__getitem__)
        next_ = min((apart[other] for other in others), default=math.inf)
        return best if _tells(apart[best], next_) else None

    def _with(self, answers: Sequence[int | None]) -> Suggestion:
        """Returns the proposal under the answers, and what both programs return under its rules."""
        questions = self.suggestion.questions
        rules = self.suggestion.answered(answers)
        known = {proposal.rule: proposal for proposal in self.suggestion.proposals}
        plan, parts = self._decided((*self.options.renames, *rules), check=False)
        left = [question for question, answer in zip(questions, answers, strict=True) if answer is None]
        verification = None
        if not left and plan.restored and plan.error() is None:
            verification = verified(self.checkpoint, plan, parts, self.programs, init=self.init)
        wanted, stored = self.suggestion.unmatched_wanted, self.suggestion.unmatched_stored
        return dataclasses.replace(
            self.suggestion,
            proposals=tuple(known.get(rule) or Proposal(rule=rule, grounds="outputs") for rule in rules),
            questions=tuple(left),
            unmatched_wanted=tuple(path for path in wanted if path not in plan.restored),
            unmatched_stored=tuple(path for path in stored if path in plan.unexpected),
            problem="\n".join(str(fault) for fault in plan.faults),
            proof=_words(verification, len(plan.missing)),
            is_proved=verification is not None and verification.equal,
            settle=None,
        )


def _touches(one: Compared, ways: _Ways) -> bool:
    return any(leaf in changed for changed in ways.values() for leaf in one.pair.leaves)


def _stays_within(one: Compared, ways: _Ways, plan: RestorePlan) -> bool:
    """Tells whether a module holds the same stored elements under every answer, so that its pair stays."""
    sources = {
        frozenset(
            atom
            for leaf in one.pair.leaves
            for atoms in layers_of(changed.get(leaf, plan.restored[leaf].recipe))
            for atom in atoms
        )
        for changed in ways.values()
    }
    return len(sources) == 1


def _tells(best: float, next_: float) -> bool:
    if best <= _EQUAL:
        return next_ > _EQUAL and next_ > _NEARER * best
    return best <= _NEAR and next_ > _NEARER * best


def _words(verification: Verification | None, missing: int) -> str:
    if verification is None:
        return ""
    zeros = f", with {counted(missing, 'leaf', 'leaves')} at zero" if missing else ""
    if verification.equal:
        return f"proved by outputs: both programs return the same within {verification.relative:.1e}{zeros}"
    where = f", first in {verification.first.path}" if verification.first is not None else ""
    apart = f"{verification.relative:.1e} apart"
    return f"the programs return different values under these rules{zeros} ({apart}){where}"
