"""Where a path points: a folder of this machine, or a bucket; and how TensorStore is told of it."""

import os
from typing import Any

from etils import epath

from orbax_nnx_handler.planning.core.causes import Hint
from orbax_nnx_handler.planning.core.errors import NotACheckpointError, RestoreError

_SCHEMES = ("gs", "s3")
_FILE = "file://"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")


def as_path(path: epath.PathLike) -> epath.Path:
    """Returns a path as the caller means it: `~` is a home, a URL stays one.

    Raises:
        NotACheckpointError: The URL is of a kind that cannot be read.
    """
    text = os.fspath(path).removeprefix(_FILE)
    scheme, is_url, rest = text.partition("://")
    if not is_url:
        return epath.Path(text).expanduser()
    if scheme not in _SCHEMES:
        raise NotACheckpointError(
            f"{text} cannot be read: {scheme}:// is not supported.",
            hints=["pass a gs:// or s3:// URL, or copy the checkpoint to a directory of this machine."],
        )
    if not rest.strip("/"):
        raise NotACheckpointError(f"{text} names no bucket.", hints=[f"pass {scheme}://BUCKET/PATH."])
    return epath.Path(text)


def is_url(path: epath.PathLike) -> bool:
    """Tells a bucket from a folder of this machine."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns an absolute path; a URL is one. `epath` would put it below the working directory."""
    found = as_path(path)
    return found if is_url(found) else found.absolute()


def check_writable(path: epath.Path) -> None:
    """Raises where Orbax could not write a checkpoint, or would write one that nobody can read.

    Raises:
        RestoreError: Says what is the matter with the path.
    """
    text = os.fspath(path)
    if text.startswith("s3://"):
        raise RestoreError(
            f"{text} cannot be written: Orbax writes to gs:// and to directories of this machine.",
            hints=[Hint("write to a local directory, and copy it there: aws s3 cp --recursive LOCAL URL.")],
        )
    if "[" in text:
        # It looks for its parts by a pattern, in which brackets have a meaning, and finds none.
        raise RestoreError(
            f"{text} cannot be written: Orbax would store nothing below a directory with '[' in its name.",
            hints=[Hint("choose a path without '['.")],
        )


def parents_of(path: epath.Path) -> list[epath.Path]:
    """Returns what a path lies in, nearest first, up to the bucket."""
    parents = list(absolute(path).parents)
    # Above a bucket lie the URL's scheme and what epath writes in its place.
    return [parent for parent in parents if not is_url(path) or _has_bucket(parent)]


def _has_bucket(path: epath.Path) -> bool:
    return bool(os.fspath(path).partition("://")[2].strip("/"))


def kvstore_spec(path: epath.Path) -> Any:
    """Returns TensorStore's description of a folder."""
    text = os.fspath(path)
    if not is_url(path):
        return {"driver": "file", "path": f"{path.absolute()}/"}
    scheme, _, rest = text.rstrip("/").partition("://")
    if scheme != "s3":
        return f"{text.rstrip('/')}/"
    bucket, _, key = rest.partition("/")
    spec = {"driver": "s3", "bucket": bucket, "path": f"{key}/" if key else ""}
    endpoint, region = _first_set(_ENDPOINTS), _first_set(_REGIONS)
    if endpoint:
        # TensorStore asks a store for its region, which another than Amazon's does not answer.
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    return spec


def _first_set(names: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)
