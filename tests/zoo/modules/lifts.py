"""Lifts within lifts, of boxes and of cells, and lifts that leave no trace in the checkpoint."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.zoo.modules.lifted import DEPTH, LinenBlock, NnxBlock, NnxListed, NnxScanned, lifted
from tests.zoo.pairs import Pair, values


class LinenBoxedBlock(nn.Module):
    """A residual block whose kernels carry logical names; its biases carry none."""

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> tuple[Any, None]:
        y = nn.Dense(8, kernel_init=named("embed", "mlp"), name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(4, kernel_init=named("mlp", "embed"), name="down")(nn.tanh(y)), None


def named(*names: str) -> Any:
    """Returns an initialiser whose values are boxed with the names of their axes."""
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)


class LinenBoxedScan(nn.Module):
    """Boxed blocks under `nn.scan`, which names the stacked axis in every box."""

    axis: int = 0

    @nn.compact
    def __call__(self, x: Any) -> Any:
        lifted = nn.scan(
            LinenBoxedBlock,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=DEPTH,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return lifted(name="layers")(x, None)[0]


class LinenScansSideBySide(nn.Module):
    """Stacks side by side: an axis of members and one of layers."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        rngs = {"params": True}
        stack = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs=rngs, length=DEPTH)
        lifted = nn.vmap(stack, variable_axes={"params": 0}, split_rngs=rngs, in_axes=(0, None))
        return lifted(name="members")(x, None)[0]


class NnxScansSideBySide(nnx.Module):
    """The same."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def build(rngs: nnx.Rngs) -> NnxScanned:
            return NnxScanned(rngs)

        self.members = build(rngs)

    def __call__(self, x: Any) -> Any:
        return nnx.vmap(lambda member, x: member(x))(self.members, x)


CARRIES = (values(2, 2, 4, seed=1), values(2, 2, 4, seed=2))


class LinenCells(nn.Module):
    """Recurrent cells side by side."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        lifted = nn.vmap(
            nn.LSTMCell, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=((0, 0), 0)
        )
        return lifted(4, name="cells")(CARRIES, x)


class NnxCells(nnx.Module):
    """The same, each cell's gates in one product."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def build(rngs: nnx.Rngs) -> nnx.OptimizedLSTMCell:
            return nnx.OptimizedLSTMCell(3, 4, rngs=rngs)

        self.cells = build(rngs)

    def __call__(self, x: Any) -> Any:
        return nnx.vmap(lambda cell, carry, x: cell(carry, x))(self.cells, CARRIES, x)


class NnxListedCells(nnx.Module):
    """The same in a list."""

    def __init__(self, rngs: nnx.Rngs):
        self.cells = nnx.List([nnx.OptimizedLSTMCell(3, 4, rngs=rngs) for _ in range(2)])

    def __call__(self, x: Any) -> Any:
        ran = [cell((CARRIES[0][i], CARRIES[1][i]), x[i]) for i, cell in enumerate(self.cells)]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *ran)


class LinenShared(nn.Module):
    """One block run three times by `nn.scan`."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        lifted = nn.scan(LinenBlock, variable_broadcast="params", split_rngs={"params": False}, length=DEPTH)
        return lifted(name="block")(x, None)[0]


class NnxShared(nnx.Module):
    """The same."""

    def __init__(self, rngs: nnx.Rngs):
        self.block = NnxBlock(rngs)

    def __call__(self, x: Any) -> Any:
        for _ in range(DEPTH):
            x = self.block(x)
        return x


class LinenLifted(nn.Module):
    """Layers under `nn.jit`, `nn.checkpoint`, `nn.map_variables`, `nn.switch` and `nn.while_loop`."""

    @nn.compact
    def __call__(self, x: Any, choice: Any) -> Any:
        x = nn.tanh(nn.jit(nn.Dense)(4, name="jitted")(x))
        x = nn.tanh(nn.checkpoint(nn.Dense)(4, name="checkpointed")(x))
        x = nn.tanh(doubled()(4, name="doubled")(x))
        cases = [nn.Dense(4, name=f"cases_{index}") for index in range(3)]
        looped = nn.Dense(4, name="looped")
        if self.is_initializing():
            return looped(sum(case(x) for case in cases))
        chosen = [lambda _, x, case=case: case(x) for case in cases]
        x = nn.switch(choice, chosen, self, x) + sum(case(x) for case in cases)
        return nn.while_loop(
            lambda _, state: state[0] < 2,
            lambda _, state: (state[0] + 1, nn.tanh(looped(state[1]))),
            self,
            (0, x),
        )[1]


def doubled() -> Any:
    """Returns dense layers that store half of what they compute with."""

    def scaled(factor: float) -> Any:
        return lambda variables: jax.tree.map(lambda leaf: leaf * factor, variables)

    return nn.map_variables(
        nn.Dense, "params", trans_in_fn=scaled(2.0), trans_out_fn=scaled(0.5), mutable=True, init=True
    )


class NnxLifted(nnx.Module):
    """The same without lifting."""

    def __init__(self, rngs: nnx.Rngs):
        for name in ("jitted", "checkpointed", "doubled", "looped"):
            setattr(self, name, nnx.Linear(4, 4, rngs=rngs))
        self.cases = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])

    def __call__(self, x: Any, choice: Any) -> Any:
        x = nnx.tanh(self.checkpointed(nnx.tanh(self.jitted(x))))
        x = nnx.tanh(x @ (2 * self.doubled.kernel[...]) + 2 * self.doubled.bias[...])
        x = self.cases[int(choice)](x) + sum(case(x) for case in self.cases)
        return nnx.tanh(self.looped(nnx.tanh(self.looped(x))))


PAIRS = (
    lifted("scan", "scan", "boxed", LinenBoxedScan(), NnxScanned),
    lifted("scan", "List", "boxed, axis 1", LinenBoxedScan(axis=1), NnxListed),
    lifted("scan", "one block", "weights broadcast", LinenShared(), NnxShared),
    lifted(
        "vmap of scan",
        "vmap of scan",
        "",
        LinenScansSideBySide(),
        NnxScansSideBySide,
        inputs=(values(2, 2, 4),),
        renames=(("members", "members/layers"),),
    ),
    lifted("vmap of LSTMCell", "vmap", "gates fused", LinenCells(), NnxCells, inputs=(values(2, 2, 3),)),
    lifted(
        "vmap of LSTMCell", "List", "gates fused", LinenCells(), NnxListedCells, inputs=(values(2, 2, 3),)
    ),
    Pair(
        linen_name="jit, checkpoint, map_variables, switch, while_loop",
        nnx_name="Linear, List",
        linen=LinenLifted(),
        nnx=NnxLifted,
        inputs=(values(3, 4), np.int32(1)),
    ),
)
