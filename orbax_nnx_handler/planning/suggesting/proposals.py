"""Rules that are proposed: tried out first, then written as text that a user reads and pastes.

A rename applies wherever its pattern matches. `Dense_{i}` for the first three
layers takes the next three too, and `Dense_0` for the head takes the one in
every block.

Rules out of pairs of leaves: as few and as general as the pairs allow.
"""

import dataclasses
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

from orbax_nnx_handler.planning.core.paths import Path, canonical, natural_key, printable, render
from orbax_nnx_handler.planning.rules import Rename, Rule
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.suggesting.pairing import Grounds, Pair, weakest

Names = tuple[str, ...]
Renaming = tuple[Names, Names]
"""What of a stored path becomes what of the wanted one."""

Members = Mapping[Renaming, Sequence[Renaming]]
"""Each rule with the renamings of single modules that it stands for."""


def in_order(members: Members) -> list[Renaming]:
    """Returns the rules in the order in which they apply: longer patterns first."""
    return sorted(members, key=lambda names: -len(names[0]))


def without_strays(members: Members, entries: Sequence[Entry], aims: Mapping[Path, Names]) -> Members:
    """Returns rules that take every leaf where it belongs, as general as that allows.

    Args:
        members: The rules to try.
        entries: The stored model.
        aims: The segments that a leaf must have after the rules, by its stored path.
    """
    current = members
    while True:
        straying = _straying(current, entries, aims)
        closer = {names: _closer(names, current[names], entries) for names in straying}
        if not any(closer.values()):
            return current
        current = {
            rule: covered
            for names, before in current.items()
            for rule, covered in (closer.get(names) or {names: before}).items()
        }


def _straying(members: Members, entries: Sequence[Entry], aims: Mapping[Path, Names]) -> list[Renaming]:
    """Returns the rules that have a part in a leaf ending elsewhere than it must."""
    touched: dict[int, list[Renaming]] = defaultdict(list)
    after = entries
    for names in in_order(members):
        before, after = after, _rule(names).apply(after).entries
        for at, (old, new) in enumerate(zip(before, after, strict=True)):
            if old is not new:
                touched[at].append(names)
    astray = [
        at
        for at, entry in enumerate(entries)
        if at in touched
        and canonical(after[at].segments) != canonical(aims.get(entry.sources[0], after[at].segments))
    ]
    return list(dict.fromkeys(names for at in astray for names in touched[at]))


def _closer(names: Renaming, covered: Sequence[Renaming], entries: Sequence[Entry]) -> Members:
    """Returns the rules for single modules that a general one stands for, or a single one from the root.

    Empty where neither is left.
    """
    stored, wanted = names
    if len(stored) > len(covered[0][0]):
        return {}  # It begins at the root: closer it cannot be.
    if list(covered) != [names]:
        return {member: (member,) for member in covered}
    roots = {entry.prefix for entry in entries if entry.segments[: len(stored)] == stored and entry.prefix}
    return {((*root, *stored), wanted): (names,) for root in sorted(roots)}


def _rule(names: Renaming) -> Rename:
    stored, wanted = ("/".join(part) for part in names)
    return Rename(stored, wanted)


_NUMBERED = re.compile(r"(.*_)?(\d+)")
_PLACES = "ijkl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """One proposed rule.

    Attributes:
        rule: The rule.
        grounds: What it rests on.
    """

    rule: Rename
    grounds: Grounds


def proposals_of(
    pairs: Sequence[Pair], above: int, entries: Sequence[Entry], settled: Collection[Path]
) -> tuple[Proposal, ...]:
    """Returns rules that take every stored leaf of the pairs to its wanted path, and no other one away.

    Longer patterns come first: a segment that one rule wrote is safe from later ones.

    Args:
        pairs: The pairs.
        above: How many segments of the wanted paths stand above the model.
        entries: The stored model, which the rules will meet.
        settled: The stored leaves that have their wanted path already.
    """
    found: dict[Renaming, list[Grounds]] = defaultdict(list)
    for pair in pairs:
        names = _names(pair, above)
        if names is not None:
            found[names].append(pair.grounds)
    aims = _aims(pairs, above, entries, settled)
    members = without_strays(_merged({names: (names,) for names in found}), entries, aims)
    return tuple(
        Proposal(
            rule=Rename("/".join(stored), "/".join(wanted)),
            grounds=weakest(*itertools.chain(*(found[member] for member in members[stored, wanted]))),
        )
        for stored, wanted in in_order(members)
    )


def _aims(
    pairs: Iterable[Pair], above: int, entries: Sequence[Entry], settled: Collection[Path]
) -> Mapping[Path, Names]:
    """Returns the segments that each stored leaf must have after the rules, where that is known."""
    sources = Counter(entry.sources[0] for entry in entries)
    # A leaf that a rule of the user's has split is several entries of one source.
    segments = {path: e.segments for e in entries for path in e.sources[:1] if sources[path] == 1}
    aims = {path: names for path, names in segments.items() if path in settled}
    for pair in pairs:
        own = segments.get(pair.stored.source)
        stored, wanted = _names(pair, above) or ((), ())
        # The gates of a recurrent cell are paired under names that only NNX has.
        if own is not None and own[: len(stored)] == stored:
            aims[pair.stored.source] = (*wanted, *own[len(stored) :])
    return aims


def _names(pair: Pair, above: int) -> Renaming | None:
    """Returns what becomes what; None where the paths are equal, or the wanted one has no name left."""
    stored, wanted = pair.stored.names, _wanted_names(pair)[above:]
    while len(stored) > 1 and len(wanted) > 1 and canonical(stored[-1:]) == canonical(wanted[-1:]):
        stored, wanted = stored[:-1], wanted[:-1]
    # Linen keeps a list's number in the name.
    return None if not wanted or canonical(stored) == canonical(wanted) else (stored, wanted)


def _wanted_names(pair: Pair) -> Names:
    names = pair.wanted.names
    if pair.unstacked is not None:
        return (*names[: pair.unstacked], *names[pair.unstacked + 1 :])
    if pair.stacked is None:
        return names
    number = pair.stored.tokens[pair.stacked].removeprefix("#")
    at = _stack_name(pair)
    return (*names[:at], number, *names[at:])


def _stack_name(pair: Pair) -> int:
    """Returns where the layer's number goes: after the name that the stack has in the wanted path.

    Below the layer both paths have equally many segments, unless a wrapper
    differs; then the layer is the first module of the two.
    """
    below = len(canonical(pair.stored.tokens)) - (pair.stacked or 0) - 1
    return max(1, len(pair.wanted.names) - below)


def _merged(members: Members) -> Members:
    """Writes a place where pairs of names differ in one number that both sides count."""
    current = members
    for place in _PLACES:
        templates: dict[Renaming, list[Renaming]] = defaultdict(list)
        for names in current:
            for template in _templates(names, place):
                templates[template].append(names)
        after: dict[Renaming, tuple[Renaming, ...]] = defaultdict(tuple)
        for names, covered in current.items():
            after[_best(names, templates, place)] += tuple(covered)
        if after == current:
            break
        current = dict(after)
    return current


def _best(names: Renaming, templates: Mapping[Renaming, Sequence[Renaming]], place: str) -> Renaming:
    found = [template for template in _templates(names, place) if len(templates[template]) > 1]
    return max(found, key=lambda template: len(templates[template]), default=names)


def _templates(names: Renaming, place: str) -> Sequence[Renaming]:
    stored, wanted = names
    found: list[Renaming] = []
    for at, name in enumerate(stored):
        number = _NUMBERED.fullmatch(name)
        if number is None:
            continue
        for to, other in enumerate(wanted):
            same = _NUMBERED.fullmatch(other)
            if same is not None and same[2] == number[2]:
                left = (*stored[:at], f"{number[1] or ''}{{{place}}}", *stored[at + 1 :])
                right = (*wanted[:to], f"{same[1] or ''}{{{place}}}", *wanted[to + 1 :])
                found.append((left, right))
    return found


Confidence = Literal["certain", "likely", "open"]

_WORDS: dict[Grounds, str] = {
    "shapes": "",
    "order": "by order of creation",
    "names": "by likeness of names",
    "likeness": "most leaves are alike",
    "nothing": "a guess: see the questions",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Modules of equal structure and shapes that something else must tell apart.

    Attributes:
        stored: Their stored paths.
        wanted: Their wanted paths, in the order in which the proposal pairs them.
        grounds: What the proposal rests on; `nothing` where every order is as good.
    """

    stored: tuple[str, ...]
    wanted: tuple[str, ...]
    grounds: Grounds

    def __str__(self) -> str:
        if len(self.stored) != len(self.wanted):
            stored = f"{len(self.stored)} stored ({_listed(self.stored)})"
            return f"{stored} but {len(self.wanted)} wanted ({_listed(self.wanted)}): which is which?"
        if self.grounds != "nothing":
            taken = f"{_listed(self.stored)} are taken for {_listed(self.wanted)}"
            return f"{taken} {_WORDS[self.grounds]}; is that so?"
        which = f"which of {_listed(self.stored)} is which of {_listed(self.wanted)}?"
        return f"{which} The shapes allow every order."


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
        questions: Where structure and shapes leave a choice.
        unmatched_wanted: Wanted paths for which nothing stored was found.
        unmatched_stored: Stored paths that nothing wants.
        problem: What a plan with these rules says against them; empty if nothing.
    """

    proposals: tuple[Proposal, ...]
    questions: tuple[Question, ...]
    unmatched_wanted: tuple[Path, ...]
    unmatched_stored: tuple[Path, ...]
    problem: str = ""

    @property
    def renames(self) -> tuple[Rule, ...]:
        """The proposed rules, as `restore` takes them."""
        return tuple(proposal.rule for proposal in self.proposals)

    @property
    def confidence(self) -> Confidence:
        """How sure the whole is.

        `certain`: structure, shapes and the numbers that both sides count by
        allow nothing else. `likely`: order or names decide. `open`: nothing
        does, nothing was found, or a plan with the rules has faults.
        """
        grounds = {item.grounds for item in (*self.proposals, *self.questions)}
        nothing_found = bool(self.unmatched_wanted) and not self.proposals
        if "nothing" in grounds or nothing_found or self.problem:
            return "open"
        return "certain" if grounds <= {"shapes"} else "likely"

    def __str__(self) -> str:
        lines = [f"# confidence: {self.confidence}", "renames=["]
        for proposal in self.proposals:
            words = _WORDS[proposal.grounds]
            lines.append(f"    {proposal.rule}," + (f"  # {words}" if words else ""))
        lines.append("]")
        lines += [_comment(f"question: {question}") for question in self.questions]
        lines += _rest("wanted, and nothing stored was found", self.unmatched_wanted)
        lines += _rest("stored, and nothing wants it", self.unmatched_stored)
        lines += [_comment(line) for line in self.problem.splitlines()]
        return "\n".join(lines)


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown}, ... ({len(names)})"


def _comment(text: str) -> str:
    """Returns a line that stays a comment when it is pasted: a key may hold a line break."""
    return f"# {printable(text)}"


def _rest(what: str, paths: tuple[Path, ...]) -> list[str]:
    ordered = sorted(paths, key=natural_key)
    lines = [_comment(f"{what}: {render(path)}") for path in ordered[:20]]
    return [*lines, f"# ... and {len(ordered) - 20} more"] if len(ordered) > 20 else lines
