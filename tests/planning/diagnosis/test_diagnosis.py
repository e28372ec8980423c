"""Each cause is found where its evidence is, and nowhere else."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import AmbiguousMappingError, RestorePlan, ScanAxis
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.diagnosis import diagnose
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import make_plan
from orbax_nnx_handler.planning.target import flatten_target
from tests.planning.models import (
    abstract,
    as_variable,
    keys,
    kinds,
    layer,
    model,
    moments,
    plan,
    stacked,
    stored_leaves,
    wanted_moments,
)
from tests.planning.plans import params, plan_of


def test_a_plan_that_fits_has_no_cause():
    found = diagnose(plan(model(2), model(2, "", "layers/{}")))

    assert found == ()


@pytest.mark.parametrize(("stored", "wanted"), [(3, 5), (5, 3)])
def test_another_number_of_layers_is_counted_on_both_sides(stored, wanted):
    found = diagnose(plan(model(stored), model(wanted, "", "layers/{}")))

    (cause,) = found
    assert cause.kind == "LayerCount"
    assert (cause.facts["group"], cause.facts["stored"], cause.facts["wanted"]) == ("layers", stored, wanted)


def test_the_moments_of_missing_layers_are_explained_with_them():
    weights, wanted = model(2), model(3, "model/", "layers/{}")
    checkpoint = weights | moments("mu", weights, "params/") | {"step": ()}
    made = plan(checkpoint, wanted | wanted_moments("mu", wanted))

    found = diagnose(made)

    assert kinds(found) == ["LayerCount"]
    assert set(found[0].paths) == set(made.missing)


def test_a_hole_between_layers_is_no_other_number_of_layers():
    checkpoint = {path: shape for path, shape in model(4).items() if "layers_1/" not in path}

    found = diagnose(plan(checkpoint, model(4, "", "layers/{}")))

    (cause,) = found
    assert cause.kind == "LayersAbsent"
    assert (cause.facts["layers"], cause.facts["stored"]) == ((1,), 3)


def test_one_missing_weight_of_one_layer_is_no_missing_layer():
    checkpoint = model(3)
    del checkpoint["params/layers_2/up/bias"]

    found = diagnose(plan(checkpoint, model(3, "", "layers/{}")))

    assert not {"LayerCount", "LayersAbsent"} & set(kinds(found))


def test_stacks_of_another_length_are_another_number_of_layers():
    checkpoint = {f"params/{path}": shape for path, shape in (stacked(3) | {"head/kernel": (4, 11)}).items()}

    found = diagnose(plan(checkpoint, stacked(5) | {"head/kernel": (4, 11)}))

    (cause,) = found
    assert cause.kind == "LayerCount"
    assert (cause.facts["stored"], cause.facts["wanted"], cause.filters) == (3, 5, ())


def test_stacked_experts_are_called_experts():
    def experts(count: int) -> dict[str, tuple[int, ...]]:
        return {"moe/experts/up": (count, 4, 6), "moe/experts/bias": (count, 6), "head/kernel": (4, 11)}

    found = diagnose(plan({f"params/{path}": s for path, s in experts(4).items()}, experts(8)))

    (cause,) = found
    assert cause.kind == "LayerCount"
    assert cause.facts["unit"] == "expert"


def test_a_wider_layer_is_a_dimension_and_no_other_number_of_layers():
    found = diagnose(plan(model(2, width=4), model(2, "", "layers/{}", width=8)))

    (cause,) = found
    assert cause.kind == "DimensionDiffers"
    assert (cause.facts["pairs"], cause.facts["ratio"], cause.facts["count"]) == (((4, 8),), "2", 6)


def test_heads_that_differ_on_one_axis_are_no_other_number_of_layers():
    def attention(heads: int) -> dict[str, tuple[int, ...]]:
        return {f"attention/{name}/kernel": (4, heads, 3) for name in ("query", "key", "value")}

    found = diagnose(plan({f"params/{path}": shape for path, shape in attention(2).items()}, attention(6)))

    (cause,) = found
    assert cause.kind == "DimensionDiffers"
    assert cause.facts["name"] == "the number of heads"


def test_several_dimensions_of_one_ratio_are_said_once():
    stored = {"params/up/kernel": (4, 16), "params/down/kernel": (16, 4), "params/norm/scale": (4,)}
    wanted = {"up/kernel": (8, 32), "down/kernel": (32, 8), "norm/scale": (8,)}

    (cause,) = diagnose(plan(stored, wanted))

    assert cause.kind == "DimensionDiffers"
    assert (cause.facts["pairs"], cause.facts["ratio"]) == (((4, 8), (16, 32)), "2")


def test_mismatches_with_nothing_in_common_get_no_guess():
    stored = {"params/a/kernel": (4, 5), "params/b/kernel": (6, 7), "params/c/kernel": (8, 9)}
    wanted = {"a/kernel": (4, 6), "b/kernel": (9, 7), "c/kernel": (8, 4)}

    assert diagnose(plan(stored, wanted)) == ()


def test_the_vocabulary_is_named_only_where_embedding_and_output_have_it():
    stored = {"params/embed/embedding": (250, 4), "params/head/kernel": (4, 250), "params/up/kernel": (4, 4)}
    vocabulary = {"embed/embedding": (256, 4), "head/kernel": (4, 256), "up/kernel": (4, 4)}
    width = {"embed/embedding": (250, 8), "head/kernel": (8, 250), "up/kernel": (8, 8)}

    names = [diagnose(plan(stored, wanted))[0].facts["name"] for wanted in (vocabulary, width)]

    assert names[0] == "the vocabulary"
    assert names[1] != "the vocabulary"


def test_layers_stacked_on_one_side_that_do_not_fit_say_why():
    stored = {f"params/{path}": shape for path, shape in (stacked(2) | {"head/kernel": (4, 11)}).items()}
    wanted = {"head/kernel": (4, 11)}
    for at in range(2):
        wanted |= {
            f"layers/{at}/up/kernel": (5, 7),
            f"layers/{at}/up/bias": (7,),
            f"layers/{at}/norm/scale": (5,),
        }

    (cause,) = diagnose(plan(stored, wanted))

    assert cause.kind == "ScannedOnOneSide"
    assert cause.facts["stacked"] == "checkpoint"
    assert "(4, 2, 6) without any one axis is not (5, 7)" in cause.text


def test_layers_that_can_be_rearranged_are_no_cause():
    stored = {f"params/{path}": shape for path, shape in (stacked(2) | {"head/kernel": (4, 11)}).items()}
    wanted = {"head/kernel": (4, 11)} | layer("layers/0") | layer("layers/1")

    assert diagnose(plan(stored, wanted)) == ()


def test_another_model_shares_neither_names_nor_shapes():
    stored = {f"params/conv_{at}/{leaf}": (3, 3, at + 1, 2) for at in range(3) for leaf in ("kernel", "gain")}

    found = diagnose(plan(stored, model(2, "", "layers/{}")))

    assert kinds(found) == ["AnotherModel"]


def test_what_may_be_the_same_model_by_other_names_is_searched_for_rules_too():
    # Fused gates: no name and no shape agree, and all shapes can be arranged.
    gates = ("p", "q", "r", "s", "t", "u")
    stored = {f"params/cells_{at}/{gate}/kernel": (8, 8) for at in range(2) for gate in gates}
    wanted = {f"rnn_{side}/dense_{part}/w": (8, 24) for side in ("a", "b") for part in ("i", "h")}

    (cause,) = diagnose(plan(stored, wanted))

    assert cause.kind == "AnotherModel"
    assert "If it is this model by other names: " in cause.way.words


def test_the_same_model_in_another_width_is_not_another_model():
    found = diagnose(plan(model(2, width=4), model(2, "", "layers/{}", width=6)))

    assert "AnotherModel" not in kinds(found)


def test_layers_under_another_name_are_not_another_model_and_the_rename_restores():
    stored = {f"params/{path}": shape for path, shape in (stacked(3) | {"head/kernel": (4, 11)}).items()}
    stored = {path.replace("layers", "strata"): shape for path, shape in stored.items()}
    wanted = {"head/kernel": (4, 11)} | {k: v for at in range(3) for k, v in layer(f"layers/{at}").items()}

    (cause,) = diagnose(plan(stored, wanted))

    assert cause.kind == "OtherGroup"
    assert (cause.facts["stored"], cause.facts["wanted"], cause.facts["count"]) == ("strata", "layers", 3)
    assert plan(stored, wanted, renames=[("strata", "layers")]).fits


@pytest.mark.parametrize(("stored", "said"), [("classifier/1", "classifier/1"), ("Dense_1", "Dense_1")])
def test_the_only_module_of_a_list_that_has_weights_is_named_as_it_is_stored(stored, said):
    """A classifier of Hugging Face is a list of a `Flatten` and a `Linear`; `Dense_1` Linen called so."""
    leaves = {"kernel": (4, 3), "bias": (3,)}
    theirs = {f"params/{stored}/{name}": shape for name, shape in leaves.items()} | {"params/stem/w": (5, 4)}
    ours = {f"fc/{name}": shape for name, shape in leaves.items()} | {"stem/w": (5, 4)}

    (cause,) = diagnose(plan(theirs, ours))

    assert (cause.kind, cause.facts["stored"]) == ("OtherGroup", said)
    assert f"renames=[({said!r}, 'fc')]" in cause.way.words
    assert plan(theirs, ours, renames=[(said, "fc")]).fits


def test_automatic_names_are_recognised_by_their_form_and_the_shapes():
    stored = {"params/Dense_0/kernel": (4, 6), "params/Dense_1/kernel": (6, 2)}

    (cause,) = diagnose(plan(stored, {"up/kernel": (4, 6), "down/kernel": (6, 2)}))

    assert cause.kind == "OtherNames"
    assert cause.facts["automatic"] == ("Dense_0", "Dense_1")
    assert "suggest" in cause.hint.words


def test_one_other_name_is_proposed_as_the_rename_that_restores():
    stored = model(1) | {"params/logits_dense/kernel": (4, 11)}
    del stored["params/head/kernel"]
    wanted = model(1, "", "layers/{}")

    (cause,) = diagnose(plan(stored, wanted))

    assert cause.kind == "OtherNames"
    assert cause.facts["renames"] == (("logits_dense", "head"),)
    assert plan(stored, wanted, renames=cause.facts["renames"]).fits


def test_names_of_other_shapes_are_not_other_names():
    stored = {"params/Dense_0/kernel": (4, 6), "params/head/kernel": (6, 2)}

    found = diagnose(plan(stored, {"up/kernel": (5, 7), "head/kernel": (6, 2)}))

    assert "OtherNames" not in kinds(found)


def test_one_shape_in_common_is_not_other_names():
    stored = {"params/x/kernel": (4, 6), "params/head/kernel": (6, 2)}
    wanted = {
        "a/kernel": (4, 6),
        "b/kernel": (5, 7),
        "c/kernel": (8, 9),
        "d/kernel": (3, 3),
        "head/kernel": (6, 2),
    }

    found = diagnose(plan(stored, wanted))

    assert "OtherNames" not in kinds(found)


def test_no_saved_optimizer_leaves_weights_complete_and_all_moments_missing():
    wanted = model(1, "model/", "layers/{}")

    found = diagnose(plan(model(1), wanted | wanted_moments("mu", wanted)))

    assert kinds(found) == ["NoOptimizer"]
    assert found[0].facts["weights"] == len(wanted)


def test_another_optimizer_keeps_other_moments():
    weights, wanted = model(1), model(1, "model/", "layers/{}")
    checkpoint = weights | moments("trace", weights, "params/") | {"step": ()}

    found = diagnose(plan(checkpoint, wanted | wanted_moments("mu", wanted) | wanted_moments("nu", wanted)))

    assert kinds(found) == ["OtherOptimizer"]
    assert (found[0].facts["stored"], found[0].facts["wanted"]) == (("trace",), ("mu", "nu"))


def test_one_missing_moment_is_not_another_optimizer():
    weights, wanted = model(1), model(1, "model/", "layers/{}")
    checkpoint = weights | moments("mu", weights, "params/") | {"step": ()}
    del checkpoint["opt_state/0/mu/head/kernel"]

    found = diagnose(plan(checkpoint, wanted | wanted_moments("mu", wanted)))

    assert not {"NoOptimizer", "OtherOptimizer"} & set(kinds(found))


def test_moments_of_the_same_name_in_two_places_are_not_another_optimizer():
    weights, wanted = model(1), model(1, "model/", "layers/{}")
    first = moments("mu", weights, "params/")
    second = {path.replace("opt_state/0", "opt_state/1"): shape for path, shape in first.items()}
    third = {path.replace("/0/", "/2/"): leaf for path, leaf in wanted_moments("mu", wanted).items()}

    made = plan(weights | first | second | {"step": ()}, wanted | third)

    assert set(made.missing) == {keys(path) for path in third}
    assert "OtherOptimizer" not in kinds(diagnose(made))


def statistics(prefix: str = "") -> dict[str, Any]:
    shape = (4,)
    return {
        f"{prefix}norm/{name}": shape if prefix else nnx.BatchStat(abstract(shape))
        for name in ("mean", "var")
    }


def test_a_collection_of_which_nothing_is_stored_was_not_saved():
    found = diagnose(plan({"params/norm/scale": (4,)}, {"norm/scale": (4,)} | statistics()))

    (cause,) = found
    assert cause.kind == "CollectionMissing"
    assert (cause.facts["collection"], cause.filters, cause.facts["count"]) == (
        "batch_stats",
        (nnx.BatchStat,),
        2,
    )


def test_a_collection_with_one_leaf_missing_was_saved():
    checkpoint = {"params/norm/scale": (4,), "batch_stats/norm/mean": (4,)}

    found = diagnose(plan(checkpoint, {"norm/scale": (4,)} | statistics()))

    assert "CollectionMissing" not in kinds(found)


def test_a_collection_of_which_other_leaves_are_stored_was_saved():
    checkpoint = {"params/norm/scale": (4,), "batch_stats/other/gain": (9,)}

    found = diagnose(plan(checkpoint, {"norm/scale": (4,)} | statistics()))

    assert "CollectionMissing" not in kinds(found)


def test_tables_that_a_module_computes_by_itself_are_no_collection_that_could_have_been_saved():
    tables = {f"rope/cached_{name}": nnx.Variable(abstract((16, 2))) for name in ("sin", "cos")}

    weights = {"norm/scale": (4,), "dense/kernel": (4, 3), "dense/bias": (3,)}
    stored = {f"params/{path}": shape for path, shape in weights.items()}

    found = diagnose(plan(stored, weights | tables))

    assert kinds(found) == ["NewPart"]


def with_lora() -> dict[str, Any]:
    leaves = {"head/lora/lora_a": (4, 2), "head/lora/lora_b": (2, 11)}
    return model(2, "", "layers/{}") | {
        path: nnx.LoRAParam(abstract(shape)) for path, shape in leaves.items()
    }


@pytest.mark.parametrize("concrete", [with_lora(), model(2, "", "layers/{}") | {"classifier/kernel": (4, 3)}])
def test_a_new_part_comes_with_the_policy_that_initialises_it(concrete):
    found = diagnose(plan(model(2), concrete))

    (cause,) = found
    assert cause.kind == "NewPart"
    rules = dict.fromkeys(cause.filters, "init")
    made = plan(model(2), concrete, policy={**rules, ...: "error"}, init=lambda: None)
    assert made.fits


@pytest.mark.parametrize(("shape", "is_new"), [((4, 12), True), ((3, 4), False), ((2, 2, 3), False)])
def test_a_missing_weight_is_new_where_no_unexpected_one_has_its_shape_in_any_arrangement(shape, is_new):
    stored = model(2) | {"params/decoder_head/kernel": shape}

    found = diagnose(plan(stored, model(2, "", "layers/{}") | {"classifier/kernel": (4, 3)}))

    assert ("NewPart" in kinds(found)) == is_new


def test_a_weight_whose_moment_is_stored_is_lost_and_not_new():
    weights, wanted = model(1), model(1, "model/", "layers/{}")
    checkpoint = weights | moments("mu", weights, "params/") | {"step": ()}
    del checkpoint["params/head/kernel"]

    found = diagnose(plan(checkpoint, wanted | wanted_moments("mu", wanted)))

    assert kinds(found) == ["LostWeights"]
    assert found[0].facts["names"] == "model/head/kernel"


def test_a_missing_bias_of_a_stored_module_is_no_new_part():
    checkpoint = model(1)
    del checkpoint["params/layers_0/up/bias"]

    assert diagnose(plan(checkpoint, model(1, "", "layers/{}"))) == ()


def key_plan(stored_impl: str, shape: tuple[int, ...] = ()) -> RestorePlan:
    target = flatten_target(nnx.State({"rngs": {"key": nnx.RngKey(jax.random.key(0))}}))
    leaf = StoredLeaf(path=("rngs", "key"), shape=shape, dtype=np.dtype(np.uint32), key_impl=stored_impl)
    return make_plan(target, {leaf.path: leaf}, RestoreOptions.of())


def test_random_keys_of_another_implementation_are_named():
    (cause,) = diagnose(key_plan("rbg"))

    assert cause.kind == "KeyImplementation"
    assert (cause.facts["stored"], cause.facts["wanted"]) == ("rbg", "threefry2x32")


def test_random_keys_of_another_shape_are_not_another_implementation():
    assert diagnose(key_plan("threefry2x32", (3,))) == ()


def streams(*paths: str) -> RestorePlan:
    target = flatten_target(
        nnx.State(
            {
                "drop": {"rngs": {"key": nnx.RngKey(jax.eval_shape(jax.random.key, 0))}},
                "scale": as_variable((3,)),
            }
        )
    )
    leaves = {
        keys(path): StoredLeaf(path=keys(path), shape=(), dtype=np.dtype(np.uint32), key_impl="threefry2x32")
        for path in paths
    } | stored_leaves({"scale": (3,)})
    return make_plan(target, leaves, RestoreOptions.of())


def test_two_streams_of_an_older_flax_are_named_where_one_is_wanted():
    found = diagnose(streams("drop/rngs/dropout/key", "drop/rngs/params/key"))

    assert kinds(found) == ["RandomLayout"]
    assert found[0].facts["wanted"] == "drop/rngs"


def test_one_stream_of_an_older_flax_is_taken_and_no_cause():
    made = streams("drop/rngs/default/key")

    assert not made.defaulted
    assert diagnose(made) == ()


@pytest.mark.parametrize("rules", [[], [ScanAxis("l", 0)]])
def test_a_stack_whose_stored_layers_leave_one_out_is_said_to_have_a_hole(rules: list[Any]) -> None:
    stored = {
        name: {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(3, np.float32)}
        for name in ("l_0", "l_2")
    }
    target = nnx.State(params({"l": {"kernel": (2, 2, 2), "bias": (2, 3)}}))

    (cause,) = plan_of(target, {"params": stored}, rules).causes

    assert cause.kind == "LayersAbsent"
    assert cause.text == "of 'l', layer 1 is not stored, while 2 others are: the checkpoint has a hole."


@pytest.mark.parametrize(
    ("kernel", "axis", "others"), [((2, 5), 1, []), ((3, 3), 3, [ScanAxis("l", at) for at in range(3)])]
)
@pytest.mark.parametrize("side", ["checkpoint", "target"])
def test_an_axis_that_a_groups_layers_do_not_have_leads_to_the_one_that_they_have(
    kernel: tuple[int, ...], axis: int, others: list[ScanAxis], side: str
) -> None:
    flat, stacked = {str(at): {"kernel": kernel} for at in range(3)}, {"l": {"kernel": (3, *kernel)}}
    wanted, stored = ({"l": flat}, stacked) if side == "checkpoint" else (stacked, {"l": flat})
    arrays = jax.tree.map(lambda size: np.ones(size, "f"), stored, is_leaf=lambda x: isinstance(x, tuple))
    target, rule = nnx.State(params(wanted)), ScanAxis("l", axis)

    (cause,) = plan_of(target, {"params": arrays}, [rule]).causes

    assert cause.kind == "ScannedOnOneSide"
    assert cause.text.endswith("they could not be rearranged, since a rule says another axis than theirs.")
    one = f"pass {' or '.join(map(str, others))} instead of {rule}."
    assert cause.way.words == (one if others else f"take {rule} out: the shapes tell the axis.")
    assert plan_of(target, {"params": arrays}, others[-1:]).fits


def test_no_axis_is_asked_for_where_stored_layers_leave_one_out() -> None:
    stored = {name: {"kernel": np.ones((2, 2), np.float32)} for name in ("l_0", "l_2")}
    plan = plan_of(nnx.State(params({"l": {"kernel": (2, 2, 2)}})), {"params": stored})

    with pytest.raises(
        AmbiguousMappingError, match="; and layer 1 is not stored, though a later one is"
    ) as caught:
        plan.check()
    assert "ScanAxis" not in str(caught.value)


def test_train_states_whose_numbers_leave_one_out_have_a_hole_and_are_no_layers() -> None:
    stored = {
        name: {"params": {"Dense_0": {"kernel": np.ones((2, 2), np.float32)}}, "step": np.int32(1)}
        for name in ("disc_0", "disc_2", "gen")
    }
    model = {"Dense": {0: {"kernel": (2, 2)}}}
    target = nnx.State(params({"disc": {0: model, 1: model}, "gen": model}))

    (cause,) = plan_of(target, stored).causes

    assert cause.text == "of 'disc', layer 1 is not stored, while 2 others are: the checkpoint has a hole."
    assert not cause.may_be_initialised
