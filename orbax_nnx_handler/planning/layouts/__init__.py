"""How each family of programs arranges a checkpoint, one module a family."""

import difflib
from collections.abc import Sequence
from typing import Literal

from orbax_nnx_handler.planning.core.errors import Hint, UnknownLayoutError
from orbax_nnx_handler.planning.layouts import linen, maxtext, nnx_programs, t5x, vision
from orbax_nnx_handler.planning.layouts.layout import Layout, Stored

_TELLING: tuple[Layout, ...] = (
    t5x.T5X,
    vision.SCENIC,
    vision.KAULDRON,
    vision.BIG_VISION,
    nnx_programs.GEMMA,
    nnx_programs.TUNIX,
    nnx_programs.OPENPI,
)
"""Layouts with names of their own: where one fits, no general one is meant."""

_GENERAL: tuple[Layout, ...] = (
    maxtext.MAXTEXT,
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

LAYOUTS: tuple[Layout, ...] = (*_TELLING, *_GENERAL)
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
    telling = [layout for layout in _TELLING if layout.fits(stored)]
    found = telling or [layout for layout in _GENERAL if layout.fits(stored)]
    if not found:
        known = ", ".join(sorted(layout.name for layout in LAYOUTS))
        raise UnknownLayoutError(
            f"the checkpoint has {len(stored)} leaves in no layout that this library knows.",
            hints=[f"name one with layout=...: {known}."],
        )
    return [layout.of_tree(stored) for layout in found]


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
