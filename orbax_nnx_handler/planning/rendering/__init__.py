"""Plans and reports for a person: as text, on a terminal, in a notebook, and as plain dicts."""

from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.rendering.as_dict import plan_to_dict
from orbax_nnx_handler.planning.rendering.html import sheet_to_html
from orbax_nnx_handler.planning.rendering.plain import render_sheet
from orbax_nnx_handler.planning.rendering.sheet import Summary, plan_sheet, report_sheet, sized
from orbax_nnx_handler.planning.rendering.terminal import sheet_on_console

__all__ = [
    "Summary",
    "plan_sheet",
    "plan_to_dict",
    "render_plan",
    "render_sheet",
    "report_sheet",
    "sheet_on_console",
    "sheet_to_html",
    "sized",
]


def render_plan(plan: RestorePlan) -> str:
    """Returns a plan as a person reads it: counts first, then aligned rows."""
    return render_sheet(plan_sheet(plan))
