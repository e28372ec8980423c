"""What is proposed, as text that a user reads and pastes."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal

from orbax_nnx_handler.planning.core.folding import Row, fold
from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.core.lines import WIDTH, aligned, as_html, counted, framed
from orbax_nnx_handler.planning.core.paths import Path, canonical, levels, printable, segments, spelled
from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.planning.likeness import lists_around
from orbax_nnx_handler.planning.likeness.links import Link, PairGrounds
from orbax_nnx_handler.planning.likeness.vocabulary import Names, concepts, exclude, likeness, meanings, words
from orbax_nnx_handler.planning.rules import Fuse, Rename, Rule, Split
from orbax_nnx_handler.planning.suggesting.proved_recipes import Remade
from orbax_nnx_handler.planning.suggesting.questions import Question, parts_in_words
from orbax_nnx_handler.planning.verdict.outcomes import Verdict, mismatched_rows

Confidence = Literal["certain", "likely", "open"]

_WORDS: Mapping[str, str] = {
    "shapes": "by shapes",
    "names": "by names",
    "order": "by the order in which both programs number or compute them",
    "siblings": "arranged as its siblings are",
    "patch": "with rows, columns and channels of a patch in one order on both sides",
    "outputs": "proved by outputs",
    "tried": "by outputs of single modules, not proved",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """One proposed rule.

    Attributes:
        rule: The rule.
        grounds: What it rests on.
        fact: The code base whose convention it follows; empty for none.
    """

    rule: Rule
    grounds: PairGrounds
    fact: str = ""

    @property
    def why(self) -> str:
        """What it rests on, in a few words; empty where shapes allow nothing else and names say the same."""
        if changes_nothing(self.rule):
            return "stays as it is, in a save as well"
        if self.grounds == "shapes" and not (isinstance(self.rule, Rename) and _is_untold(self.rule)):
            return ""
        return f"as in {self.fact}" if self.fact else _WORDS.get(self.grounds, "")


def _is_untold(rule: Rename) -> bool:
    """Tells whether both sides of a rename have names, and no word or meaning in common."""
    sides = (re.sub(r"\{\w*\}", "", side) for side in (rule.pattern, rule.replacement))
    said = [{*meanings(side), *(word.removesuffix("s") for word in words(side))} for side in sides]
    return all(said) and said[0].isdisjoint(said[1])


_RANKING: tuple[PairGrounds, ...] = ("shapes", "names", "patch", "siblings", "order", "fact")


def proposals_of(rules: Mapping[Rule, Sequence[Link]]) -> Iterator[Proposal]:
    """Yields each rule with the weakest ground of the links that it serves.

    A known program tells a rule where all that this serves follows that program: what several arrays are
    made one by, or which part is which; else names do.
    """
    counted = _told_by_order([link for links in rules.values() for link in links])
    for rule, links in rules.items():
        found: list[PairGrounds] = [link.grounds for link in links]
        if any(link.source.source in counted for link in links):
            found.append("order")
        is_joining = isinstance(rule, Fuse | Split)
        facts = {link.fact if is_joining or link.joint is None else "" for link in links}
        fact = facts.pop() if len(facts) == 1 else ""
        told: list[PairGrounds] = [x if fact or x != "fact" else "names" for x in found]
        grounds: PairGrounds = max(told, key=_RANKING.index) if told else "shapes"
        yield Proposal(rule=rule, grounds=grounds, fact=fact if grounds == "fact" else "")


def _told_by_order(links: Sequence[Link]) -> Collection[Path]:
    """Returns the stored leaves that nothing but an order tells from another one of their shape.

    Linen counts modules as they are made: of `Dense(n)(relu(Dense(n)(x)))` the layer that is called last
    is `Dense_0`. A target that has the same name counts the same way. And what is no index, as the sizes in
    `branch_3` and `branch_5`, is that of the other side's layer by its rank alone.
    """
    found, shifts = defaultdict[object, set[Path]](set), defaultdict[object, dict[Path, int]](dict)
    for link in links:
        target, source, theirs = link.target, link.source, levels(link.source.names)
        if automatic := {level.base for level in theirs if level.is_automatic}:
            ours = {level.base for level in levels(target.names)}
            if not automatic <= ours:
                names = tuple(level.base if level.is_automatic else level for level in theirs)
                found[names, source.shape, source.number].add(source.source)
        if inner := lists_around(source.names)[:1]:
            for (one, at, within), (other, to, inside) in zip(
                lists_around(target.names), inner, strict=False
            ):
                shifts[one, within, other, inside, source.shape][source.source] = to - at
    ranked = [{*several} for several in shifts.values() if len({*several.values()}) > 1]
    return {path for paths in (*found.values(), *ranked) if len(paths) > 1 for path in paths}


def _settling(questions: Sequence[Question], *, is_run: bool) -> Iterator[str]:
    """Yields how questions are settled: by both programs, or by their reader."""
    if not is_run:
        yield f"# to settle a question, run both: {RUN_BOTH}."
    last = [str(min(at // 2, len(question.choices) - 1)) for at, question in enumerate(questions[:3])]
    shown = [*last[:1], *["None"][: len(last) - 1], *last[2:], *["..."][: max(len(questions) - 3, 0)]]
    what = "it by number" if len(questions) == 1 else "them by number; None leaves one open"
    yield f"# {BY_NUMBER}{', '.join(shown)}]) answers {what}."


RUN_BOTH = "suggest(..., verify=(linen_apply, nnx_apply, inputs))"
_FLATTENED = (
    "where an image is flattened, its channels may come first or last, as only outputs tell; run both"
)
BY_NUMBER = "renames=found.answered(["

Answers = Sequence[int | None]
"""For each question the number of its alternative, or None to leave it open."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Proposed rules. Nothing is applied: print it, read it, paste `renames`.

    ```python
    found = suggest(path, target)
    print(found)
    plan = plan_restore(path, target, renames=found.renames)
    ```

    Attributes:
        proposals: The rules with what each rests on, in the order in which they apply.
        questions: What names, order and shapes leave open; no rule rests on it.
        unmatched_wanted: Wanted paths for which nothing stored was found.
        unmatched_stored: Stored paths that nothing wants.
        problem: What a plan with these rules says against them; empty if nothing.
        wanted_count: How many leaves the target wants of the checkpoint.
        settle: Returns the rules with some questions answered, and some leaves made otherwise.
        proof: What both programs return under the rules, in words; empty where they were not run.
        is_proved: Whether both programs return the same under the rules.
        is_refuted: Whether both programs were run and return different values.
        is_given: Whether the caller's own rules decide too, of which nothing here says that they are right.
        flattened: Wanted matrices that may be of an image made one axis, in an order that only outputs tell.
        resized: Of which wanted leaves another size is stored, in words.
        is_untold: Whether both programs return the same, which does not tell of all that rules make.
        is_rivalled: Whether a stored module that nothing wants would fit as well as one that is taken.
    """

    proposals: tuple[Proposal, ...]
    questions: tuple[Question, ...]
    unmatched_wanted: tuple[Path, ...]
    unmatched_stored: tuple[Path, ...]
    problem: str = ""
    wanted_count: int = 0
    settle: Callable[[Answers, Sequence[Remade]], tuple[Rule, ...]] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )
    proof: str = ""
    is_proved: bool = False
    is_refuted: bool = False
    is_given: bool = False
    flattened: tuple[Path, ...] = ()
    resized: tuple[str, ...] = ()
    is_untold: bool = False
    is_rivalled: bool = False

    @property
    def renames(self) -> tuple[Rule, ...]:
        """The proposed rules, as `restore` takes them."""
        return tuple(proposal.rule for proposal in self.proposals)

    @cached_property
    def _asked(self) -> frozenset[Path]:
        """The wanted leaves that the questions are about."""
        return frozenset(path for question in self.questions for path in question.wanted)

    @property
    def covered(self) -> int:
        """How many wanted leaves are settled under the rules, those that need none included."""
        return self.wanted_count - len(self._asked.union(self.unmatched_wanted))

    @property
    def confidence(self) -> Confidence:
        """How sure the whole is.

        `certain`: every wanted leaf is covered, and shapes and names that both sides share allow nothing
        else, or both programs return the same. `likely`: every leaf is covered, and names, order, a known
        program or the caller's rules decide, features may be flattened otherwise, another stored module
        would fit as well, or equal outputs do not tell of all. `open`: a leaf is not, or values differ.
        """
        if self.unmatched_wanted or self.questions or self.problem or self.is_refuted:
            return "open"
        is_doubted = self.is_given or self.is_rivalled or self.is_untold or bool(self.flattened)
        is_told = not is_doubted and all(item.grounds == "shapes" for item in self.proposals)
        return "certain" if self.is_proved or is_told else "likely"

    def answered(self, answers: Answers, changes: Sequence[Remade] = ()) -> tuple[Rule, ...]:
        """Returns the complete rules with some of the questions answered.

        Args:
            answers: For each question the number of its alternative, or None to leave it open.
            changes: Leaves that are made otherwise than the rules without them say.

        Raises:
            ValueError: There are more or fewer answers than questions, or an answer is none of the choices.
        """
        if len(answers) != len(self.questions):
            raise ValueError(
                f"{counted(len(self.questions), 'question')}, {counted(len(answers), 'answer')}: each takes "
                "one, None to leave it open"
            )
        for at, (answer, question) in enumerate(zip(answers, self.questions, strict=True), 1):
            if answer is not None and not 0 <= answer < len(question.choices):
                raise ValueError(f"question {at} has answers 0 to {len(question.choices) - 1}, not {answer}")
        return self.settle(answers, changes) if self.settle is not None else self.renames

    def __str__(self) -> str:
        lines = [f"# {self.coverage}", f"# confidence: {self.confidence}"]
        rules = [f"    {item.rule}," + (f"  # {item.why}" if item.why else "") for item in self.proposals]
        lines += ["renames=[", *rules, "]"] if rules else ["# no rule is proposed."]
        lines += [_comment(line) for question in self.questions for line in question.lines]
        if self.flattened and not self.proof:
            lines.append(_comment(f"{parts_in_words(self.flattened)}: {_FLATTENED}: {RUN_BOTH}."))
        lines += [f"# your rules are not proved; run both: {RUN_BOTH}."] * (self.is_given and not self.proof)
        lines += _settling(self.questions, is_run=bool(self.proof)) if self.questions else []
        lines += [_comment(self.proof)] if self.proof else []
        lines += _rest("wanted, and nothing stored was found", self.unmatched_wanted)
        lines += _rest("stored, and nothing wants it", self.unmatched_stored)
        lines += [_comment(line) for line in (*self.resized, *self.problem.splitlines())]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return framed(as_html(str(self).split("\n")))

    @property
    def coverage(self) -> str:
        """How much of the target is covered, in a line."""
        left, asked = self.wanted_count - self.covered, len(self._asked)
        said = f"covers {self.covered} of {counted(self.wanted_count, 'leaf', 'leaves')}"
        among = "all asked about" if asked == left else f"{asked} of them asked about"
        return f"{said}; {left} open" + (f", {among}" if asked else "") if left else said


def asking_too(
    found: Suggestion, rule: Rule, parts: tuple[Path, Path], stored: Iterable[Path], wanted: Iterable[Path]
) -> Suggestion:
    """Returns a proposal that asks whether a stored part becomes a wanted one too, by a rule behind it."""

    def settled(answers: Answers, changes: Sequence[Remade]) -> tuple[Rule, ...]:
        return (*found.answered(answers[:-1], changes), *([] if answers[-1] is None else [rule]))

    question = Question(
        wanted=tuple(wanted),
        stored=tuple(stored),
        parts=((parts[0],), (parts[1],)),
        about="which",
        choices=(f"{' -> '.join(map(spelled, parts))} too",),
        settle=lambda _: (*found.renames, rule),
    )
    return dataclasses.replace(found, questions=(*found.questions, question), settle=settled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
    """Rules with what a plan makes of them.

    Attributes:
        rules: The rules, each with the links that it serves.
        links: What the rules are to do.
        verdict: The plan; None where the planner refuses the rules.
        problem: What it says against them.
        right: How many wanted leaves are made from what the links say.
        wrong: Those that are not, and those that the rules take from what they were made of without.
        root: How many segments of wanted paths lead to the model.
        below: The stored levels that the planner takes away by itself.
    """

    rules: Mapping[Rule, Sequence[Link]] = dataclasses.field(default_factory=dict[Rule, Sequence[Link]])
    links: Sequence[Link] = ()
    verdict: Verdict | None
    problem: str = ""
    right: int = 0
    wrong: tuple[Path, ...] = ()
    root: int = 0
    below: Names = ()

    @property
    def is_clean(self) -> bool:
        """Whether the planner takes the rules and no leaf comes from elsewhere."""
        return not self.wrong and not self.problem

    @property
    def is_rivalled(self) -> bool:
        """Whether a module that nothing wants may be meant where one is taken that holds the same."""
        return self.verdict is not None and bool(self.rules) and is_rivalled(self.verdict)


def steps_by_leaf(links: Iterable[Link]) -> Mapping[Path, tuple[str, ...]]:
    """Returns what is done with the shape of each wanted leaf, or of the first part of it, in order."""
    found: dict[Path, tuple[str, ...]] = {}
    for link in links:
        for at, leaf in enumerate(link.wanted):
            way = link.ways[at if link.is_split else 0][0]
            if not link.source.made:
                steps = (*link.after, *way.steps) if link.is_split else (*way.steps, *link.after)
                found[leaf.source] = (*link.source.done, *(step.kind for step in steps))
    return found


def behind(rules: Sequence[Rule], found: Suggestion, fact: str = "") -> Suggestion:
    """Returns the same proposal behind rules that it was searched under, and that it needs."""
    grounds: PairGrounds = "fact" if fact else "names"
    first = tuple(Proposal(rule=one, grounds=grounds, fact=fact) for one in rules)
    answered = changed(found, lambda others: (*rules, *others))
    return dataclasses.replace(answered, proposals=(*first, *found.proposals))


def changed(found: Suggestion, change: Callable[[tuple[Rule, ...]], tuple[Rule, ...]]) -> Suggestion:
    """Returns a proposal with the rules of each answer changed."""

    def asked(question: Question) -> Question:
        def settled(answer: int) -> tuple[Rule, ...]:
            return change(question.settle(answer))

        return dataclasses.replace(question, settle=settled)

    def settled(answers: Answers, changes: Sequence[Remade]) -> tuple[Rule, ...]:
        return change(found.renames if found.settle is None else found.settle(answers, changes))

    return dataclasses.replace(found, questions=tuple(map(asked, found.questions)), settle=settled)


def changes_nothing(rule: Rule) -> bool:
    """Tells whether a rule says nothing but that a path is the right one."""
    return isinstance(rule, Rename) and rule.pattern == rule.replacement


def problem_of(verdict: Verdict, weights: Iterable[Path], questions: Iterable[Question] = ()) -> str:
    """Returns what a plan says against its rules, or of shapes that no question is about; empty for none."""
    asked = {path for each in questions if each.about == "which" for path in each.wanted}
    if verdict.faults:
        return "\n".join(map(str, verdict.faults))
    wrong = {path: x for path, x in verdict.mismatched.items() if x.kind == "shape" and path not in asked}
    if not (shapes := [wrong[path] for path in weights if path in wrong]):
        return ""
    head, rows = f"{counted(len(shapes), 'leaf is', 'leaves are')} stored", aligned(mismatched_rows(shapes))
    way = "no rule cuts or pads a weight: build the target with the stored sizes."
    pairs = [(x.stored_shape, x.wanted.shape) for x in shapes]
    if all(one != other and sorted(one) == sorted(other) for one, other in pairs):
        way = "their axes lie in another order, which shapes do not tell: pass a Transpose for each."
    return f"{head} in another shape:\n{rows}\n{way}"


def resized_in(verdict: Verdict, questions: Iterable[Question]) -> tuple[str, ...]:
    """Returns in words which wanted tables of positions or words another size is stored of."""
    placed, asked = verdict.sides.placements, {path for each in questions for path in each.wanted}
    stored = [leaf for path, leaf in verdict.unexpected.items() if placed[path].section == "model"]
    return tuple(
        text
        for path, item in verdict.missing.items()
        if path not in asked and (text := _resized(item.wanted, stored))
    )


_TABLES = frozenset(("pos", "token", "embed"))


def _resized(wanted: WantedLeaf, stored: Iterable[StoredLeaf]) -> str:
    said = concepts(segments(wanted.path))
    found = [
        (likeness(said, concepts(segments(leaf.path))), leaf)
        for leaf in (stored if said & _TABLES else ())
        if len(leaf.shape) == len(wanted.shape) > 1
        and sum(one != other for one, other in zip(leaf.shape, wanted.shape, strict=True)) == 1
    ]
    best = [leaf for score, leaf in found if score == max(each for each, _ in found) and score > 0]
    if len(best) != 1:
        return ""
    (leaf,) = best
    one, other = f"{spelled(wanted.path)} {wanted.shape}", f"{spelled(leaf.path)} {leaf.shape}"
    if math.prod(leaf.shape) > math.prod(wanted.shape):
        return f"{one} may be a part of {other}: if you know which, a Split takes it out."
    return f"{one} is larger than what may be meant, {other}: no rule pads a weight."


# What may be meant as well.


def is_rivalled(verdict: Verdict) -> bool:
    """Tells whether a module that nothing wants holds what one does that is wanted, and may be meant.

    An average of the weights, an older copy of them, a layer more. Of what is wanted by its own name, one
    that is counted with it, or called its opposite, is none.
    """
    # Without their numbers: of a list there are few names, however long it is.
    taken = defaultdict[tuple[tuple[Path, Path], Shape], set[tuple[str, bool]]](set)
    for path, item in verdict.restored.items() if verdict.unexpected else ():
        source, called = item.recipe.path if isinstance(item.recipe, Read) else (), canonical(path)
        for at, others in _levels(source):
            is_own = {*canonical(names := segments(source)[at : at + 1])} <= {*called}
            taken[others, item.wanted.shape].add((_unnumbered(*names), is_own))
    rivals = defaultdict[Path, list[set[str]]](list)
    for path, leaf in verdict.unexpected.items() if any(taken.values()) else ():
        for at, others in _levels(path):
            name = _unnumbered(segments(path)[at])
            some = {x for x, is_own in taken[others, leaf.shape] if not is_own or _may_be(name, x)}
            rivals[path[: at + 1]].append(some)
    return any(names[0].intersection(*names[1:]) for names in rivals.values())


def _may_be(name: str, own: str) -> bool:
    return name != own and not exclude(concepts([name]), concepts([own]))


def _levels(path: Path) -> list[tuple[int, tuple[Path, Path]]]:
    """Returns the levels of modules in a path, each with what stands before and behind it."""
    keys = segments(path)
    return [(at, (keys[:at], keys[at + 1 :])) for at in range(1, len(keys) - 1)]


@functools.lru_cache(maxsize=65536)
def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "", name)


def _comment(text: str) -> str:
    """Returns a line that stays a comment when it is pasted: a key may hold a line break."""
    return f"# {printable(text)}"


def _rest(what: str, paths: tuple[Path, ...]) -> list[str]:
    """Returns paths in a line, or where that is wider than a line, each in a line of its own."""
    line = f"{what}: {parts_in_words(paths)}"
    if len(line) <= WIDTH:
        return [_comment(line)] if paths else []
    return [_comment(f"{what}:"), *(_comment(f"    {row.text}") for row in fold(map(Row, paths)))]
