"""CRC-32C, the checksum of OCDBT's manifest and B-tree nodes, without a compiled dependency.

The bytes are laid out as equal runs, one after the other in memory and side by side in
the computation, so that NumPy takes a step in all of them at once. Two neighbours are
joined by letting the left one run on over as many zero bytes as the right one is long:
a linear map on 32 bits, which is computed in the same pass, from the 32 unit vectors.
"""

import functools
from typing import Any

import numpy as np

_POLYNOMIAL = 0x82F63B78
_ONES = 0xFFFFFFFF
# A step costs a few microseconds, for however many runs.
_SHORT_RUN = 64

_Words = np.ndarray[Any, np.dtype[np.uint32]]


def crc32c(content: bytes | memoryview) -> int:
    """Returns the CRC-32C checksum (Castagnoli, RFC 3720) of at least four bytes."""
    data = np.frombuffer(content, np.uint8)
    runs = 1
    while len(data) > runs * _SHORT_RUN * 4 and runs < 1 << 14:
        runs *= 2
    length = -(-len(data) // runs)
    # Zeros in front change nothing as long as the register is zero; what it really begins
    # with is added to the first four bytes instead.
    rows = np.zeros(runs * length, np.uint8)
    rows[rows.size - len(data) :] = data
    rows[rows.size - len(data) :][:4] ^= 0xFF
    state, over = _run(rows.reshape(runs, length))
    while len(state) > 1:
        state = _apply(over, state[0::2]) ^ state[1::2]
        over = _apply(over, over)
    return int(state[0]) ^ _ONES


def _run(rows: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[_Words, _Words]:
    """Returns the register after each row, and where a row of zeros takes each single bit."""
    table = _table()
    columns = np.ascontiguousarray(rows.T)
    state: _Words = np.zeros(len(rows), np.uint32)
    bits: _Words = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for column in columns:
        state = table[(state ^ column) & 0xFF] ^ (state >> np.uint32(8))
        bits = table[bits & 0xFF] ^ (bits >> np.uint32(8))
    return state, bits


def _apply(images: _Words, words: _Words) -> _Words:
    """Applies the linear map that takes bit i to `images[i]`."""
    result = np.zeros_like(words)
    for bit, image in enumerate(images):
        result ^= ((words >> np.uint32(bit)) & np.uint32(1)) * image
    return result


@functools.cache
def _table() -> _Words:
    words = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        words = (words >> np.uint32(1)) ^ ((words & np.uint32(1)) * np.uint32(_POLYNOMIAL))
    return words
