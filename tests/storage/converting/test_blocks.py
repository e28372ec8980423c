"""Leaves in blocks of bounded size: every element once, in order; digests and differences by other means."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

from orbax_nnx_handler.storage.checkpoint.metadata import read_metadata
from orbax_nnx_handler.storage.converting import blocks
from orbax_nnx_handler.storage.converting.blocks import as_stored, differences, digests_of, read_blocks
from tests.storage.checkpoints import FORMATS, numbers, save

VALUES = {
    "wide": numbers((7, 33)),
    "deep": numbers((3, 5, 8), jnp.bfloat16, seed=1),
    "codes": numbers((41,), np.int8, seed=2),
    "scalar": numbers((), seed=3),
}
# From less than a row of any leaf to more than all of them.
WINDOWS = [1, 60, 500, 1 << 20]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return read_metadata(save(tmp_path_factory.mktemp("blocks") / "item", VALUES, FORMATS[0]))


def leaves_of(checkpoint):
    return list(as_stored(checkpoint).values())


@pytest.mark.parametrize("window", WINDOWS)
def test_the_blocks_of_a_leaf_end_to_end_are_its_bytes(checkpoint, window) -> None:
    found, ended = {}, []
    for batch in read_blocks(checkpoint, leaves_of(checkpoint), window):
        for block in batch:
            (name,) = block.leaf.path
            assert name not in ended
            found[name] = found.get(name, b"") + block.values.tobytes()
            ended += [name] if block.is_last else []

    assert found == {name: np.asarray(value).tobytes() for name, value in VALUES.items()}
    assert sorted(ended) == sorted(VALUES)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_batch_takes_no_more_than_the_window_or_one_element(checkpoint, window) -> None:
    for batch in read_blocks(checkpoint, leaves_of(checkpoint), window):
        sizes = [block.values.nbytes for block in batch]
        assert sum(sizes) <= window or [block.values.size for block in batch if block.values.size] == [1]


@pytest.mark.parametrize("window", WINDOWS)
def test_a_digest_is_half_of_the_sha_256_of_the_bytes_whatever_the_window(checkpoint, window) -> None:
    told = []

    found = digests_of(checkpoint, leaves_of(checkpoint), window, told.append)

    assert found == {
        (name,): hashlib.sha256(np.asarray(value).tobytes()).hexdigest()[:32]
        for name, value in VALUES.items()
    }
    assert sum(told) == sum(np.asarray(value).nbytes for value in VALUES.values())


SIDES = {
    "same": ([1.0, np.nan, 3.0], [1.0, np.nan, 3.0], 0, 0.0),
    "other": ([1.0, 2.0, 3.0], [1.0, 2.5, -1.0], 2, 4.0),
    "nan on one side": ([1.0, np.nan], [1.0, 2.0], 1, np.nan),
    "zeros of two signs": ([0.0, -0.0], [-0.0, 0.0], 0, 0.0),
    "complex": (np.complex64([1 + 1j]), np.complex64([1 - 2j]), 1, 3.0),
}


@pytest.mark.parametrize("window", [4, 1 << 20])
@pytest.mark.parametrize("case", SIDES)
def test_differences_are_numpys(tmp_path, case, window) -> None:
    left, right, unequal, largest = SIDES[case]
    sides = []
    for name, value in (("left", left), ("right", right)):
        value = np.asarray(value)
        tree = {"x": value if value.dtype.kind == "c" else value.astype(np.float32)}
        found = read_metadata(save(tmp_path / name, tree))
        sides.append((found, leaves_of(found)))

    (difference,) = differences(*sides, window).values()

    assert difference.unequal == unequal
    np.testing.assert_equal(difference.largest, largest)


def test_large_integers_that_are_one_float_are_two_values() -> None:
    one, other = np.array([2**62]), np.array([2**62 + 1])

    assert blocks._compare(one, other).unequal == 1
