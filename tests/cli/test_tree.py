"""`orbax-nnx tree`: the whole text, the whole JSON."""

import numpy as np

from tests.cases import load_case


def test_the_tree_of_a_manager_s_root_names_steps_items_and_parts(cli, root) -> None:
    said = cli("tree", root, "--depth", 1)

    assert said.status == 0
    assert said.err == ""
    assert (
        said.out
        == f"""\
{root}/200/default
  layout        Flax TrainState
  disk format   ocdbt+zarr
  steps         100, 200
  items         default
  in all        40 leaves, 4.9 kB

  step             1 leaf      4 B
  params        12 leaves   1.6 kB
  optimizer     25 leaves   3.2 kB
  batch_stats    2 leaves     64 B

  batch_stats   2 leaves    64 B
  opt_state     25 leaves   3.2 kB
  params        12 leaves   1.6 kB
  step          1 leaf      4 B
"""
    )


def test_a_relative_path_has_the_same_steps_and_items(cli, root, monkeypatch) -> None:
    monkeypatch.chdir(root.parent)

    for path in (root.name, f"{root.name}/200", f"{root.name}/200/default"):
        said = cli("tree", path, "--depth", 1)
        assert "  steps         100, 200\n  items         default\n" in said.out


def test_leaves_have_shape_dtype_chunks_and_bytes_and_layers_are_folded(cli, root) -> None:
    said = cli("tree", root)

    rows = [line.split() for line in said.out.splitlines() if line]
    layers = next(row for row in rows if row[0] == "params/hidden_{0..2}/kernel")
    assert layers == ["params/hidden_{0..2}/kernel", "(8,", "8)", "float32", "one", "chunk", "768", "B"]


def test_depth_sums_up_what_lies_deeper(cli) -> None:
    case = load_case("llama2_unscanned_to_unscanned")

    said = cli("tree", case.step_path, "--depth", 2)

    assert said.status == 0
    assert (
        said.out
        == f"""\
{case.path}
  layout        MaxText (may also be read as Flax TrainState)
  disk format   ocdbt+zarr3
  items         items
  metadata      scan_layers=False
  in all        66 leaves, 1.3 MB

  step           1 leaf        4 B
  params      21 leaves   427.3 kB
  optimizer   44 leaves   854.5 kB

  opt_state/0     43 leaves   854.5 kB
  opt_state/2     1 leaf      4 B
  params/params   21 leaves   427.3 kB
  step            1 leaf      4 B
"""
    )


def test_json_lists_every_leaf(cli, auto_named) -> None:
    said = cli("tree", auto_named, "--json")

    def leaf(path: str, shape: list[int]) -> dict[str, object]:
        size = 4
        for length in shape:
            size *= length
        return {
            "path": path,
            "part": "params",
            "shape": shape,
            "dtype": "float32",
            "chunk_shape": shape,
            "bytes": size,
        }

    assert said.status == 0
    assert said.json == {
        "directory": str(auto_named),
        "layout": "variables",
        "layouts": ["variables"],
        "disk_format": "ocdbt+zarr",
        "steps": [],
        "items": [],
        "metadata": {},
        "bytes": 4 * (8 + 16 * 8 + 4 + 8 * 4 + 8 + 8),
        "leaves": [
            leaf("params/Dense_0/bias", [8]),
            leaf("params/Dense_0/kernel", [16, 8]),
            leaf("params/Dense_1/bias", [4]),
            leaf("params/Dense_1/kernel", [8, 4]),
            leaf("params/LayerNorm_0/bias", [8]),
            leaf("params/LayerNorm_0/scale", [8]),
        ],
        "lost": {},
        "foreign": {},
    }


def test_a_path_that_is_no_checkpoint_is_an_error_without_a_traceback(cli, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")

    said = cli("tree", tmp_path)

    assert said.status == 1
    assert said.out == ""
    assert said.err.startswith(
        f"NotACheckpointError: {tmp_path} is no Orbax checkpoint; it holds: notes.txt.\n"
    )
    assert "Traceback" not in said.err


def test_one_very_long_name_does_not_widen_the_other_rows(cli, tmp_path) -> None:
    leaves = {
        "n" * 20_000: np.ones(2, np.float32),
        **{f"w{at}x": np.ones(at + 1, np.float32) for at in range(9)},
    }
    np.savez(tmp_path / "model.npz", **leaves)

    said = cli("tree", tmp_path / "model.npz").out

    assert max(len(line) for line in said.splitlines() if "nnn" not in line) < 300
