"""What is wrong with a user's rules once the whole mapping is known."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping

from orbax_nnx_handler.planning.dtypes import changes_values
from orbax_nnx_handler.planning.errors import RestoreError, RuleError
from orbax_nnx_handler.planning.found import Found, ModelMatch
from orbax_nnx_handler.planning.leaves import StoredLeaf
from orbax_nnx_handler.planning.paths import Path, render
from orbax_nnx_handler.planning.recipes import Recipe, Scale, Slice, parts_of, reads, render_reads
from orbax_nnx_handler.planning.roots import Tokens
from orbax_nnx_handler.planning.rules import Casts, RulesApplied, ScanAxis, unused_rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class StuckMoment:
    """A stored moment that cannot follow what a rule does to its parameter.

    Attributes:
        path: The wanted moment.
        parameter: How its parameter is made.
        reason: The rule.
        why: Why the moment cannot follow.
    """

    path: Path
    parameter: Recipe
    reason: str
    why: str


def why_stuck(
    recipe: Recipe, moments: Mapping[Path, StoredLeaf], stored: Mapping[Path, StoredLeaf], casts: Casts
) -> str:
    """Returns why the stored moments of one slot cannot follow their parameter; empty if they can.

    Args:
        recipe: The parameter's recipe.
        moments: The slot's moments by their parameters' stored paths.
        stored: The stored leaves.
        casts: What rules cast.
    """
    if not any(path in moments for path in reads(recipe)):
        return ""
    for part in parts_of(recipe):
        if isinstance(part, Scale):
            return "a moment of a scaled parameter is not the scaled moment"
        if casts and part in casts:  # Not without casts: the hash of a recipe is that of all its parts.
            lossy = [path for path in reads(part) if changes_values(stored[path].dtype, casts[part])]
            if lossy:
                before = stored[lossy[0]].dtype
                return f"casting {before} to {casts[part]} changes the parameter under its moment"
    return ""


def moment_faults(stuck: Collection[StuckMoment]) -> Iterator[RestoreError]:
    """Yields the error for moments that cannot follow their parameters."""
    if stuck:
        rows = "\n".join(
            f"  {render(item.path)}  <-  {render_reads(item.parameter)} by {item.reason}: {item.why}"
            for item in stuck
        )
        yield RuleError(
            f"{len(stuck)} optimizer moments cannot follow what a rule does to their parameters:\n{rows}\n"
            "hint: restore the model without its optimizer, or leave the rule out and change the "
            "value in the program.",
            paths=[item.path for item in stuck],
        )


def rule_faults(
    applied: RulesApplied, match: ModelMatch, found: Mapping[Path, Found]
) -> Iterator[RestoreError]:
    """Yields the errors for parts that go nowhere and for axes that nothing asks for."""
    yield from _loose_parts(applied, found)
    idle = [rule for rule in applied.axes if not any(_meets(rule, group) for group in match.groups)]
    if idle:
        yield unused_rules(idle)


def _meets(rule: ScanAxis, group: Tokens) -> bool:
    return rule.tokens[-len(group) :] == group


def _loose_parts(applied: RulesApplied, found: Mapping[Path, Found]) -> Iterator[RestoreError]:
    """A leaf that is split is used when one of its parts is; the others must not get lost."""
    parts = [
        entry for entry in applied.entries if any(isinstance(part, Slice) for part in parts_of(entry.recipe))
    ]
    if not parts:
        return
    taken = {part for item in found.values() for part in parts_of(item.recipe)}
    loose = [entry for entry in parts if entry.recipe not in taken]
    if loose:
        rows = "\n".join(
            f"  {'/'.join(entry.segments)} {entry.shape}  <-  {render_reads(entry.recipe)} by {entry.reason}"
            for entry in loose
        )
        yield RuleError(
            f"{len(loose)} parts of split leaves are no wanted leaf:\n{rows}\n"
            "hint: correct their names, or leave them behind with Drop(name, reason).",
            paths=[path for entry in loose for path in entry.sources],
        )
