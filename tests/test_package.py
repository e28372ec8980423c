"""What the package says of itself: one version, one address, floors that pip can be given."""

import pathlib
import re
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HOME = PROJECT["urls"]["Homepage"]


def test_the_changelog_begins_with_the_version_of_the_package_and_so_does_the_citation():
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert newest[1] == PROJECT["version"]
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_address_of_this_project_is_the_one_in_pyproject():
    files = [
        ROOT / "pyproject.toml",
        ROOT / "CITATION.cff",
        ROOT / "mkdocs.yml",
        *(ROOT / ".github").rglob("*.yml"),
    ]
    found = {
        address
        for file in files
        for address in re.findall(r"https://github\.com/[\w-]+/orbax-nnx-handler", file.read_text())
    }

    assert found == {HOME}


def test_the_readme_on_pypi_has_no_link_that_leads_nowhere():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    text = (ROOT / "README.md").read_text()
    for rule in settings["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)

    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 10
    assert {link for link in links if not link.startswith("https://")} == set()
    assert {
        link for link in links if not (ROOT / link.split("/blob/main/")[1].split("#")[0]).exists()
    } == set()


def test_each_floor_is_a_version_that_pip_can_be_held_to():
    ran = subprocess.run(
        [sys.executable, ROOT / ".ci" / "floors.py"], capture_output=True, text=True, check=True
    )

    assert len(ran.stdout.splitlines()) == len(PROJECT["dependencies"])
    assert all(re.fullmatch(r"[\w-]+==\d[\d.]*", line) for line in ran.stdout.splitlines())


def test_every_page_of_the_documentation_is_in_the_navigation_of_the_site():
    listed = set(re.findall(r"(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))

    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_workflows_and_pages_name_only_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.yml")]
    commands = [
        command
        for page in pages
        for command in re.findall(r"(?:`|run: |^)make ((?:[a-z]+ ?)+)", page.read_text(), re.MULTILINE)
    ]

    assert len(commands) > 10
    assert {target for command in commands for target in command.split()} - targets == set()


def test_the_suite_runs_on_every_python_that_the_package_names():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()

    assert f"python: [{', '.join(map(repr, named))}]".replace("'", '"') in workflow
    assert PROJECT["requires-python"] == f">={named[0]}"
