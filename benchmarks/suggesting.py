"""How long `suggest` takes on 20,000 leaves, and whether what it proposes is right.

    python -m benchmarks.suggesting

Each case is a checkpoint and a target of one model whose names or arrangement differ, made up. Every leaf
that the proposed rules restore is compared with the one it was made from, and where names tell them all
none may be left open: a fast wrong proposal fails, and so does a fast empty one.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.measuring import Row, arguments, report, table
from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import make_plan
from orbax_nnx_handler.planning.suggesting import propose
from orbax_nnx_handler.planning.target import Target, flatten_target
from orbax_nnx_handler.storage import paused_collection

FLOAT = np.dtype("float32")
WIDTH = 8

Pair = tuple[tuple[str, Shape] | None, tuple[str, Shape] | None]
"""A stored leaf and the wanted one that is made of it; None for what the other side holds otherwise."""
Case = Callable[[int], Iterable[Pair]]

_BLOCK = (
    ("LayerNorm_0/scale", "input_norm/scale", (WIDTH,)),
    ("LayerNorm_0/bias", "input_norm/bias", (WIDTH,)),
    ("attn/query/kernel", "self_attn/q_proj/kernel", (WIDTH, 2 * WIDTH)),
    ("attn/key/kernel", "self_attn/k_proj/kernel", (WIDTH, 2 * WIDTH)),
    ("attn/value/kernel", "self_attn/v_proj/kernel", (WIDTH, 2 * WIDTH)),
    ("attn/out/kernel", "self_attn/o_proj/kernel", (2 * WIDTH, WIDTH)),
    ("LayerNorm_1/scale", "post_attention_norm/scale", (WIDTH,)),
    ("LayerNorm_1/bias", "post_attention_norm/bias", (WIDTH,)),
    ("mlp/fc1/kernel", "mlp/up_proj/kernel", (WIDTH, 4 * WIDTH)),
    ("mlp/fc2/kernel", "mlp/down_proj/kernel", (4 * WIDTH, WIDTH)),
)
"""A transformer's block: its leaves in the checkpoint and in the target, with their shapes."""


def _blocks(leaves: int) -> Iterator[tuple[int, str, str, Shape]]:
    return (
        (at, stored, wanted, shape)
        for at in range(max(2, leaves // len(_BLOCK)))
        for stored, wanted, shape in _BLOCK
    )


def _as_it_is(leaves: int) -> Iterator[Pair]:
    return (((f"layers_{at}/{name}", shape),) * 2 for at, name, _, shape in _blocks(leaves))


def _a_level(leaves: int) -> Iterator[Pair]:
    for at, name, _, shape in _blocks(leaves):
        yield (f"model/transformer/layers_{at}/{name}", shape), (f"layers/{at}/{name}", shape)


def _layers(leaves: int) -> Iterator[Pair]:
    for at, name, _, shape in _blocks(leaves):
        yield (f"layers_{at}/{name}", shape), (f"blocks/{at}/{name}", shape)


def _all_names(leaves: int) -> Iterator[Pair]:
    for at, name, other, shape in _blocks(leaves):
        yield (f"encoderblock_{at}/{name}", shape), (f"layers/{at}/{other}", shape)


def _untold(leaves: int) -> Iterator[Pair]:
    """Four matrices of one shape in each layer, by numbers on one side and names that tell nothing."""
    for at, (number, name) in itertools.product(range(max(2, leaves // 4)), enumerate("pqrs")):
        square = (WIDTH, WIDTH)
        yield (f"layers_{at}/un{name}/kernel", square), (f"Block_{at}/Dense_{number}/weight", square)


def _stages(leaves: int) -> Iterator[Pair]:
    blocks = max(2, leaves // 24)
    for stage, at, conv in itertools.product(range(4), range(blocks), range(3)):
        inside, wide = (3, 3) if conv == 1 else (1, 1), WIDTH * 2**stage
        left, right = f"layer{stage + 1}_block{at}", f"stages/{stage}/blocks/{at}"
        yield (
            (f"{left}/conv{conv + 1}/kernel", (*inside, wide, wide)),
            (f"{right}/convs/{conv}/kernel", (*inside, wide, wide)),
        )
        yield (f"{left}/bn{conv + 1}/scale", (wide,)), (f"{right}/norms/{conv}/scale", (wide,))


def _stacked_in_checkpoint(leaves: int) -> Iterator[Pair]:
    return ((other, one) for one, other in _stacked_in_target(leaves))


def _stacked_in_target(leaves: int) -> Iterator[Pair]:
    count = max(2, leaves // len(_BLOCK))
    for at, name, _, shape in _blocks(leaves):
        yield (f"layers_{at}/{name}", shape), (f"blocks/{name}", (count, *shape)) if at == 0 else None


def _experts(leaves: int) -> Iterator[Pair]:
    experts = 16
    for at in range(max(2, leaves // (3 * experts + 4))):
        for name, other in (("q", "wq"), ("k", "wk"), ("v", "wv"), ("o", "wo")):
            shape = (2 * WIDTH, WIDTH) if name == "o" else (WIDTH, 2 * WIDTH)
            yield (
                (f"layers_{at}/attention/{name}_proj/kernel", shape),
                (f"blocks/{at}/attn/{other}/kernel", shape),
            )
        for expert, (name, other) in itertools.product(
            range(experts), (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down"))
        ):
            shape = (3 * WIDTH, WIDTH) if other == "down" else (WIDTH, 3 * WIDTH)
            yield (
                (f"layers_{at}/mlp/experts_{expert}/{name}/kernel", shape),
                (f"blocks/{at}/moe/experts/{expert}/{other}/kernel", shape),
            )


def _unet(leaves: int) -> Iterator[Pair]:
    count = max(2, leaves // (8 * 2 * 4))
    for arm, other in (("down_blocks", "encoder"), ("up_blocks", "decoder")):
        for level, at, conv in itertools.product(range(4), range(count), range(2)):
            wide = WIDTH * 2 ** (level if other == "encoder" else 3 - level)
            left, right = f"{arm}_{level}/resnets_{at}", f"{other}/{level}/res/{at}"
            kernel, norm = (3, 3, wide, wide), (wide,)
            for kind, shape in (("kernel", kernel), ("bias", norm)):
                yield (
                    (f"{left}/conv{conv + 1}/{kind}", shape),
                    (f"{right}/conv_{conv + 1}/{kind}", shape),
                )
            for kind in ("scale", "bias"):
                yield (
                    (f"{left}/norm{conv + 1}/{kind}", norm),
                    (f"{right}/norm_{conv + 1}/{kind}", norm),
                )


_WORDS = [*map("".join, itertools.product("bklmnrstvwxz", "aeiou", "bklmnrstvwxz", "aeiou"))]
"""Names that mean nothing."""


def _modules(leaves: int) -> Iterator[Pair]:
    """Small modules without numbers, each of a name and a shape of its own."""
    for at, (first, second) in enumerate(
        itertools.islice(itertools.product(_WORDS, _WORDS[:8]), leaves // 2)
    ):
        path, wide = f"{first}/{second}", 1 + at
        yield (f"{path}_dense/kernel", (3, wide)), (f"net/{path}_linear/weight", (3, wide))
        yield (f"{path}_dense/bias", (wide,)), (f"net/{path}_linear/bias", (wide,))


def _modules_of_one_shape(leaves: int) -> Iterator[Pair]:
    """The same, all of one shape."""
    for first, second in itertools.islice(itertools.product(_WORDS, _WORDS[:8]), leaves // 2):
        path = f"{first}/{second}"
        yield (f"{path}_dense/kernel", (3, 5)), (f"net/{path}_linear/weight", (3, 5))
        yield (f"{path}_dense/bias", (5,)), (f"net/{path}_linear/bias", (5,))


def _another(leaves: int) -> Iterator[Pair]:
    """A target of which nothing is stored."""
    for at, name, _, shape in _blocks(leaves):
        yield (f"layers_{at}/{name}", shape), None
        yield None, (f"stage{at % 7}/{at // 7}/unit/{name.replace('/', '_')}", (3, 5 + at % 11))


def _without_a_leaf(leaves: int) -> Iterator[Pair]:
    """All names differ, and a norm lacks its scale: which of its block's two the rest is, nothing tells."""
    for at, (one, other) in enumerate(_all_names(leaves)):
        yield (None if at == len(_BLOCK) else one), other


def _automatic(leaves: int) -> Iterator[Pair]:
    """Blocks whose layers Linen numbered by itself, in the order in which the target names its layers."""
    for at, (number, (name, shape)) in itertools.product(
        range(max(2, leaves // 4)), enumerate((("up", (8, 32)), ("down", (32, 8))))
    ):
        yield (f"Block_{at}/Dense_{number}/kernel", shape), (f"layers/{at}/{name}_proj/kernel", shape)
        yield (f"Block_{at}/Dense_{number}/bias", shape[1:]), (f"layers/{at}/{name}_proj/bias", shape[1:])


def _transposed(leaves: int) -> Iterator[Pair]:
    for at, name, other, shape in _blocks(leaves):
        weight = other.replace("kernel", "weight")
        yield (f"h_{at}/{name}", shape), (f"layers/{at}/{weight}", shape[::-1])


def _fused(leaves: int) -> Iterator[Pair]:
    """Queries, keys and values are one matrix in the target."""
    for at, name, other, shape in _blocks(leaves):
        if name == "attn/query/kernel":
            yield None, (f"layers/{at}/self_attn/qkv_proj/kernel", (WIDTH, 6 * WIDTH))
        is_part = name in ("attn/query/kernel", "attn/key/kernel", "attn/value/kernel")
        yield (f"encoderblock_{at}/{name}", shape), None if is_part else (f"layers/{at}/{other}", shape)


def _towers(leaves: int) -> Iterator[Pair]:
    """Many small models beside each other, of one arrangement and of names that mean nothing."""
    for word, at in itertools.product(itertools.islice(_WORDS, max(2, leaves // 400)), range(40)):
        for name, other, shape in _BLOCK:
            yield (f"{word}_tower/block_{at}/{name}", shape), (f"{word}_net/layers/{at}/{other}", shape)


def _joined(leaves: int) -> Iterator[Pair]:
    """Layers and modules in one name, which no level divides."""
    for at, name, other, shape in _blocks(leaves):
        yield (f"block{at}_{name.replace('/', '_')}", shape), (f"layers/{at}/{other}", shape)


def _experts_in_names(leaves: int) -> Iterator[Pair]:
    """Experts of all layers beside each other, their roles numbers on one side."""
    for at, expert, (name, other) in itertools.product(
        range(max(2, leaves // 192)), range(64), (("w1", "gate"), ("w3", "up"), ("w2", "down"))
    ):
        shape = (3 * WIDTH, WIDTH) if other == "down" else (WIDTH, 3 * WIDTH)
        yield (
            (f"layers_{at}_experts_{expert}_{name}", shape),
            (
                f"blocks/{at}/moe/{expert}/{other}/kernel",
                shape,
            ),
        )


CASES: dict[str, Case] = {
    "nothing to rename": _as_it_is,
    "a level more": _a_level,
    "the layers have another name": _layers,
    "all names differ": _all_names,
    "names that tell nothing": _untold,
    "stages and blocks": _stages,
    "stacked in the checkpoint": _stacked_in_checkpoint,
    "stacked in the target": _stacked_in_target,
    "experts": _experts,
    "a U-Net": _unet,
    "modules without numbers": _modules,
    "modules of one shape": _modules_of_one_shape,
    "another model": _another,
    "a leaf is missing": _without_a_leaf,
    "automatic numbers": _automatic,
    "all kernels transposed": _transposed,
    "fused in the target": _fused,
    "many towers": _towers,
    "joined names": _joined,
    "experts in joined names": _experts_in_names,
}

NOTHING_TELLS = ("names that tell nothing", "another model")
"""Cases in which every leaf is left open; in all others each has to be restored."""
UNTOLD = {"a leaf is missing": 4}
"""How many leaves nothing tells in another case."""
SOME_ARE_TOLD = ("modules of one shape", "joined names", "experts in joined names")
"""Where there are many of one shape, or one name says all, each is restored or left open."""


def problem(case: Case, leaves: int) -> tuple[Target, dict[Path, StoredLeaf], dict[Path, Path]]:
    """Returns a target, stored leaves, and the stored path of each wanted one that is made of one alone."""
    stored, wanted, expected = dict[Path, StoredLeaf](), dict[Path, Any](), dict[Path, Path]()
    for one, other in case(leaves):
        source = aim = None
        if one is not None:
            source = ("params", *one[0].split("/"))
            stored[source] = StoredLeaf(path=source, shape=one[1], dtype=FLOAT)
        if other is not None:
            aim = tuple(int(name) if name.isdecimal() else name for name in other[0].split("/"))
            wanted[aim] = nnx.Param(jax.ShapeDtypeStruct(other[1], FLOAT))
        if source is not None and aim is not None:
            expected[aim] = source
    return flatten_target(nnx.from_flat_state(wanted)), stored, expected


def suggested(name: str, leaves: int) -> Row:
    """Proposes once, checks the plan under the proposed rules, and returns what the proposal alone took."""
    target, stored, expected = problem(CASES[name], leaves)
    cpu = time.process_time()
    with paused_collection():  # As `suggest` proposes.
        found = propose(target, stored, RestoreOptions.of())
    cpu = time.process_time() - cpu
    options = RestoreOptions.of(renames=found.renames, policy="warn", unexpected="ignore")
    plan = make_plan(target, stored, options)
    for path, item in plan.restored.items():
        if path in expected and expected[path] not in reads(item.recipe):
            raise SystemExit(f"{name}: {path} is restored from {[*reads(item.recipe)]}")
    right, left = len(plan.restored), len(found.unmatched_wanted)
    told = len(target.leaves) - UNTOLD.get(name, 0)
    least = 0 if name in (*NOTHING_TELLS, *SOME_ARE_TOLD) else told
    most = 0 if name in NOTHING_TELLS else len(target.leaves)
    if not least <= right <= most or right + left != len(target.leaves):
        raise SystemExit(f"{name}: {right} of {len(target.leaves)} leaves are restored, {left} are open")
    return {"case": name, "leaves": max(len(stored), len(target.leaves)), "right": right, "cpu_seconds": cpu}


def main() -> None:
    """Measures each case in this process."""
    options = arguments(__doc__ or "", choosable=True)
    rows: list[Row] = []
    for name in CASES:
        if options.only in name:
            trials = [suggested(name, 48 if options.toy else 20_000) for _ in range(options.rounds)]
            median = statistics.median(row["cpu_seconds"] for row in trials)
            rows.append(trials[0] | {"cpu_seconds": median})
    report("suggesting", options, rows, {"**suggest**": table(rows)})


if __name__ == "__main__":
    main()
