"""The page `docs/errors.md`, from the gallery's real messages."""

import functools
import pathlib
import re
import tempfile

from orbax_nnx_handler import RestoreError
from tests.gallery.cases import GALLERY, Broken

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "errors.md"
_DIGEST = re.compile(r"\b[0-9a-f]{32}\b")
"""A file of the database: another name in every save."""

INTRODUCTION = pathlib.Path(__file__).with_name("introduction.md")


@functools.cache
def error_of(case: Broken) -> tuple[RestoreError, str]:
    """Returns the error of a broken restore and its message, with its place on this machine taken out.

    Raises:
        AssertionError: It did not fail.
    """
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory).resolve()
        try:
            case.provoke(root)
        except RestoreError as error:
            message = f"{type(error).__name__}: {error}".replace(str(root), "/checkpoints")
            return error, _DIGEST.sub("41d8cd98f00b204e9800998ecf8427e5", message)
    raise AssertionError(f"{case.title}: nothing was raised")


def page() -> str:
    """Returns the whole page."""
    parts = [INTRODUCTION.read_text().rstrip()]
    topic = ""
    for case in GALLERY:
        if case.topic != topic:
            topic = case.topic
            parts.append(f"## {topic}")
        parts.append(f"### {case.title}\n\n{case.story}\n\n```text\n{error_of(case)[1]}\n```")
    return "\n\n".join(parts) + "\n"
