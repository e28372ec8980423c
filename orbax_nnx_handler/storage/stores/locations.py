"""Where a path points: a folder of this machine, or a bucket; opens files, and says why one cannot be read.

A checkpoint may be a stranger's. A pipe in place of a file would wait for ever, a device may do
anything, and a link may lead to any file that this user can read. Links that stay within
the folder are followed, and those of Hugging Face's cache, which keeps the files of a snapshot in
a folder `blobs` of their own (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

import functools
import os
import pathlib
import re
import stat
import urllib.parse
from collections.abc import Mapping
from typing import Any, cast

from etils import epath

from orbax_nnx_handler.planning.core.errors import Hint, NotACheckpointError, RestoreError
from orbax_nnx_handler.planning.core.paths import printable

_DRIVERS = {"gs": "gcs", "s3": "s3"}
_FILE = "file://"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")


def as_path(path: epath.PathLike) -> epath.Path:
    """Returns a path as the caller means it: `~` is a home, a URL stays one.

    Raises:
        NotACheckpointError: The URL is of a kind that cannot be read, or the path is empty.
        TypeError: It is no path.
    """
    given: Any = path
    if not isinstance(given, str | os.PathLike):
        raise TypeError(
            f"path is a {type(given).__name__}: a path is a str or an os.PathLike, and comes first, as in "
            "restore(path, target) and save(path, state)."
        )
    if not os.fspath(path):
        # Else it would be the working directory, and whatever lies there.
        raise NotACheckpointError("the path is empty.", hints=["pass '.' for the working directory."])
    text = os.fspath(path).removeprefix(_FILE)
    if "\0" in text:
        raise NotACheckpointError(f"{printable(text)} is no path: it holds a null character.")
    scheme, is_url, rest = text.partition("://")
    if not is_url:
        return epath.Path(text).expanduser()
    if scheme not in _DRIVERS:
        raise NotACheckpointError(
            f"{text} is neither read nor written: {scheme}:// is not supported.",
            hints=["pass a path of this machine or a gs:// URL; s3:// can be read, too."],
        )
    if not rest.partition("/")[0]:
        raise NotACheckpointError(f"{text} names no bucket.", hints=[f"pass {scheme}://BUCKET/PATH."])
    return epath.Path(text)


def is_url(path: epath.PathLike) -> bool:
    """Tells a bucket from a folder of this machine."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """Returns an absolute path; a URL is one. `epath` would put it below the working directory."""
    found = as_path(path)
    return found if is_url(found) else found.absolute()


_COLLAPSED = frozenset(f"{scheme}:" for scheme in _DRIVERS)
"""What a URL begins with, as a part of a path that has lost a slash."""


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
    if is_url(path) and not parents_of(path):
        raise RestoreError(
            f"{text} cannot be written: it is a whole bucket.",
            hints=[Hint(f"name a folder in it: '{text.rstrip('/')}/NAME'.")],
        )
    if "[" in text:
        # It looks for its parts by a pattern, in which brackets have a meaning, and finds none.
        raise RestoreError(
            f"{text} cannot be written: Orbax would store nothing below a directory with '[' in its name.",
            hints=[Hint("choose a path without '['.")],
        )
    if is_url(path) and (odd := _odd_in_url(text)):
        # Orbax writes the arrays by a path, and all else by a URL, of which these are no part of a name.
        raise RestoreError(
            f"{printable(text)} cannot be written: Orbax would write a part of it elsewhere for {odd!r}.",
            hints=[Hint(f"choose a path without {odd!r}.")],
        )
    taken = next((part for part in pathlib.PurePath(text).parts if part in _COLLAPSED), None)
    if taken and not is_url(path):
        url = f"{taken}//{text.partition(taken)[2].strip('/')}"
        raise RestoreError(
            f"{text} cannot be written: it is no URL.",
            hints=[Hint(f"pass {url!r}, as a string: pathlib takes one of two slashes away.", {"path": url})],
        )
    if not is_url(path) and is_misread(text):
        raise RestoreError(
            f"{text} cannot be written: {MISREAD}, and Orbax would write half of it elsewhere.",
            hints=[Hint("choose a path without a backslash.")],
        )


def _odd_in_url(text: str) -> str | None:
    """Returns what in a bucket's path Orbax, fsspec and TensorStore take for different names."""
    odd = (char for char in text if char in "?#*" or not char.isprintable())
    return next(odd, ".." if ".." in pathlib.PurePosixPath(text).parts else None)


def parents_of(path: epath.Path) -> list[epath.Path]:
    """Returns what a path lies in, nearest first, up to the bucket."""
    parents = list(absolute(path).parents)
    # Above a bucket lie the URL's scheme and what epath writes in its place.
    return [parent for parent in parents if not is_url(path) or _has_bucket(parent)]


def _has_bucket(path: epath.Path) -> bool:
    return bool(os.fspath(path).partition("://")[2].strip("/"))


MISREAD = "TensorStore takes a backslash in a path for a separator"


class MisreadError(ValueError):
    """TensorStore would open something else than what lies at a path."""


def is_misread(path: str) -> bool:
    """Tells whether TensorStore takes a path of this machine for another; other keys it takes as they are."""
    return "\\" in path


def kvstore_spec(path: epath.Path) -> Any:
    """Returns TensorStore's description of a folder.

    Raises:
        MisreadError: TensorStore would open another.
    """
    text = os.fspath(path)
    if not is_url(path):
        if is_misread(os.fspath(path.absolute())):
            raise MisreadError(f"{MISREAD}, and would read elsewhere")
        return {"driver": "file", "path": f"{path.absolute()}/"}
    scheme, _, rest = text.rstrip("/").partition("://")
    bucket, _, key = rest.partition("/")
    # Not as a URL, in which TensorStore takes a percent sign for the beginning of another character.
    spec = {"driver": _DRIVERS[scheme], "bucket": bucket, "path": f"{key}/" if key else ""}
    if scheme == "gs":
        _check_google()
        return spec
    endpoint, region = _s3_store()
    if endpoint:
        # TensorStore asks a store for its region, which another than Amazon's does not answer.
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    return spec


WRITTEN_TO = "restore again once nothing is written there, or restore another step."
"""The hint where something was written to while it was read."""


class SettingError(ValueError):
    """A variable of the environment that the libraries would take differently, or end the process for."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


def _check_google() -> None:
    """Raises where gcsfs, which lists, and TensorStore, which reads, would not do the same."""
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "default")
    if emulator not in ("", "default") and not os.environ.get("TENSORSTORE_GCS_HTTP_URL"):
        url = emulator if "://" in emulator else f"http://{emulator}"
        raise SettingError(
            "STORAGE_EMULATOR_HOST is set and TENSORSTORE_GCS_HTTP_URL is not, so that files would be listed "
            "in one store and read from another",
            f"export TENSORSTORE_GCS_HTTP_URL={url}",
        )
    account = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if account and pathlib.Path(account).is_dir():
        # TensorStore, which reads it as a file, ends the process.
        raise SettingError(
            f"GOOGLE_APPLICATION_CREDENTIALS is the directory {account}",
            "set it to the JSON file of the account's key.",
        )


def file_system(scheme: str, **options: Any) -> Any:
    """Returns what lists buckets of a scheme."""
    # Here, for a checkpoint on this machine needs none of it.
    import fsspec  # pyright: ignore[reportMissingTypeStubs]

    return cast(Any, fsspec).filesystem(scheme, **options)


def _s3_store() -> tuple[str | None, str | None]:
    """Returns the endpoint, None for Amazon's, and the region, None for an unknown one, that s3fs asks.

    It takes them from the environment and from profiles and services of the AWS configuration, TensorStore
    from arguments alone: a bucket would otherwise be listed in one store and read from another.
    """
    settings = frozenset((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    endpoint, region = _asked_by_s3fs(settings)
    # botocore knows no AWS_REGION.
    return endpoint, _first_set(_REGIONS) or region


@functools.lru_cache(maxsize=8)  # Asked for every array in files of its own.
def _asked_by_s3fs(_: frozenset[tuple[str, str]]) -> tuple[str | None, str | None]:
    try:
        # Anew: an instance that fsspec keeps has the settings of when it was made.
        found = file_system("s3", skip_instance_cache=True).s3.meta
    except ImportError:
        return _first_set(_ENDPOINTS), None
    endpoint = str(found.endpoint_url)
    host = urllib.parse.urlsplit(endpoint).hostname or ""
    if host.endswith(".amazonaws.com"):
        return None, None if host == _ANY_REGION else found.region_name
    return endpoint, found.region_name


_ANY_REGION = "s3.amazonaws.com"


def _first_set(names: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


_BYTES = re.compile(
    r"\[\d+, ?\d+\)|\b(size|length|line|column|char) \d+|\b\d+ (out of \d+ )?bytes", re.IGNORECASE
)
_URL = re.compile(r"\w+://[^\s\"']+")
_DENIED = re.compile(r"\b403\b|forbidden|PERMISSION_DENIED|AccessDenied", re.IGNORECASE)
_NOT_LOGGED_IN = re.compile(
    r"\b401\b|UNAUTHENTICATED|anonymous|credential|unauthorized|reauth|ProfileNotFound|InvalidAccessKeyId|SignatureDoesNotMatch",
    re.IGNORECASE,
)
_BUSY = re.compile(
    r"\b(408|429|50[0-4])\b|UNAVAILABLE|DEADLINE|timed? ?out|timeout|too many|slow ?down|connect|ABORTED",
    re.IGNORECASE,
)
# An answer that ends too early, or is not the one to what was asked.
_CUT_OFF = re.compile(
    r"partial file|not completed|OUT_OF_RANGE|JSONDecodeError|Internal Server Error", re.IGNORECASE
)
_LOGIN = {
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_RIGHTS = {"gs": "storage.objects.list and storage.objects.get", "s3": "s3:ListBucket and s3:GetObject"}
_MAY_WRITE = {"gs": "storage.objects.create, storage.objects.get and storage.objects.list"}
_LIBRARIES = {"gs": "gcsfs", "s3": "s3fs"}
# TensorStore adds where in its own source a status was made, and what the store's answer looked like.
_DETAILS = re.compile(r"\s*\[(source locations|tensorstore_spec|http_response_body)=.*?\](?=\s|$)", re.DOTALL)
_CODE = re.compile(r"\s*\[http_response_code='(\d+)'\]")
# Where a bucket of another region is asked, the store redirects; botocore follows without end.
_ELSEWHERE = re.compile(r"PermanentRedirect|AuthorizationHeaderMalformed|\b301\b")
_UNKNOWN_CALLER = "[http_response_code='401']"


def cannot_read(path: str | os.PathLike[str], error: BaseException) -> NotACheckpointError:
    """Returns the error that says why a path could not be read."""
    reason, hint = reason_and_hint(path, error)
    return NotACheckpointError(printable(f"{os.fspath(path)} cannot be read: {reason}."), hints=[hint])


def cannot_write(path: str | os.PathLike[str], error: BaseException) -> RestoreError:
    """Returns the error that says why a store did not take what was to be written to a URL."""
    reason, hint = reason_and_hint(path, error, rights=_MAY_WRITE)
    left = "whatever was written there is no finished save: no reader takes it for one."
    return RestoreError(printable(f"{os.fspath(path)} cannot be written: {reason}."), hints=[hint, left])


def reason_and_hint(
    path: str | os.PathLike[str], error: BaseException, rights: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """Returns what went wrong, and what to do about it; `rights` are those an account needs, by scheme."""
    text = _CODE.sub(r" (HTTP \1)", _DETAILS.sub("", str(error))).strip().splitlines()
    first = " ".join(text[: 2 if text[0].endswith(":") else 1]) if text else "no reason is given"
    reason = f"{type(error).__name__}: {first}".removesuffix(".")
    bucket, _, key = os.fspath(path).rpartition("://")[2].partition("/")
    # Neither a step's number is a status code, nor one in a bucket's name, nor one of bytes.
    said = _BYTES.sub("", _URL.sub("", str(error)))
    for name in filter(None, (key, bucket)):
        said = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "", said)
    if isinstance(error, SettingError):
        return reason, error.hint
    return reason, _hint(os.fspath(path), error, f"{type(error).__name__} {said}", rights or _RIGHTS)


def _hint(path: str, error: BaseException, text: str, rights: Mapping[str, str]) -> str:
    scheme = path.partition("://")[0] if "://" in path else ""
    if isinstance(error, ImportError):
        return f"pip install {_LIBRARIES.get(scheme, 'the library that it names')}."
    if not scheme:
        return _local_hint(error)
    # TensorStore calls a 401 PERMISSION_DENIED, as it does a 403.
    if _UNKNOWN_CALLER in text or (_NOT_LOGGED_IN.search(text) and not _DENIED.search(text)):
        return f"the store does not know who asks: {_LOGIN[scheme]}."
    if _DENIED.search(text):
        return f"the account in use needs {rights[scheme]} there, or log in as another: {_LOGIN[scheme]}."
    if isinstance(error, TimeoutError) or _BUSY.search(text):
        return "the store did not answer, several retries included: try again later, or check the network."
    if scheme == "s3" and (isinstance(error, RecursionError) or _ELSEWHERE.search(text)):
        return (
            "the bucket may be of another region, or store: set AWS_REGION, or AWS_ENDPOINT_URL, to its own."
        )
    if isinstance(error, OSError) and error.filename:
        return (
            f"that file of this machine, which the store's settings name, cannot be read: {_LOGIN[scheme]}."
        )
    if isinstance(error, FileNotFoundError):
        return "another process deletes or writes there: let one at a time save to a path."
    if _CUT_OFF.search(text):
        return (
            "the store's answer is not whole: try again; if it stays so, copy the checkpoint there once more."
        )
    return "check the URL and that this machine can reach the store."


def _local_hint(error: BaseException) -> str:
    if isinstance(error, OutsideError):
        return "if that file belongs to it, copy the checkpoint with what its links mean: cp -rL FROM TO."
    if isinstance(error, MisreadError):
        return "give its folders names without a backslash, or copy the checkpoint to such a place."
    if isinstance(error, PermissionError):
        return "this user may not read it: change its permissions, or run as its owner."
    return "a file of it is damaged, or is none: copy it again from where it was written."


_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_SNAPSHOTS, _BLOBS = "/snapshots/", "/blobs/"


class OutsideError(OSError):
    """A link leads out of the checkpoint."""


def open_file(folder: str, name: str) -> int:
    """Returns a descriptor of a regular file.

    Args:
        folder: What it must lie in, links included.
        name: Its path below the folder.

    Raises:
        OutsideError: A link on the way leads elsewhere.
        OSError: There is no such file, it may not be read, or it is a pipe, a device or a folder.
    """
    path = f"{folder.rstrip('/')}/{name}"
    if _has_link(folder, name):
        path = _target(folder, path)
    descriptor = os.open(path, _FLAGS)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_inside(folder: str, name: str) -> None:
    """Raises if a path below a folder is a link that leads out of it.

    Raises:
        OutsideError: Says where it leads.
    """
    if _has_link(folder, name):
        _target(folder, f"{folder}/{name}")


def check_files(folder: str, name: str) -> None:
    """Raises if a file below a folder is none that a reader may open that does so by itself.

    Raises:
        OutsideError: A link leads elsewhere.
        OSError: It is a pipe or a device.
    """
    for path, folders, files in os.walk(f"{folder}/{name}"):
        for entry in (*folders, *files):
            check_inside(folder, f"{path}/{entry}"[len(folder) + 1 :])
        for file in map(pathlib.Path(path).joinpath, files):
            if file.exists() and not file.is_file():
                raise OSError(f"{file} is no regular file")


def _has_link(folder: str, name: str) -> bool:
    path = folder.rstrip("/")
    for part in name.split("/"):
        path = f"{path}/{part}"
        if os.path.islink(path):  # noqa: PTH114 - thousands of calls
            return True
    return False


def _target(folder: str, path: str) -> str:
    """Returns what a path with links means."""
    home = os.path.realpath(folder).rstrip("/") + "/"
    real = os.path.realpath(path)
    cache, snapshots, _ = home.rpartition(_SNAPSHOTS)
    if real.startswith(home) or (snapshots and real.startswith(cache + _BLOBS)):
        return real
    raise OutsideError(f"it is a link that leads out of the checkpoint, to {real}")
