"""`orbax-nnx diff`: what differs, and in values by how much."""

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization


@pytest.fixture
def pair(tmp_path):
    """Two items: one leaf alone in each, one of another shape, one of other values, one equal."""
    left = {
        "same": np.arange(6, dtype=np.float32).reshape(2, 3),
        "other": np.array([1.0, 2.0, np.nan, 4.0], np.float32),
        "shape": np.zeros((2, 2), np.float32),
        "mine": np.zeros(1, np.int32),
    }
    right = {
        "same": left["same"],
        "other": np.array([1.0, 2.5, np.nan, 1.0], np.float32),
        "shape": np.zeros((2, 3), np.float32),
        "yours": np.zeros(2, np.int32),
    }
    for name, tree in (("a", left), ("b", right)):
        ocp.PyTreeCheckpointer().save(tmp_path / name, {"params": tree})
    return tmp_path / "a", tmp_path / "b"


def test_the_whole_of_what_differs_is_in_the_json(cli, pair) -> None:
    said = cli("diff", *pair, "--values", "--json")

    assert said.status == 1
    assert said.json == {
        "a": str(pair[0]),
        "b": str(pair[1]),
        "same": False,
        "only_a": [{"path": "params/mine", "shape": [1], "dtype": "int32"}],
        "only_b": [{"path": "params/yours", "shape": [2], "dtype": "int32"}],
        "changed": [
            {
                "path": "params/shape",
                "a": {"shape": [2, 2], "dtype": "float32"},
                "b": {"shape": [2, 3], "dtype": "float32"},
            }
        ],
        "values": [
            {"path": "params/other", "unequal": 2, "largest": 3.0},
            {"path": "params/same", "unequal": 0, "largest": 0.0},
        ],
    }


def test_the_text_lists_each_kind_of_difference(cli, pair) -> None:
    said = cli("diff", *pair, "--values")

    assert (
        said.out
        == f"""\
  A   {pair[0]}
  B   {pair[1]}

1 leaf only in A
  params/mine   (1,)   int32

1 leaf only in B
  params/yours   (2,)   int32

1 leaf of another shape or dtype
  params/shape   A   (2, 2)   float32   B   (2, 3)   float32

1 leaf of other values
  params/other   2 values   largest difference 3

1 leaf has equal values, 1 differ.
"""
    )


def test_a_checkpoint_does_not_differ_from_itself(cli, root) -> None:
    said = cli("diff", root, root, "--values")

    assert said.status == 0
    assert said.out.splitlines()[-1] == "Nothing differs in values: 40 leaves."


def test_two_steps_differ_in_the_step_alone(cli, root) -> None:
    said = cli("diff", root / "100", root / "200", "--values", "--json")

    assert said.status == 1
    assert [item for item in said.json["values"] if item["unequal"]] == [
        {"path": "step", "unequal": 1, "largest": 100.0}
    ]


def test_a_nan_against_a_number_is_a_difference(cli, tmp_path) -> None:
    for name, value in (("a", np.nan), ("b", 1.0)):
        ocp.PyTreeCheckpointer().save(tmp_path / name, {"params": {"w": np.array([value, 1.0], np.float32)}})

    said = cli("diff", tmp_path / "a", tmp_path / "b", "--values", "--json")

    assert said.status == 1
    assert said.json["values"] == [{"path": "params/w", "unequal": 1, "largest": "NaN"}]


def test_without_values_the_last_line_counts_what_agrees(cli, pair) -> None:
    said = cli("diff", *pair)

    assert said.status == 1
    assert said.out.splitlines()[-2:] == [
        "",
        "2 leaves agree in path, shape and dtype; --values compares their values.",
    ]


def test_where_no_path_is_shared_it_is_said_that_no_values_were_compared(cli, tmp_path) -> None:
    for name in ("a", "b"):
        ocp.PyTreeCheckpointer().save(tmp_path / name, {"params": {name: np.ones(2, np.float32)}})

    said = cli("diff", tmp_path / "a", tmp_path / "b", "--values")

    assert said.status == 1
    assert "No path has leaves of one shape on both sides: no values were compared; with --rules" in said.out

    said = cli("diff", tmp_path / "a", tmp_path / "b", "--values", "--rename", "a=c")

    last = "No path has leaves of one shape on both sides: no values were compared under these rules."
    assert said.out.splitlines()[-1] == last


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("float8_e4m3fn", other) for other in ("float32", "float8_e5m2", "complex64")),
        *(("int4", other) for other in ("int8", "float32", "float8_e5m2")),
        ("uint4", "int32"),
    ],
)
def test_numbers_of_4_and_8_bits_are_compared_with_any_others(cli, tmp_path, one, other) -> None:
    for name, dtype, values in (("a", one, [1, 2, 3]), ("b", other, [1, 2, 7])):
        content = serialization.to_bytes({"w": np.array(values).astype(jnp.dtype(dtype))})
        (tmp_path / name).mkdir()
        (tmp_path / name / "flax_model.msgpack").write_bytes(content)

    for names in (("a", "b"), ("b", "a")):
        said = cli("diff", *(tmp_path / name for name in names), "--values", "--json")
        assert said.json["values"] == [{"path": "w", "unequal": 1, "largest": 4.0}]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.array([16777217, 5], np.int32), np.array([16777216, 5], np.float32)),
        (np.array([257, 5], np.int16), np.array([256, 5], jnp.bfloat16)),
        (np.array([2**53 + 1, 5]), np.array([2**53, 5])),
        (np.array([2**64 - 1, 5], np.uint64), np.array([2**64 - 2, 5], np.uint64)),
    ],
    ids=["int32-float32", "int16-bfloat16", "int64", "uint64"],
)
def test_values_that_a_narrower_type_would_round_to_one_differ(cli, tmp_path, one, other) -> None:
    for name, value in (("a", one), ("b", other)):
        ocp.PyTreeCheckpointer().save(tmp_path / name, {"params": {"w": value}})

    said = cli("diff", tmp_path / "a", tmp_path / "b", "--values", "--json")

    assert said.status == 1
    assert [leaf["unequal"] for leaf in said.json["values"]] == [1]


def test_a_hugging_face_directory_is_compared_with_an_nnx_state(cli, tmp_path) -> None:
    kernel, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros(3, np.float32)
    (tmp_path / "hf").mkdir()
    params = {"Dense_0": {"kernel": kernel, "bias": bias}}
    (tmp_path / "hf" / "flax_model.msgpack").write_bytes(serialization.to_bytes(params))
    state = nnx.State(
        {"up": {"kernel": nnx.Param(jnp.asarray(kernel)), "bias": nnx.Param(jnp.asarray(bias))}}
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nnx", state)

    said = cli("diff", tmp_path / "hf", tmp_path / "nnx", "--rename", "Dense_0=up", "--values")

    assert (said.status, said.out.splitlines()[-1]) == (0, "Nothing differs in values: 2 leaves.")


@pytest.mark.parametrize("level", ["", "model"], ids=["alone", "in a train state"])
@pytest.mark.parametrize("turned", [False, True], ids=["A is Linen's", "B is Linen's"])
def test_linen_variables_are_compared_with_an_nnx_state(cli, tmp_path, turned, level) -> None:
    params = {"dense": {"kernel": np.arange(6.0).reshape(2, 3)}, "norm": {"scale": np.ones(3)}}
    averages = {"norm": {"mean": np.arange(3.0)}}
    state = {
        "dense": {"kernel": {"value": params["dense"]["kernel"] + 1}},
        "norm": {"scale": {"value": params["norm"]["scale"]}, "mean": {"value": averages["norm"]["mean"]}},
    }
    with ocp.PyTreeCheckpointer() as stock:
        stock.save(tmp_path / "linen", {"params": params, "batch_stats": averages})
        stock.save(tmp_path / "nnx", {level: state} if level else state)
    paths = [tmp_path / "linen", tmp_path / "nnx"]

    said = cli("diff", *(paths[::-1] if turned else paths), "--values", "--json")

    assert (said.json["only_a"], said.json["only_b"], said.json["changed"]) == ([], [], [])
    assert {
        item["path"].split("/")[-2 if turned else -1]: item["unequal"] for item in said.json["values"]
    } == {
        "kernel": 6,
        "scale": 0,
        "mean": 0,
    }


def test_two_collections_that_hold_one_path_are_not_taken_for_one(cli, tmp_path) -> None:
    with ocp.PyTreeCheckpointer() as stock:
        stock.save(tmp_path / "linen", {"params": {"x": np.ones(2)}, "batch_stats": {"x": np.zeros(2)}})
        stock.save(tmp_path / "nnx", {"x": {"value": np.ones(2)}})

    said = cli("diff", tmp_path / "linen", tmp_path / "nnx", "--values", "--json")

    assert [item["path"] for item in said.json["only_a"]] == ["batch_stats/x", "params/x"]
    assert said.json["values"] == []
