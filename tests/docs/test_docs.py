"""Every code block of README and docs runs, and prints what the page shows."""

import pathlib
import re
import sys

import pytest

from tests.docs.blocks import ROOT, blocks_of, run
from tests.docs.figures import rewritten
from tests.docs.pages import PAGES
from tests.docs.reference import PAGE, reference

GENERATED = {"docs/errors.md", "docs/reference.md"}
EVERY_PAGE = sorted(["README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))])


@pytest.fixture
def directory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty working directory from which a page may import what it writes."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run_and_print_what_it_shows(name, directory):
    # What another test on this worker imported from its own directory is not the page's module of that name.
    for other in [n for n, m in sys.modules.items() if "pytest-of-" in str(getattr(m, "__file__", ""))]:
        del sys.modules[other]

    shown = run(ROOT / name, PAGES[name](directory), directory)

    assert [block.code.rstrip() for block, _ in shown] == [printed for _, printed in shown], (
        f"run `python -m tests.docs {name}`"
    )


@pytest.mark.parametrize("name", sorted(set(EVERY_PAGE) - set(PAGES) - GENERATED))
def test_a_page_that_is_not_run_has_no_code(name):
    assert {block.language for block in blocks_of(ROOT / name)} <= {"text"}


def test_the_reference_is_what_the_docstrings_say():
    assert PAGE.read_text() == reference(), "run `python -m tests.docs`"


@pytest.mark.parametrize("name", EVERY_PAGE)
def test_links_between_pages_lead_somewhere(name):
    page = ROOT / name

    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(((?!https?:)[^)#\s]+)(?:#[^)]*)?\)", prose)

    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_figures_of_the_readme_are_those_of_the_benchmarks():
    readme = (ROOT / "README.md").read_text()

    assert rewritten(readme) == readme, "run `python -m tests.docs`"
