"""A small residual network for images."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.zoo.models.base import ModelPair
from tests.zoo.models.conversion import numbered, renamed
from tests.zoo.pairs import values

WIDTHS = (4, 6)
"""Features of each block; the last one changes the width and projects its input."""


class LinenResidual(nn.Module):
    """Two convolutions around a shortcut."""

    features: int
    named: bool

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        def name(text: str) -> str | None:
            return text if self.named else None

        def norm(text: str) -> nn.BatchNorm:
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name(text))

        y = nn.Conv(self.features, (3, 3), use_bias=False, name=name("conv_a"))(x)
        y = nn.relu(norm("norm_a")(y))
        y = norm("norm_b")(nn.Conv(self.features, (3, 3), use_bias=False, name=name("conv_b"))(y))
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), use_bias=False, name=name("shortcut"))(x)
        return nn.relu(x + y)


class LinenResNet(nn.Module):
    """The Linen program; `named` gives the modules NNX's names."""

    named: bool

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        x = nn.relu(nn.Conv(WIDTHS[0], (3, 3), name="stem" if self.named else None)(x))
        for index, width in enumerate(WIDTHS):
            x = LinenResidual(width, self.named, name=f"blocks_{index}" if self.named else None)(x, train)
        return nn.Dense(3, name="head" if self.named else None)(x.mean((1, 2)))


class NnxResidual(nnx.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, before: int, features: int, rngs: nnx.Rngs):
        self.conv_a = nnx.Conv(before, features, (3, 3), use_bias=False, rngs=rngs)
        self.norm_a = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.conv_b = nnx.Conv(features, features, (3, 3), use_bias=False, rngs=rngs)
        self.norm_b = nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
        self.shortcut = nnx.data(None)
        if before != features:
            self.shortcut = nnx.Conv(before, features, (1, 1), use_bias=False, rngs=rngs)

    def __call__(self, x: Any, train: bool) -> Any:
        y = nnx.relu(self.norm_a(self.conv_a(x), use_running_average=not train))
        y = self.norm_b(self.conv_b(y), use_running_average=not train)
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class NnxResNet(nnx.Module):
    """The NNX program."""

    def __init__(self, rngs: nnx.Rngs):
        befores = (WIDTHS[0], *WIDTHS[:-1])
        self.stem = nnx.Conv(3, WIDTHS[0], (3, 3), rngs=rngs)
        self.blocks = nnx.List([NnxResidual(b, w, rngs) for b, w in zip(befores, WIDTHS, strict=True)])
        self.head = nnx.Linear(WIDTHS[-1], 3, rngs=rngs)

    def __call__(self, x: Any, *, train: bool) -> Any:
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x, train)
        return self.head(jnp.mean(x, (1, 2)))


BATCH = (values(6, 5, 5, 3),)
LABELS = np.arange(6) % 3
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, eps=1e-4, weight_decay=1e-2))
NAMES = (
    ("LinenResidual_{i}/Conv_0", "blocks/{i}/conv_a"),
    ("LinenResidual_{i}/Conv_1", "blocks/{i}/conv_b"),
    ("LinenResidual_{i}/Conv_2", "blocks/{i}/shortcut"),
    ("LinenResidual_{i}/BatchNorm_0", "blocks/{i}/norm_a"),
    ("LinenResidual_{i}/BatchNorm_1", "blocks/{i}/norm_b"),
    ("Conv_0", "stem"),
    ("Dense_0", "head"),
)

MODELS = (
    ModelPair(
        name="ResNet",
        linen=LinenResNet(named=True),
        nnx=NnxResNet,
        inputs=BATCH,
        labels=LABELS,
        optimizer=OPTIMIZER,
        optimizer_name="chain of clip and adamw",
        has_statistics=True,
        as_nnx=numbered,
    ),
    ModelPair(
        name="ResNet, automatic names",
        linen=LinenResNet(named=False),
        nnx=NnxResNet,
        inputs=BATCH,
        labels=LABELS,
        optimizer=OPTIMIZER,
        optimizer_name="chain of clip and adamw",
        has_statistics=True,
        as_nnx=lambda leaves: renamed(
            leaves,
            ("^Conv_0", "stem"),
            ("^Dense_0", "head"),
            (r"^LinenResidual_(\d)", r"blocks/\1"),
            ("Conv_0", "conv_a"),
            ("Conv_1", "conv_b"),
            ("Conv_2", "shortcut"),
            ("BatchNorm_0", "norm_a"),
            ("BatchNorm_1", "norm_b"),
        ),
        renames=NAMES,
        determined="shapes and order",
    ),
)
