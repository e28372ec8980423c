"""The figures of the documentation, light and dark: `python -m benchmarks.plots`.

The flow of a restore, and plots of the last results. Plain SVG without a library, narrow enough for a
phone: the files change only where a figure does.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from benchmarks.measuring import RESULTS

IMAGES = pathlib.Path(__file__).parents[1] / "docs" / "images"
# Of the page: what is written, the lines of the grid, this package, the others.
THEMES = {
    "light": {"ink": "#24292f", "grid": "#d0d7de", "ours": "#3f51b5", "other": "#b0611f"},
    "dark": {"ink": "#e6edf3", "grid": "#484f58", "ours": "#9fa8ff", "other": "#f0a35e"},
}
_CASES = {
    "37 leaves, bfloat16": "37 leaves, 0.5 GB",
    "37 leaves, zstd": "the same, zstd",
    "2169 leaves, float32": "2,169 leaves",
    "20005 leaves, float32, zstd": "20,005 leaves, zstd",
    "2169 leaves, sharded over 8 devices": "2,169 leaves, 8 shards",
    "2169 leaves, replicated on 8 devices": "2,169 leaves, 8 copies",
}
_WIDTH, _LABEL = 540, 166


def main() -> None:
    """Draws all."""
    IMAGES.mkdir(exist_ok=True)
    for theme, colours in THEMES.items():
        for name, drawing in (("flow", _flow()), ("restore", _restore()), ("scaling", _scaling())):
            content = drawing
            for role, colour in colours.items():
                content = content.replace(f"var({role})", colour)
            (IMAGES / f"{name}-{theme}.svg").write_text(content)


def _results(name: str) -> Mapping[str, Mapping[str, Mapping[str, float]]]:
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


_BOXES = {
    # x, y, width: what is written, and in which colour.
    (10, 10, 148): (("the target", "shapes and shardings"), "grid"),
    (166, 10, 148): (("the checkpoint", "its metadata alone"), "grid"),
    (322, 10, 148): (("rules and policies", "what the user says"), "grid"),
    (130, 106, 220): (("plan: does it fit?", "each leaf: where from, and why"), "ours"),
    (10, 206, 200): (("one error", "every problem, cause, way out"), "other"),
    (270, 206, 200): (("read", "planned bytes, into place"), "ours"),
    (270, 286, 200): (("fill", "what policies fill; defaults"), "ours"),
    (270, 366, 200): (("NNX state on the mesh", "and a report of every leaf"), "grid"),
}
_ARROWS = ((84, 62, 190, 106), (240, 62, 240, 106), (396, 62, 290, 106), (180, 158, 110, 206))
_DOWN = ((300, 158, 370, 206), (370, 258, 370, 286), (370, 338, 370, 366))


def _flow() -> str:
    """Returns the steps of a restore: what decides, then what is read."""
    parts: list[str] = []
    for (x, y, width), ((head, more), role) in _BOXES.items():
        shape = f'x="{x}" y="{y}" width="{width}" height="52" rx="6" fill="none"'
        parts.append(f'<rect {shape} stroke="var({role})" stroke-width="1.6"/>')
        parts.append(_text(x + width / 2, y + 22, head, "middle", weight=600))
        parts.append(_text(x + width / 2, y + 40, more, "middle", size=12))
    for x, y, to_x, to_y in (*_ARROWS, *_DOWN):
        parts.append(_line(x, y, to_x, to_y - 6, role="ink"))
        corners = f"M{to_x - 4} {to_y - 8}L{to_x} {to_y}L{to_x + 4} {to_y - 8}Z"
        parts.append(f'<path d="{corners}" fill="var(ink)"/>')
    parts += [_text(108, 180, "no", weight=600), _text(356, 180, "yes", weight=600)]
    return _svg(480, 428, "A plan is made from target, metadata and rules; it fits, or is one error", parts)


def _restore() -> str:
    """Returns bars: seconds and peak memory, each over stock Orbax's."""
    rows = [(label, _results("restore")[case]) for case, label in _CASES.items()]
    parts: list[str] = []
    half = (_WIDTH - _LABEL) // 2
    for column, (field, title) in enumerate((("seconds", "time"), ("peak", "peak memory"))):
        left, width = _LABEL + column * half, half - 44
        parts.append(_text(left, 22, f"{title} ÷ Orbax's", weight=600))
        parts.append(_line(left + width, 34, left + width, 40 + 30 * len(rows), dashed=True))
        for at, (_, row) in enumerate(rows):
            share, y = row["ours"][field] / row["orbax"][field], 40 + 30 * at
            parts.append(_bar(left, y, width, "grid"))
            parts.append(_bar(left, y, max(2, width * share), "ours"))
            parts.append(_text(left + width + 6, y + 15, f"{share:.2f}"))
    parts += [_text(_LABEL - 10, 55 + 30 * at, label, "end") for at, (label, _) in enumerate(rows)]
    return _svg(_WIDTH, 50 + 30 * len(rows), "Time and memory of a restore against stock Orbax", parts)


def _scaling() -> str:
    """Returns lines: seconds against the number of leaves, both logarithmic."""
    curves = {
        who: {int(count): point["seconds"] for count, point in found["points"].items()}  # type: ignore[attr-defined]
        for who, found in _results("scaling")["leaves"].items()
    }
    left, top, right, bottom = 40, 34, _WIDTH - 110, 250
    counts = sorted(next(iter(curves.values())))
    ticks = [0.1, 1, 10]

    def x(count: float) -> float:
        return left + (right - left) * _share(count, counts[0], counts[-1])

    def y(seconds: float) -> float:
        return bottom - (bottom - top) * _share(seconds, 0.05, 50)

    parts = [_text(left, 20, "seconds of a restore, by number of leaves of 2.5 kB", weight=600)]
    for tick in ticks:
        parts += [_line(left, y(tick), right, y(tick)), _text(left - 8, y(tick) + 5, f"{tick:g}", "end")]
    parts += [_text(x(count), bottom + 20, f"{count:,}", "middle") for count in counts]
    for who, label, role in (("orbax", "stock Orbax", "other"), ("ours", "this package", "ours")):
        points = [(x(count), y(seconds)) for count, seconds in sorted(curves[who].items())]
        parts.append(_curve(points, role))
        parts.append(_text(points[-1][0] + 12, points[-1][1] + 5, label, role=role, weight=600))
    return _svg(_WIDTH, bottom + 32, "Seconds of a restore against the number of leaves", parts)


def _share(value: float, least: float, most: float) -> float:
    return (math.log(value) - math.log(least)) / (math.log(most) - math.log(least))


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-size="13" '
    )
    head += 'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">'
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>", ""])


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    role: str = "ink",
    weight: int = 400,
    size: int = 13,
) -> str:
    style = f'text-anchor="{anchor}" fill="var({role})" font-weight="{weight}" font-size="{size}"'
    return f'<text x="{x:.0f}" y="{y:.0f}" {style}>{escape(text)}</text>'


def _bar(x: float, y: float, width: float, role: str) -> str:
    opacity = ' opacity="0.45"' if role == "grid" else ""
    return f'<rect x="{x:.0f}" y="{y}" width="{width:.1f}" height="20" rx="3" fill="var({role})"{opacity}/>'


def _line(x: float, y: float, to_x: float, to_y: float, *, role: str = "grid", dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="4 4"' if dashed else ""
    return f'<path d="M{x:.0f} {y:.0f}L{to_x:.0f} {to_y:.0f}" stroke="var({role})" fill="none"{dashes}/>'


def _curve(points: Sequence[tuple[float, float]], role: str) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="var({role})"/>' for x, y in points)
    return f'<path d="M{path}" stroke="var({role})" stroke-width="2" fill="none"/>{dots}'


if __name__ == "__main__":
    main()
