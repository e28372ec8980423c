"""Completion scripts, and what is said while a command works."""

import io
import subprocess
import sys
import time

import pytest
from rich.console import Console

from orbax_nnx_handler.cli import parser
from orbax_nnx_handler.commands import screen as screens
from orbax_nnx_handler.commands.screen import Screen


def test_a_script_for_bash_completes_commands_and_options(cli, tmp_path) -> None:
    pytest.importorskip("shtab")
    script = tmp_path / "completion.bash"
    script.write_text(cli("--completion", "bash").out)
    ask = """
        source {}
        COMP_WORDS=({}); COMP_CWORD={}; COMPREPLY=()
        $(complete -p orbax-nnx | sed "s/.*-F \\([^ ]*\\).*/\\1/")
        echo "${{COMPREPLY[@]}}"
    """

    def completed(*words: str) -> list[str]:
        command = ask.format(script, " ".join(words), len(words) - 1)
        return subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, check=True
        ).stdout.split()

    assert completed("orbax-nnx", "pl") == ["plan"]
    assert completed("orbax-nnx", "plan", "run", "--pol") == ["--policy"]


def test_without_its_library_or_for_an_unknown_shell_completion_says_what_to_do(cli, monkeypatch) -> None:
    pytest.importorskip("shtab")
    said = cli("--completion", "korn")

    assert (said.status, said.out) == (2, "")
    assert "--completion korn: the shells are bash, zsh, " in said.err
    monkeypatch.setitem(sys.modules, "shtab", None)
    said = cli("--completion", "bash")
    assert said.status == 2
    assert "pip install 'orbax-nnx-handler[completion]'" in said.err


def test_the_help_of_each_command_shows_an_example(cli) -> None:
    for name in parser()._subparsers._group_actions[0].choices:
        said = cli(name, "--help")
        assert f"example:\n  orbax-nnx {name}" in said.out


@pytest.mark.parametrize("terminal", [True, False])
def test_what_takes_long_is_said_on_a_terminal_only(monkeypatch, terminal) -> None:
    monkeypatch.setattr(screens, "_A_WHILE_S", 0.01)
    written = io.StringIO()
    err = Console(file=written, force_terminal=terminal, width=80)
    screen = Screen(out=Console(file=io.StringIO()), err=err)

    with screen.waiting("planning"):
        time.sleep(0.3)

    assert ("planning …" in written.getvalue()) is terminal


def test_nothing_is_said_of_what_is_done_at_once() -> None:
    written = io.StringIO()
    screen = Screen(
        out=Console(file=io.StringIO()),
        err=Console(file=written, force_terminal=True, force_interactive=True),
    )

    with screen.waiting("planning"):
        pass

    assert written.getvalue() == ""
