"""What a store says when it does not hand out a file, in one sentence with a way out."""

import os
import re

from orbax_nnx_handler.planning.core.errors import NotACheckpointError

_DENIED = re.compile(r"403|forbidden|PERMISSION_DENIED|AccessDenied", re.IGNORECASE)
_NOT_LOGGED_IN = re.compile(
    r"401|UNAUTHENTICATED|anonymous|credential|unauthorized|reauth|InvalidAccessKeyId|SignatureDoesNotMatch",
    re.IGNORECASE,
)
_BUSY = re.compile(
    r"\b(408|429|50[0-4])\b|UNAVAILABLE|DEADLINE|timed? ?out|timeout|too many|slow ?down|connect|ABORTED",
    re.IGNORECASE,
)
_LOGIN = {
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_RIGHTS = {"gs": "storage.objects.list and storage.objects.get", "s3": "s3:ListBucket and s3:GetObject"}
_LIBRARIES = {"gs": "gcsfs", "s3": "s3fs"}
# TensorStore adds where in its own source a status was made, and what the store's answer looked like.
_DETAILS = re.compile(r"\s*\[(source locations|tensorstore_spec|http_response_body)=.*?\](?=\s|$)", re.DOTALL)
_CODE = re.compile(r"\s*\[http_response_code='(\d+)'\]")


def cannot_read(path: str | os.PathLike[str], error: BaseException) -> NotACheckpointError:
    """Returns the error that says why a path could not be read."""
    reason, hint = reason_and_hint(path, error)
    return NotACheckpointError(f"{os.fspath(path)} cannot be read: {reason}.", hints=[hint])


def reason_and_hint(path: str | os.PathLike[str], error: BaseException) -> tuple[str, str]:
    """Returns what went wrong, and what to do about it.

    Args:
        path: The file or folder that was asked for.
        error: What fsspec, TensorStore or the operating system raised.
    """
    text = _CODE.sub(r" (HTTP \1)", _DETAILS.sub("", str(error))).strip().splitlines()
    reason = f"{type(error).__name__}: {text[0] if text else 'no reason is given'}".removesuffix(".")
    key = os.fspath(path).rpartition("://")[2].partition("/")[2]
    # A step's number is no status code.
    said = str(error).replace(key, "") if key else str(error)
    return reason, _hint(os.fspath(path), error, f"{type(error).__name__} {said}")


def _hint(path: str, error: BaseException, text: str) -> str:
    scheme = path.partition("://")[0] if "://" in path else ""
    if isinstance(error, ImportError):
        return f"pip install {_LIBRARIES.get(scheme, 'the library that it names')}."
    if not scheme:
        return _local_hint(error)
    if _NOT_LOGGED_IN.search(text) and not _DENIED.search(text):
        return f"the store does not know who asks: {_LOGIN[scheme]}."
    if _DENIED.search(text):
        return f"the account in use needs {_RIGHTS[scheme]} there, or log in as another: {_LOGIN[scheme]}."
    if isinstance(error, TimeoutError) or _BUSY.search(text):
        return "the store did not answer, several retries included: try again later, or check the network."
    return "check the URL and that this machine can reach the store."


def _local_hint(error: BaseException) -> str:
    if isinstance(error, PermissionError):
        return "this user may not read it: change its permissions, or run as its owner."
    return "a file of it is damaged, or is none: copy it again from where it was written."
