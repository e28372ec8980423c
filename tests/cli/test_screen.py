"""What a command says on a terminal and in a pipe."""

import io

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


def test_a_narrow_terminal_breaks_the_paths_alone() -> None:
    text = said(terminal=True, width=50)

    assert "\x1b[" in text
    assert "(4096, 14336)   bfloat16" in text


def test_a_terminal_too_narrow_for_paths_beside_columns_breaks_lines_and_drops_nothing() -> None:
    lines = said(terminal=True, width=30).splitlines()

    assert lines[1:3] == [
        "  params/decoder/layers/mlp/kernel   (4096, 14336)   bfloat16",
        "  step                               ()              int32",
    ]


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
