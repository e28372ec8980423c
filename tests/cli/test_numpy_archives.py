"""The commands on a NumPy archive, which they take as they take any checkpoint."""

import pathlib

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.cli.conftest import MODEL, Mlp, stock


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The variables of `Mlp` as `numpy.savez` stores them, `/` between the keys."""
    variables = Mlp().init(jax.random.key(0), np.ones((1, 16), np.float32))
    path = tmp_path_factory.mktemp("archive") / "weights.npz"
    np.savez(path, **traverse_util.flatten_dict(jax.tree.map(np.asarray, variables), sep="/"))
    return path


def test_tree_shows_what_is_in_it(cli, archive) -> None:
    said = cli("tree", archive, "--json")

    assert said.status == 0, said.err
    assert (said.json["disk_format"], said.json["layout"]) == ("npz", "variables")
    assert {leaf["path"] for leaf in said.json["leaves"]} >= {"params/up/kernel", "batch_stats/norm/mean"}


def test_plan_fits_and_suggest_finds_the_names(cli, archive) -> None:
    plan = cli("plan", archive, f"{MODEL}:make")
    suggestion = cli("suggest", archive, f"{MODEL}:make")

    assert plan.status == 0, plan.out + plan.err
    assert "hidden/{0..2}/kernel" in plan.out
    assert suggestion.status == 0, suggestion.out + suggestion.err


def test_convert_writes_what_was_in_it(cli, archive, tmp_path) -> None:
    said = cli("convert", archive, tmp_path / "out")

    assert said.status == 0, said.err
    found = traverse_util.flatten_dict(stock(tmp_path / "out"), sep="/")
    with np.load(archive) as stored:
        assert set(found) == set(stored)
        for name, value in stored.items():
            np.testing.assert_array_equal(found[name], value)
    assert cli("diff", archive, tmp_path / "out", "--values").status == 0


def test_diff_finds_one_changed_value(cli, archive, tmp_path) -> None:
    with np.load(archive) as stored:
        values = dict(stored)
    values["params/up/kernel"][3, 2] += 0.5
    np.savez_compressed(tmp_path / "other.npz", **values)

    said = cli("diff", archive, tmp_path / "other.npz", "--values", "--json")

    assert said.status == 1
    assert [(item["path"], item["unequal"]) for item in said.json["values"] if item["unequal"]] == [
        ("params/up/kernel", 1)
    ]


def test_convert_leaves_nothing_out_that_it_cannot_read(cli, tmp_path) -> None:
    np.savez(tmp_path / "x.npz", **{"params/a": np.zeros(2), "params/b": np.array([{}], object)})

    said = cli("convert", tmp_path / "x.npz", tmp_path / "out")
    shown = cli("tree", tmp_path / "x.npz")

    assert said.status == 1
    assert said.err.startswith(
        "UnreadableLeafError: the checkpoint has 1 leaf that holds no numbers of a known type:\n"
        "  params/b\n      pickled Python objects, which are never loaded "
        f"(params/b.npy in {tmp_path}/x.npz)\n"
    )
    assert shown.err == (
        "no numbers: params/b: pickled Python objects, which are never loaded "
        f"(params/b.npy in {tmp_path}/x.npz)\n"
    )
