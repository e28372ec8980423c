"""Writers of Hugging Face's forms that share no code with the reader, as transformers 4.57 writes them."""

import json
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import serialization, traverse_util

NAMES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "float16": "F16",
    "bool": "BOOL",
    "uint8": "U8",
}
CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_layer": 2,
    "eps": 1e-05,
    "tied": True,
}


def flat(tree: Any, separator: str) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep=separator)


def header_of(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Returns the header of arrays that lie one behind the other."""
    entries: dict[str, Any] = {"__metadata__": {"format": "flax"}}
    at = 0
    for name, array in arrays.items():
        entries[name] = {
            "dtype": NAMES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    return entries


def write_file(file: pathlib.Path, header: Any, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for a in arrays.values()))


def safetensors(folder: pathlib.Path, tree: Any) -> pathlib.Path:
    """Writes `model.safetensors`."""
    folder.mkdir(parents=True)
    arrays = flat(tree, ".")
    write_file(folder / "model.safetensors", header_of(arrays), arrays)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def safetensors_in_parts(folder: pathlib.Path, tree: Any, parts: int = 2) -> pathlib.Path:
    """Writes `model-0000x-of-0000n.safetensors` and their index."""
    folder.mkdir(parents=True)
    arrays = flat(tree, ".")
    where: dict[str, str] = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        mine = {key: arrays[key] for number, key in enumerate(arrays) if number % parts == part}
        write_file(folder / name, header_of(mine), mine)
        where |= dict.fromkeys(mine, name)
    index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def msgpack(folder: pathlib.Path, tree: Any) -> pathlib.Path:
    """Writes `flax_model.msgpack`."""
    folder.mkdir(parents=True)
    (folder / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def msgpack_in_parts(folder: pathlib.Path, tree: Any, parts: int = 2) -> pathlib.Path:
    """Writes `flax_model-0000x-of-0000n.msgpack` and their index."""
    folder.mkdir(parents=True)
    arrays = flat(tree, "/")
    where: dict[str, str] = {}
    for part in range(parts):
        name = f"flax_model-{part + 1:05d}-of-{parts:05d}.msgpack"
        mine = {key: arrays[key] for number, key in enumerate(arrays) if number % parts == part}
        (folder / name).write_bytes(serialization.to_bytes(traverse_util.unflatten_dict(mine, sep="/")))
        where |= dict.fromkeys(mine, name)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    return folder
