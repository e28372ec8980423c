"""Values whose every bit counts: all dtypes that are copied over a mesh, made of random bits."""

import pathlib

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

_DTYPES = ("bfloat16", "float8_e4m3fn", "float16", "float32", "int8", "int32", "uint32", "bool", "int4")
_SHAPE = (16, 8)
_COPIES = 3


def write_bits(directory: pathlib.Path) -> None:
    """Saves the values with stock Orbax as `bits` and `bits_again`, and once more as plain bytes."""
    values = {f"{name}_{number}": _value(name, number) for name in _DTYPES for number in range(_COPIES)}
    values["scalar"] = np.array(-0.0, np.float32)
    for name in ("bits", "bits_again"):
        ocp.PyTreeCheckpointer().save(directory / name, {"params": values})
    np.savez(directory / "bits.npz", values=np.array(values, dtype=object))


def bits_in(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the values that `write_bits` saved."""
    return np.load(directory / "bits.npz", allow_pickle=True)["values"].item()


def _value(name: str, number: int) -> np.ndarray:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    random = np.random.default_rng([number, len(name)])
    if name == "bool":
        return random.random(_SHAPE) > 0.5
    if name == "int4":
        return random.integers(-8, 8, _SHAPE).astype(dtype)
    # Signs of zeros and the payloads of NaNs among them.
    return random.integers(0, 256, (*_SHAPE, dtype.itemsize), np.uint8).view(dtype)[..., 0]
