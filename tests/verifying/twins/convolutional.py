"""Convolutions: residual blocks with batch statistics, and a U-Net with skip connections."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from tests.verifying.twins.twin import Twin, attend

_IMAGES = np.random.default_rng(4).normal(size=(2, 8, 8, 3)).astype("f")


class LinenResidual(nn.Module):
    filters: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        y = nn.relu(norm()(conv(self.filters, (3, 3), self.stride, padding=1)(x)))
        y = norm()(conv(self.filters, (3, 3), padding=1)(y))
        if y.shape != x.shape:
            x = norm(name="norm_proj")(conv(self.filters, (1, 1), self.stride, name="conv_proj")(x))
        return nn.relu(x + y)


class LinenResnet(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv_init")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="bn_init")(x))
        for filters, stride in ((4, 1), (8, 2), (8, 1)):
            x = LinenResidual(filters, stride)(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Residual(nnx.Module):
    def __init__(self, before, filters, stride, padding, epsilon, rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = functools.partial(nnx.BatchNorm, use_running_average=True, epsilon=epsilon, rngs=rngs)
        self.conv1 = conv(before, filters, (3, 3), strides=stride, padding=padding)
        self.conv2 = conv(filters, filters, (3, 3), padding=1)
        self.bn1, self.bn2 = norm(filters), norm(filters)
        shortcut = [conv(before, filters, (1, 1), strides=stride), norm(filters)]
        self.downsample = nnx.Sequential(*shortcut) if before != filters else None

    def __call__(self, x):
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        return nnx.relu(y + (x if self.downsample is None else self.downsample(x)))


class Resnet(nnx.Module):
    def __init__(self, rngs, padding=1, epsilon=1e-5, pool=jnp.mean):
        self.conv1 = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        sizes = ((4, 4, 1), (4, 8, 2), (8, 8, 1))
        self.layers = nnx.List([Residual(*size, padding, epsilon, rngs) for size in sizes])
        self.fc, self.pool = nnx.Linear(8, 5, rngs=rngs), pool

    def __call__(self, images):
        x = nnx.relu(self.bn1(self.conv1(images)))
        for layer in self.layers:
            x = layer(x)
        return self.fc(self.pool(x, (1, 2)))


RESNET = Twin(
    name="resnet",
    linen=LinenResnet(),
    make=lambda **changed: Resnet(nnx.Rngs(0), **changed),
    inputs=(_IMAGES,),
    rules=[
        ("conv_init", "conv1"),
        ("bn_init", "bn1"),
        *(
            (f"LinenResidual_{{i}}/{stored}", f"layers/{{i}}/{wanted}")
            for stored, wanted in (
                ("Conv_0", "conv1"),
                ("Conv_1", "conv2"),
                ("BatchNorm_0", "bn1"),
                ("BatchNorm_1", "bn2"),
                ("conv_proj", "downsample/layers/0"),
                ("norm_proj", "downsample/layers/1"),
            )
        ),
        ("head", "fc"),
    ],
    faults={
        "another padding": ({"padding": "SAME"}, "layers/1/conv1"),
        "another epsilon": ({"epsilon": 1e-3}, "layers/0/bn1"),
        "another pooling": ({"pool": jnp.max}, "(root)"),
    },
)


class LinenUnetBlock(nn.Module):
    filters: int

    @nn.compact
    def __call__(self, x, time):
        y = nn.Conv(self.filters, (3, 3), name="conv1")(nn.silu(nn.GroupNorm(2, name="norm1")(x)))
        y = y + nn.Dense(self.filters, name="time_emb_proj")(nn.silu(time))[:, None, None]
        y = nn.Conv(self.filters, (3, 3), name="conv2")(nn.silu(nn.GroupNorm(2, name="norm2")(y)))
        shortcut = nn.Conv(self.filters, (1, 1), name="conv_shortcut")(x) if x.shape != y.shape else x
        return shortcut + y


class LinenUnetAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.GroupNorm(2, name="group_norm")(x).reshape(len(x), -1, x.shape[-1])
        q, k, v = (nn.Dense(x.shape[-1], name=name)(y) for name in ("query", "key", "value"))
        y = nn.Dense(x.shape[-1], name="proj_attn")(attend(q, k, v, causal=False, heads=1))
        return x + y.reshape(x.shape)


class LinenUnet(nn.Module):
    @nn.compact
    def __call__(self, images, time):
        time = nn.Dense(8, name="time_embedding")(time[:, None])
        x = nn.Conv(4, (3, 3), name="conv_in")(images)
        skips = [x]
        x = LinenUnetBlock(4, name="down_blocks_0")(x, time)
        skips.append(x)
        x = LinenUnetBlock(8, name="down_blocks_1")(nn.Conv(4, (3, 3), 2, name="downsampler")(x), time)
        x = LinenUnetAttention(name="mid_attention")(x)
        x = LinenUnetBlock(8, name="mid_block")(x, time)
        x = nn.ConvTranspose(4, (2, 2), (2, 2), name="upsampler")(x)
        for level in range(2):
            x = LinenUnetBlock(4, name=f"up_blocks_{level}")(jnp.concatenate([x, skips.pop()], -1), time)
        return nn.Conv(3, (3, 3), name="conv_out")(nn.silu(nn.GroupNorm(2, name="norm_out")(x)))


class UnetBlock(nnx.Module):
    def __init__(self, before, filters, activation, rngs):
        self.gn1, self.gn2 = nnx.GroupNorm(before, 2, rngs=rngs), nnx.GroupNorm(filters, 2, rngs=rngs)
        self.c1 = nnx.Conv(before, filters, (3, 3), rngs=rngs)
        self.c2 = nnx.Conv(filters, filters, (3, 3), rngs=rngs)
        self.temb = nnx.Linear(8, filters, rngs=rngs)
        self.skip = nnx.Conv(before, filters, (1, 1), rngs=rngs) if before != filters else None
        self.activation = activation

    def __call__(self, x, time):
        y = self.c1(self.activation(self.gn1(x))) + self.temb(self.activation(time))[:, None, None]
        y = self.c2(self.activation(self.gn2(y)))
        return y + (x if self.skip is None else self.skip(x))


class UnetAttention(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.GroupNorm(8, 2, rngs=rngs)
        self.to_q, self.to_k, self.to_v, self.to_out = (nnx.Linear(8, 8, rngs=rngs) for _ in range(4))

    def __call__(self, x):
        y = self.norm(x).reshape(len(x), -1, 8)
        y = attend(self.to_q(y), self.to_k(y), self.to_v(y), causal=False, heads=1)
        return x + self.to_out(y).reshape(x.shape)


class Unet(nnx.Module):
    def __init__(self, rngs, activation=nnx.silu, skip_first=False):
        block = functools.partial(UnetBlock, activation=activation, rngs=rngs)
        self.time, self.stem = nnx.Linear(1, 8, rngs=rngs), nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.down = nnx.List([block(4, 4), block(4, 8)])
        self.shrink = nnx.Conv(4, 4, (3, 3), strides=2, rngs=rngs)
        self.attention, self.middle = UnetAttention(rngs), block(8, 8)
        self.grow = nnx.ConvTranspose(8, 4, (2, 2), strides=(2, 2), transpose_kernel=False, rngs=rngs)
        self.up = nnx.List([block(8, 4), block(8, 4)])
        self.norm, self.final = nnx.GroupNorm(4, 2, rngs=rngs), nnx.Conv(4, 3, (3, 3), rngs=rngs)
        self.skip_first = skip_first

    def __call__(self, images, time):
        time = self.time(time[:, None])
        first = self.stem(images)
        second = self.down[0](first, time)
        x = self.down[1](self.shrink(second), time)
        x = self.grow(self.middle(self.attention(x), time))
        for block, skip in zip(self.up, (second, first), strict=True):
            x = block(jnp.concatenate([skip, x] if self.skip_first else [x, skip], -1), time)
        return self.final(nnx.silu(self.norm(x)))


_BLOCK = {
    "norm1": "gn1",
    "conv1": "c1",
    "time_emb_proj": "temb",
    "norm2": "gn2",
    "conv2": "c2",
    "conv_shortcut": "skip",
}


def _of_block(stored: str, wanted: str, *, shortcut: bool = True) -> list[Any]:
    return [
        (f"{stored}/{one}", f"{wanted}/{other}")
        for one, other in _BLOCK.items()
        if shortcut or one != "conv_shortcut"
    ]


UNET = Twin(
    name="unet",
    linen=LinenUnet(),
    make=lambda **changed: Unet(nnx.Rngs(0), **changed),
    inputs=(_IMAGES, np.array([0.5, -1.5], "f")),
    rules=[
        ("time_embedding", "time"),
        ("conv_in", "stem"),
        *_of_block("down_blocks_{i}", "down/{i}"),
        ("downsampler", "shrink"),
        ("mid_attention/group_norm", "attention/norm"),
        *(
            (f"mid_attention/{stored}", f"attention/{wanted}")
            for stored, wanted in (
                ("query", "to_q"),
                ("key", "to_k"),
                ("value", "to_v"),
                ("proj_attn", "to_out"),
            )
        ),
        *_of_block("mid_block", "middle", shortcut=False),
        ("upsampler", "grow"),
        *_of_block("up_blocks_{i}", "up/{i}"),
        ("norm_out", "norm"),
        ("conv_out", "final"),
    ],
    faults={
        "another activation": ({"activation": nnx.gelu}, "down/0"),
        "skip connections joined the other way": ({"skip_first": True}, "(root)"),
    },
)
