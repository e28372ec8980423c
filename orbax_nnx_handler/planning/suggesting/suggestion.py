"""What is proposed, as text that a user reads and pastes."""

import dataclasses
from typing import Literal

from orbax_nnx_handler.planning.core.paths import Path, natural_key, render
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.suggesting.pairing import Grounds
from orbax_nnx_handler.planning.suggesting.proposals import Proposal

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
    return f"# {text if text.isprintable() else repr(text)[1:-1]}"


def _rest(what: str, paths: tuple[Path, ...]) -> list[str]:
    ordered = sorted(paths, key=natural_key)
    lines = [_comment(f"{what}: {render(path)}") for path in ordered[:20]]
    return [*lines, f"# ... and {len(ordered) - 20} more"] if len(ordered) > 20 else lines
