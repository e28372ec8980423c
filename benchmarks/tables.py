"""The tables of the last results, as `benchmarks/README.md` shows them: `python -m benchmarks.tables`."""

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.measuring import RESULTS, Row, table

_RESTORE = {
    "seconds": "s",
    "cpu_seconds": "CPU s",
    "GB/s": "GB/s",
    "peak": "peak ÷ bytes",
    "read": "read ÷ bytes",
    "x orbax": "× Orbax",
    "cpu x orbax": "CPU × Orbax",
    "x tensorstore": "× TensorStore",
    "cpu x tensorstore": "CPU × TensorStore",
}
_VERDICT = {
    "seconds": "s",
    "fastest": "fastest",
    "slowest": "slowest",
    "cpu_seconds": "CPU s",
    "of a restore": "× restore",
    "MB": "MB",
    "exponent": "exponent",
}
_REMOTE = {"requests": "requests", "chain": "in a row", "seconds": "s", "MB": "MB", "x orbax": "× Orbax"}
_CONVERT = {"peak GB": "peak GB", "peak ÷ bound": "peak ÷ bound"}
_SAVE = {
    "seconds": "s",
    "fastest": "fastest",
    "slowest": "slowest",
    "cpu_seconds": "CPU s",
    "x save_orbax": "× parent",
    "x begin_orbax": "× parent",
}
_TABLES = (
    ("restore", _RESTORE),
    ("remote", _REMOTE),
    ("verdict", _VERDICT),
    ("save", _SAVE),
    ("convert", _CONVERT),
)


def main() -> None:
    """Prints every result that is there."""
    for name, columns in _TABLES:
        for title, rows in _results(name).items():
            print(f"\n**{title}**\n\n{table(_chosen(rows, columns))}")
    for title, curves in _results("scaling").items():
        print(f"\n**{title}**, seconds\n\n{table(_curve(curves))}")
    proposals = _results("suggesting")
    if proposals:
        print(f"\n**Proposing**\n\n{table(proposals)}")
    processes = _results("multihost")
    if processes:
        print(f"\n**Processes**\n\n{table(processes)}")


def _results(name: str) -> Any:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text())["results"] if file.exists() else {}


def _chosen(rows: Mapping[str, Row], columns: Mapping[str, str]) -> list[Row]:
    return [
        {"": name, **{title: row[column] for column, title in columns.items() if column in row}}
        for name, row in rows.items()
    ]


def _curve(curves: Mapping[str, Row]) -> list[Row]:
    return [
        {
            "": name,
            **{count: point["seconds"] for count, point in curve["points"].items()},
            "exponent": curve["exponent"],
        }
        for name, curve in curves.items()
    ]


if __name__ == "__main__":
    main()
