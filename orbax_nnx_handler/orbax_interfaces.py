"""Orbax's two interfaces, under the names that the installed versions have for them.

Whatever this package uses of Orbax comes from here, so that Orbax 1.0, which puts v1 at the top
level of `orbax.checkpoint`, is the work of one module. Every version that `pyproject.toml` allows
has both names, and loads both with `orbax.checkpoint`.
"""

import orbax.checkpoint as v0
from orbax.checkpoint import v1

# Private: the context in force, whose limits Orbax's own handlers keep to. Orbax passes it to no handler,
# and without it `Context.memory.read_concurrent_bytes` would not hold for an NNX target.
from orbax.checkpoint.experimental.v1._src.context.context import get_context

__all__ = ["get_context", "v0", "v1"]
