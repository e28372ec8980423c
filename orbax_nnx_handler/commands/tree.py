"""`orbax-nnx tree`: what is in a checkpoint."""

import argparse
from typing import Any

from etils import epath

from orbax_nnx_handler.commands.arguments import add_item, add_json, add_path, whole
from orbax_nnx_handler.commands.contents import Contents, read_contents
from orbax_nnx_handler.commands.screen import Screen, count, size
from orbax_nnx_handler.planning.folding import Row, fold
from orbax_nnx_handler.planning.paths import render

_SHOWN = 200


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tree",
        help="what is in a checkpoint",
        description="Shows what is in a checkpoint, from its metadata.",
    )
    add_path(parser)
    add_item(parser)
    parser.add_argument("--depth", metavar="N", type=whole(1), help="sum up what lies deeper than N keys")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Shows the tree."""
    contents = read_contents(epath.Path(arguments.path), arguments.item)
    if arguments.json:
        screen.json(contents.to_dict())
        return 0
    screen.head(str(contents.checkpoint.directory))
    screen.facts(_facts(contents))
    screen.say()
    screen.table(_parts(contents), right=(1, 2))
    screen.say()
    rows = _leaves(contents) if arguments.depth is None else _summed(contents, arguments.depth)
    screen.table(rows[:_SHOWN])
    if len(rows) > _SHOWN:
        screen.say(f"  … and {len(rows) - _SHOWN} more rows; --depth sums up, --json lists all.")
    for path, reason in contents.checkpoint.lost.items():
        screen.error("lost", f"{render(path)}: {reason}")
    for path, what in contents.checkpoint.foreign.items():
        screen.error("no numbers", f"{render(path)}: {what}")
    return 0


def _facts(contents: Contents) -> list[tuple[str, str]]:
    checkpoint = contents.checkpoint
    also = f" (may also be read as {', '.join(contents.layouts[1:])})" if contents.layouts[1:] else ""
    facts = [
        ("layout", (contents.layouts[0] if contents.layouts else "unknown") + also),
        ("disk format", checkpoint.disk_format),
        ("steps", contents.steps_in_words),
        ("items", ", ".join(contents.items)),
        ("metadata", ", ".join(f"{k}={v}" for k, v in contents.custom.items())),
        ("in all", f"{count(len(checkpoint.leaves), 'leaf', 'leaves')}, {size(contents.nbytes)}"),
    ]
    return [(name, value) for name, value in facts if value]


def _parts(contents: Contents) -> list[tuple[str, str, str]]:
    return [
        (name, count(len(leaves), "leaf", "leaves"), size(sum(leaf.nbytes for leaf in leaves)))
        for name, leaves in contents.parts.items()
    ]


def _leaves(contents: Contents) -> list[tuple[str, ...]]:
    rows = [
        Row(leaf.path, (str(leaf.shape), str(leaf.dtype or "string"), _chunks(leaf), str(leaf.nbytes)))
        for leaf in contents.checkpoint.leaves.values()
    ]
    return [(row.text, *row.columns[:3], size(int(row.columns[3]) * row.count)) for row in fold(rows)]


def _chunks(leaf: Any) -> str:
    whole = leaf.chunk_shape is None or leaf.chunk_shape == leaf.shape
    return "one chunk" if whole else f"chunks {leaf.chunk_shape}"


def _summed(contents: Contents, depth: int) -> list[tuple[str, ...]]:
    below: dict[Any, list[int]] = {}
    for path, leaf in contents.checkpoint.leaves.items():
        below.setdefault(path[:depth], []).append(leaf.nbytes)
    rows = [
        Row(path, (count(len(sizes), "leaf", "leaves"), str(sum(sizes)))) for path, sizes in below.items()
    ]
    return [
        (row.text, row.columns[0] + (" each" if row.count > 1 else ""), size(int(row.columns[1]) * row.count))
        for row in fold(rows)
    ]
