"""Reading: from stored leaves to arrays on the mesh, exactly as planned."""

from orbax_nnx_handler.transfer.reading.jobs import Job
from orbax_nnx_handler.transfer.reading.read import read_arrays

__all__ = ["Job", "read_arrays"]
