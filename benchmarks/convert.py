"""`orbax-nnx convert` under bounds of memory: `python -m benchmarks.convert`.

Each conversion is a process of its own, whose highest resident memory must stay
below `--memory`. Stock Orbax then reads what was written, in another process, and
every value is compared with the model's.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from benchmarks.measuring import Row, arguments, command, earlier, program, report, table
from benchmarks.models import Model, found_checksums, sized, target, write

LOOSE_GB = 2.0
_TOY_GB = 64.0
_AXIS = ("--axis", "1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One conversion.

    Attributes:
        source: The model that is stored.
        options: What follows source and destination on the command line.
        written: The model whose values must come out.
        least_gb: The tightest bound: plans of many leaves take memory of their own.
    """

    source: Model
    options: Sequence[str] = ()
    written: Model
    least_gb: float = 0.6


def cases(nbytes: int, *, toy: bool) -> dict[str, Case]:
    """Returns the conversions of a model of so many bytes."""
    few, one, many = 65, 2, 101 if toy else 20005
    apart, stacked = sized(few, nbytes), sized(few, nbytes, stored="stacked")
    whole = sized(one, nbytes * 3 // 4, projections=1)
    packed = dataclasses.replace(whole, compressed=True)
    tiny = sized(many, min(nbytes, 50_000_000), compressed=True)
    scan, unscan = ("--scan", "layers", *_AXIS), ("--unscan", "layers", *_AXIS)
    return {
        "to NNX": Case(source=apart, options=(_factory(apart),), written=apart),
        "zstd, as it is": Case(source=dataclasses.replace(apart, compressed=True), written=apart),
        "scanned": Case(source=apart, options=scan, written=stacked),
        "unscanned": Case(source=stacked, options=unscan, written=apart),
        "zstd, unscanned": Case(
            source=dataclasses.replace(stacked, compressed=True), options=unscan, written=apart
        ),
        "to bfloat16": Case(
            source=apart,
            options=("--dtype", "bfloat16"),
            written=dataclasses.replace(apart, dtype="bfloat16"),
        ),
        "one leaf": Case(source=whole, written=whole),
        "zstd, one leaf": Case(source=packed, written=whole),
        f"{tiny.leaves} leaves": Case(source=tiny, written=tiny, least_gb=0.8),
        f"{tiny.leaves} leaves, to NNX": Case(
            source=tiny, options=(_factory(tiny),), written=tiny, least_gb=1.0
        ),
    }


def wanted(layers: int, width: int) -> nnx.State:
    """Returns the abstract state of a model: the factory of `convert`."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return target(Model(layers=layers, width=width), place)


def _factory(model: Model) -> str:
    return f"benchmarks.convert:wanted({model.layers}, {model.width})"


def main() -> None:
    """Converts every model under every bound."""
    options = arguments(__doc__ or "", choosable=True)
    results = {} if options.toy else earlier("convert", options)
    for title, case in cases(int(options.gb * 1e9), toy=options.toy).items():
        if options.only in title:
            heading = f"{title}, {case.source.nbytes / 1e9:.3g} GB"
            results[heading] = _rows(case, options.scratch, toy=options.toy)
    tables = {
        f"**{title}**": table({"": name, **row} for name, row in rows.items())
        for title, rows in results.items()
    }
    report("convert", options, results, tables)
    exceeded = [
        f"{title}: {name}"
        for title, rows in results.items()
        for name, row in rows.items()
        if row["peak ÷ bound"] > 1
    ]
    if exceeded:
        raise RuntimeError("more memory than allowed:\n" + "\n".join(exceeded))


def _rows(case: Case, scratch: pathlib.Path, *, toy: bool) -> dict[str, Row]:
    _errand("write", case.source, scratch, toy=toy)
    source, out = scratch / case.source.name, scratch / "converted"
    # A toy runs in this process, which may hold anything already.
    bounds = (_TOY_GB,) if toy else (case.least_gb, LOOSE_GB)
    return {f"--memory {bound}": _converted(case, source, out, bound, toy=toy) for bound in bounds}


def _converted(case: Case, source: pathlib.Path, out: pathlib.Path, bound: float, *, toy: bool) -> Row:
    shutil.rmtree(out, ignore_errors=True)
    words = command("convert", str(source), str(out), *case.options, "--memory", str(bound))
    row = program(words, 0, toy=toy)
    _errand("check", case.written, out, toy=toy)
    shutil.rmtree(out)
    row = row | {"peak ÷ bound": row["peak GB"] / bound}
    print(f"{source.name} {' '.join(case.options)} --memory {bound}: {row}", file=sys.stderr)
    return row


def _errand(name: str, model: Model, path: pathlib.Path, *, toy: bool) -> None:
    """Runs an errand in a process of its own, whose memory is then free again; a toy here."""
    if toy:
        ERRANDS[name](model, path)
    else:
        program(["-m", "benchmarks.convert", name, json.dumps(dataclasses.asdict(model)), str(path)], 0)


def check(model: Model, path: pathlib.Path) -> None:
    """Compares what stock Orbax reads with the model's values.

    Raises:
        AssertionError: A value differs, or a leaf is absent.
    """
    metadata = ocp.PyTreeCheckpointHandler().metadata(path).tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
    tree = ocp.PyTreeCheckpointer().restore(path, restore_args=args)
    flat = jax.tree_util.tree_flatten_with_path(tree.get("params", tree))[0]
    arrays = {_nnx_path(tuple(str(key.key) for key in keys)): value for keys, value in flat}
    assert found_checksums(model, arrays) == model.checksums(), f"values differ in {path}"


def _nnx_path(keys: tuple[str, ...]) -> tuple[str | int, ...]:
    """Returns a stored path as NNX has it: `layers_3` is `layers/3`, and a Variable's `value` is no key."""
    words = "/".join(keys).removesuffix("kernel/value").removesuffix("kernel").replace("layers_", "layers/")
    return (*(int(word) if word.isdigit() else word for word in words.split("/")[:-1]), "kernel")


ERRANDS = {"check": check, "write": write}

if __name__ == "__main__":
    errand = ERRANDS.get(next(iter(sys.argv[1:]), ""))
    if errand is None:
        main()
    else:
        errand(Model(**json.loads(sys.argv[2])), pathlib.Path(sys.argv[3]))
