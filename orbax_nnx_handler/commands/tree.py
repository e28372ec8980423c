"""`orbax-nnx tree`: what is in a checkpoint, and the steps and items around it."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from etils import epath

from orbax_nnx_handler.commands.arguments import add_item, add_json, add_path, described, whole
from orbax_nnx_handler.commands.screen import Screen, count, size
from orbax_nnx_handler.planning import layouts
from orbax_nnx_handler.planning.core.errors import UnknownLayoutError
from orbax_nnx_handler.planning.core.folding import Row, fold
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, spelled
from orbax_nnx_handler.planning.layouts.layout import Layout, Placement
from orbax_nnx_handler.storage.checkpoint.directories import CONFIG_FILE, is_item, items_of, steps_of
from orbax_nnx_handler.storage.checkpoint.find import find_item
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint, read_metadata
from orbax_nnx_handler.storage.stores.files import Files
from orbax_nnx_handler.storage.stores.kvstore import files_at
from orbax_nnx_handler.storage.stores.locations import as_path, is_url, parents_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """A checkpoint and its surroundings.

    Attributes:
        checkpoint: The item.
        candidates: The layouts it can be read under, more telling ones first.
        steps: The finished steps beside it.
        items: The items of its step.
    """

    checkpoint: Checkpoint
    candidates: tuple[Layout, ...]
    steps: tuple[int, ...]
    items: tuple[str, ...]

    @property
    def layouts(self) -> tuple[str, ...]:
        """The titles of the layouts."""
        return tuple(layout.title for layout in self.candidates)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves, uncompressed."""
        return sum(leaf.nbytes for leaf in self.checkpoint.leaves.values())

    @property
    def custom(self) -> Mapping[str, Any]:
        """What the program stored beside the tree."""
        return {**self.checkpoint.step_metadata, **self.checkpoint.custom_metadata}

    @property
    def steps_in_words(self) -> str:
        """The steps, the long list cut."""
        if len(self.steps) <= 8:
            return ", ".join(map(str, self.steps))
        first, last = ", ".join(map(str, self.steps[:3])), ", ".join(map(str, self.steps[-3:]))
        return f"{first}, … {last} ({len(self.steps)})"

    @property
    def placements(self) -> tuple[Placement, ...]:
        """What each leaf is, under the first layout."""
        return self.candidates[0].place(self.checkpoint.leaves) if self.candidates else ()

    @property
    def parts(self) -> Mapping[str, list[StoredLeaf]]:
        """The leaves by part of the train state: the model's collections, optimizer, step, the rest."""
        found: dict[str, list[StoredLeaf]] = {}
        for placement in self.placements:
            found.setdefault(_part(placement), []).append(placement.leaf)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        parts = {placement.leaf.path: _part(placement) for placement in self.placements}
        return {
            "directory": str(self.checkpoint.directory),
            "layout": self.candidates[0].name if self.candidates else None,
            "layouts": [layout.name for layout in self.candidates],
            "disk_format": self.checkpoint.disk_format,
            "steps": list(self.steps),
            "items": list(self.items),
            "metadata": dict(self.custom),
            "bytes": self.nbytes,
            "leaves": [_leaf(leaf, parts) for leaf in self.checkpoint.leaves.values()],
            "lost": {
                spelled(path): reason
                for path, reason in {**self.checkpoint.lost, **self.checkpoint.damaged}.items()
            },
            "foreign": {spelled(path): what for path, what in self.checkpoint.foreign.items()},
        }


def read_contents(path: epath.PathLike, item: str | None) -> Contents:
    """Reads what is at a path.

    Raises:
        NotACheckpointError: The path is no checkpoint; says what it is.
    """
    given = as_path(path)
    files = files_at(given)
    directory = find_item(given, item, files)
    checkpoint = read_metadata(directory, files)
    # As the path was given, relative or not: the steps are compared with it.
    above = (parents_of(directory) if is_url(directory) else list(directory.parents))[:2]
    files.look_into(above)
    steps = [steps_of(folder, files) for folder in above]
    is_step = bool(steps) and directory in steps[0].values()
    in_step = len(steps) > 1 and directory.parent in steps[1].values()
    root_steps = steps_of(given, files) if files.is_folder(given) and not is_item(given, files) else {}
    beside = steps[0] if is_step else steps[1] if in_step else {}
    return Contents(
        checkpoint=checkpoint,
        candidates=_candidates(checkpoint),
        steps=tuple(root_steps or beside),
        items=_items(directory.parent, files) if in_step or directory.parent == given else (),
    )


def _candidates(checkpoint: Checkpoint) -> tuple[Layout, ...]:
    try:
        return tuple(layouts.candidates(checkpoint.leaves, "auto"))
    except UnknownLayoutError:
        return ()


def _items(step: epath.Path, files: Files) -> tuple[str, ...]:
    return tuple(child.name for child in items_of(step, files))


def _part(placement: Placement) -> str:
    if placement.section == "model":
        return placement.collection or "model"
    return "NNX leftovers" if placement.section == "aux" else placement.section


def _leaf(leaf: StoredLeaf, parts: Mapping[Any, str]) -> dict[str, Any]:
    return {
        "path": spelled(leaf.path),
        "part": parts.get(leaf.path),
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype) if leaf.dtype is not None else "string",
        "chunk_shape": list(leaf.chunk_shape) if leaf.chunk_shape is not None else None,
        "bytes": leaf.nbytes,
    }


_SHOWN = 200
_CONFIG_FIELDS = 12


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tree",
        help="what is in a checkpoint",
        **described("Shows what is in a checkpoint, from its metadata.", "orbax-nnx tree run --depth 2"),
    )
    add_path(parser)
    add_item(parser)
    parser.add_argument("--depth", metavar="N", type=whole(1), help="sum up what lies deeper than N keys")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Shows the tree."""
    with screen.waiting("reading metadata"):
        contents = read_contents(arguments.path, arguments.item)
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
    checkpoint = contents.checkpoint
    _unread(screen, "lost", checkpoint.lost)
    _unread(screen, "damaged", checkpoint.damaged)
    _unread(screen, "no numbers", checkpoint.foreign)
    return 0


def _unread(screen: Screen, word: str, reasons: Mapping[Path, str]) -> None:
    rows = fold(Row(path, (reason,)) for path, reason in reasons.items())
    for row in rows[:_SHOWN]:
        screen.error(word, f"{row.text}: {row.columns[0]}")
    if len(rows) > _SHOWN:
        screen.error(word, f"… and {sum(row.count for row in rows[_SHOWN:])} more; --json lists all.")


def _facts(contents: Contents) -> list[tuple[str, str]]:
    checkpoint = contents.checkpoint
    also = f" (may also be read as {', '.join(contents.layouts[1:])})" if contents.layouts[1:] else ""
    facts = [
        ("layout", (contents.layouts[0] if contents.layouts else "unknown") + also),
        ("disk format", checkpoint.disk_format),
        ("steps", contents.steps_in_words),
        ("items", ", ".join(contents.items)),
        ("metadata", ", ".join(f"{k}={v}" for k, v in contents.custom.items() if k != CONFIG_FILE)),
        (CONFIG_FILE, _config(contents.custom.get(CONFIG_FILE))),
        ("in all", f"{count(len(checkpoint.leaves), 'leaf', 'leaves')}, {size(contents.nbytes)}"),
    ]
    return [(name, value) for name, value in facts if value]


def _config(config: Any) -> str:
    """Returns what the file beside Hugging Face's weights says of the model: its kind, then its numbers."""
    if not isinstance(config, Mapping):
        return ""
    fields = cast("Mapping[str, Any]", config)
    first = {name: fields[name] for name in ("model_type", "architectures") if name in fields}
    numbers = {name: value for name, value in fields.items() if type(value) in (int, float)}
    shown = [f"{name}={value!r}" for name, value in {**first, **numbers}.items()]
    rest = len(shown) - _CONFIG_FIELDS
    return ", ".join([*shown[:_CONFIG_FIELDS], *([f"… and {rest} more"] if rest > 0 else [])])


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
