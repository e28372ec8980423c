"""A multilayer perceptron with batch normalisation."""

from typing import Any

import flax.linen as nn
import numpy as np
import optax
from flax import nnx

from tests.zoo.models.base import ModelPair
from tests.zoo.models.conversion import numbered, renamed
from tests.zoo.pairs import values

WIDTHS = (8, 6)


class LinenMLP(nn.Module):
    """The Linen program; `named` gives the modules NNX's names."""

    named: bool

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        for index, width in enumerate(WIDTHS):
            x = nn.Dense(width, name=f"hidden_{index}" if self.named else None)(x)
            norm = nn.BatchNorm(momentum=0.9, name=f"norm_{index}" if self.named else None)
            x = nn.relu(norm(x, use_running_average=not train))
        return nn.Dense(3, name="head" if self.named else None)(x)


class NnxMLP(nnx.Module):
    """The NNX program."""

    def __init__(self, rngs: nnx.Rngs):
        sizes = (4, *WIDTHS)
        self.hidden = nnx.List([nnx.Linear(sizes[i], sizes[i + 1], rngs=rngs) for i in range(len(WIDTHS))])
        self.norm = nnx.List([nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for width in WIDTHS])
        self.head = nnx.Linear(sizes[-1], 3, rngs=rngs)

    def __call__(self, x: Any, *, train: bool) -> Any:
        for layer, norm in zip(self.hidden, self.norm, strict=True):
            x = nnx.relu(norm(layer(x), use_running_average=not train))
        return self.head(x)


class NnxClassifier(nnx.Module):
    """The NNX program again, with an attribute for each layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.reader = nnx.Linear(4, 8, rngs=rngs)
        self.reader_norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.mixer = nnx.Linear(8, 6, rngs=rngs)
        self.mixer_norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.classes = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x: Any, *, train: bool) -> Any:
        x = nnx.relu(self.reader_norm(self.reader(x), use_running_average=not train))
        x = nnx.relu(self.mixer_norm(self.mixer(x), use_running_average=not train))
        return self.classes(x)


BATCH = (values(12, 4),)
LABELS = np.arange(12) % 3
OPTIMIZER = optax.sgd(0.1, momentum=0.9)

MODELS = (
    ModelPair(
        name="MLP with BatchNorm",
        linen=LinenMLP(named=True),
        nnx=NnxMLP,
        inputs=BATCH,
        labels=LABELS,
        optimizer=OPTIMIZER,
        optimizer_name="sgd with momentum",
        has_statistics=True,
        as_nnx=numbered,
    ),
    ModelPair(
        name="MLP with BatchNorm, automatic names",
        linen=LinenMLP(named=False),
        nnx=NnxClassifier,
        inputs=BATCH,
        labels=LABELS,
        optimizer=OPTIMIZER,
        optimizer_name="sgd with momentum",
        has_statistics=True,
        as_nnx=lambda leaves: renamed(
            leaves,
            ("BatchNorm_0", "reader_norm"),
            ("BatchNorm_1", "mixer_norm"),
            ("Dense_0", "reader"),
            ("Dense_1", "mixer"),
            ("Dense_2", "classes"),
        ),
        renames=(
            ("Dense_0", "reader"),
            ("BatchNorm_0", "reader_norm"),
            ("Dense_1", "mixer"),
            ("BatchNorm_1", "mixer_norm"),
            ("Dense_2", "classes"),
        ),
        determined="shapes",
    ),
)
