"""Mistakes of a user that a type checker sees: every line that ends in `# error` is one, and no other is."""

from orbax_nnx_handler import NNXLinenHandler, NNXLinenRestore, from_linen, restore, save
from tests.types.program import Model


def restored(path: str, target: Model) -> None:
    """Does everything a little wrong."""
    restore(path, target, policy="eror")  # error
    restore(path, target, layout="maxtxt")  # error
    restore(path, target, dtype="stord")  # error
    from_linen({}, target, unexpected="warning")  # error
    from_linen({}, target, renames=["stem"])  # error
    from_linen({}, target, item="default")  # error
    NNXLinenRestore(target, policy="zeros")  # error
    NNXLinenHandler(layout="maxtxt")  # error
    save(path, target, layout="t5x")  # error
    print(restore(path, target).depth)  # error
    number: int = restore(path, target)  # error
    print(number, restore(path, target).width)
