"""Which stored leaves are codes: scales lie beside them, in one box with them or in a collection."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from orbax_nnx_handler.planning.core.dtypes import scales_of
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from tests.sampled import sampled


def leaf(path: str, shape: tuple[int, ...], dtype: Any = "float32") -> StoredLeaf:
    return StoredLeaf(path=tuple(path.split("/")), shape=shape, dtype=np.dtype(jnp.dtype(dtype)))


def found(*leaves: StoredLeaf) -> dict[str, list[str]]:
    scales = scales_of(leaves)
    return {"/".join(code): ["/".join(path) for path in paths] for code, paths in scales.items()}


CODES = ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int8", "uint8", "int4", "uint4", "int32"]


@pytest.mark.parametrize(
    ("names", "shape", "dtype"),
    sampled(
        [
            ("params/up/kernel", "params/up/kernel_scale"),
            ("params/up/kernel", "params/up/kernel_scale_inv"),
            ("params/up/kernel", "params/up/weight_scale_inv"),
            ("params/up/kernel", "params/up/scale"),
            ("params/up/kernel", "params/up/kernel_absmax"),
            ("params/up/kernel/qvalue", "params/up/kernel/scale"),
            ("params/up/kernel/array/qvalue", "params/up/kernel/array/scale"),
            ("params/up/kernel/codes", "params/up/kernel/step"),
            ("params/up/kernel/value", "params/up/kernel/scale"),
            ("params/up/kernel/value", "params/up/kernel/scale/value"),
            ("up/kernel/value", "up/kernel_scale/value"),
            ("params/up/kernel", "scales/up/kernel"),
            ("params/up/kernel", "quant/up/kernel"),
            ("params/up/kernel", "quant_params/params/up/kernel_scale"),
            ("params/params/up/kernel", "params/scales/up/kernel"),
            ("up/kernel", "scales/up/kernel"),
            ("opt_state/0/mu/up/kernel/q", "opt_state/0/mu/up/kernel/absmax"),
        ],
        [(), (6,), (1, 6), (4, 1)],
        CODES,
    ),
)
def test_a_smaller_leaf_of_wider_floats_beside_a_code_is_its_scale(
    names: tuple[str, str], dtype: str, shape: tuple[int, ...]
) -> None:
    code, scale = names

    assert found(leaf(code, (4, 6), dtype), leaf(scale, shape)) == {code: [scale]}


@pytest.mark.parametrize(
    ("code", "other"),
    [
        (leaf("params/up/kernel", (4, 6), "float8_e4m3fn"), leaf("params/up/bias", (6,))),
        (leaf("params/up/kernel", (4, 6), "float8_e4m3fn"), leaf("params/down/kernel_scale", (6,))),
        (leaf("params/up/kernel", (4, 6), "float8_e4m3fn"), leaf("ema_params/up/kernel", (4, 6))),
        (leaf("params/up/kernel", (4, 6), "float8_e4m3fn"), leaf("params/up/scale", (6,), "float8_e4m3fn")),
        (leaf("params/up/kernel", (4, 6), "bfloat16"), leaf("params/up/kernel_scale", (6,))),
        (leaf("params/up/kernel", (4, 6)), leaf("params/up/kernel_scale", (6,))),
        (leaf("encoder/up/kernel", (4, 6), "float8_e4m3fn"), leaf("decoder/up/kernel", (2, 6))),
        (leaf("up/kernel", (4, 6), "float8_e4m3fn"), leaf("down/kernel", (2, 6))),
        (leaf("params/step", (), "int32"), leaf("params/step_scale", ())),
    ],
)
def test_other_leaves_are_none(code: StoredLeaf, other: StoredLeaf) -> None:
    assert found(code, other) == {}


def test_the_scales_of_a_microscaling_format_are_exponents_of_8_bits() -> None:
    scale = leaf("params/up/kernel_scale", (4, 2), "float8_e8m0fnu")

    assert found(leaf("params/up/kernel", (4, 64), "float8_e4m3fn"), scale)


def test_scales_of_small_floats_belong_to_yet_smaller_codes() -> None:
    scale = leaf("params/up/kernel_scale", (4, 4), "float8_e4m3fn")

    assert found(leaf("params/up/kernel", (4, 64), "float4_e2m1fn"), scale)
