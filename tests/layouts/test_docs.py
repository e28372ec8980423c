"""The docs say what the suite shows."""

import pytest

from orbax_nnx_handler.planning.layouts import LAYOUTS
from orbax_nnx_handler.planning.layouts.layout import Layout
from tests.layouts.table import PAGE, rewritten


def test_the_tables_of_layouts_and_formats_are_up_to_date() -> None:
    page = PAGE.read_text()

    assert page == rewritten(page), "run: python -m tests.layouts.table"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_is_described(layout: Layout) -> None:
    page = (PAGE.parent / "layouts.md").read_text()

    assert f"| `{layout.name}` |" in page
