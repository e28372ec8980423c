"""What is proposed, as text that a user reads and pastes."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal

from orbax_nnx_handler.planning.core.folding import Row, fold, fold_paths, list_paths
from orbax_nnx_handler.planning.core.lines import WIDTH, aligned, as_html, counted, framed
from orbax_nnx_handler.planning.core.paths import Path, printable
from orbax_nnx_handler.planning.likeness.joined_parts import Remade
from orbax_nnx_handler.planning.likeness.links import Link, PairGrounds
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, part_of
from orbax_nnx_handler.planning.likeness.vocabulary import Names
from orbax_nnx_handler.planning.rules import Rename, Rule
from orbax_nnx_handler.planning.verdict.outcomes import Verdict, mismatched_rows

Confidence = Literal["certain", "likely", "open"]

_WORDS: Mapping[str, str] = {
    "shapes": "",
    "names": "by names",
    "order": "by the order in which both programs number or compute them",
    "siblings": "a square matrix, arranged as its siblings are",
    "patch": "with rows, columns and channels of a patch in one order on both sides",
    "fact": "",
    "outputs": "proved by outputs",
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
        """What it rests on, in a few words; empty where shapes allow nothing else."""
        return f"as in {self.fact}" if self.fact else _WORDS[self.grounds]


_RANKING: tuple[PairGrounds, ...] = ("shapes", "names", "patch", "siblings", "order", "fact")


def proposal_of(rule: Rule, links: Sequence[Link]) -> Proposal:
    """Returns a rule with the weakest ground of the links that it serves."""
    found: list[PairGrounds] = [link.grounds for link in links]
    grounds = max(found, key=_RANKING.index) if found else "shapes"
    fact = next((link.fact for link in links if link.fact), "")
    return Proposal(rule=rule, grounds=grounds, fact=fact if grounds == "fact" else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Leaves that names, order and shapes leave open.

    Attributes:
        wanted: The wanted leaves that the answer is about.
        stored: The stored leaves that they could be made from.
        parts: The stored and the wanted modules that it is about.
        about: What is open: which part is which, how one array holds several, or whether a square matrix is
            transposed.
        choices: Each possible answer in words.
        settle: Returns the rules with this one question answered, by the number of the choice.
    """

    wanted: tuple[Path, ...]
    stored: tuple[Path, ...]
    parts: tuple[tuple[Path, ...], tuple[Path, ...]]
    about: Literal["which", "how", "transposed"]
    choices: tuple[str, ...]
    settle: Callable[[int], tuple[Rule, ...]] = dataclasses.field(repr=False, compare=False)

    @cached_property
    def alternatives(self) -> tuple[tuple[Rule, ...], ...]:
        """For each answer the complete list of rules, this one question settled; written when asked for."""
        return tuple(map(self.settle, range(len(self.choices))))

    def __str__(self) -> str:
        stored, wanted = map(_listed, self.parts)
        if self.about == "transposed":
            return f"is {stored} transposed for {wanted}? Shapes allow both."
        if len(self.choices) == 1:
            return f"is {stored} meant by {wanted}? Shapes allow it, and no name tells."
        if self.about == "how":
            return f"how is {stored} made into {wanted}? Shapes allow several ways."
        if len(self.parts[0]) > len(self.parts[1]):
            return f"which of {stored} is {wanted}? The shapes allow each."
        return f"which of {stored} is which of {wanted}? The shapes allow every order."


def _settling(questions: int, *, is_run: bool) -> Iterator[str]:
    """Yields how questions are settled: by both programs, or by their reader."""
    if not is_run:
        yield f"# to settle a question, run both: {RUN_BOTH}."
    answers = ", ".join(["0", "None", "1"][:questions]) + (", ..." if questions > 3 else "")
    yield f"# {BY_NUMBER}{answers}]) answers {'it' if questions == 1 else 'them'} by number."


RUN_BOTH = "suggest(..., verify=(linen_apply, nnx_apply, inputs))"
_FLATTENED = "features may be flattened with channels first or last, which only outputs tell; run both"
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

    @property
    def renames(self) -> tuple[Rule, ...]:
        """The proposed rules, as `restore` takes them."""
        return tuple(proposal.rule for proposal in self.proposals)

    @property
    def covered(self) -> int:
        """How many wanted leaves are found under the rules, those that need none included."""
        return self.wanted_count - len(self.unmatched_wanted)

    @property
    def confidence(self) -> Confidence:
        """How sure the whole is.

        `certain`: every wanted leaf is covered, and shapes and names that both sides share allow nothing
        else, or both programs return the same. `likely`: every leaf is covered, and names, order, the
        convention of a known program or the caller's own rules decide, or features may be flattened in
        another order. `open`: something is not, or both programs' values differ.
        """
        if self.unmatched_wanted or self.questions or self.problem or self.is_refuted:
            return "open"
        is_doubted = self.is_given or bool(self.flattened)
        is_told = not is_doubted and all(item.grounds == "shapes" for item in self.proposals)
        return "certain" if self.is_proved or is_told else "likely"

    def answered(self, answers: Answers, changes: Sequence[Remade] = ()) -> tuple[Rule, ...]:
        """Returns the complete rules with some of the questions answered.

        Args:
            answers: For each question the number of its alternative, or None to leave it open.
            changes: Leaves that are made otherwise than the rules without them say.

        Raises:
            ValueError: There are more or fewer answers than questions.
        """
        if len(answers) != len(self.questions):
            raise ValueError(f"{len(self.questions)} questions take as many answers, not {len(answers)}")
        return self.settle(answers, changes) if self.settle is not None else self.renames

    def __str__(self) -> str:
        lines = [f"# {self.coverage}", f"# confidence: {self.confidence}"]
        rules = [f"    {item.rule}," + (f"  # {item.why}" if item.why else "") for item in self.proposals]
        lines += ["renames=[", *rules, "]"] if rules else ["# no rule is proposed."]
        for question in self.questions:
            lines.append(_comment(f"question: {question}"))
            shown = enumerate(question.choices[:CHOICES])
            lines += [_comment(f"    {at}: {choice}") for at, choice in shown]
            if len(question.choices) > CHOICES:
                lines.append(f"#     ... and {len(question.choices) - CHOICES} more")
        if self.flattened and not self.proof:
            lines.append(_comment(f"{_listed(self.flattened)}: {_FLATTENED}: {RUN_BOTH}."))
        lines += [f"# your rules are not proved; run both: {RUN_BOTH}."] * (self.is_given and not self.proof)
        lines += _settling(len(self.questions), is_run=bool(self.proof)) if self.questions else []
        lines += [_comment(self.proof)] if self.proof else []
        lines += _rest("wanted, and nothing stored was found", self.unmatched_wanted)
        lines += _rest("stored, and nothing wants it", self.unmatched_stored)
        lines += [_comment(line) for line in self.problem.splitlines()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return framed(as_html(str(self).split("\n")))

    @property
    def coverage(self) -> str:
        """How much of the target is covered, in a line."""
        left = len(self.unmatched_wanted)
        said = f"covers {self.covered} of {counted(self.wanted_count, 'leaf', 'leaves')}"
        return f"{said}; {left} open" if left else said


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


def open_ends(found: Suggestion) -> tuple[bool, int]:
    """Returns how far a proposal is from a whole one: whether a plan speaks against it, what is open."""
    return bool(found.problem), len(found.unmatched_wanted)


def asking(other: Suggestion, found: Suggestion) -> Suggestion:
    """Returns a proposal with the questions of another one, which says more of the stored names."""
    return dataclasses.replace(found, questions=other.questions, settle=other.settle)


def one_of(networks: Mapping[str, Suggestion], found: Suggestion) -> Suggestion | None:
    """Returns the proposal for the only stored network that the target may be, or the question which it is.

    Args:
        networks: The proposals by the keys of their network.
        found: What is proposed without any.

    Returns:
        None where each of them leaves something open.
    """
    whole = {key: one for key, one in networks.items() if one.confidence != "open"}
    if len(whole) < 2:
        asked = [one for one in networks.values() if not whole and _asks_all(one)]
        return next(iter(whole.values()), asked[0] if len(asked) == 1 else None)
    each = tuple(whole.values())
    question = Question(
        wanted=found.unmatched_wanted,
        stored=found.unmatched_stored,
        parts=(tuple((name,) for name in whole), (("the target",),)),
        about="which",
        choices=tuple(whole),
        settle=lambda answer: each[answer].renames,
    )

    def settled(answers: Answers, changes: Sequence[Remade]) -> tuple[Rule, ...]:
        (answer,) = answers
        return () if answer is None else each[answer].answered((), changes)

    return dataclasses.replace(found, proposals=(), questions=(question,), settle=settled)


def _asks_all(found: Suggestion) -> bool:
    """Tells whether a proposal with its questions answered leaves nothing open."""
    asked = {path for question in found.questions for path in question.wanted}
    return not found.problem and asked.issuperset(found.unmatched_wanted)


def mixes(found: Suggestion, keys: Sequence[Rename], called: Mapping[Path, Path]) -> bool:
    """Tells whether a proposal takes a part of several networks and leaves the rest: no model is both."""
    unused, parts = {*found.unmatched_stored}, 0
    for key in keys:
        above = tuple(key.pattern.split("/"))
        inside = {path for path, names in called.items() if names[: len(above)] == above}
        # What is asked about within the network is left for the answer.
        asked = {path for each in found.questions if inside.issuperset(each.stored) for path in each.stored}
        its = [path in unused for path in inside - asked]
        parts += any(its) and not all(its)
    return parts > 1


def problem_of(verdict: Verdict, weights: Iterable[Path]) -> str:
    """Returns what a plan says against its rules, or why no rule helps; empty for nothing."""
    if verdict.faults:
        return "\n".join(map(str, verdict.faults))
    others = [verdict.mismatched[path] for path in weights if path in verdict.mismatched]
    shapes = [item for item in others if item.kind == "shape"]
    if not shapes:
        return ""
    head, rows = f"{counted(len(shapes), 'leaf is', 'leaves are')} stored", aligned(mismatched_rows(shapes))
    way = "no rule cuts or pads a weight: build the target with the stored sizes."
    if all(sorted(item.stored_shape) == sorted(item.wanted.shape) for item in shapes):
        way = "their axes lie in another order, which shapes do not tell: pass a Transpose for each."
    return f"{head} in another shape:\n{rows}\n{way}"


_SHOWN, CHOICES = 4, 6


@dataclasses.dataclass(frozen=True)
class Choice:
    """A choice that nothing has made, with the possible readings."""

    about: Literal["which", "how", "transposed"]
    readings: tuple[tuple[Link, ...], ...]

    def question(self, settle: Callable[[Sequence[Link]], tuple[Rule, ...]]) -> Question:
        """Returns the question which reading is right; `settle` writes the rules with the links of one."""
        links = [link for reading in self.readings for link in reading]
        wanted = [leaf for link in links for leaf in link.wanted]
        stored = [leaf for link in links for leaf in link.stored]
        return Question(
            wanted=tuple(dict.fromkeys(leaf.source for leaf in wanted)),
            stored=tuple(dict.fromkeys(leaf.source for leaf in stored)),
            parts=(self._parts(stored), self._parts(wanted)),
            about=self.about,
            choices=self._in_words(),
            settle=lambda answer: settle(self.readings[answer]),
        )

    def _parts(self, leaves: Iterable[Leaf]) -> tuple[Path, ...]:
        """Returns the modules that the question is about; of a square matrix the matrix itself."""
        whole = self.about == "transposed"
        return tuple(dict.fromkeys(leaf.names if whole else part_of(leaf) or leaf.names for leaf in leaves))

    def _in_words(self) -> tuple[str, ...]:
        """Returns each reading in words: its rules are for the machine."""
        if self.about == "which":
            return _pairs_in_words(self.readings)
        if self.about == "transposed":
            return tuple("transposed" if is_turned(reading) else "as it is" for reading in self.readings)
        orders = {each[0].parts for each in self.readings}
        return tuple(_way_in_words(reading[0], with_order=len(orders) > 1) for reading in self.readings)


def is_turned(reading: Sequence[Link]) -> bool:
    """Tells whether some links transpose a matrix, or may."""
    return any(way.turned for link in reading for ways in link.ways for way in ways)


def _way_in_words(link: Link, *, with_order: bool) -> str:
    said = link.told or ", ".join(map(str, link.ways[0][0].steps)) or "one after the other"
    return f"{said}: {', '.join(link.parts)}" if with_order else said


def _pairs_in_words(readings: Sequence[Sequence[Link]]) -> tuple[str, ...]:
    """Returns a few pairs of parts of each reading: the first ones by which most readings differ."""
    pairs = [{_part(link.target): _part(link.source) for link in reading} for reading in readings]
    shown = list[str]()
    while len(shown) < _SHOWN or len({_of(shown, each) for each in pairs}) < len(pairs):
        left = [part for part in dict.fromkeys(part for each in pairs for part in each) if part not in shown]
        if not left:
            break
        shown.append(max(left, key=lambda part: len({_of([*shown, part], each) for each in pairs})))
    named = ([part for part in each if part in shown] or list(each)[:1] for each in pairs)
    said = ((each, [f"{each[at]} -> {at}" for at in parts]) for each, parts in zip(pairs, named, strict=True))
    return tuple(", ".join([*parts, *["..."][: len(each) > len(parts)]]) for each, parts in said)


def _of(parts: Iterable[str], pairs: Mapping[str, str]) -> tuple[str | None, ...]:
    return tuple(pairs.get(part) for part in parts)


def _part(leaf: Leaf) -> str:
    return "/".join(part_of(leaf) or leaf.names)


def _listed(paths: Sequence[Path]) -> str:
    return list_paths(paths) if len(paths) < 5 else fold_paths(paths)


def _comment(text: str) -> str:
    """Returns a line that stays a comment when it is pasted: a key may hold a line break."""
    return f"# {printable(text)}"


def _rest(what: str, paths: tuple[Path, ...]) -> list[str]:
    """Returns paths in a line, or where that is wider than a line, each in a line of its own."""
    line = f"{what}: {_listed(paths)}"
    if len(line) <= WIDTH:
        return [_comment(line)] if paths else []
    return [_comment(f"{what}:"), *(_comment(f"    {row.text}") for row in fold(map(Row, paths)))]
