"""How one array lies in a member of a NumPy archive.

A member is a `.npy` file (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html):
a header with dtype, order and shape, then the values in one run.

`numpy.save` knows no bfloat16 and stores its values as two raw bytes each, `V2`;
big_vision's own reader takes them for bfloat16 (big_vision/utils.py
`recover_dtype`), and so does this one. Other raw values could be of several types
(`V1`: any float8, any 4-bit integer), so they are not guessed.
"""

import dataclasses
import math
import zipfile
from collections.abc import Callable
from typing import IO, Any, Literal

import jax.numpy as jnp
import numpy as np
from numpy.lib import format as npy_format

from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.transfer.zarr import Encoding

_NUMBERS = "biufc"
_TEXT = "SU"
_BFLOAT16_BYTES = 2

_Header = tuple[Shape, bool, np.dtype[Any]]
_READERS: dict[tuple[int, int], Callable[[Any], _Header]] = {
    (1, 0): npy_format.read_array_header_1_0,
    (2, 0): npy_format.read_array_header_2_0,
}


class ForeignError(ValueError):
    """The member is in order, and its values are no numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpyEncoding(Encoding):
    """The layout of one member.

    Attributes:
        prefix: Bytes before the first value: the header.
        order: Whether the last (`C`) or the first axis (`F`) lies closest together.
        stored_dtype: `dtype` in the byte order of the file.
        nbytes: Bytes of the unpacked member, the header included.
        crc: The checksum (CRC-32) of these bytes.
    """

    prefix: int
    order: Literal["C", "F"]
    stored_dtype: np.dtype[Any]
    nbytes: int
    crc: int

    def chunk_key(self, index: tuple[int, ...]) -> str:  # noqa: ARG002
        """Returns the key of the member's bytes below its name: there is one run of them."""
        return "npy"


@dataclasses.dataclass(frozen=True)
class Text:
    """A member that holds one text, which is no array to JAX."""


def read_header(info: zipfile.ZipInfo, member: IO[bytes]) -> NpyEncoding | Text:
    """Reads what a member's header says.

    Args:
        info: The member's entry in the directory of the archive.
        member: Its unpacked bytes, at their start.

    Raises:
        ForeignError: The values are no numbers.
        ValueError: The member is no array, or its bytes are not those of its header.
    """
    shape, is_fortran, dtype = _parse(member)
    if dtype.kind in _TEXT and not shape:
        return Text()
    _check_type(dtype)
    if dtype.kind == "V":
        dtype = np.dtype(jnp.bfloat16)
    prefix = member.tell()
    size = prefix + math.prod(shape) * dtype.itemsize
    if any(length < 0 for length in shape) or size != info.file_size:
        raise ValueError(f"holds {info.file_size} bytes where {shape} {dtype} takes {size}")
    return NpyEncoding(
        driver="npy",
        shape=shape,
        dtype=dtype.newbyteorder("="),
        # One chunk, which has no side of nothing.
        chunk_shape=tuple(max(1, length) for length in shape),
        codec="stored" if info.compress_type == zipfile.ZIP_STORED else "deflated",
        sharded=False,
        separator="",
        fill_value=None,
        prefix=prefix,
        order="F" if is_fortran else "C",
        stored_dtype=dtype,
        nbytes=size,
        crc=info.CRC,
    )


def _parse(member: IO[bytes]) -> _Header:
    version = npy_format.read_magic(member)
    if version not in _READERS:
        # Version 3.0 exists for one thing: names of fields that are not in Latin 1.
        raise ForeignError("records of several fields")
    return _READERS[version](member)


def _check_type(dtype: np.dtype[Any]) -> None:
    if dtype.hasobject:
        raise ForeignError("pickled Python objects, which are never loaded")
    if dtype.fields is not None:
        raise ForeignError("records of several fields")
    if dtype.kind == "V" and dtype.itemsize != _BFLOAT16_BYTES:
        raise ForeignError(f"raw bytes (V{dtype.itemsize}), whose type NumPy does not store; V2 is bfloat16")
    if dtype.kind not in _NUMBERS + "V":
        raise ForeignError(f"values of the type {dtype}, which are no numbers")
