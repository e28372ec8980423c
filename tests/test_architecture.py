"""What holds for the source as a whole: who may import whom, how long a piece may be, what may be named."""

import ast
import functools
import pathlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "orbax_nnx_handler"
MODULES = sorted(PACKAGE.rglob("*.py"))
FACADE = {"handler.py", "v1.py", "api.py", "planner.py", "cli.py", "__init__.py"}
MODULE_LINES = 450
FUNCTION_LINES = 60
FOLDER_FILES = 15
MODULE_COUNT = 170
LOCAL_IMPORTS = {
    # An interrupt while JAX is being loaded is still told in one line.
    ("__main__", "cli"),
    # Devices are pretended before JAX starts.
    ("commands.demo", "commands.demo.programs"),
    ("commands.demo", "commands.demo.walkthrough"),
    # What writes checkpoints comes with Orbax, and few plans ask what a save of the target would write.
    ("planner", "storage.saving"),
}
"""Modules of ours that are imported inside a function, with the reason: how long a start takes."""
LATE_IMPORTS = {
    # As long to load as all of the package, and needed for a proposal only.
    ("planning.likeness.highest_sums", "scipy.optimize"),
    # A checkpoint on this machine needs none of it.
    ("storage.stores.locations", "fsspec"),
    # A tenth of a second that `plan` need not wait.
    ("commands.screen", "rich.progress"),
}
"""Modules of others that are imported inside a function, for the same reason."""
PUBLIC_TWICE = {"Add", "NNXLinenHandler", "Repeat", "Reshape", "Scale", "Transpose"}
"""Rules called as the step of a recipe that they are, and the handler of each interface of Orbax."""
DISTRIBUTIONS = {"absl": "absl_py", "orbax": "orbax_checkpoint"}
"""Import names that differ from the name of the project that brings them."""


def name_of(file: pathlib.Path) -> str:
    return file.relative_to(ROOT).as_posix()


@functools.cache
def parsed(file: pathlib.Path) -> ast.Module:
    return ast.parse(file.read_text())


@functools.cache
def nodes(file: pathlib.Path) -> list[ast.AST]:
    return list(ast.walk(parsed(file)))


@functools.cache
def imports(file: pathlib.Path) -> list[tuple[str, int]]:
    """Returns each imported name in full, with its line."""
    return list(_imports(nodes(file)))


def _imports(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, int]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@functools.cache
def import_statements(file: pathlib.Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in nodes(file) if isinstance(node, ast.Import | ast.ImportFrom)]


def functions(file: pathlib.Path) -> Iterator[tuple[str, int]]:
    """Yields each function with its lines of code, the docstring not counted."""
    for node in nodes(file):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            described = ast.get_docstring(node) is not None and node.body[0]
            docstring = described.end_lineno - described.lineno + 1 if described else 0
            yield node.name, node.end_lineno - node.lineno + 1 - docstring


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def has_reason(lines: list[str], line: int) -> bool:
    """Tells whether an import has a comment on its own line or right above it."""
    return "#" in lines[line - 1] or (line > 1 and lines[line - 2].lstrip().startswith("#"))


def tracked_texts() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    for name in filter(None, listed.stdout.split("\0")):
        file = ROOT / name
        if file.is_file() and b"\0" not in (content := file.read_bytes()):
            yield name, content.decode(errors="replace")


def test_imports_keep_the_direction_that_the_contracts_state():
    command = pathlib.Path(sys.executable).with_name("lint-imports")

    ran = subprocess.run([command, "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False)

    assert ran.returncode == 0, ran.stdout + ran.stderr


def module_of(file: pathlib.Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules_imported(nodes: Iterable[ast.AST], known: set[str]) -> set[str]:
    """Returns our own modules that some code imports: a name that is a module's stands for that module."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= below or {node.module}
    return found


def graph() -> dict[str, set[str]]:
    """Returns what each module imports of the others, imports inside functions and for types included."""
    known = {module_of(file) for file in MODULES}
    return {module_of(file): modules_imported(nodes(file), known) - {module_of(file)} for file in MODULES}


def circle_in(edges: dict[str, set[str]]) -> list[str]:
    """Returns what is left when modules that import none of the others are taken out, again and again."""
    left = {name: set(others) for name, others in edges.items()}
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    return sorted(left)


def test_no_module_imports_itself_by_way_of_others():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert circle_in(graph()) == []


def test_an_import_inside_a_function_is_there_for_the_time_that_a_start_takes():
    known = {module_of(file) for file in MODULES}
    inside = [
        (module_of(file), node)
        for file in MODULES
        for function in nodes(file)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in import_statements(file)
        if function.lineno <= node.lineno <= function.end_lineno
    ]
    ours = {(module, name) for module, node in inside for name in modules_imported([node], known)}
    others = {(module, name) for module, node in inside for name, _ in _imports([node])}
    start = f"{PACKAGE.name}."

    assert {tuple(name.removeprefix(start) for name in pair) for pair in ours} == LOCAL_IMPORTS
    assert {(module.removeprefix(start), name) for module, name in others if not name.startswith(start)} == (
        LATE_IMPORTS
    )


def test_a_folder_holds_no_more_files_than_one_can_take_in():
    folders = Counter(file.parent.relative_to(PACKAGE).as_posix() for file in MODULES)

    assert {name: count for name, count in folders.items() if count > FOLDER_FILES} == {}


def test_the_package_has_no_more_modules_than_one_can_know():
    assert len(MODULES) <= MODULE_COUNT


def test_a_class_name_means_one_thing():
    names = Counter(
        node.name for file in MODULES for node in parsed(file).body if isinstance(node, ast.ClassDef)
    )

    twice = {name for name, count in names.items() if count > 1 and not name.startswith("_")}
    assert twice <= PUBLIC_TWICE


def rooms_known(file: pathlib.Path) -> set[str]:
    """Returns the parts of this package that a module imports from."""
    return {name.split(".")[1] for name, _ in imports(file) if name.startswith("orbax_nnx_handler.")}


def test_only_the_facade_knows_both_planning_and_storage():
    outside = [
        file
        for file in MODULES
        if file.relative_to(PACKAGE).parts[0] not in ("planning", "storage", "verifying")
    ]

    both = {name_of(file) for file in outside if {"planning", "storage"} <= rooms_known(file)}

    # Each command of the command line is a façade of its own.
    commands = {name for name in both if name.startswith("orbax_nnx_handler/commands/")}
    assert both - commands <= {f"orbax_nnx_handler/{name}" for name in FACADE}


def test_a_module_is_one_idea_long():
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in MODULES}

    assert {name: length for name, length in lengths.items() if length > MODULE_LINES} == {}


def test_a_function_fits_on_a_screen():
    lengths = [(name_of(file), name, lines) for file in MODULES for name, lines in functions(file)]

    assert [entry for entry in lengths if entry[2] > FUNCTION_LINES] == []


def test_a_private_name_of_another_project_is_imported_only_with_its_reason_beside_it():
    unexplained = [
        (name_of(file), name)
        for file in MODULES
        for name, line in imports(file)
        if not name.startswith("orbax_nnx_handler.")
        if is_private(name) and not has_reason(file.read_text().splitlines(), line)
    ]

    assert unexplained == []


def test_what_is_used_of_orbax_comes_through_one_module():
    users = {
        name_of(file)
        for file in MODULES
        for name, _ in imports(file)
        if name.split(".")[0] == "orbax"
        if not file.is_relative_to(PACKAGE / "commands/demo")  # A user's program.
    }

    assert users == {"orbax_nnx_handler/orbax_interfaces.py"}


def test_no_private_module_is_reached_through_an_attribute():
    reached = [
        (name_of(file), ast.unparse(node))
        for file in MODULES
        for node in nodes(file)
        if isinstance(node, ast.Attribute) and node.attr == "_src"
        if not has_reason(file.read_text().splitlines(), node.lineno)
    ]

    assert reached == []


def test_every_project_that_is_imported_is_a_declared_dependency():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    projects = {re.split(r"[<>=\[ ]", requirement)[0].replace("-", "_") for requirement in declared}
    tops = {name.split(".")[0] for file in MODULES for name, _ in imports(file)}

    foreign = tops - set(sys.stdlib_module_names) - {"orbax_nnx_handler"}
    undeclared = {DISTRIBUTIONS.get(top, top) for top in foreign} - projects

    assert not undeclared


def test_no_file_names_a_place_on_one_machine():
    # Built from parts, so that this file does not find itself.
    homes = "|".join(["ro" + "ot", "wo" + "rk", "ho" + r"me/\w+", "Us" + r"ers/\w+"])
    absolute = re.compile(rf"(?<![\w.:/*}}-])/(?:{homes})/[\w.]")

    named = {name: found.group() for name, text in tracked_texts() if (found := absolute.search(text))}

    assert not named


def test_every_file_that_answers_a_question_of_a_contributor_exists():
    rows = re.findall(r"^\| .*\? \| `(.+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)

    assert len(rows) >= 15
    assert [name for name in rows if not (PACKAGE / name).is_file()] == []


def test_the_tree_in_the_readme_has_every_folder_and_file_of_the_package():
    tree = (ROOT / "README.md").read_text().split("```text\norbax_nnx_handler/\n")[1].split("```")[0]
    shown = set(re.findall(r"^ +([\w.]+)/? ", tree, re.MULTILINE))

    folders = {file.parent.name for file in MODULES} - {PACKAGE.name}
    top = {file.name for file in PACKAGE.glob("*.py")} - {"__main__.py"}
    assert shown == folders | top


def test_what_test_modules_share_lies_in_no_test_module():
    imported = re.compile(r"^\s*(?:from|import) tests\b.*\btest_\w+", re.MULTILINE)

    shared = {
        (name_of(file), found)
        for file in sorted((ROOT / "tests").rglob("*.py"))
        for found in imported.findall(file.read_text())
    }

    assert shared == set()
