"""A Linen model trained, and carried on in NNX: `orbax-nnx demo`."""

import logging


def main() -> None:
    """Runs the demo on this terminal, in under two minutes on two cores."""
    # Orbax warns of every default that a script leaves it; the demo goes without.
    logging.getLogger("absl").setLevel(logging.ERROR)
    # Inside, so that `orbax-nnx` starts without the demo's own imports.
    from orbax_nnx_handler.demo.programs import use_virtual_devices
    from orbax_nnx_handler.demo.walkthrough import run

    use_virtual_devices()
    run()
