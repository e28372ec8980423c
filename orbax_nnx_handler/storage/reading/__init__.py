"""Reading: from stored leaves to arrays on the mesh, exactly as planned."""

from orbax_nnx_handler.storage.reading.fetch import check_one_save, read_values
from orbax_nnx_handler.storage.reading.jobs import Job
from orbax_nnx_handler.storage.reading.read import read_arrays, read_everywhere

__all__ = ["Job", "check_one_save", "read_arrays", "read_everywhere", "read_values"]
