"""What a command says on a terminal and in a pipe."""

import io
import re

import pytest
from rich.console import Console

from orbax_nnx_handler.commands.screen import Screen, count, size

ROWS = [("params/decoder/layers/mlp/kernel", "(4096, 14336)", "bfloat16"), ("step", "()", "int32")]


def said(*, terminal: bool, width: int) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, highlight=False)
    screen = Screen(console, console)
    screen.head("a heading")
    screen.table(ROWS)
    screen.error("RestoreError", "something is [wrong]")
    with screen.progress(10, "writing", "reading again") as (write, read):
        write(10)
        read(10)
    return file.getvalue()


def test_a_pipe_gets_whole_lines_without_colours_or_bars() -> None:
    assert said(terminal=False, width=30) == (
        "a heading\n"
        "  params/decoder/layers/mlp/kernel   (4096, 14336)   bfloat16\n"
        "  step                               ()              int32\n"
        "RestoreError: something is [wrong]\n"
    )


@pytest.mark.parametrize("width", [30, 50])
def test_a_narrow_terminal_gives_each_path_a_line_of_its_own(width: int) -> None:
    lines = said(terminal=True, width=width).splitlines()

    assert "\x1b[" in lines[0]
    assert lines[1:5] == [
        "  params/decoder/layers/mlp/kernel",
        "      (4096, 14336)   bfloat16",
        "  step",
        "      ()              int32",
    ]


def test_a_long_fact_goes_on_below_itself_on_a_terminal() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=30, highlight=False, no_color=True)

    Screen(console, console).facts([("left out", "7 leaves of optimizer, step and others")])

    lines = [re.sub(r"\x1b\[\d*m", "", line).rstrip() for line in file.getvalue().splitlines()]
    assert lines == ["  left out   7 leaves of", "             optimizer, step", "             and others"]


def test_sizes_and_counts_read_as_a_person_writes_them() -> None:
    assert [size(n) for n in (0, 999, 1000, 999_949, 999_960, 2_000_000_000, 3 * 10**15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "999.9 kB",
        "1.0 MB",
        "2.0 GB",
        "3000.0 TB",
    ]
    assert [count(1, "leaf", "leaves"), count(1200, "leaf", "leaves"), count(2, "value")] == [
        "1 leaf",
        "1,200 leaves",
        "2 values",
    ]
