"""What a type checker is told to choose from is what may be chosen."""

import typing

from orbax_nnx_handler.planning.layouts import LAYOUTS, LayoutChoice


def test_every_layout_may_be_named() -> None:
    assert sorted(typing.get_args(LayoutChoice)) == sorted(
        ["auto", "linen", *(layout.name for layout in LAYOUTS)]
    )
