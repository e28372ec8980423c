"""`orbax-nnx convert`: what it writes, compared with what stock Orbax reads on both sides."""

import contextlib
import pathlib
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import restore
from orbax_nnx_handler.commands.convert import interrupts
from orbax_nnx_handler.storage import converting
from orbax_nnx_handler.storage.converting import BlockWriter
from tests.cases import load_case, problems
from tests.cli import nnx_program
from tests.cli.conftest import MODEL, stock
from tests.processes import COMMAND_LINE, Forked

MAXTEXT = load_case("llama2_scanned_to_scanned")
LAYERS = 2


def flat(tree: object) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(value) for path, value in leaves}


def names_in(directory: pathlib.Path) -> list[str]:
    return [entry.name for entry in directory.iterdir()]


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_unscanning_to_linen_gives_each_layer_its_own_leaf_in_weights_and_moments(cli, tmp_path) -> None:
    source = stock(MAXTEXT.path)

    said = cli(
        "convert", MAXTEXT.path, tmp_path / "out", "--to", "linen", "--unscan", "decoder/layers", "--axis", 1
    )

    assert said.status == 0, said.err
    found = stock(tmp_path / "out")
    assert sorted(found) == sorted(source)
    assert found["opt_state"][1] is None
    for made, stacked in [
        (found["params"], source["params"]["params"]),
        (found["opt_state"][0]["mu"], source["opt_state"][0]["mu"]["params"]),
        (found["opt_state"][0]["nu"], source["opt_state"][0]["nu"]["params"]),
    ]:
        layers = stacked["decoder"].pop("layers")
        apart = [made["decoder"].pop(f"layers_{number}") for number in range(LAYERS)]
        for number, layer in enumerate(apart):
            assert_equal(flat(layer), {k: v[:, number] for k, v in flat(layers).items()})
        assert_equal(flat(made), flat(stacked))


def test_there_and_back_gives_the_same_checkpoint(cli, tmp_path) -> None:
    away, back = tmp_path / "7" / "items", tmp_path / "back"
    cli("convert", MAXTEXT.path, away, "--to", "linen", "--unscan", "decoder/layers", "--axis", 1)

    said = cli("convert", tmp_path, back, "--to", "maxtext", "--scan", "decoder/layers", "--axis", 1)

    assert said.status == 0, said.err
    assert_equal(flat(stock(back)), flat(stock(MAXTEXT.path)))


def test_what_was_converted_restores_as_exactly_as_the_original(cli, tmp_path) -> None:
    case = load_case("llama2_scanned_to_unscanned")

    cli("convert", case.path, tmp_path / "out", "--unscan", "decoder/layers", "--axis", 1)

    assert not problems(case, restore(tmp_path / "out", case.target))


def test_a_manager_finds_a_converted_step(cli, root, tmp_path) -> None:
    cli("convert", root, tmp_path / "1200" / "default")

    with ocp.CheckpointManager(tmp_path) as manager:
        found = manager.restore(1200, args=ocp.args.PyTreeRestore())

    assert_equal(flat(found), flat(stock(root / "200" / "default")))


def test_a_factory_gives_a_state_that_nnx_programs_restore_with_stock_orbax(cli, root, tmp_path) -> None:
    source = stock(root / "200" / "default")

    said = cli("convert", root, tmp_path / "out", f"{MODEL}:make")

    assert said.status == 0, said.err
    target = nnx.state(nnx.eval_shape(nnx_program.make))
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(tmp_path / "out", target)
    np.testing.assert_array_equal(
        state["hidden"][1]["kernel"].get_value(), source["params"]["hidden_1"]["kernel"]
    )
    np.testing.assert_array_equal(state["norm"]["var"].get_value(), source["batch_stats"]["norm"]["var"])
    fresh = nnx.state(nnx_program.make())["drop"]["rngs"]["key"].get_value()
    np.testing.assert_array_equal(
        jax.random.key_data(state["drop"]["rngs"]["key"].get_value()), jax.random.key_data(fresh)
    )


def test_a_factory_and_a_linen_layout_give_what_the_linen_program_wrote(cli, root, tmp_path) -> None:
    source = stock(root / "200" / "default")

    said = cli("convert", root, tmp_path / "out", f"{MODEL}:make_train", "--to", "linen")

    assert said.status == 0, said.err
    found = stock(tmp_path / "out")
    assert found["opt_state"][1] is None
    assert_equal(flat(found), flat(source))
    assert "2 leaves without a counterpart in Linen: 0/drop/rngs/count, 0/drop/rngs/key" in said.out


def test_weights_alone_in_bfloat16_are_numpy_s_own_rounding(cli, root, tmp_path) -> None:
    source = stock(root / "200" / "default")

    said = cli("convert", root, tmp_path / "out", "--weights-only", "--dtype", "bfloat16")

    assert said.status == 0, said.err
    expected = {name: source[name] for name in ("params", "batch_stats")}
    assert_equal(
        flat(stock(tmp_path / "out")), {k: v.astype(jnp.bfloat16) for k, v in flat(expected).items()}
    )


def test_a_dtype_leaves_the_moments_alone(cli, root, tmp_path) -> None:
    cli("convert", root, tmp_path / "out", "--dtype", "bfloat16")

    found = stock(tmp_path / "out")
    assert found["params"]["up"]["kernel"].dtype == jnp.bfloat16
    assert found["opt_state"][0]["nu"]["up"]["kernel"].dtype == jnp.float32


def test_leaves_larger_than_the_window_are_written_in_chunks(cli, tmp_path, monkeypatch) -> None:
    value = np.arange(37 * 5 * 11, dtype=np.float32).reshape(37, 5, 11)
    ocp.PyTreeCheckpointer().save(tmp_path / "in", {"params": {"w": value}})
    monkeypatch.setattr(converting, "window_of", lambda _: 1000)

    said = cli("convert", tmp_path / "in", tmp_path / "out")

    assert said.status == 0, said.err
    assert_equal(flat(stock(tmp_path / "out")["params"]), {"['w']": value})
    (leaf,) = cli("tree", tmp_path / "out", "--json").json["leaves"]
    assert leaf["chunk_shape"] == [4, 5, 11]


def test_nothing_is_overwritten(cli, root, tmp_path) -> None:
    (tmp_path / "out").mkdir()

    said = cli("convert", root, tmp_path / "out")

    assert said.status == 1
    assert said.err == (
        f"RestoreError: there is something at {tmp_path}/out already; nothing is overwritten.\n"
        "hint: name another destination, or take away what is there.\n"
    )
    assert names_in(tmp_path / "out") == []


@pytest.mark.parametrize("place", ["out", "new/1200/items"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_conversion_that_stops_midway_leaves_nothing(
    cli, root, tmp_path, monkeypatch, error, place
) -> None:
    def fail(self, batch, arrays) -> None:
        raise error

    monkeypatch.setattr(BlockWriter, "_write", fail)

    said = cli("convert", root, tmp_path / place)

    assert names_in(tmp_path) == []
    if isinstance(error, KeyboardInterrupt):
        assert said.status == 130
    else:
        assert said.status == 1
        assert said.err == (
            f"RestoreError: {tmp_path / place} cannot be written: disk full\n"
            "hint: nothing was left at the destination.\n"
        )


def test_an_interrupt_that_python_drops_is_raised_at_the_next_step() -> None:
    with interrupts() as check:
        check()
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            check()

    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_values_that_come_back_changed_leave_nothing(cli, root, tmp_path, monkeypatch) -> None:
    honest = BlockWriter._write

    def flip(self, batch, arrays) -> None:
        honest(self, batch, arrays)
        for block in batch:
            if block.leaf.path[-2:] == ("up", "kernel"):
                wrong = block.values.copy()
                wrong.flat[3] += 1
                arrays[block.leaf.path].write(wrong).result()

    monkeypatch.setattr(BlockWriter, "_write", flip)

    said = cli("convert", root, tmp_path / "out")

    assert said.status == 1
    assert said.err.startswith(
        "RestoreError: 3 leaves were read again with other values than were written:\n"
    )
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_from_the_keyboard_or_a_scheduler_leaves_nothing(tmp_path, number) -> None:
    value = np.random.default_rng(0).random((256, 1024, 128), np.float32)
    ocp.PyTreeCheckpointer().save(tmp_path / "in", {"params": {"w": value}})
    out = tmp_path / "out"
    out.mkdir()
    process = Forked(COMMAND_LINE, "convert", str(tmp_path / "in"), str(out / "it"))
    deadline = time.monotonic() + 60
    while not names_in(out) and time.monotonic() < deadline:
        time.sleep(0.01)

    process.send_signal(number)

    assert process.wait() == 130, process.stderr
    assert process.stderr.endswith("interrupted: nothing was changed\n")
    assert names_in(out) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "nnx"], "--to nnx needs the MODULE:FACTORY"),
        (["--unscan", "hidden"], "need --axis"),
        (["--axis", "1"], "--axis goes with --scan or --unscan"),
        (["--rename", "a=b"], "--rename, --rules and --policy need a MODULE:FACTORY."),
        (["--dtype", "float99"], "there is no such dtype"),
        (["--dtype", "int8"], "weights are floating-point numbers"),
        ([f"{MODEL}:make", "--scan", "hidden", "--axis", "0"], "without a factory"),
    ],
)
def test_options_that_contradict_each_other_are_status_2(cli, root, tmp_path, options, words) -> None:
    said = cli("convert", root, tmp_path / "out", *options)

    assert said.status == 2
    assert words in said.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scan", "nothing", "--axis", "0"], "no parameter lies under nothing_0 or nothing/0."),
        (["--unscan", "hidden", "--axis", "0"], "no parameter lies under hidden."),
        (["--unscan", "up/kernel", "--axis", "0"], "no parameter lies under up/kernel."),
        (["--unscan", "up", "--axis", "0"], "do not agree on a number of layers on axis 0"),
    ],
)
def test_groups_that_are_none_are_refused(cli, root, tmp_path, options, words) -> None:
    said = cli("convert", root, tmp_path / "out", *options)

    assert said.status == 1
    assert words in said.err
    assert names_in(tmp_path) == []


def test_layers_scan_onto_the_axis_that_was_named(cli, root, tmp_path) -> None:
    source = stock(root / "200" / "default")

    said = cli("convert", root, tmp_path / "out", "--scan", "hidden", "--axis", 0)

    assert said.status == 0, said.err
    found = stock(tmp_path / "out")
    layers = [source["params"][f"hidden_{number}"]["kernel"] for number in range(3)]
    np.testing.assert_array_equal(found["params"]["hidden"]["kernel"], np.stack(layers))


def test_a_saved_state_alone_cannot_become_linen(cli, tmp_path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "in", nnx.state(nnx_program.make(), nnx.Param))

    said = cli("convert", tmp_path / "in", tmp_path / "out", "--to", "linen")

    assert said.status == 1
    assert "a saved NNX state does not tell parameters from statistics" in said.err


def test_source_paths_are_not_touched(cli, root, tmp_path) -> None:
    def stamp(path: pathlib.Path) -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in path.rglob("*")}

    before = stamp(root)

    cli("convert", root, tmp_path / "out")

    assert stamp(root) == before


def _stored(path: pathlib.Path, **leaves: np.ndarray | jax.Array) -> pathlib.Path:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, {"params": {"up": leaves}})
    return path


def test_values_that_are_rounded_are_listed(cli, tmp_path) -> None:
    source = _stored(tmp_path / "src", kernel=np.ones((2, 2), np.float32))

    said = cli("convert", source, tmp_path / "dst", "--dtype", "bfloat16")

    assert said.status == 0
    assert "rounded    1 leaf: params/up/kernel" in said.err + said.out


def test_a_value_that_a_dtype_cannot_hold_is_refused(cli, tmp_path) -> None:
    source = _stored(tmp_path / "src", kernel=np.array([[1.0, 1e5]], np.float32))

    said = cli("convert", source, tmp_path / "dst", "--dtype", "float16")

    assert said.status == 1
    assert "stored leaf params/up/kernel (float32) holds 100000.0, which float16 cannot hold." in said.err
    assert names_in(tmp_path) == ["src"]


def test_codes_are_not_written_as_weights_of_another_dtype(cli, tmp_path) -> None:
    codes = jnp.ones((4, 6), jnp.float8_e4m3fn)
    source = _stored(tmp_path / "src", kernel=codes, kernel_scale=np.ones(6, np.float32))

    said = cli("convert", source, tmp_path / "dst", "--dtype", "bfloat16")

    assert said.status == 1
    assert "quantised, with scales such as params/up/kernel_scale" in said.err
    assert names_in(tmp_path) == ["src"]
    assert cli("convert", source, tmp_path / "dst").status == 0
