"""Blocks under `nn.scan`, `nn.remat` and `nn.vmap`, against NNX's transforms and plain lists."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from tests.zoo.pairs import Pair, Training, values

DEPTH = 3
X = values(2, 4)
EACH_ITS_OWN = values(DEPTH, 2, 4)
BATCH = values(6, 4)


class LinenBlock(nn.Module):
    """A residual block; returns a pair, as `nn.scan` asks."""

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> tuple[Any, None]:
        y = nn.Dense(8, name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(4, name="down")(nn.tanh(y)), None


class NnxBlock(nnx.Module):
    """The same."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.down = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.down(nnx.tanh(self.up(self.norm(x))))


class LinenScanned(nn.Module):
    """Blocks stacked on one axis by `nn.scan`, with or without `nn.remat`."""

    axis: int = 0
    remat: bool = False
    layers_name: str | None = "layers"

    @nn.compact
    def __call__(self, x: Any) -> Any:
        block = nn.remat(LinenBlock) if self.remat else LinenBlock
        lifted = nn.scan(
            block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=DEPTH
        )
        return lifted(name=self.layers_name)(x, None)[0]


class LinenListed(nn.Module):
    """Blocks one by one, with or without `nn.remat`."""

    remat: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        block = nn.remat(LinenBlock) if self.remat else LinenBlock
        for index in range(DEPTH):
            x, _ = block(name=f"layers_{index}")(x)
        return x


class LinenNested(nn.Module):
    """Four blocks stacked two by two by `nn.remat_scan`."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.remat_scan(LinenPlainBlock, lengths=(2, 2))(name="layers")(x)


class LinenPlainBlock(nn.Module):
    """One layer, for lifts that carry one value."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x + nn.tanh(nn.Dense(4, name="mix")(x))


class NnxPlainBlock(nnx.Module):
    """The same."""

    def __init__(self, rngs: nnx.Rngs):
        self.mix = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + nnx.tanh(self.mix(x))


class LinenEnsemble(nn.Module):
    """Blocks side by side by `nn.vmap`, each on its own input."""

    layers_name: str | None = "layers"

    @nn.compact
    def __call__(self, x: Any) -> Any:
        lifted = nn.vmap(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)
        return lifted(name=self.layers_name)(x)[0]


def stacked_blocks(rngs: nnx.Rngs, axis: int = 0) -> NnxBlock:
    """Returns blocks stacked on an axis."""

    @nnx.split_rngs(splits=DEPTH)
    @nnx.vmap(in_axes=0, out_axes=nnx.StateAxes({...: axis}))
    def build(rngs: nnx.Rngs) -> NnxBlock:
        return NnxBlock(rngs)

    return build(rngs)


class NnxScanned(nnx.Module):
    """Blocks stacked on an axis and run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs, axis: int = 0):
        self.layers = stacked_blocks(rngs, axis)
        self.axis = axis

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, nnx.StateAxes({...: self.axis})), out_axes=nnx.Carry)
        def run(x: Any, block: NnxBlock) -> Any:
            return block(x)

        return run(x, self.layers)


class NnxListed(nnx.Module):
    """Blocks one by one."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([NnxBlock(rngs) for _ in range(DEPTH)])

    def __call__(self, x: Any) -> Any:
        for block in self.layers:
            x = block(x)
        return x


class NnxNested(nnx.Module):
    """Four blocks stacked two by two, run one after the other."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def row(rngs: nnx.Rngs) -> NnxPlainBlock:
            return NnxPlainBlock(rngs)

        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def rows(rngs: nnx.Rngs) -> NnxPlainBlock:
            return row(rngs)

        self.layers = rows(rngs)

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def inner(x: Any, block: NnxPlainBlock) -> Any:
            return block(x)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def outer(x: Any, blocks: NnxPlainBlock) -> Any:
            return inner(x, blocks)

        return outer(x, self.layers)


class NnxEnsemble(nnx.Module):
    """Blocks side by side by `nnx.vmap`."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = stacked_blocks(rngs)

    def __call__(self, x: Any) -> Any:
        return nnx.vmap(lambda block, x: block(x))(self.layers, x)


class NnxListedEnsemble(NnxListed):
    """Blocks side by side in a list."""

    def __call__(self, x: Any) -> Any:
        return jnp.stack([block(part) for block, part in zip(self.layers, x, strict=True)])


class LinenNormBlock(nn.Module):
    """A block with statistics."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> tuple[Any, None]:
        x = nn.Dense(4, name="mix")(x)
        return nn.tanh(nn.BatchNorm(use_running_average=not train, name="norm")(x)), None


class LinenScannedNorm(nn.Module):
    """Blocks whose weights and statistics are both stacked."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        lifted = nn.scan(
            LinenNormBlock,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=DEPTH,
        )
        return lifted(name="layers")(x, train)[0]


class NnxNormBlock(nnx.Module):
    """The same."""

    def __init__(self, rngs: nnx.Rngs):
        self.mix = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: Any, train: bool) -> Any:
        return nnx.tanh(self.norm(self.mix(x), use_running_average=not train))


class NnxScannedNorm(nnx.Module):
    """The same."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=DEPTH)
        @nnx.vmap
        def build(rngs: nnx.Rngs) -> NnxNormBlock:
            return NnxNormBlock(rngs)

        self.layers = build(rngs)

    def __call__(self, x: Any, *, train: bool) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: Any, block: NnxNormBlock) -> Any:
            return block(x, train)

        return run(x, self.layers)


def lifted(linen_name: str, nnx_name: str, variant: str, linen: nn.Module, build: Any, **fields: Any) -> Pair:
    """A pair of block stacks on the same input."""
    inputs = fields.pop("inputs", (X,))
    return Pair(
        linen_name=linen_name,
        nnx_name=nnx_name,
        variant=variant,
        linen=linen,
        nnx=build,
        inputs=inputs,
        **fields,
    )


PAIRS = (
    lifted("scan", "scan", "axis 0", LinenScanned(), NnxScanned),
    lifted("scan", "scan", "axis 1", LinenScanned(axis=1), lambda rngs: NnxScanned(rngs, axis=1)),
    lifted("scan", "List", "axis 0", LinenScanned(), NnxListed),
    lifted("scan", "List", "axis 1", LinenScanned(axis=1), NnxListed),
    lifted("blocks one by one", "scan", "axis 0", LinenListed(), NnxScanned),
    lifted("blocks one by one", "scan", "axis 1", LinenListed(), lambda rngs: NnxScanned(rngs, axis=1)),
    lifted("remat", "List", "", LinenListed(remat=True), NnxListed),
    lifted("scan of remat", "scan", "", LinenScanned(remat=True), NnxScanned),
    lifted(
        "scan of remat",
        "List",
        "automatic names",
        LinenScanned(remat=True, layers_name=None),
        NnxListed,
        renames=(("ScanCheckpointLinenBlock_0", "layers"),),
    ),
    lifted("remat_scan", "scan of scan", "two axes", LinenNested(), NnxNested),
    lifted("vmap", "vmap", "", LinenEnsemble(), NnxEnsemble, inputs=(EACH_ITS_OWN,)),
    lifted("vmap", "List", "", LinenEnsemble(), NnxListedEnsemble, inputs=(EACH_ITS_OWN,)),
    lifted(
        "vmap",
        "vmap",
        "automatic names",
        LinenEnsemble(layers_name=None),
        NnxEnsemble,
        inputs=(EACH_ITS_OWN,),
        renames=(("VmapLinenBlock_0", "layers"),),
    ),
    lifted(
        "scan",
        "scan",
        "batch statistics stacked too",
        LinenScannedNorm(),
        NnxScannedNorm,
        inputs=(BATCH,),
        linen_kwargs={"train": False},
        nnx_kwargs={"train": False},
        training=Training(linen={"train": True}, nnx={"train": True}),
    ),
)
