"""What is wrong with a user's rules once the whole mapping is known."""

from collections.abc import Iterator, Mapping

from orbax_nnx_handler.planning.errors import RestoreError, RuleError
from orbax_nnx_handler.planning.found import Found, ModelMatch
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.recipes import Read, Slice, parts_of, render_reads
from orbax_nnx_handler.planning.roots import Tokens
from orbax_nnx_handler.planning.rules import RulesApplied, ScanAxis, unused_rules


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
    changed = [entry for entry in applied.entries if not isinstance(entry.recipe, Read)]
    parts = [entry for entry in changed if any(isinstance(part, Slice) for part in parts_of(entry.recipe))]
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
