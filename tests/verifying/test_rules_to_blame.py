"""Given rules that are said to make what outputs prove wrong: without them alone the rest is found."""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import StackLayers, Transpose, UnstackLayers, suggest

LAYERS, X = 3, np.random.default_rng(0).normal(size=(2, 5, 8)).astype("f")


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="ln_1")(x)
        q, k, v = (nn.Dense(8, name=name)(y) for name in ("query", "key", "value"))
        x = x + nn.Dense(8, name="out")(nn.softmax(q @ k.swapaxes(-1, -2)) @ v)
        y = nn.LayerNorm(name="ln_2")(x)
        return x + nn.Dense(8, name="fc2")(nn.gelu(nn.Dense(8, name="fc1")(y))), None


class Linen(nn.Module):
    is_scanned: bool

    @nn.compact
    def __call__(self, x):
        if self.is_scanned:
            scan = nn.scan(
                LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
            )
            x, _ = scan(name="layers")(x, None)
        for layer in range(0 if self.is_scanned else LAYERS):
            x, _ = LinenBlock(name=f"layers_{layer}")(x, None)
        return nn.Dense(4, name="head")(x)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(8, rngs=rngs) for _ in range(2))
        self.q, self.k, self.v, self.o, self.fc1, self.fc2 = (nnx.Linear(8, 8, rngs=rngs) for _ in range(6))

    def __call__(self, x):
        y = self.norm1(x)
        x = x + self.o(nnx.softmax(self.q(y) @ self.k(y).swapaxes(-1, -2)) @ self.v(y))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x))))


class Model(nnx.Module):
    def __init__(self, rngs, is_scanned):
        if is_scanned:
            self.blocks = nnx.vmap(lambda key: Block(nnx.Rngs(key)))(jax.random.split(rngs.params(), LAYERS))
        else:
            self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        if isinstance(self.blocks, Block):
            run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return self.head(run(x, self.blocks))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


UNSTACK, EACH = UnstackLayers("layers", "blocks/{i}", axis=0), ("layers_{i}", "blocks/{i}")
ALL = {"ln_1": "norm1", "ln_2": "norm2", "query": "q", "key": "k", "value": "v", "out": "o"}
NORMS, HEADS = {"ln_1": "norm2", "ln_2": "norm1"}, {"query": "k", "key": "q"}
ONE = {f"blocks/1/{old}": f"blocks/1/{new}" for old, new in (*NORMS.items(), *HEADS.items())}
SHIFTED = {f"blocks/{layer}": f"blocks/{(layer + 1) % LAYERS}" for layer in range(LAYERS)}
MOVED = {f"layers_{layer}": f"blocks/{(layer + 1) % LAYERS}" for layer in range(LAYERS)}
CASES: dict[str, tuple[bool, bool, list[Any], list[Any]]] = {
    "a transpose in all layers": (True, False, [UNSTACK], [Transpose("fc1/kernel", (1, 0))]),
    "a transpose in one layer": (True, False, [UNSTACK], [Transpose("blocks/1/fc1/kernel", (1, 0))]),
    "norms in all layers": (True, False, [UNSTACK], [*NORMS.items()]),
    "norms in one layer": (True, False, [UNSTACK], [*ONE.items()][:2]),
    "q and k in all layers": (True, False, [UNSTACK], [*HEADS.items()]),
    "q and k in one layer": (True, False, [UNSTACK], [*ONE.items()][2:]),
    "layers shifted": (True, False, [UNSTACK], [*SHIFTED.items()]),
    "norms of a scan": (True, True, [("layers", "blocks")], [*NORMS.items()]),
    "norms of layers apart": (False, False, [EACH], [*NORMS.items()]),
    "q and k of layers apart": (False, False, [EACH], [*HEADS.items()]),
    "layers apart shifted": (False, False, [], [*MOVED.items()]),
    "a transpose where they are stacked": (
        False,
        True,
        [StackLayers("layers_{i}", "blocks", axis=0)],
        [Transpose("fc1/kernel", (0, 2, 1))],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rules_that_are_right_are_not_blamed_for_what_others_make_wrong(case: str, tmp_path: pathlib.Path):
    is_stored_so, is_wanted_so, first, wrong = CASES[case]
    linen, random = Linen(is_stored_so), np.random.default_rng(1)
    variables = linen.init(jax.random.key(0), X)
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * random.normal(size=leaf.shape).astype("f"), variables)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", moved)
    target = nnx.eval_shape(lambda: Model(nnx.Rngs(0), is_wanted_so))
    pair = (linen.apply, lambda model, x: model(x), (X,))
    in_all = {str(rule[0]) for rule in wrong if isinstance(rule, tuple)}
    rest = [rule for rule in ALL.items() if rule[0] not in in_all]

    found = suggest(tmp_path / "c", target, renames=[*first, *wrong, *rest], verify=pair)
    again = suggest(tmp_path / "c", target, renames=[*first, *rest], verify=pair)

    said = [str(rule) if isinstance(rule, tuple) else repr(rule) for rule in wrong]
    named = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    assert found.proof.endswith(f"Given rules make it so: correct or take out {named}, and run it again.")
    assert again.is_proved, again
