"""`convert` of layers with a level of their own, `h/0` and `h/1`, as Flax models of transformers have it."""

import numpy as np
import optax
import pytest

from tests.cli.conftest import stock
from tests.laws.worlds import Numbers, check, flat, write
from tests.storage.checkpoint import hugging_face


def model(numbers, layers=3):
    """Returns a model whose layers are `transformer/h/0` and so on."""
    layer = [{"attn": {"kernel": numbers(4, 12)}, "ln_1": {"scale": numbers(4)}} for _ in range(layers)]
    blocks = {str(at): part for at, part in enumerate(layer)}
    return {"transformer": {"wte": {"embedding": numbers(10, 4)}, "h": blocks}}


def stacked(tree, axis=0):
    """Returns the same with the layers stacked, by NumPy alone."""
    blocks = tree["transformer"]["h"]
    parts = [flat(blocks[str(at)]) for at in range(len(blocks))]
    whole = {}
    for (module, name), first in parts[0].items():
        stack = np.stack([part[module, name] for part in parts], min(axis, first.ndim))
        whole.setdefault(module, {})[name] = stack
    return {"transformer": tree["transformer"] | {"h": whole}}


@pytest.mark.parametrize("layers", [2, 12])
def test_layers_below_a_module_of_their_own_are_stacked_with_their_moments(cli, tmp_path, layers) -> None:
    numbers = Numbers()
    params = model(numbers, layers)
    adam = numbers.optimizer(optax.adam(1e-3), params)
    path = write(tmp_path, {"params": params, "opt_state": adam, "step": numbers(1, dtype=np.int32)})

    said = cli("convert", path, tmp_path / "out", "--scan", "transformer/h", "--axis", 0)

    assert said.status == 0, said.err
    before, found = stock(path), stock(tmp_path / "out")
    check(found["params"], stacked(before["params"]))
    assert flat(found["params"]).keys() == flat(stacked(before["params"])).keys()
    for name in ("mu", "nu"):
        check(found["opt_state"][0][name], stacked(before["opt_state"][0][name]))


def test_layers_of_a_list_are_stacked(cli, tmp_path) -> None:
    numbers = Numbers()
    path = write(tmp_path, {"params": {"h": [{"w": numbers(4)}, {"w": numbers(4)}]}})

    said = cli("convert", path, tmp_path / "out", "--scan", "h", "--axis", 0)

    assert said.status == 0, said.err
    layers = stock(path)["params"]["h"]
    check(stock(tmp_path / "out")["params"], {"h": {"w": np.stack([layer["w"] for layer in layers])}})


def test_what_lies_beside_numbered_layers_is_not_mixed_with_their_stack(cli, tmp_path) -> None:
    numbers = Numbers()
    blocks = {"0": {"w": numbers(4)}, "1": {"w": numbers(4)}, "norm": {"scale": numbers(4)}}
    path = write(tmp_path, {"params": {"h": blocks}})

    said = cli("convert", path, tmp_path / "out", "--scan", "h", "--axis", 0)

    assert said.status == 1
    assert said.err.startswith(
        "RestoreError: 1 leaf lies beside the layers of h, which would lie in their stack:\n"
        "  params/h/norm/scale\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_group_without_its_levels_is_told_with_the_groups_that_there_are(cli, tmp_path) -> None:
    path = write(tmp_path, {"params": model(Numbers())})
    cli("convert", path, tmp_path / "stack", "--scan", "transformer/h", "--axis", 0)

    scan = cli("convert", path, tmp_path / "out", "--scan", "h", "--axis", 0)
    unscan = cli("convert", tmp_path / "stack", tmp_path / "out", "--unscan", "h", "--axis", 0)

    assert (scan.status, unscan.status) == (1, 1)
    there = "a group is a path below a collection or a train state; there are: transformer/h."
    assert scan.err == f"RestoreError: no parameter lies under h_0 or h/0.\nhint: {there}\n"
    assert unscan.err == f"RestoreError: no parameter lies under h.\nhint: {there}\n"


@pytest.mark.parametrize("form", ["safetensors", "safetensors_in_parts", "msgpack", "msgpack_in_parts"])
def test_a_directory_of_a_flax_model_becomes_another_layout(cli, tmp_path, form) -> None:
    tree = model(Numbers())
    folder = getattr(hugging_face, form)(tmp_path / "in", tree)

    there = cli("convert", folder, tmp_path / "there", "--to", "maxtext")
    scanned = ("--to", "maxtext", "--scan", "transformer/h", "--axis", 1)
    stack = cli("convert", folder, tmp_path / "stack", *scanned)

    assert (there.status, stack.status) == (0, 0), there.err + stack.err
    check(stock(tmp_path / "there")["params"]["params"], tree)
    check(stock(tmp_path / "stack")["params"]["params"], stacked(tree, axis=1))


def test_safetensors_of_pytorch_are_no_linen_programs(cli, tmp_path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    arrays = hugging_face.flat(model(Numbers()), ".")
    header = hugging_face.header_of(arrays) | {"__metadata__": {"format": "pt"}}
    hugging_face.write_file(folder / "model.safetensors", header, arrays)

    said = cli("convert", folder, tmp_path / "out", "--to", "maxtext")

    assert said.status == 1
    assert "6 leaves are named as NNX names them" in said.err
    assert "(SRC DST MODULE:FACTORY --to maxtext)" in said.err
