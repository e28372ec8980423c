"""Reading: from stored leaves to arrays on the mesh, exactly as planned."""

from orbax_nnx_handler.transfer.reading.everywhere import read_everywhere
from orbax_nnx_handler.transfer.reading.jobs import Job
from orbax_nnx_handler.transfer.reading.presence import absent_chunks
from orbax_nnx_handler.transfer.reading.read import read_arrays
from orbax_nnx_handler.transfer.reading.values import read_values

__all__ = ["Job", "absent_chunks", "read_arrays", "read_everywhere", "read_values"]
