"""How each family of programs arranges a checkpoint, one module for programs of a kind."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Literal

from orbax_nnx_handler.planning.core.errors import Hint, UnknownLayoutError
from orbax_nnx_handler.planning.layouts import language, linen, nnx_programs, vision
from orbax_nnx_handler.planning.layouts.layout import Layout, Placement, Stored

_TELLING: tuple[Layout, ...] = (
    language.T5X,
    vision.SCENIC,
    vision.KAULDRON,
    vision.BIG_VISION,
    nnx_programs.GEMMA,
    nnx_programs.TUNIX,
    nnx_programs.OPENPI,
)
"""Layouts with names of their own: where one fits, no general one is meant."""

_GENERAL: tuple[Layout, ...] = (
    language.MAXTEXT,
    linen.TRAIN_STATE,
    linen.VARIABLES,
    linen.BY_NETWORK,
    nnx_programs.OPENPI_WEIGHTS,
    nnx_programs.OPENPI_TRAIN_STATE,
    nnx_programs.NNX_STATE,
    nnx_programs.NNX_PURE_DICT,
    nnx_programs.PARAMS,
    vision.BIG_VISION_WEIGHTS,
    nnx_programs.OPTAX_STATE,
)
"""Layouts that may fit the same tree; the one under which the most leaves are found is taken."""


def _keeping_aside(layout: Layout) -> Layout:
    """Returns a layout that reads what a save keeps aside for NNX, beside whatever its program writes."""

    def fits(stored: Stored) -> bool:
        return layout.fits(_without_aside(stored))

    def place(stored: Stored) -> tuple[Placement, ...]:
        rest = _without_aside(stored)
        placed = layout.place(rest)
        if len(rest) == len(stored):
            return placed  # Nearly every tree.
        owners = {item.owner for item in placed}
        return (*placed, *(linen.aside(stored[path], owners) for path in stored if path not in rest))

    return dataclasses.replace(layout, fits=fits, place=place)


def _without_aside(stored: Stored) -> Stored:
    if not any(path[:1] == (linen.AUX,) and len(path) > 1 for path in stored):
        return stored
    return {path: leaf for path, leaf in stored.items() if path[:1] != (linen.AUX,) or len(path) == 1}


_LINEN = (language.MAXTEXT, linen.TRAIN_STATE, linen.VARIABLES)
"""Layouts whose train states have a place for it themselves."""

_PARTICULAR, _ANY = (
    tuple(one if one in _LINEN else _keeping_aside(one) for one in listed) for listed in (_TELLING, _GENERAL)
)

LAYOUTS: tuple[Layout, ...] = (*_PARTICULAR, *_ANY)
"""Every known layout."""

UNNAMED: Layout = nnx_programs.PARAMS
"""The layout in which no key has a meaning: fits no tree with Linen's own keys, and may still be meant."""

LayoutChoice = Literal[
    "auto",
    "linen",
    "train_state",
    "variables",
    "by_network",
    "params",
    "maxtext",
    "t5x",
    "scenic",
    "kauldron",
    "big_vision",
    "big_vision_weights",
    "gemma",
    "tunix",
    "openpi",
    "openpi_weights",
    "openpi_train_state",
    "nnx_state",
    "nnx_pure_dict",
    "optax_state",
]
"""What may be given as `layout=`: `auto`, a name of a layout, or `linen` for that of a Flax TrainState."""

_ALIASES = {"linen": "train_state"}


def candidates(stored: Stored, name: str) -> Sequence[Layout]:
    """Returns the layouts under which a tree can be read.

    Args:
        stored: The stored leaves.
        name: `auto`, or the name of one layout, which is then taken at its word.

    Raises:
        UnknownLayoutError: No layout has that name, or none fits the tree.
    """
    if name != "auto":
        return (_named(name),)
    # Of nearly every tree nothing is kept aside, and no layout has to look for it.
    asked = (_TELLING, _GENERAL) if _without_aside(stored) is stored else (_PARTICULAR, _ANY)
    found = _fitting(_PARTICULAR, asked[0], stored) or _fitting(_ANY, asked[1], stored)
    if not found:
        known = ", ".join(sorted(layout.name for layout in LAYOUTS))
        raise UnknownLayoutError(
            f"the checkpoint has {len(stored)} leaves in no layout that this library knows.",
            hints=[f"name one with layout=...: {known}."],
        )
    return [layout.of_tree(stored) for layout in found]


def _fitting(layouts: Sequence[Layout], asked: Sequence[Layout], stored: Stored) -> list[Layout]:
    return [layout for layout, one in zip(layouts, asked, strict=True) if one.fits(stored)]


def check_layout(name: str) -> None:
    """Raises where a name is neither `auto` nor that of a layout.

    Raises:
        UnknownLayoutError: Says which are.
    """
    if name != "auto":
        _named(name)


def _named(name: str) -> Layout:
    wanted = _ALIASES.get(name, name)
    for layout in LAYOUTS:
        if layout.name == wanted:
            return layout
    known = ["auto", *_ALIASES, *(layout.name for layout in LAYOUTS)]
    # A plan prints `Flax TrainState` where `train_state` is to be passed.
    labels = {layout.title.lower(): layout.name for layout in LAYOUTS} | {name: name for name in known}
    close = difflib.get_close_matches(str(name).lower(), labels, n=1)
    meant = [Hint(f"pass layout={labels[close[0]]!r}.", {"layout": labels[close[0]]})] if close else []
    raise UnknownLayoutError(
        f"there is no layout {name!r}.", hints=[*meant, f"layout is one of {', '.join(known)}."]
    )
