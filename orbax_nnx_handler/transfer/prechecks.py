"""The few stored values that decide a verdict: counts that must fit, leftovers that must be zero.

They are read before anything else, so that a failure is known before the first
weight is read.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorstore as ts

from orbax_nnx_handler.planning.errors import DtypeMismatchError, UnmappedValueError, UnreadableLeafError
from orbax_nnx_handler.planning.paths import Path, render
from orbax_nnx_handler.planning.plan import Dropped, Restored, RestorePlan
from orbax_nnx_handler.planning.recipes import reads
from orbax_nnx_handler.transfer.metadata import Checkpoint
from orbax_nnx_handler.transfer.npy import NpyEncoding
from orbax_nnx_handler.transfer.reading import read_values


def check_values(checkpoint: Checkpoint, plan: RestorePlan) -> None:
    """Reads and judges the values that a plan leaves open.

    Raises:
        DtypeMismatchError: A step or count does not fit the wanted integer type.
        UnmappedValueError: A value that NNX has no home for is not zero.
    """
    _check_counts(checkpoint, [item for item in plan.restored.values() if item.cast == "count"])
    homeless = [item for item in plan.dropped.values() if isinstance(item, Dropped)]
    _check_dropped(checkpoint, homeless)


def _check_counts(checkpoint: Checkpoint, counts: Iterable[Restored]) -> None:
    bad: list[tuple[Path, str]] = []
    for item in counts:
        limits = np.iinfo(item.dtype)
        for path in reads(item.recipe):
            value = _read(checkpoint, path)
            if int(value.min()) < limits.min or int(value.max()) > limits.max:
                bad.append(
                    (
                        item.wanted.path,
                        f"stored {value} ({value.dtype}) from {render(path)}, wanted {item.dtype}",
                    )
                )
    if bad:
        rows = "\n".join(f"  {render(path)}   {text}" for path, text in bad)
        raise DtypeMismatchError(
            f"{len(bad)} counts do not fit the wanted integer type:\n{rows}\n"
            f"checkpoint: {checkpoint.directory}\n"
            'hint: give the target a wider integer type for them, or pass dtype="stored".',
            paths=[path for path, _ in bad],
        )


def _check_dropped(checkpoint: Checkpoint, dropped: Iterable[Dropped]) -> None:
    bad = [item for item in dropped if np.any(_read(checkpoint, item.leaf.path))]
    if bad:
        rows = "\n".join(f"  {render(item.leaf.path)}   {item.leaf.shape}   {item.reason}" for item in bad)
        patterns = dict.fromkeys("/".join(map(str, item.leaf.path[-2:])) for item in bad)
        rules = ", ".join(f"Drop({pattern!r}, 'why')" for pattern in patterns)
        raise UnmappedValueError(
            f"{'1 stored value has' if len(bad) == 1 else f'{len(bad)} stored values have'} "
            f"no home in NNX and {'is' if len(bad) == 1 else 'are'} not zero:\n{rows}\n"
            f"checkpoint: {checkpoint.directory}\n"
            "hint: without them the model computes something else: fold them into another weight first, or "
            f"leave them behind on purpose with renames=[{rules}].",
            paths=[item.leaf.path for item in bad],
        )


def _read(checkpoint: Checkpoint, path: Path) -> np.ndarray[Any, Any]:
    if checkpoint.values and path in checkpoint.values:
        return checkpoint.values[path]
    array = checkpoint.arrays[path]
    if isinstance(array.encoding, NpyEncoding):
        return read_values(checkpoint, [path])[path]
    spec = {
        "driver": array.encoding.driver,
        "kvstore": {**array.store.spec, "path": f"{array.store.spec.get('path', '')}{array.name}/"},
        "fill_missing_data_reads": not checkpoint.writes_fill,
    }
    try:
        return ts.open(spec, open=True, read=True, context=array.store.context).result().read().result()
    except ValueError as error:
        raise UnreadableLeafError(
            f"{render(path)} cannot be read from {array.store.directory}: {error}", paths=[path]
        ) from error
