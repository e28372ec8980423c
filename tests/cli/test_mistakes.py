"""What a stranger gets wrong: one readable error, the right exit status, and nothing changed."""

import pathlib
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.processes import COMMAND_LINE, Forked

MISSING = "needs() missing 1 required positional argument: 'layers'\n"
PROGRAM = """\
from flax import nnx

def fails():
    raise KeyError("vocab")

def leaves():
    raise SystemExit("no accelerator")

def nothing():
    nnx.Linear(2, 3, rngs=nnx.Rngs(0))

def needs(layers):
    return nnx.Linear(layers, 2, rngs=nnx.Rngs(0))
"""


@pytest.fixture
def program(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return file


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("fails", "fails under nnx.eval_shape: KeyError: 'vocab'\nat {file}:4\n"),
        ("leaves", "fails under nnx.eval_shape: SystemExit: no accelerator\nat {file}:7\n"),
        ("nothing", "builds nothing; it must return the module or the train state.\n"),
        (
            "needs",
            "fails under nnx.eval_shape: TypeError: {missing}",
        ),
    ],
)
@pytest.mark.parametrize("command", ["plan", "suggest", "convert"])
def test_a_factory_that_does_not_build_a_target_is_status_2(
    cli, root, program, tmp_path, command, factory, words
) -> None:
    paths = [root, tmp_path / "out"] if command == "convert" else [root]

    said = cli(command, *paths, f"{program}:{factory}")

    assert said.status == 2
    assert said.err == f"usage: {program}:{factory} {words.format(file=program, missing=MISSING)}"


def test_of_many_functions_those_of_nearly_the_name_are_listed_first(cli, root, program) -> None:
    program.write_text(
        "".join(f"def case_{at}():\n    pass\n" for at in range(40)) + "def make():\n    pass\n"
    )

    said = cli("plan", root, f"{program}:mak")

    assert said.err.startswith(f"usage: {program} has no mak; it has: make, case_0, case_1, ")
    assert said.err.endswith(", case_10, ... and 29 more.\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def make(:\n", "SyntaxError: invalid syntax (program.py, line 1)\nat {file}:1\n"),
        ("import os\nraise RuntimeError('no GPU')\n", "RuntimeError: no GPU\nat {file}:2\n"),
        (
            "import nosuchmodule\n",
            "No module named 'nosuchmodule'\nat {file}:1\n",
        ),
    ],
)
def test_a_file_that_cannot_be_imported_is_status_2(cli, root, program, text, words) -> None:
    program.write_text(text)

    said = cli("plan", root, f"{program}:make")

    assert said.status == 2
    assert said.err == f"usage: {program} cannot be imported: {words.format(file=program)}"


def test_an_unfinished_save_is_not_read(cli, root, tmp_path) -> None:
    left = tmp_path / "1200.orbax-checkpoint-tmp-7"
    shutil.copytree(root / "200" / "default", left)

    said = cli("tree", left)

    assert said.status == 1
    assert said.err == (
        f"NotACheckpointError: {left} is a save that was interrupted.\n"
        "hint: no finished step lies beside it: the job has to save again.\n"
    )


def test_a_file_of_a_checkpoint_leads_to_the_checkpoint(cli, root) -> None:
    item = root / "200" / "default"

    said = cli("tree", item / "_METADATA")

    assert said.status == 1
    assert said.err == (
        f"NotACheckpointError: {item / '_METADATA'} is a file.\n"
        f"hint: it is a part of the item {item}; pass that.\n"
    )


def test_a_destination_inside_a_checkpoint_or_below_a_file_is_refused(cli, root, tmp_path) -> None:
    item = root / "200" / "default"
    (tmp_path / "notes.txt").write_text("")

    inside = cli("convert", root, item / "new")
    below = cli("convert", root, tmp_path / "notes.txt" / "new")

    assert (inside.status, below.status) == (1, 1)
    assert inside.err == (
        f"RestoreError: {item / 'new'} lies inside the checkpoint {item}, which would be changed.\n"
    )
    assert below.err == (
        f"RestoreError: {tmp_path / 'notes.txt'} is a file, so nothing can be written to "
        f"{tmp_path / 'notes.txt' / 'new'}.\n"
    )


def test_a_bad_number_is_status_2_and_named(cli, root, tmp_path) -> None:
    depth = cli("tree", root, "--depth", "deep")
    axis = cli("convert", root, tmp_path / "out", "--unscan", "hidden", "--axis", "-1")

    assert (depth.status, axis.status) == (2, 2)
    assert depth.err.endswith("error: argument --depth: 'deep' is no whole number from 1 on\n")
    assert axis.err.endswith("error: argument --axis: '-1' is no whole number from 0 on\n")


def test_a_store_whose_package_is_not_installed_is_one_line(cli, root, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("orbax_nnx_handler.commands.tree.find_item", refuse)

    said = cli("tree", "gs://bucket/run")

    assert said.status == 1
    assert said.err == "ImportError: Please install gcsfs to access Google Storage\n"


def test_a_source_damaged_in_the_middle_leaves_nothing(cli, tmp_path) -> None:
    values = np.random.default_rng(0).random((1000, 1000), np.float32)
    ocp.PyTreeCheckpointer().save(tmp_path / "in", {"params": {"w": values}})
    (largest,) = (file for file in (tmp_path / "in").rglob("*") if file.stat().st_size > 1_000_000)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 100_000] = bytes(100_000)
    largest.write_bytes(content)

    said = cli("convert", tmp_path / "in", tmp_path / "out")

    assert said.status == 1
    assert said.err.startswith("UnreadableLeafError: stored leaf params/w cannot be read: ")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_reader_that_has_seen_enough_is_no_mistake(tmp_path, more: list[str]) -> None:
    ocp.PyTreeCheckpointer().save(tmp_path / "in", {"params": {"w": np.ones(3, np.float32)}})
    program = f"import os; reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1); {COMMAND_LINE}"

    done = Forked(program, "tree", str(tmp_path / "in"), *more)

    assert (done.wait(), done.stderr) == (0, "")


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path) -> None:
    values = np.random.default_rng(0).random((1000, 1000), np.float32)
    ocp.PyTreeCheckpointer().save(tmp_path / "in", {"params": {"w": values}})
    out = tmp_path / "out"
    # A limit on the size of files stands in for a full disk: the system refuses the write in the same way.
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)); "
        "from orbax_nnx_handler.cli import main; sys.exit(main())"
    )

    done = Forked(program, "convert", str(tmp_path / "in"), str(out))

    assert done.wait() == 1, done.stderr
    assert done.stderr.startswith(f"RestoreError: {out} cannot be written: ")
    assert done.stderr.endswith("hint: nothing was left at the destination.\n")
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]
