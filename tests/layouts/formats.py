"""Every format on disk that the suite restores: how it comes about, and what the library calls it."""

from pathlib import Path

OLD = Path(__file__).parent / "old"

# Written by the Orbax of the name, by `old/write.py`, and kept.
VERSIONS = {
    "orbax_0.2.3/zarr": "zarr",
    "orbax_0.2.3/msgpack": "msgpack",
    "orbax_0.2.3/mixed": "zarr and msgpack",
    "orbax_0.4.2/ocdbt": "ocdbt+zarr",
    "orbax_0.5.3/mixed": "ocdbt+zarr and msgpack",
}

# Written by the Orbax of the suite, with and without `_METADATA`.
OPTIONS = {
    "ocdbt+zarr": {"use_ocdbt": True, "use_zarr3": False},
    "ocdbt+zarr3": {"use_ocdbt": True, "use_zarr3": True},
    "zarr": {"use_ocdbt": False, "use_zarr3": False},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
}

# Made by hand, or by the writers of other codebases.
OTHERS = {
    "OCDBT beside one directory per array": "ocdbt+zarr and zarr",
    "arrays in directories, no tree": "zarr",
    "flax.training.checkpoints, one file": "msgpack",
    "T5X's own: tree in msgpack, arrays in gzip": "zarr and msgpack",
    "big_vision: directories named by paths": "zarr",
    "big_vision and published weights: `np.savez`, `np.savez_compressed`": "npz",
}
