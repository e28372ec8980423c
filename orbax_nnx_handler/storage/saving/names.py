"""The names of arrays on disk: two leaves of one name would be one array, and one value be lost."""

from collections.abc import Iterable

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.paths import Path, printable, segments
from orbax_nnx_handler.storage.checkpoint.trees import array_name, leads_out

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
            raise RestoreError(
                f"{_keys(other)} and {_keys(path)} would both be stored at {name!r}: Orbax joins the keys "
                "of a path by dots.",
                paths=[other, path],
                hints=[_RENAME],
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
            raise RestoreError(
                f"{_keys(other)} and {_keys(path)} would both be stored at {'/'.join(segments(path))}: a key "
                "with a slash is spelled as two keys are, and no restore could tell them apart.",
                paths=[other, path],
                hints=[_RENAME],
            )


def _keys(path: Path) -> str:
    return printable(repr(tuple(map(str, path))))
