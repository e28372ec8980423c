"""Convolutions and their transposes."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax import nnx

from tests.zoo.pairs import Pair, values


def conv(variant: str, size: tuple[int, ...], *shape: int, **options: Any) -> Pair:
    """A convolution to six features from inputs of `shape`, features last."""
    return Pair(
        linen_name="Conv",
        nnx_name="Conv",
        variant=variant,
        linen=nn.Conv(6, size, **options),
        nnx=lambda rngs: nnx.Conv(shape[-1], 6, size, **options, rngs=rngs),
        inputs=(values(*shape),),
    )


def conv_transpose(
    variant: str, size: tuple[int, ...], shape: tuple[int, ...], options: Mapping[str, Any]
) -> Pair:
    """A transposed convolution to three features from inputs of `shape`."""
    return Pair(
        linen_name="ConvTranspose",
        nnx_name="ConvTranspose",
        variant=variant,
        linen=nn.ConvTranspose(3, size, **options),
        nnx=lambda rngs: nnx.ConvTranspose(shape[-1], 3, size, **options, rngs=rngs),
        inputs=(values(*shape),),
    )


PAIRS = (
    conv("1-D", (3,), 2, 5, 4),
    conv("2-D", (3, 2), 2, 5, 4, 4),
    conv("3-D", (2, 2, 2), 1, 3, 3, 3, 2),
    conv("grouped, no bias", (3,), 2, 5, 4, feature_group_count=2, use_bias=False),
    conv("dilated, strided", (3,), 2, 9, 2, kernel_dilation=2, strides=2),
    conv("circular", (3,), 2, 5, 2, padding="CIRCULAR"),
    conv("causal", (3,), 2, 5, 2, padding="CAUSAL"),
    conv_transpose("1-D", (3,), (2, 4, 2), {}),
    conv_transpose("2-D, strided", (3, 2), (1, 3, 3, 2), {"strides": (2, 2)}),
    conv_transpose("transposed kernel", (3,), (2, 4, 2), {"transpose_kernel": True, "use_bias": False}),
    conv_transpose("circular", (3,), (2, 4, 2), {"padding": "CIRCULAR"}),
)
