"""Plans as text and as plain dicts."""

from collections.abc import Iterable, Mapping
from typing import Any

from orbax_nnx_handler.planning.folding import Row, aligned
from orbax_nnx_handler.planning.leaves import StoredLeaf
from orbax_nnx_handler.planning.paths import Path, render
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.recipes import reads, render_reads


def render_plan(plan: RestorePlan) -> str:
    """Returns a plan as a person reads it: counts first, then aligned rows."""
    parts = [
        f"{len(plan.restored)} restored",
        f"{len(plan.missing)} missing",
        f"{len(plan.mismatched)} mismatched",
        f"{len(plan.defaulted)} defaulted",
        f"{len(plan.unexpected)} unexpected",
    ]
    head = f"RestorePlan: {', '.join(parts)}  (layout: {plan.layout}, {plan.stored_count} stored leaves)"
    sections = [
        _section("restored", (Row(p, (_source(i), i.transform)) for p, i in plan.restored.items())),
        _section("missing", (Row(p, (*_leaf(i.wanted), i.policy)) for p, i in plan.missing.items())),
        _section(
            "mismatched",
            (
                Row(p, (f"stored {i.stored_shape} {i.stored_dtype}", f"wanted {i.wanted.shape} {i.wanted.dtype}"))
                for p, i in plan.mismatched.items()
            ),
        ),
        _section("defaulted", (Row(p, (f"from {i.source}", i.reason)) for p, i in plan.defaulted.items())),
        _section("unexpected", (Row(p, _leaf(i)) for p, i in plan.unexpected.items())),
    ]
    return "\n".join([head, *(section for section in sections if section)])


def _source(item: Any) -> str:
    # Folded rows must have equal columns, so only the transform of a restored leaf is shown in full.
    return f"{item.wanted.shape} {item.dtype}"


def _leaf(leaf: Any) -> tuple[str, str]:
    return str(leaf.shape), str(leaf.dtype)


def _section(title: str, rows: Iterable[Row]) -> str:
    lines = aligned(rows, limit=30, indent="    ")
    return f"  {title}\n{lines}" if lines else ""


def plan_to_dict(plan: RestorePlan) -> dict[str, Any]:
    """Returns a plan as plain dicts, lists, strings and numbers."""
    return {
        "directory": plan.directory,
        "layout": plan.layout,
        "stored_leaves": plan.stored_count,
        "fits": plan.fits,
        "restored": [
            _wanted(path, item.wanted)
            | {
                "stored": [render(source) for source in dict.fromkeys(reads(item.recipe))],
                "stored_dtype": str(item.stored_dtype),
                "result_dtype": str(item.dtype),
                "transform": item.transform,
            }
            for path, item in plan.restored.items()
        ],
        "missing": [
            _wanted(path, item.wanted)
            | {"policy": item.policy, "filled_by": item.filled_by, "layers": list(item.layers)}
            for path, item in plan.missing.items()
        ],
        "mismatched": [
            _wanted(path, item.wanted)
            | {
                "kind": item.kind,
                "stored": render_reads(item.recipe),
                "stored_shape": list(item.stored_shape),
                "stored_dtype": item.stored_dtype,
                "detail": item.detail,
            }
            for path, item in plan.mismatched.items()
        ],
        "defaulted": [
            _wanted(path, item.wanted) | {"source": item.source, "reason": item.reason}
            for path, item in plan.defaulted.items()
        ],
        "unexpected": _stored(plan.unexpected),
        "skipped": _stored(plan.skipped),
        "dropped": [{"path": render(path), "reason": item.reason} for path, item in plan.dropped.items()],
    }


def _wanted(path: Path, leaf: Any) -> dict[str, Any]:
    return {"path": render(path), "shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _stored(leaves: Mapping[Path, StoredLeaf]) -> list[dict[str, Any]]:
    return [_wanted(path, leaf) for path, leaf in leaves.items()]
