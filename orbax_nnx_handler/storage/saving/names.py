"""Names under which leaves are saved: what a disk, a database or a reader could not tell apart is refused."""

from collections.abc import Iterable

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.paths import Path, printable, segments
from orbax_nnx_handler.storage.checkpoint.trees import array_name, leads_out
from orbax_nnx_handler.storage.stores.locations import MISREAD, is_misread

_LOCK, _LONGEST = ".__lock", 255
_RENAME = "call one of the two otherwise, or save them as items of their own."


def check_names(paths: Iterable[Path]) -> None:
    """Raises where arrays would have one name on disk, or a name that no reader takes.

    Args:
        paths: The stored path of each array.

    Raises:
        RestoreError: Names both paths, and the name.
    """
    known: dict[str, Path] = {}
    for path in paths:
        name = array_name(path)
        if leads_out(name):
            raise RestoreError(
                f"{_keys(path)} cannot be stored: its array would be called {name!r}, which is no name "
                "inside a checkpoint.",
                paths=[path],
                hints=["no part of a key between slashes may be empty, '.' or '..': call it otherwise."],
            )
        other = known.setdefault(name, path)
        if other is not path:
            raise _both_at(repr(name), other, path, "Orbax joins the keys of a path by dots.")


def check_folders(paths: Iterable[Path]) -> None:
    """Raises where an array could not have a directory of its own, under its name.

    Raises:
        RestoreError: Names the path.
    """
    for path in paths:
        name = array_name(path)
        reason = MISREAD if is_misread(name) else ""
        if any(part.endswith(_LOCK) for part in name.split("/")):
            reason = f"TensorStore keeps names that end in '{_LOCK}' for itself"
        if any(len(part.encode(errors="replace")) > _LONGEST for part in name.split("/")):
            reason = f"a directory's name has at most {_LONGEST} bytes"
        if reason:
            raise RestoreError(
                f"{_keys(path)} cannot be stored in a directory of its own: {reason}.",
                paths=[path],
                hints=["save with use_ocdbt=True: the database keeps such names. Or call it otherwise."],
            )


def check_spellings(paths: Iterable[Path]) -> None:
    """Raises where two paths are spelled alike, so that no rule and no restore could tell them apart.

    Raises:
        RestoreError: Names both paths.
    """
    known: dict[tuple[str, ...], Path] = {}
    for path in paths:
        other = known.setdefault(segments(path), path)
        if other is not path:
            why = "a key with a slash is spelled as two keys are, and no restore could tell them apart."
            raise _both_at("/".join(segments(path)), other, path, why)


def _both_at(place: str, one: Path, other: Path, why: str) -> RestoreError:
    return RestoreError(
        f"{_keys(one)} and {_keys(other)} would both be stored at {place}: {why}",
        paths=[one, other],
        hints=[_RENAME],
    )


def _keys(path: Path) -> str:
    return printable(repr(tuple(map(str, path))))
