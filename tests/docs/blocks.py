"""The code blocks of a page, and how each of them is run.

A page runs from top to bottom in one namespace and one empty directory:

- a `python` block that begins with a file's name as a comment (`# model.py`) is written to it;
- any other `python` block is executed;
- a `shell` block runs line by line: `orbax-nnx` in this process; `make` is looked up, `pip` is not run;
- a `text` block after a block that printed something is what it must have printed.
"""

import contextlib
import dataclasses
import io
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (\w+\.py)\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a page, with the line it begins at."""

    language: str
    code: str
    line: int


def blocks_of(page: pathlib.Path) -> Iterator[Block]:
    """Yields the blocks of a page in order."""
    text = page.read_text()
    for match in _BLOCK.finditer(text):
        yield Block(language=match[1], code=match[2], line=text[: match.start()].count("\n") + 2)


def run(page: pathlib.Path, namespace: dict[str, Any], directory: pathlib.Path) -> list[tuple[Block, str]]:
    """Runs a page; returns its `text` blocks, each with what the block before it really printed.

    Raises:
        AssertionError: Nobody knows how to run a block.
    """
    printed = ""
    shown: list[tuple[Block, str]] = []
    for block in blocks_of(page):
        if block.language == "text":
            shown += [(block, _clean(printed, directory))] if printed else []
            printed = ""
        elif block.language == "python":
            printed = _run_python(block, page, namespace, directory)
        elif block.language == "shell":
            printed = _run_shell(block)
        else:
            raise AssertionError(f"{page.name}:{block.line}: nobody knows how to run {block.language}")
    return shown


def _clean(printed: str, directory: pathlib.Path) -> str:
    lines = printed.replace(str(directory), "/checkpoints").rstrip().splitlines()
    return "\n".join(line.rstrip() for line in lines)


def _run_python(block: Block, page: pathlib.Path, namespace: dict[str, Any], directory: pathlib.Path) -> str:
    named = _FILE.match(block.code)
    if named:
        (directory / named[1]).write_text(block.code)
        return ""
    # Blank lines in front, so that a traceback names the page's own line.
    code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, namespace)
    return out.getvalue()


def _run_shell(block: Block) -> str:
    from orbax_nnx_handler.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "110")
        for line in block.code.splitlines():
            program, *arguments = shlex.split(line, comments=True) or [""]
            if program == "orbax-nnx":
                main(arguments)
            elif program == "make":
                assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()
            else:
                assert program in ("pip", "git", "cd", ""), f"nobody knows how to run {program}"
    return out.getvalue()
