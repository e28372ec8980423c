"""The table of pairs in the docs is written from the pairs that the suite tests."""

from tests.planning.suggesting.table import PAGE, rewritten


def test_the_page_shows_the_pairs_and_their_figures():
    page = PAGE.read_text()

    assert page == rewritten(page), "run: python -m tests.planning.suggesting.table"
