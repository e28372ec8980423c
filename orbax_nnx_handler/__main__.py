"""`python -m orbax_nnx_handler`, and `orbax-nnx`."""

import gc
import sys

_VERDICTS = frozenset({"tree", "plan", "suggest"})


def program() -> None:
    """Runs the command line and ends the process with its status.

    What is imported and what a verdict is made of lives until the end, a million
    small objects at 20,000 leaves. Looking for garbage among them, while they are
    made and once more at the exit, takes a fifth of the time of `plan`.
    """
    gc.disable()
    # Not above: importing JAX and Flax makes half of the objects.
    from orbax_nnx_handler.cli import main

    if not _VERDICTS.intersection(sys.argv[1:2]):
        gc.enable()
    status = main()
    gc.freeze()
    sys.exit(status)


if __name__ == "__main__":
    program()
