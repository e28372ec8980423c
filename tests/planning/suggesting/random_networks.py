"""Random checkpoints of several networks: what is proposed without a question is right.

The suite draws a few; `python -m tests.planning.suggesting.random_networks` draws more, and exits 1 where a
value is wrong or none.
"""

import itertools
import os
import random
import sys
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import optax
from flax import nnx

from orbax_nnx_handler import RestoreError, from_linen, suggest
from tests.planning.suggesting.proposals import Model

NETWORKS = ["gen=generator disc=discriminator", "actor=pi critic=q", "teacher=teacher_net img=vision"]
LINEN = ["embed layers query key value out norm1 norm2 up_proj down_proj head"]
LINEN += ["embed layers wq wk wv wo attention_norm ffn_norm w1 w2 head"]
OURS = ["inp blocks q_proj k_proj v_proj o_proj pre_attn_norm pre_mlp_norm wi wo cls"]
OURS += ["inp h to_q to_k to_v to_out attn_norm mlp_norm up down out"]
TX = optax.adam(1e-3)


def blocks(width: int, out: int) -> Iterator[tuple[int, int | None, str, tuple[int, ...]]]:
    """Yields what a network holds: the number of a name in the lists above, a layer, a leaf and its shape."""
    for layer, at in itertools.product(range(2), range(2, 10)):
        if at in (6, 7):
            yield from ((at, layer, name, (width,)) for name in ("scale", "bias"))
        else:
            shape = {8: (width, 2 * width), 9: (2 * width, width)}.get(at, (width, width))
            yield from ((at, layer, "kernel", shape), (at, layer, "bias", shape[1:]))
    for at, shape in ((0, (3, width)), (10, (width, out))):
        yield from ((at, None, "kernel", shape), (at, None, "bias", shape[1:]))


def put(tree: dict, path: tuple, value: object) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def drawn(seed: int, *, stacks: bool = True):
    """Returns a checkpoint, what makes its target, and the right values by wanted path."""
    draw, numbers = random.Random(seed), itertools.count(1.0)
    pairs = [tuple(pair.split("=")) for pair in draw.choice(NETWORKS).split()]
    linen, ours = draw.choice(LINEN).split(), draw.choice(OURS).split()
    form, same, stacked = (
        draw.choice(["params", "single", "bare", "state"]),
        draw.random() < 0.5,
        draw.random() < 0.5,
    )
    stacked = stacked and stacks
    pairs = [(name, name if draw.random() < 0.3 else other) for name, other in pairs]
    tree, shapes, right = {}, {}, {}

    def filled(owner: tuple, wanted: tuple, width: int, out: int) -> dict:
        found, layers = {}, {}
        for at, layer, leaf, shape in blocks(width, out):
            array = np.asarray([next(numbers) for _ in range(np.prod(shape))], "f").reshape(shape)
            right[(*wanted, *([ours[1], layer] if layer is not None else []), ours[at], leaf)] = array
            layers.setdefault((at, leaf), []).append(array)
            above = () if layer is None else (linen[1],) if stacked else (f"{linen[1]}_{layer}",)
            array = np.stack(layers[at, leaf]) if stacked and layer is not None else array
            put(found, (*above, linen[at], leaf), array)
        return found

    for number, (name, other) in enumerate(pairs):
        width, out = (8, 3) if same else (8 * (number + 1), 3 + number)
        shapes[other] = {}
        for at, layer, leaf, shape in blocks(width, out):
            put(shapes[other], (*([ours[1], layer] if layer is not None else []), ours[at], leaf), shape)
        if form == "state":
            tree[name] = {
                "params": filled((name,), (other, "model"), width, out),
                "step": np.int32(7 + number),
            }
            moments = [
                filled((name,), (other, "optimizer", "opt_state", 0, slot), width, out)
                for slot in ("mu", "nu")
            ]
            state = TX.init(tree[name]["params"])
            tree[name]["opt_state"] = (
                state[0]._replace(count=np.int32(5 + number), mu=moments[0], nu=moments[1]),
                *state[1:],
            )
            right[other, "optimizer", "step"] = 7 + number
            right[other, "optimizer", "opt_state", 0, "count"] = 5 + number
        else:
            weights = filled((name,), (other,), width, out)
            tree[name] = {"params": weights} if form == "params" else weights

    def make():
        models = {name: Model(held) for name, held in shapes.items()}
        if form != "state":
            return models
        return {
            name: {"model": model, "optimizer": nnx.Optimizer(model, TX, wrt=nnx.Param)}
            for name, model in models.items()
        }

    return {"params": tree} if form == "single" else tree, make, right


def try_networks(seed):
    """Proposes for the networks of a seed, with nothing settled."""
    tree, make, right = drawn(seed)
    target = nnx.eval_shape(make)

    found = suggest(tree, target, init=make)

    assert found.confidence == "likely"
    check(from_linen(tree, target, renames=found.renames), right)


def try_renames_settled(seed, how_many):
    """Proposes where the renames of some networks are settled."""
    tree, make, right = drawn(seed)
    target = nnx.eval_shape(make)
    names = zip(tree["params"] if tree.keys() == {"params"} else tree, make(), strict=True)
    settled = [(name, other) for name, other in names if name != other][:how_many]

    found = suggest(tree, target, init=make, renames=settled)

    assert found.confidence == "likely"
    check(from_linen(tree, target, renames=[*settled, *found.renames]), right)


def try_modules_settled(seed):
    """Proposes where the renames of all modules within the networks are settled."""
    tree, make, right = drawn(seed, stacks=False)
    linen = next(names.split() for names in LINEN if names.split()[2] in str(tree))
    ours = next(names.split() for names in OURS if any(names.split()[2] in path for path in right))
    settled = [
        ("layers_{i}", f"{other}/{{i}}") if name == "layers" else (name, other)
        for name, other in zip(linen, ours, strict=True)
    ]

    found = suggest(tree, nnx.eval_shape(make), init=make, renames=settled)

    check(from_linen(tree, nnx.eval_shape(make), renames=[*settled, *found.renames]), right)


def check(result: object, right: dict) -> None:
    got = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(result))}
    assert got.keys() == right.keys()
    for path, value in right.items():
        np.testing.assert_array_equal(got[path], value, err_msg=str(path))


LONG = (
    (try_networks, [(seed,) for seed in (*range(24), 93)]),
    (try_renames_settled, list(itertools.product((0, 1, 2, 3, 4, 5, 7), (1, 2)))),
    (try_modules_settled, [(4,), (10,), (22,), (26,)]),
)


def main() -> int:
    """Tries all three, each on its seeds."""
    bad = 0
    for attempt, drawn_from in LONG:
        for arguments in drawn_from:
            try:
                attempt(*arguments)
            except (AssertionError, RestoreError) as error:
                bad += 1
                print(attempt.__name__, *arguments, str(error)[:300])
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
