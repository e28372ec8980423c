"""Gemma's released weights: nested, flat with slashes in the keys, stacked by kind of attention."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import Rename, Reshape, Split, Transpose, restore
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.layouts.nnx_programs import GEMMA
from tests.layouts import language, writers
from tests.layouts.programs import TOLERANCE, random_tree

# The forms, and the one name that the NNX program has otherwise.
FORMS = {
    "nested": ("layer_{number}", "layers/{number}"),
    "flat": ("layer_{number}", "layers/{number}"),
    "stacked": ("layer", "layers"),
}


@pytest.fixture(scope="module")
def params() -> Any:
    shapes = jax.eval_shape(lambda: language.LinenGemma().init(jax.random.key(0), language.TOKENS))
    return random_tree(shapes)["params"]


@pytest.mark.parametrize("form", FORMS)
def test_released_weights_give_the_same_logits_in_nnx(tmp_path: Path, params: Any, form: str) -> None:
    path = writers.write_standard(tmp_path / "gemma", writers.gemma_tree(params, form, language.KINDS))
    target = nnx.eval_shape(language.NnxGemma)

    model = restore(path, target, renames=[FORMS[form]], unexpected="error")

    expected = language.LinenGemma().apply({"params": params}, language.TOKENS)
    np.testing.assert_allclose(model(language.TOKENS), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("form", ["flat", "stacked"])
def test_a_module_with_gemmas_own_names_needs_no_rename(tmp_path: Path, params: Any, form: str) -> None:
    path = writers.write_standard(tmp_path / "gemma", writers.gemma_tree(params, form, language.KINDS))
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)

    tree = restore(path, target, unexpected="error")

    jax.tree.map(np.testing.assert_array_equal, tree, params)


@pytest.mark.parametrize("form", ["nested", "flat"])
def test_a_port_with_a_linear_layer_for_each_projection_needs_rules_only(
    tmp_path: Path, params: Any, form: str
) -> None:
    path = writers.write_standard(tmp_path / "gemma", writers.gemma_tree(params, form, language.KINDS))
    target = nnx.eval_shape(lambda: language.NnxGemma(language.PORTED_SHAPES))
    rules = [
        Rename("layer_{number}", "layers/{number}"),
        Rename("mlp/linear", "mlp/down_proj/kernel"),
        Split("mlp/gating_einsum", ("mlp/gate_proj/kernel", "mlp/up_proj/kernel"), axis=0),
        Reshape("mlp/gate_proj/kernel", (language.HIDDEN, language.WIDTH)),
        Reshape("mlp/up_proj/kernel", (language.HIDDEN, language.WIDTH)),
        Transpose("mlp/gate_proj/kernel", (1, 0)),
        Transpose("mlp/up_proj/kernel", (1, 0)),
    ]

    model = restore(path, target, renames=rules, unexpected="error")

    expected = language.LinenGemma().apply({"params": params}, language.TOKENS)
    np.testing.assert_allclose(model(language.TOKENS), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_image_encoder_of_the_flat_form_goes_into_the_module_of_gemmas_own_name(tmp_path: Path) -> None:
    position, scale = np.arange(8.0).reshape(1, 4, 2), np.arange(2.0)
    tree = {
        "transformer/final_norm": {"scale": -scale},
        "SigLiPFromPatches_0/siglip_encoder": {"pos_embedding": position},
        "SigLiPFromPatches_0/siglip_encoder/Transformer/encoder_norm": {"scale": scale},
    }
    target = {
        "final_norm": {"scale": jax.ShapeDtypeStruct((2,), np.float32)},
        "vision_encoder": {
            "siglip_encoder": {
                "pos_embedding": jax.ShapeDtypeStruct((1, 4, 2), np.float32),
                "Transformer": {"encoder_norm": {"scale": jax.ShapeDtypeStruct((2,), np.float32)}},
            }
        },
    }
    path = writers.write_standard(tmp_path / "gemma", tree)
    as_modules = jax.tree.map(nnx.Param, target)

    for found in (restore(path, target), nnx.to_pure_dict(restore(path, nnx.State(as_modules)))):
        np.testing.assert_array_equal(found["final_norm"]["scale"], -scale)
        encoder = found["vision_encoder"]["siglip_encoder"]
        np.testing.assert_array_equal(encoder["pos_embedding"], position)
        np.testing.assert_array_equal(encoder["Transformer"]["encoder_norm"]["scale"], scale)


def test_the_image_encoder_is_placed_as_gemmas_loader_does() -> None:
    path = ("SigLiPFromPatches_0/siglip_encoder/Transformer/encoder_norm", "scale")
    leaf = StoredLeaf(path=path, shape=(8,), dtype=np.dtype(np.float32))

    (placement,) = GEMMA.place({path: leaf})

    assert placement.path == ("vision_encoder", "siglip_encoder", "Transformer", "encoder_norm", "scale")
