"""All processes go on, or none does.

A process that fails alone would leave the others waiting in the next collective.
After each step that can fail on one process only, all of them compare notes.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from orbax_nnx_handler.planning.core.errors import RestoreError

T = TypeVar("T")
_MESSAGE_BYTES = 2048


class OtherProcessError(RestoreError):
    """Another process failed; its message is quoted."""


class DisagreementError(RestoreError):
    """The processes of one program look at different checkpoints."""


def agree(step: Callable[[], T]) -> T:
    """Runs a step on every process; raises on all if it fails on any.

    Raises:
        OtherProcessError: The step failed on another process only.
        Exception: Whatever the step itself raised here.
    """
    if jax.process_count() == 1:
        return step()
    result: T | None = None
    failure: Exception | None = None
    try:
        result = step()
    except Exception as error:  # Whatever it is, the others must hear of it.
        failure = error
    messages = _exchange("" if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for process, message in enumerate(messages):
        if message:
            raise OtherProcessError(f"process {process} failed, so all stop: {message}")
    return result  # type: ignore[return-value]


def agree_on(what: str, step: Callable[[], T]) -> T:
    """Runs a step on every process; raises on all if it fails on any or if their results differ.

    Args:
        what: What the results are, for the message ("checkpoint").
        step: Gives a result whose text tells it from others.

    Raises:
        DisagreementError: The processes found different things; all are listed.
        OtherProcessError: The step failed on another process only.
    """
    result = agree(step)
    if jax.process_count() == 1:
        return result
    found = _exchange(str(result))
    if len(set(found)) > 1:
        listed = "\n".join(f"  process {process}: {text}" for process, text in enumerate(found))
        raise DisagreementError(
            f"the processes do not see the same {what}:\n{listed}",
            hints=["name the step, or wait until every host sees the same files."],
        )
    return result


def _exchange(message: str) -> list[str]:
    encoded = np.zeros(_MESSAGE_BYTES, np.uint8)
    content = message.encode()[:_MESSAGE_BYTES]
    encoded[: len(content)] = np.frombuffer(content, np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(encoded)).reshape(jax.process_count(), -1)
    return [bytes(row[row != 0]).decode(errors="replace") for row in gathered]
