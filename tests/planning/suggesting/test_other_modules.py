"""Known pairs of which one side has a module fewer or more: nothing else takes its place.

`python -m tests.planning.suggesting.test_other_modules` takes away or adds one module at random in each
pair, and exits 1 where a leaf is wrong that should be right.
"""

import logging
import random
import sys

import numpy as np
import pytest
from flax import nnx, traverse_util

from orbax_nnx_handler import from_linen, suggest
from tests.planning.suggesting.pairs import UNSEEN, proposed, target_of
from tests.planning.suggesting.proposals import DENSE, OTHER, proposal
from tests.sampled import every

KNOWN = [
    # Others could be what is left, and which of them, order does not tell.
    ("deeplab", "unwanted", "classifier/0/convs/0"),
    ("segformer", "unwanted", "segformer/encoder/block/0/1/layer_norm_1"),
    ("maskgit", "unwanted", "layers/1/mlp"),
    ("ddpm", "unwanted", "downs/1/1/block1/norm"),
    ("dpt", "unwanted", "depth_head/scratch/refinenet4/resConfUnit1/conv2"),
    ("mobilenet", "unwanted", "features/4/conv/0"),
    # `down_1_block_1` is `down/1/block/1`, whatever else has its size.
    ("ddpm_ho", "unwanted", "down/2/block/1/norm2"),
    # A stack of norms is no norm.
    ("maxtext_deepseek", "unwanted", "model/layers/0/mlp/down_proj"),
    # `wi_0` alone is still the gate.
    ("maxtext_deepseek", "absent", "params/decoder/moe_layers/DeepSeekMoeBlock_0/shared_experts/wi_1"),
    # A layer of the target network is no layer of the actor beside it.
    ("td3", "absent", "params/actor/Dense_2"),
    # The norm of a layer that the other side lacks is not the one behind all layers.
    ("pegasus", "absent", "params/model/decoder/layers/0"),
    ("pegasus", "twice", "params/model/encoder/layers/0"),
    # `w1` is in the first layer what it is in the others.
    ("easylm", "absent", "params/params/transformer/h/0/feed_forward/w3"),
    ("llama_meta", "unwanted", "layers/0/feed_forward/w3"),
    # The layer that alone holds something beside is not the last one.
    ("relbias_min", "twice", "params/decoder/layers_1/pre_self_attention_layer_norm"),
]


LACKING = [
    # One layer lacks a module, or holds one that nothing wants: the others are found all the same.
    ("opt", "absent", "params/model/decoder/layers/1/self_attn/k_proj", 2),
    ("gpt_jax", "absent", "params/0/mlp/c_fc", 2),
    ("lra", "absent", "params/encoderblock_1/SelfAttention_0/query", 1),
    ("roformer", "twice", "params/roformer/encoder/layer/2/attention/output/dense", 0),
    ("modernbert", "unwanted", "blocks/1/attn", 0),
    ("modernbert", "twice", "params/layers_1/attn", 3),
]


def values(tree, wanted, rules):
    state = from_linen(tree, target_of(wanted), renames=rules, policy="warn", unexpected="ignore")
    return {"/".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}


def wrong_with(name: str, change: str, module: str) -> list[str] | None:
    """Returns the wrong leaves where a module is not wanted, absent, or stored twice, with other values.

    None where the planner takes neither pair.
    """
    found = changed(name, change, module)
    return None if found is None else found[0]


def changed(name: str, change: str, module: str) -> tuple[list[str], int] | None:
    """Returns the wrong leaves, and how many more are left open than without the change."""
    (tree, first), wanted = proposed(name), UNSEEN[name]["wanted"]
    try:
        right = values(tree, wanted, first.renames)
    except ValueError:
        return None
    stored = traverse_util.flatten_dict(tree, sep="/")
    inside = [path for path in (wanted if change == "unwanted" else stored) if path.startswith(f"{module}/")]
    assert inside
    if change == "unwanted":
        wanted = {path: leaf for path, leaf in wanted.items() if path not in inside}
    elif change == "absent":
        stored = {path: value for path, value in stored.items() if path not in inside}
    else:
        above, _, last = module.rpartition("/")
        stored |= {f"{above}/other_{last}{path[len(module) :]}": -1 - stored[path] for path in inside}
    tree = traverse_util.unflatten_dict(stored, sep="/")
    again = suggest(tree, target_of(wanted))
    found = values(tree, wanted, again.renames)
    left = {"/".join(map(str, path)) for path in (*first.unmatched_wanted, *again.unmatched_wanted)}
    wrong = [path for path in found.keys() - left if not np.array_equal(found[path], right[path])]
    return wrong, len(again.unmatched_wanted) - len(first.unmatched_wanted)


@pytest.mark.parametrize(("name", "change", "module"), every(2, KNOWN))
def test_nothing_takes_the_place_of_another_module(name, change, module):
    assert wrong_with(name, change, module) == []


@pytest.mark.parametrize(("name", "change", "module", "count"), LACKING)
def test_what_one_layer_lacks_or_holds_beside_keeps_the_others_from_nothing(name, change, module, count):
    assert changed(name, change, module) == ([], count)


NORM = {"scale": (2,), "bias": (2,)}
RIVALS = {
    "a layer more": (
        {"layers": {at: {"norm": NORM, "fc": DENSE} for at in range(3)}},
        {f"block_{at}": {"ln": NORM, "lin": DENSE} for at in range(4)},
    ),
    "another name than its own": ({"fin": NORM, "out": DENSE}, {"fin": NORM, "last_ln": NORM, "head": DENSE}),
}
NO_RIVALS = {
    "as many layers": (
        {"layers": {at: {"norm": NORM, "fc": DENSE} for at in range(3)}},
        {f"block_{at}": {"ln": NORM, "lin": DENSE} for at in range(3)},
    ),
    "another number": ({"fc1": DENSE, "out": OTHER}, {"fc1": DENSE, "fc2": DENSE, "head": OTHER}),
    "an opposite": ({"actor": DENSE, "out": OTHER}, {"actor": DENSE, "critic": DENSE, "head": OTHER}),
    "no rule": ({"fin": NORM}, {"fin": NORM, "last_ln": NORM}),
}


@pytest.mark.parametrize("name", RIVALS)
def test_beside_another_module_that_may_be_meant_nothing_is_certain(name):
    found = proposal(*RIVALS[name])
    assert (found.unmatched_wanted, found.confidence) == ((), "likely")


@pytest.mark.parametrize("name", NO_RIVALS)
def test_what_names_tell_to_be_another_module_leaves_a_proposal_certain(name):
    found = proposal(*NO_RIVALS[name])
    assert (found.unmatched_wanted, found.confidence) == ((), "certain")


@pytest.mark.parametrize(
    ("wanted", "stored"),
    [
        ({"det_head": DENSE}, {"head": DENSE}),
        ({"head": {"fc1": DENSE, "fc2": OTHER}}, {"projector": {"fc1": DENSE, "fc2": OTHER}}),
    ],
)
def test_a_head_that_is_dropped_is_asked_about_where_a_new_one_is_for_something_else(wanted, stored):
    found = proposal(wanted | {"conv": {"kernel": (4, 4)}}, stored | {"conv": {"kernel": (4, 4)}})
    assert not found.renames
    assert found.questions


def main() -> int:
    logging.disable()
    seed, wrong = int(sys.argv[1]) if len(sys.argv) > 1 else 0, 0
    for name in UNSEEN:
        for change in ("unwanted", "absent", "twice"):
            rng = random.Random(f"{seed} {name} {change}")
            paths = [*UNSEEN[name]["wanted" if change == "unwanted" else "stored"]]
            modules = {path.rsplit("/", depth)[0] for path in paths for depth in range(1, path.count("/"))}
            small = [
                x for x in sorted(modules) if 3 * sum(y.startswith(f"{x}/") for y in paths) <= len(paths)
            ]
            if not small:
                continue
            module = rng.choice(small)
            try:
                found = wrong_with(name, change, module)
            except ValueError as error:
                print(f"{name} {change} {module}: {str(error).splitlines()[0]}")
                continue
            if found:
                wrong += 1
                print(f"{name} {change} {module}: {len(found)} wrong, {sorted(found)[:3]}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
