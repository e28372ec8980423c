"""Why a plan does not fit, from the plan's own evidence."""

import difflib

from orbax_nnx_handler.planning.paths import render
from orbax_nnx_handler.planning.plan import RestorePlan


def hints(plan: RestorePlan) -> list[str]:
    """Returns the lines that say what is probably wrong and what to do about it."""
    missing = [item for item in plan.missing.values() if item.policy == "error"]
    lines: list[str] = []
    if missing and plan.unexpected:
        names = {render(path): leaf for path, leaf in plan.unexpected.items()}
        first = render(missing[0].wanted.path)
        close = difflib.get_close_matches(first, list(names)[:2000], n=1, cutoff=0.3)
        if close:
            lines.append(f"closest unexpected: {close[0]} {names[close[0]].shape}")
    if missing:
        lines.append(
            'hint: correct the names with renames=[("stored", "wanted")], or pass policy="init" to initialise '
            "what is missing."
        )
    return lines
