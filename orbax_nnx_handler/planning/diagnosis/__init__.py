"""Why a checkpoint does not become a target, and the way out: the explanation of a verdict."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.core.errors import (
    AmbiguousMappingError,
    Cause,
    DtypeMismatchError,
    Hint,
    KeyMismatchError,
    MissingParamError,
    RestoreError,
    RuleError,
    ShapeMismatchError,
    UnexpectedParamError,
    UnreadableLeafError,
    error_of_kinds,
    of_memory,
)
from orbax_nnx_handler.planning.core.folding import fold
from orbax_nnx_handler.planning.core.lines import Line, Sentence, align, aligned, counted, joined, lines_of
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence
from orbax_nnx_handler.planning.diagnosis.layer_differences import (
    find_layer_counts,
    find_nested_stacks,
    find_scanned,
    find_shifted,
)
from orbax_nnx_handler.planning.diagnosis.names import (
    find_copies,
    find_other_groups,
    find_other_names,
)
from orbax_nnx_handler.planning.diagnosis.one_sided_parts import (
    find_biases,
    find_collections,
    find_fields,
    find_lost_weights,
    find_new_parts,
    find_no_optimizer,
    find_no_weights,
    find_steps,
    find_tied,
    find_wrappers,
)
from orbax_nnx_handler.planning.diagnosis.optimizers import find_networks, find_optimizers
from orbax_nnx_handler.planning.diagnosis.passed_rules import (
    find_another_model,
    find_dropped,
    find_given_layout,
    find_own_steps,
    find_replicated,
    find_rules_of_layers,
    find_sizes_of_rules,
    find_stuck_moments,
    find_unneeded,
    find_unused_parts,
    of_numbers,
)
from orbax_nnx_handler.planning.diagnosis.rearranged import (
    find_flat_keys,
    find_fused,
    find_merged,
    find_open_factoring,
    find_permuted,
)
from orbax_nnx_handler.planning.diagnosis.sizes import (
    find_dimensions,
    find_heads,
    find_keys,
    find_quantised,
    find_random_layouts,
)
from orbax_nnx_handler.planning.diagnosis.ways import (
    LOOK,
    checked,
    completed,
    fill_all,
    is_arranged,
    is_search,
    search_hint,
    suggest_hint,
)
from orbax_nnx_handler.planning.verdict.outcomes import (
    IN_MEMORY,
    Verdict,
    closest_row,
    look,
    mismatched_rows,
    missing_rows,
    stored_rows,
)

_Finder = Callable[[Evidence], Iterable[Cause]]

_FINDERS: tuple[_Finder, ...] = (
    find_given_layout,
    find_no_weights,
    find_quantised,
    find_flat_keys,
    find_wrappers,
    find_rules_of_layers,
    find_nested_stacks,
    find_fused,
    find_copies,
    find_fields,
    find_networks,
    find_another_model,
    find_open_factoring,
    find_stuck_moments,
    find_dropped,
    find_unneeded,
    find_unused_parts,
    find_sizes_of_rules,
    find_shifted,
    find_layer_counts,
    find_scanned,
    find_own_steps,
    find_collections,
    find_optimizers,
    find_no_optimizer,
    find_steps,
    find_other_groups,
    find_other_names,
    find_lost_weights,
    find_biases,
    find_tied,
    find_new_parts,
    find_permuted,
    find_merged,
    find_replicated,
    find_heads,
    find_dimensions,
    find_keys,
    find_random_layouts,
)
"""In this order: what one finder explains, the later ones do not look at again."""

_OF_MORE = (find_given_layout, find_random_layouts)
"""Finders that look at more than what is missing, mismatched or unexpected."""


def diagnose(verdict: Verdict) -> tuple[Cause, ...]:
    """Returns the causes that a verdict holds evidence for.

    Returns:
        The causes, those that explain everything first; none where nothing is
        wrong or nothing tells why.
    """
    evidence = Evidence(verdict=verdict)
    causes: list[Cause] = []
    is_whole = not (evidence.missing or evidence.mismatched or evidence.unexpected)
    for find in _OF_MORE if is_whole else _FINDERS:
        found = [cause for each in _found(find, evidence) if (cause := checked(each, evidence)) is not None]
        causes += found
        evidence = evidence.without(path for cause in found for path in cause.paths)
    return tuple(causes)


def _found(find: _Finder, evidence: Evidence) -> list[Cause]:
    try:
        return list(find(evidence))
    except RuleError:
        # The rule that would help cannot be written: a stored name is no pattern (`{x}`).
        return []


def problems_of(verdict: Verdict) -> list[RestoreError]:
    """Returns what is wrong with a verdict, one error for each kind; empty if it fits."""
    return [*verdict.faults, *(problem for find in _KINDS for problem in find(verdict))]


def _missing(verdict: Verdict) -> Sequence[RestoreError]:
    contested = _contested(verdict)
    bad = [item for path, item in verdict.missing.items() if item.policy == "error" and path not in contested]
    if not bad:
        return []
    total = verdict.wanted_count - len(verdict.defaulted)
    share = f"{len(bad)} of the {counted(total, 'leaf', 'leaves')}"
    if len(bad) == total:
        share = "the one leaf" if total == 1 else f"all {total} leaves"
    rows = aligned(missing_rows(bad))
    message = f"the checkpoint lacks {share} that the target needs:\n{rows}"
    return [MissingParamError(message, paths=[item.wanted.path for item in bad])]


def _contested(verdict: Verdict) -> set[Path]:
    """Returns wanted leaves that another fault names already: not missing, but claimed in two ways.

    Their moments follow them, and are as open.
    """
    named = {
        path for fault in verdict.faults if isinstance(fault, AmbiguousMappingError) for path in fault.paths
    }
    if not named:
        return set()
    evidence = Evidence(verdict=verdict)
    parameters = {evidence.below[path] for path in named if path in evidence.below}
    return named | {path for path, (_, parameter) in evidence.moments.items() if parameter in parameters}


def _sourceless(verdict: Verdict) -> Sequence[RestoreError]:
    bad = [item for item in verdict.missing.values() if item.policy == "init" and item.filled_by is None]
    if not bad:
        return []
    leaves = counted(len(bad), "missing weight")
    message = f'policy "init" has no initial value for {leaves}:\n{aligned(missing_rows(bad))}'
    return [MissingParamError(message, paths=[item.wanted.path for item in bad])]


def _mismatches(
    kind: str, error: type[RestoreError], what: str
) -> Callable[[Verdict], Sequence[RestoreError]]:
    def find(verdict: Verdict) -> Sequence[RestoreError]:
        bad = [item for item in verdict.mismatched.values() if item.kind == kind]
        if not bad:
            return []
        leaves = counted(len(bad), "leaf has", "leaves have")
        message = f"{leaves} another {what} in the checkpoint:\n{aligned(mismatched_rows(bad))}"
        return [error(message, paths=[item.wanted.path for item in bad])]

    return find


def _unexpected(verdict: Verdict) -> Sequence[RestoreError]:
    if verdict.unexpected_policy != "error" or not verdict.unexpected:
        return []
    leaves = counted(len(verdict.unexpected), "leaf", "leaves")
    rows = aligned(stored_rows(verdict.unexpected.values()))
    message = f"the checkpoint holds {leaves} that the target does not want:\n{rows}"
    return [UnexpectedParamError(message, paths=list(verdict.unexpected))]


_KINDS: tuple[Callable[[Verdict], Sequence[RestoreError]], ...] = (
    _missing,
    _sourceless,
    _mismatches("shape", ShapeMismatchError, "shape"),
    _mismatches("dtype", DtypeMismatchError, "kind of dtype"),
    _mismatches("key", KeyMismatchError, "random key implementation or shape"),
    _unexpected,
)


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
        found = _advice(self.verdict, self.causes)
        if self.verdict.directory != IN_MEMORY:
            return found
        return [of_memory(item) if isinstance(item, Hint) else item for item in found]

    @property
    def advice(self) -> list[Line]:
        """What probably caused the problems and what to do about them, line by line."""
        return [_line(item) for item in self._findings]

    @property
    def hints(self) -> list[Hint]:
        """The ways out, those of single problems first."""
        evidence = Evidence(verdict=self.verdict)
        problems = () if _is_misread(self.causes) else self.problems
        own = [completed(hint, evidence) for problem in problems for hint in problem.hints]
        return [*own, *(item for item in self._findings if isinstance(item, Hint))]

    def error(self) -> RestoreError | None:
        """Returns the one error that lists every problem, or None."""
        if not self.problems:
            return None
        kind = error_of_kinds(*dict.fromkeys(type(problem) for problem in self.problems))
        # The list of a foreign model's leaves would bury the one fact that matters.
        first = [cause.text for cause in self.causes if cause.kind == "AnotherModel"]
        is_short = _is_misread(self.causes)
        said = (each.what.splitlines() if is_short else lines_of(each) for each in self.problems)
        body = [line for lines in said for line in lines]
        lines = [*(() if self.verdict.faults else first), *body, _checkpoint(self.verdict), *self.advice]
        return kind(
            "\n".join(problem.what for problem in self.problems),
            paths=list(dict.fromkeys(path for problem in self.problems for path in problem.paths)),
            hints=self.hints,
            causes=self.causes,
            problems=self.problems if len(self.problems) > 1 else (),
            message=joined(lines),
        )


def _is_misread(causes: Sequence[Cause]) -> bool:
    """Tells whether another layout was named than the checkpoint's: no other hint leads anywhere then."""
    return any(cause.kind == "LayoutGiven" for cause in causes)


def _line(item: str | Cause | Hint) -> Line:
    if isinstance(item, Cause):
        return Sentence("cause", item.text)
    return Sentence("hint", item.words) if isinstance(item, Hint) else item


def _advice(verdict: Verdict, causes: Sequence[Cause]) -> list[str | Cause | Hint]:
    evidence = Evidence(verdict=verdict)
    if any(isinstance(fault, AmbiguousMappingError | UnreadableLeafError) for fault in verdict.faults):
        # Until it is decided how to read the checkpoint, whatever is missing may be the other reading's;
        # and what cannot be read may be what is missing.
        if _is_misread(causes):
            return list(_ways(causes[:1]))
        contested = _contested(verdict)
        is_more = any(item.wanted.path not in contested for item in verdict.missing.values())
        return [search_hint(evidence)] if evidence.links and is_more else []
    # What has another name need not be initialised, and the rest of a renamed model may be renamed as well.
    renamed = any(cause.kind == "OtherNames" for cause in causes)
    explained = {path for cause in causes for path in cause.paths}
    fresh = [path for cause in causes if cause.may_be_initialised for path in cause.paths]
    rest = [] if renamed or not verdict.restored else _open(verdict, explained)
    is_other_way = any(cause.may_be_initialised and cause.way.words for cause in causes)
    found = [
        *_closest(evidence, {p for cause in causes if cause.kind != "OtherNames" for p in cause.paths}),
        *_ways(causes),
        *_general(evidence, explained, causes),
        *_fill(evidence, {*fresh, *rest} - evidence.perhaps_stored, "or " if is_other_way else ""),
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


def _fill(evidence: Evidence, paths: Collection[Path], word: str) -> Iterable[Hint]:
    """Yields the one policy that fills what may be initialised, and nothing that only has another name."""
    missing = evidence.open_leaves.keys() & paths
    if not missing:
        return
    fill = fill_all(evidence, missing)
    if fill is not None:
        yield dataclasses.replace(fill, words=word + fill.words)
    elif len(missing) == len(evidence.open_leaves):
        words = 'pass policy="init" to initialise all that is missing, or filters for a part of it.'
        yield Hint(word + words, {"policy": "init"})


def _open(verdict: Verdict, explained: Collection[Path]) -> list[Path]:
    return [at for at, item in verdict.missing.items() if item.policy == "error" and at not in explained]


def _has_no_source(verdict: Verdict) -> bool:
    return any(item.policy == "error" and item.filled_by is None for item in verdict.missing.values())


def _closest(evidence: Evidence, explained: Collection[Path]) -> list[str]:
    """Returns the stored leaves that names and shapes put beside missing ones which nothing else explains."""
    leaves, wanted = evidence.stored_weights, evidence.sides.wanted
    links = {path: sources for path, sources in evidence.links.items() if path not in explained}
    # Sorted, so that rows of layers are alike, and the text on every host.
    held = {path: sorted(sources, key=render) for path, sources in links.items()}
    pairs = [(wanted[path].leaf, [leaves[source].leaf for source in held[path]]) for path in links]
    if len(pairs) == 1 and len(pairs[0][1]) == 1:
        (leaf,) = pairs[0][1]
        return [f"closest unexpected: {render(leaf.path)} {look(leaf)}"]
    rows = [closest_row(leaf, held) for leaf, held in pairs]
    return ["closest unexpected:", *align(fold(rows), limit=_SHOWN)] if rows else []


def _general(evidence: Evidence, explained: Collection[Path], causes: Sequence[Cause]) -> Iterable[Hint]:
    """Yields the way out of what no cause explains."""
    verdict = evidence.verdict
    left = [item for path, item in verdict.mismatched.items() if path not in explained]
    kinds = {item.kind for item in left}
    if any(item.policy == "init" and item.filled_by is None for item in verdict.missing.values()):
        yield _SOURCE
    arranged = [item for item in left if is_arranged(evidence, item.wanted.path)]
    if not evidence.perhaps_stored.issubset(explained) or arranged:
        if not any(is_search(cause.way) for cause in causes):
            yield suggest_hint(evidence) if arranged else search_hint(evidence)
    elif not verdict.restored and _open(verdict, explained):
        yield LOOK
    if "shape" in {item.kind for item in left if item not in arranged}:
        yield Hint("a weight is never cut, padded or reshaped: build the target with the stored shapes.")
    yield from of_numbers(left)
    if "key" in kinds:
        yield Hint("build the target with random keys of the stored implementation and shape.")
    if verdict.unexpected_policy == "error" and any(path not in explained for path in verdict.unexpected):
        yield Hint('pass unexpected="warn" if nobody needs what is left over.', {"unexpected": "warn"})


def _checkpoint(verdict: Verdict) -> str:
    about = f"layout: {verdict.layout}, {counted(verdict.stored_count, 'stored leaf', 'stored leaves')}"
    if verdict.unexpected:
        about += f", {len(verdict.unexpected)} of them unexpected"
    return f"checkpoint: {verdict.directory} ({about})"
