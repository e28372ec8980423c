"""Normalisation of activations and of weights."""

from typing import Any

import flax.linen as nn
from flax import nnx

from tests.zoo.pairs import Pair, Training, values

BATCH_NORM = Training(linen={"use_running_average": False}, nnx={"use_running_average": False})
# nnx.SpectralNorm writes the normalised kernel back over the kernel (Linen does not), so that
# from the second step on the two programs differ whatever the checkpoint; one step is comparable.
SPECTRAL_NORM = Training(linen={"update_stats": True}, nnx={"update_stats": True}, steps=1)


class LinenNormalisedBlock(nn.Module):
    """A layer under its own norm, beside layers of its kind without one."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(4, name="before")(x)
        x = nn.WeightNorm(nn.Dense(4, name="normalised"), name="norm", variable_filter=None)(x)
        return nn.Dense(4, name="after")(x)


class NnxNormalisedBlock(nnx.Module):
    """The same; the norm owns its layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.before = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs), variable_filter=..., rngs=rngs)
        self.after = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.after(self.norm(self.before(x)))


class LinenAutoNamed(nn.Module):
    """Both wrappers with Linen's own names."""

    @nn.compact
    def __call__(self, x: Any, *, update_stats: bool) -> Any:
        x = nn.WeightNorm(nn.Dense(4))(x)
        return nn.SpectralNorm(nn.Conv(3, (2,)))(nn.tanh(x), update_stats=update_stats)


class NnxAutoNamed(nnx.Module):
    """The same under attribute names."""

    def __init__(self, rngs: nnx.Rngs):
        self.scaled = nnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
        self.bounded = nnx.SpectralNorm(nnx.Conv(4, 3, (2,), rngs=rngs), rngs=rngs)

    def __call__(self, x: Any, *, update_stats: bool) -> Any:
        return self.bounded(nnx.tanh(self.scaled(x)), update_stats=update_stats)


PAIRS = (
    Pair(
        linen_name="BatchNorm",
        nnx_name="BatchNorm",
        linen=nn.BatchNorm(momentum=0.8),
        nnx=lambda rngs: nnx.BatchNorm(4, momentum=0.8, rngs=rngs),
        inputs=(values(6, 4),),
        linen_kwargs={"use_running_average": True},
        nnx_kwargs={"use_running_average": True},
        training=BATCH_NORM,
    ),
    Pair(
        linen_name="BatchNorm",
        nnx_name="BatchNorm",
        variant="statistics only",
        linen=nn.BatchNorm(use_bias=False, use_scale=False),
        nnx=lambda rngs: nnx.BatchNorm(4, use_bias=False, use_scale=False, rngs=rngs),
        inputs=(values(2, 3, 4),),
        linen_kwargs={"use_running_average": True},
        nnx_kwargs={"use_running_average": True},
        training=BATCH_NORM,
    ),
    Pair(
        linen_name="BatchNorm",
        nnx_name="BatchNorm",
        variant="features on axis 1, no scale",
        linen=nn.BatchNorm(axis=1, use_scale=False),
        nnx=lambda rngs: nnx.BatchNorm(3, axis=1, use_scale=False, rngs=rngs),
        inputs=(values(6, 3, 4),),
        linen_kwargs={"use_running_average": True},
        nnx_kwargs={"use_running_average": True},
        training=BATCH_NORM,
    ),
    Pair(
        linen_name="LayerNorm",
        nnx_name="LayerNorm",
        variant="over two axes, no bias",
        linen=nn.LayerNorm(reduction_axes=(1, 2), use_bias=False),
        nnx=lambda rngs: nnx.LayerNorm(4, reduction_axes=(1, 2), use_bias=False, rngs=rngs),
        inputs=(values(2, 3, 4),),
    ),
    Pair(
        linen_name="LayerNorm",
        nnx_name="LayerNorm",
        linen=nn.LayerNorm(),
        nnx=lambda rngs: nnx.LayerNorm(4, rngs=rngs),
        inputs=(values(3, 4),),
    ),
    Pair(
        linen_name="RMSNorm",
        nnx_name="RMSNorm",
        linen=nn.RMSNorm(),
        nnx=lambda rngs: nnx.RMSNorm(4, rngs=rngs),
        inputs=(values(3, 4),),
    ),
    Pair(
        linen_name="GroupNorm",
        nnx_name="GroupNorm",
        linen=nn.GroupNorm(2),
        nnx=lambda rngs: nnx.GroupNorm(4, 2, rngs=rngs),
        inputs=(values(3, 5, 4),),
    ),
    Pair(
        linen_name="GroupNorm",
        nnx_name="GroupNorm",
        variant="by group size, no bias",
        linen=nn.GroupNorm(num_groups=None, group_size=2, use_bias=False),
        nnx=lambda rngs: nnx.GroupNorm(4, num_groups=None, group_size=2, use_bias=False, rngs=rngs),
        inputs=(values(3, 5, 4),),
    ),
    Pair(
        linen_name="InstanceNorm",
        nnx_name="InstanceNorm",
        variant="features on axis 1",
        linen=nn.InstanceNorm(feature_axes=(1,)),
        nnx=lambda rngs: nnx.InstanceNorm(3, feature_axes=(1,), rngs=rngs),
        inputs=(values(2, 3, 4),),
    ),
    Pair(
        linen_name="InstanceNorm",
        nnx_name="InstanceNorm",
        linen=nn.InstanceNorm(),
        nnx=lambda rngs: nnx.InstanceNorm(4, rngs=rngs),
        inputs=(values(2, 5, 4),),
    ),
    Pair(
        linen_name="WeightNorm",
        nnx_name="WeightNorm",
        linen=nn.WeightNorm(nn.Dense(3)),
        nnx=lambda rngs: nnx.WeightNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs),
        inputs=(values(2, 4),),
    ),
    Pair(
        linen_name="WeightNorm",
        nnx_name="WeightNorm",
        variant="inside a model, bias too",
        linen=LinenNormalisedBlock(),
        nnx=NnxNormalisedBlock,
        inputs=(values(2, 4),),
    ),
    Pair(
        linen_name="WeightNorm",
        nnx_name="WeightNorm",
        variant="of attention",
        linen=nn.WeightNorm(nn.MultiHeadAttention(2), feature_axes=-1),
        nnx=lambda rngs: nnx.WeightNorm(
            nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs), feature_axes=-1, rngs=rngs
        ),
        inputs=(values(2, 5, 8),),
        unseen=("params/layer_instance/key/bias",),
    ),
    Pair(
        linen_name="SpectralNorm",
        nnx_name="SpectralNorm",
        linen=nn.SpectralNorm(nn.Dense(3)),
        nnx=lambda rngs: nnx.SpectralNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs),
        inputs=(values(2, 4),),
        linen_kwargs={"update_stats": False},
        nnx_kwargs={"update_stats": False},
        training=SPECTRAL_NORM,
    ),
    Pair(
        linen_name="WeightNorm, SpectralNorm",
        nnx_name="WeightNorm, SpectralNorm",
        variant="automatic names",
        linen=LinenAutoNamed(),
        nnx=NnxAutoNamed,
        inputs=(values(2, 5, 4),),
        linen_kwargs={"update_stats": False},
        nnx_kwargs={"update_stats": False},
        training=SPECTRAL_NORM,
        renames=(("WeightNorm_0", "scaled"), ("SpectralNorm_0", "bounded")),
    ),
)
