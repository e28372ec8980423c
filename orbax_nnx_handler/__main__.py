"""`python -m orbax_nnx_handler`, and `orbax-nnx`."""

import gc
import io
import logging
import os
import signal
import sys
from typing import NoReturn

_INTERRUPTED = 130
_VERDICTS = frozenset({"tree", "plan", "suggest"})


def program() -> None:
    """Runs the command line and ends the process with its status.

    What is imported and what a verdict is made of lives until the end, a million
    small objects at 20,000 leaves. Looking for garbage among them, while they are
    made and once more at the exit, takes a fifth of the time of `plan`.
    """
    gc.disable()
    signal.signal(signal.SIGINT, _end)
    # Not above: importing JAX and Flax makes half of the objects.
    from orbax_nnx_handler.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    # One logs what it tries again, with tracebacks, the other what an interrupt left half done in Orbax's
    # loops; what became of it, the one error says.
    for name in ("gcsfs", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not _VERDICTS.intersection(sys.argv[1:2]):
        gc.enable()
    for stream in (sys.stdout, sys.stderr):
        # Where the encoding lacks a character of a name, it is shown escaped; a closed stream is None.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    status = main()
    gc.freeze()
    sys.exit(status)


def _end(*_: object) -> NoReturn:
    """Ends the process while it still imports: nothing has begun, and a traceback would help nobody."""
    os.write(2, b"interrupted: nothing was changed\n")
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    program()
