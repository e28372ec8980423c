"""Which files are NumPy archives, and which one a directory of them means.

big_vision wrote `checkpoint.npz` over and over, and at some steps a copy of it,
`checkpoint.npz-000012000` (big_vision/utils.py `save_checkpoint`, until it came to
`tssave`). So the file without a number is the newest state, if it is there.
Weights are published in files of any name that ends in `.npz`.
"""

import re
from typing import IO, cast

from etils import epath

_NAME = re.compile(r"(?P<run>.*)\.npz(?:-(?P<step>\d+))?")
# Written under this name first and renamed when it is complete.
_UNFINISHED = re.compile(r".*\.npz-TEMPORARY")
# What a zip file begins with: its first member, or its directory if it has none.
_BEGINNINGS = (b"PK\x03\x04", b"PK\x05\x06")


def is_archive(path: epath.Path) -> bool:
    """Tells whether a path is a NumPy archive, by its name or else by its first bytes."""
    if not path.is_file():
        return False
    if _NAME.fullmatch(path.name):
        return True
    with cast(IO[bytes], path.open("rb")) as file:
        return file.read(4) in _BEGINNINGS


def is_numbered(path: epath.Path) -> bool:
    """Tells whether a file is big_vision's copy of one step."""
    named = _NAME.fullmatch(path.name)
    return named is not None and named["step"] is not None and path.is_file()


def is_unfinished(path: epath.Path) -> bool:
    """Tells whether a file is one that big_vision was still writing."""
    return _UNFINISHED.fullmatch(path.name) is not None


def archives_in(directory: epath.Path) -> list[epath.Path]:
    """Returns all archives of a directory, by name."""
    return [child for child in sorted(directory.iterdir()) if _NAME.fullmatch(child.name) and child.is_file()]


def newest_in(directory: epath.Path) -> list[epath.Path]:
    """Returns the newest archive of each run that has any in a directory."""
    newest: dict[str, epath.Path] = {}
    for path in sorted(archives_in(directory), key=_age):
        newest[_match(path)["run"]] = path
    return list(newest.values())


def _age(path: epath.Path) -> tuple[bool, int]:
    step = _match(path)["step"]
    return step is None, int(step or 0)


def _match(path: epath.Path) -> re.Match[str]:
    named = _NAME.fullmatch(path.name)
    if named is None:
        raise ValueError(f"{path} has not the name of a NumPy archive")
    return named
