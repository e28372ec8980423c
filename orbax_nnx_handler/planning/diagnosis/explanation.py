"""The explanation of a verdict: what is wrong, what probably caused it, what to do about it."""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.core.causes import Cause, Hint, fill_hint
from orbax_nnx_handler.planning.core.dtypes import name_of
from orbax_nnx_handler.planning.core.errors import (
    AmbiguousMappingError,
    RestoreError,
    UnreadableLeafError,
    error_of_kinds,
)
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence, selecting
from orbax_nnx_handler.planning.diagnosis.finders import diagnose
from orbax_nnx_handler.planning.diagnosis.names import LOOK, nearest
from orbax_nnx_handler.planning.diagnosis.problems import problems_of
from orbax_nnx_handler.planning.text.folding import Row, fold
from orbax_nnx_handler.planning.text.lines import Line, Sentence, align, joined, lines_of
from orbax_nnx_handler.planning.text.words import counted
from orbax_nnx_handler.planning.verdict.outcomes import Verdict
from orbax_nnx_handler.planning.verdict.rows import look

_SHOWN = 6
_SOURCE = Hint(
    "the target is abstract, so initial values need init=..., a function that builds the target.",
    needs_init=True,
)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why a verdict is what it is; each part is worked out when somebody first asks for it."""

    verdict: Verdict

    @cached_property
    def problems(self) -> tuple[RestoreError, ...]:
        """What is wrong, one error for each kind; empty if the restore can be carried out."""
        return tuple(problems_of(self.verdict))

    @cached_property
    def causes(self) -> tuple[Cause, ...]:
        """Why it does not fit, as far as there is evidence."""
        return diagnose(self.verdict)

    @cached_property
    def _findings(self) -> list[str | Cause | Hint]:
        return _advice(self.verdict, self.causes)

    @property
    def advice(self) -> list[Line]:
        """What probably caused the problems and what to do about them, line by line."""
        return [_line(item) for item in self._findings]

    @property
    def hints(self) -> list[Hint]:
        """The ways out, those of single problems first."""
        own = [hint for problem in self.problems for hint in problem.hints]
        return [*own, *(item for item in self._findings if isinstance(item, Hint))]

    def error(self) -> RestoreError | None:
        """Returns the one error that lists every problem, or None."""
        if not self.problems:
            return None
        kind = error_of_kinds(*dict.fromkeys(type(problem) for problem in self.problems))
        # The list of a foreign model's leaves would bury the one fact that matters.
        first = [cause.text for cause in self.causes if cause.kind == "AnotherModel"]
        body = [line for problem in self.problems for line in lines_of(problem)]
        lines = [*(() if self.verdict.faults else first), *body, _checkpoint(self.verdict), *self.advice]
        return kind(
            "\n".join(problem.what for problem in self.problems),
            paths=list(dict.fromkeys(path for problem in self.problems for path in problem.paths)),
            hints=self.hints,
            causes=self.causes,
            problems=self.problems if len(self.problems) > 1 else (),
            message=joined(lines),
        )


def _line(item: str | Cause | Hint) -> Line:
    if isinstance(item, Cause):
        return Sentence("cause", item.text)
    return Sentence("hint", item.words) if isinstance(item, Hint) else item


def _advice(verdict: Verdict, causes: Sequence[Cause]) -> list[str | Cause | Hint]:
    if any(isinstance(fault, AmbiguousMappingError | UnreadableLeafError) for fault in verdict.faults):
        # Until it is decided how to read the checkpoint, whatever is missing may be the other reading's;
        # and what cannot be read may be what is missing.
        return []
    # What has another name need not be initialised, and the rest of a renamed model may be renamed as well.
    renamed = any(cause.kind == "OtherNames" for cause in causes)
    explained = {path for cause in causes for path in cause.paths}
    fresh = [path for cause in causes if cause.may_be_initialised for path in cause.paths]
    rest = [] if renamed or not verdict.restored else _open(verdict, explained)
    is_other_way = any(cause.may_be_initialised and cause.way.words for cause in causes)
    found = [
        *_closest(verdict, {p for cause in causes if cause.kind != "OtherNames" for p in cause.paths}),
        *_ways(causes),
        *_general(verdict, explained),
        *_fill(verdict, {*fresh, *rest}, "or " if is_other_way else ""),
    ]
    if any(isinstance(item, Hint) and item.fills for item in found) and _has_no_source(verdict):
        found.append(_SOURCE)
    return found


def _ways(causes: Sequence[Cause]) -> Iterable[Cause | Hint]:
    """Yields causes with their ways out; a way that several share comes once, after the last of them."""
    for at, cause in enumerate(causes):
        if cause.kind != "AnotherModel":
            yield cause
        if cause.way.words and all(cause.way != later.way for later in causes[at + 1 :]):
            yield cause.way


def _fill(verdict: Verdict, paths: Collection[Path], word: str) -> Iterable[Hint]:
    """Yields the one policy that fills what may be initialised, and nothing that only has another name."""
    missing = {path for path in _open(verdict, ()) if path in paths}
    filters = selecting(Evidence(verdict=verdict), missing)
    if filters:
        fill = fill_hint(filters, len(missing))
        yield dataclasses.replace(fill, words=word + fill.words)
    elif missing and len(missing) == len(_open(verdict, ())):
        words = 'pass policy="init" to initialise all that is missing, or filters for a part of it.'
        yield Hint(word + words, {"policy": "init"})


def _open(verdict: Verdict, explained: Collection[Path]) -> list[Path]:
    return [
        path for path, item in verdict.missing.items() if item.policy == "error" and path not in explained
    ]


def _has_no_source(verdict: Verdict) -> bool:
    return any(item.policy == "error" and item.filled_by is None for item in verdict.missing.values())


def _closest(verdict: Verdict, explained: Collection[Path]) -> list[str]:
    """Returns the nearest names of leaves that nothing but another name may explain."""
    missing = [
        verdict.sides.wanted[path] for path in _open(verdict, explained) if path in verdict.sides.wanted
    ]
    unexpected = [verdict.sides.placements[p] for p in verdict.unexpected if p in verdict.sides.placements]
    pairs = nearest(missing, unexpected)
    if len(pairs) == 1:
        return [f"closest unexpected: {render(pairs[0][1].path)} {look(pairs[0][1])}"]
    rows = [Row(wanted.path, (look(stored),), render(stored.path)) for wanted, stored in pairs]
    return ["closest unexpected:", *align(fold(rows), limit=_SHOWN)] if rows else []


def _general(verdict: Verdict, explained: Collection[Path]) -> Iterable[Hint]:
    """Yields the way out of what no cause explains."""
    left = [item for path, item in verdict.mismatched.items() if path not in explained]
    kinds = {item.kind for item in left}
    if any(item.policy == "init" and item.filled_by is None for item in verdict.missing.values()):
        yield _SOURCE
    if _is_renamed(verdict, _open(verdict, explained)):
        yield Hint(
            'where only a name differs, pass renames=[("name in the checkpoint", "name in the target")].'
        )
    elif not verdict.restored and _open(verdict, explained):
        yield LOOK
    if "shape" in kinds:
        yield Hint("a weight is never cut, padded or reshaped: build the target with the stored shapes.")
    # A mismatch with a detail says itself what to do.
    if any(item.kind == "dtype" and not item.detail for item in left):
        yield Hint(
            "integers, booleans and floats never become each other: give the target's leaf the stored kind."
        )
    if "key" in kinds:
        yield Hint("build the target with random keys of the stored implementation and shape.")
    if verdict.unexpected_policy == "error" and any(path not in explained for path in verdict.unexpected):
        yield Hint('pass unexpected="warn" if nobody needs what is left over.', {"unexpected": "warn"})


def _is_renamed(verdict: Verdict, missing: Iterable[Path]) -> bool:
    """Tells whether a missing leaf may be an unexpected one of another name: the shape has to agree."""
    shapes = {(leaf.shape, name_of(leaf.dtype)) for leaf in verdict.unexpected.values() if leaf.shape}
    wanted = [verdict.sides.wanted[path] for path in missing if path in verdict.sides.wanted]
    weights = [item.leaf for item in wanted if item.role == "model"]
    return any((leaf.shape, name_of(leaf.dtype)) in shapes for leaf in weights)


def _checkpoint(verdict: Verdict) -> str:
    about = f"layout: {verdict.layout}, {counted(verdict.stored_count, 'stored leaf', 'stored leaves')}"
    if verdict.unexpected:
        about += f", {len(verdict.unexpected)} of them unexpected"
    return f"checkpoint: {verdict.directory} ({about})"
