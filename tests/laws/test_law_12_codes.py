"""Law 12: codes are not weights."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import restore, save
from tests.laws.worlds import FORMS, Numbers, check, refused, target_of, write
from tests.sampled import sampled

FLOATS = {jnp.float8_e4m3fn: 448, jnp.float8_e5m2: 57344, jnp.float4_e2m1fn: 6}
INTEGERS = {jnp.int8: 127, jnp.int4: 7}
SCALES = ("kernel_scale", "kernel_scale_inv", "scale", "weight_scale_inv")


def _model(numbers):
    return {"hidden": numbers.dense(4, 8), "out": numbers.dense(8, 3)}


def _quantised(model, dtype, kept):
    """Returns the layers with their kernels kept as codes and scales."""
    stored = {}
    for layer, parts in model.items():
        codes, scale = _codes(parts["kernel"], dtype, (FLOATS | INTEGERS)[dtype])
        stored[layer] = {"bias": parts["bias"], **kept(codes, scale)}
    return stored


def _codes(kernel, dtype, top):
    scale = np.abs(kernel).max(0, keepdims=True) / top
    return jnp.asarray(np.round(kernel / scale) if top == 127 else kernel / scale).astype(dtype), scale


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=lambda dtype: jnp.dtype(dtype).name)
def test_codes_with_a_scale_beside_them_are_said_to_be_quantised(tmp_path, dtype, name):
    model = _model(Numbers())
    stored = _quantised(model, dtype, lambda codes, scale: {"kernel": codes, name: scale})
    error = refused(write(tmp_path, {"params": stored}), target_of("module", model), unexpected="ignore")
    assert "quantis" in str(error)


WRAPPED = {
    "aqt": lambda codes, scale: {"qvalue": codes, "scale": scale},
    "qwix": lambda codes, scale: {"array": {"qvalue": codes, "scale": scale}},
    "boxed": lambda codes, scale: {"value": codes, "scale": scale},
}


@pytest.mark.parametrize(("dtype", "wrapped", "form"), sampled([jnp.int8, jnp.float8_e4m3fn], WRAPPED, FORMS))
def test_a_tree_per_kernel_is_said_to_be_quantised(tmp_path, dtype, wrapped, form):
    model = _model(Numbers())
    stored = _quantised(model, dtype, lambda codes, scale: {"kernel": WRAPPED[wrapped](codes, scale)})
    error = refused(write(tmp_path, {"params": stored}), target_of(form, model), unexpected="ignore")
    assert "quantis" in str(error)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: jnp.dtype(dtype).name)
def test_scales_in_a_collection_of_their_own_are_seen(tmp_path, dtype):
    model = _model(Numbers())
    params, scales = {}, {}
    for layer, parts in model.items():
        codes, scale = _codes(parts["kernel"], dtype, FLOATS[dtype])
        params[layer], scales[layer] = {"bias": parts["bias"], "kernel": codes}, {"kernel": scale}
    path = write(tmp_path, {"params": params, "scales": scales})
    refused(path, target_of("module", model), unexpected="ignore")


@pytest.mark.parametrize("dtype", [*FLOATS, jnp.int8], ids=lambda dtype: jnp.dtype(dtype).name)
def test_codes_into_codes_of_the_same_type_are_restored(tmp_path, dtype):
    codes = jnp.asarray(np.arange(6).reshape(2, 3), jnp.float32).astype(dtype)
    stored = {"dense": {"kernel": codes, "kernel_scale": np.float32(3.5)}}
    path = write(tmp_path, {"params": stored})
    result = restore(path, target_of("pure", stored))
    np.testing.assert_array_equal(
        np.asarray(result["dense"]["kernel"]).astype(np.float32), np.asarray(codes).astype(np.float32)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_quantised_layer_of_a_stack_is_seen(tmp_path, which, form):
    numbers = Numbers()
    layers = [{"kernel": numbers(4, 5)} for _ in range(3)]
    codes, scale = _codes(layers[which]["kernel"], jnp.float8_e4m3fn, 448)
    stored = {f"layers_{at}": dict(layer) for at, layer in enumerate(layers)}
    stored[f"layers_{which}"] = {"kernel": codes, "kernel_scale": scale}
    wanted = {"layers": {"kernel": np.stack([layer["kernel"] for layer in layers])}}
    refused(write(tmp_path, {"params": stored}), target_of(form, wanted), unexpected="ignore")


@pytest.mark.parametrize(
    ("dtype", "name", "shape", "form"),
    sampled(
        [jnp.int8, jnp.float8_e4m3fn],
        ["kernel_scale", "kernel_scale_inv", "scale"],
        [(), (1,), (1, 1)],
        FORMS,
    ),
)
def test_a_single_code_with_a_scale_beside_it_is_quantised_too(tmp_path, dtype, name, shape, form):
    numbers = Numbers()
    model = {"one": {"kernel": numbers(1, 1), "bias": numbers(1)}, "out": numbers.dense(1, 3)}
    codes = jnp.asarray(model["one"]["kernel"]).astype(dtype)
    quantised = {"kernel": codes, "bias": model["one"]["bias"], name: numbers(*shape)}
    path = write(tmp_path, {"params": model | {"one": quantised}})
    error = refused(path, target_of(form, model), unexpected="ignore")
    assert "quantis" in str(error)


@pytest.mark.parametrize("form", FORMS)
def test_a_single_narrow_weight_without_a_scale_is_restored(tmp_path, form):
    numbers = Numbers()
    model = {"one": {"kernel": numbers(1, 1), "bias": numbers(1)}}
    narrow = jnp.asarray(model["one"]["kernel"]).astype(jnp.float8_e4m3fn)
    path = write(tmp_path, {"params": {"one": model["one"] | {"kernel": narrow}}})
    check(restore(path, target_of(form, model)), model)


@pytest.mark.parametrize(
    ("dtype", "name", "form"), sampled(FLOATS, ["kernel_scale", "kernel_scale_inv", "scale"], FORMS)
)
def test_codes_are_no_weights_where_the_target_wants_their_scale_too(tmp_path, dtype, name, form):
    model = _model(Numbers())
    stored, wanted = {}, {}
    for layer, parts in model.items():
        codes, scale = _codes(parts["kernel"], dtype, FLOATS[dtype])
        stored[layer] = {"bias": parts["bias"], "kernel": codes, name: scale}
        wanted[layer] = parts | {name: scale}
    error = refused(write(tmp_path, {"params": stored}), target_of(form, wanted))
    assert "quantis" in str(error)


@pytest.mark.parametrize(
    ("dtype", "name", "form"),
    sampled([jnp.int8, jnp.float8_e4m3fn], ["absmax", "amax_history", "d", "step_size"], FORMS),
)
def test_what_nothing_reads_beside_codes_is_their_scale_whatever_its_name(tmp_path, dtype, name, form):
    model = _model(Numbers())
    stored = _quantised(model, dtype, lambda codes, scale: {"kernel": codes, name: scale})
    error = refused(write(tmp_path, {"params": stored}), target_of(form, model), unexpected="ignore")
    assert "quantis" in str(error)


@pytest.mark.parametrize("form", FORMS)
def test_narrow_weights_beside_what_is_read_and_a_bias_left_unread_are_restored(tmp_path, form):
    numbers = Numbers()
    wanted = {"out": {"kernel": numbers(2, 3), "gain": numbers(3)}}
    narrow = jnp.asarray(wanted["out"]["kernel"] % 8).astype(jnp.float8_e4m3fn)
    stored = {"out": {"kernel": narrow, "gain": wanted["out"]["gain"], "bias": numbers(3)}}
    path = write(tmp_path, {"params": stored})
    expected = {"out": {"kernel": np.asarray(narrow).astype(np.float32), "gain": wanted["out"]["gain"]}}
    check(restore(path, target_of(form, wanted), unexpected="ignore"), expected)


@pytest.mark.parametrize(
    ("name", "where", "form"),
    sampled(["scale", "amax_history", "meta"], ["beside", "apart", "variables", "called in full"], FORMS),
)
def test_what_nothing_reads_and_is_called_after_the_codes_is_their_scale(tmp_path, where, name, form):
    numbers = Numbers()
    model = _model(numbers)
    params, aside = {}, {}
    for layer, parts in model.items():
        params[layer] = {"bias": parts["bias"], "kernel": parts["kernel"].astype(jnp.float8_e4m3fn)}
        aside[layer] = {name: numbers(4)}
    if where == "beside":
        params |= {f"{layer}_{name}": parts[name] for layer, parts in aside.items()}
    tree = {"params": params} | ({"quant": aside} if where == "apart" else {})
    tree |= {"quant": {"params": aside}} if where == "variables" else {}
    if where == "called in full":
        tree |= {"quant": {f"{layer}_{name}": parts[name] for layer, parts in aside.items()}}
    error = refused(write(tmp_path, tree), target_of(form, model), unexpected="ignore")
    assert "quantis" in str(error)


@pytest.mark.parametrize("beside", ["rate", "seen_scale", "seen64"])
def test_integers_that_are_wanted_as_integers_have_no_scale(tmp_path, beside):
    seen, rate = np.arange(7, 11), np.float32(0.25)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    item = {"model": model, "seen": seen, beside: rate}
    save(tmp_path / "item", item)

    found = restore(tmp_path / "item", item)

    np.testing.assert_array_equal(found["seen"], seen)
    assert found[beside] == rate
