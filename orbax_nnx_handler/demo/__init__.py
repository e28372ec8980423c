"""A Linen model trained, and carried on in NNX: `orbax-nnx demo`."""

import logging
from typing import Any


def main() -> dict[str, Any]:
    """Runs the demo on this terminal, in under two minutes on two cores; returns its figures."""
    # Orbax warns of every default that a script leaves it; the demo goes without.
    logging.getLogger("absl").setLevel(logging.ERROR)
    # Inside, so that `orbax-nnx` starts without the demo's own imports.
    from orbax_nnx_handler.demo.programs import use_virtual_devices
    from orbax_nnx_handler.demo.walkthrough import run

    use_virtual_devices()
    return run().to_dict()
