"""The NNX sides of the zoo, for the command line."""

from flax import nnx

from tests.zoo.modules import PAIRS


def make(name: str) -> nnx.Module:
    """Builds the NNX module of the pair with this name."""
    pair = next(pair for pair in PAIRS if str(pair) == name)
    return pair.nnx(nnx.Rngs(0))
