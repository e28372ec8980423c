"""What a user says about names and shapes that nobody else can know."""

from collections.abc import Iterable, Sequence

from orbax_nnx_handler.planning.entries import Entry
from orbax_nnx_handler.planning.errors import UnusedRuleError
from orbax_nnx_handler.planning.rules.rename import Rename

__all__ = ["Rename", "Rule", "apply_rules", "as_rules"]

Rule = Rename


def as_rules(renames: Iterable[Rule | tuple[str, str]]) -> tuple[Rule, ...]:
    """Returns rules from what a user may write: rule values or (pattern, replacement) pairs."""
    return tuple(rule if isinstance(rule, Rename) else Rename(*rule) for rule in renames)


def apply_rules(entries: Sequence[Entry], rules: Sequence[Rule]) -> tuple[list[Entry], dict[Rule, list[Entry]]]:
    """Applies the rules in order.

    Returns:
        The entries after all rules, and for each rule the entries it changed, as
        they were when it had changed them.

    Raises:
        UnusedRuleError: A rule matches no stored leaf.
    """
    after, changed = list(entries), dict[Rule, list[Entry]]()
    for rule in rules:
        after, changed[rule] = rule.apply(after)
    unused = [rule for rule, hits in changed.items() if not hits]
    if unused:
        quoted = "\n".join(f"  {rule}" for rule in unused)
        raise UnusedRuleError(
            f"{len(unused)} of the {len(rules)} rules match no stored leaf:\n{quoted}\n"
            "hint: a pattern is whole path segments as `orbax-nnx tree` prints them; correct it or take it out."
        )
    return after, changed
