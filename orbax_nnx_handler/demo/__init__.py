"""A Linen model trained, and carried on in NNX: `orbax-nnx demo`."""

import logging


def main() -> None:
    """Tells the whole story on this terminal, in under two minutes on two cores."""
    # Orbax warns of every default that a script leaves it; the story is told without them.
    logging.getLogger("absl").setLevel(logging.ERROR)
    # Inside, so that `orbax-nnx` starts without the demo's own imports.
    from orbax_nnx_handler.demo.story import tell
    from orbax_nnx_handler.demo.train import claim_devices

    claim_devices()
    tell()
