"""Known pairs with other sizes: what shapes told is asked where they are the same.

`python -m tests.planning.suggesting.test_equal_sizes` replaces sizes in all pairs, and exits 1 where a leaf
is wrong that should be right.
"""

import itertools
import logging
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import from_linen, suggest
from tests.planning.suggesting.pairs import UNSEEN, nested, proposed, target_of

KNOWN = {
    "t5x_bonsai": {2: 8},  # As many heads as distances, which T5X's table has the other way around.
    "ppo_rnn": {5: 16},  # Two lists, and one that Linen counts through both.
    "vae_flax": {6: 24, 30: 24},  # A name excludes what is right, and nothing else is left.
    "nafnet": {4: 8, 16: 8, 32: 8},  # Six convolutions, of which five are called by a number.
    "conv_tasnet": {12: 20, 16: 20, 24: 20, 48: 20},  # All are convolutions; not all are called so.
}

# Only shapes told which level is which, and what a third axis is.
UNTOLD = {"ddpm", "unet_scenic", "s4"}


def wrong_where(name: str, sizes: Mapping[int, int]) -> list[str] | None:
    """Returns the wrong leaves of a pair with other sizes; None where the right rules don't allow these."""
    pair, (_, first) = UNSEEN[name], proposed(name)

    def resized(shape: Sequence[int]) -> list[int]:
        return [sizes.get(size, size) for size in shape]

    stored = {path: resized(shape) for path, shape in pair["stored"].items()}
    wanted = {path: (resized(shape), kind, None) for path, (shape, kind, _) in pair["wanted"].items()}

    def values(rules):
        state = from_linen(tree, target_of(wanted), renames=rules, policy="warn", unexpected="ignore")
        return {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}

    try:
        tree = nested(stored)
        right = values(first.renames)
    except (AssertionError, ValueError):
        return None
    again = suggest(tree, target_of(wanted))
    found = values(again.renames)
    told = right.keys() - {*first.unmatched_wanted, *again.unmatched_wanted}
    # What the right rules do not make any more (a size is part of one) is zero.
    told -= {path for path in told if right[path].size > 1 and not right[path].any()}
    return ["/".join(map(str, path)) for path in told if not np.array_equal(found[path], right[path])]


@pytest.mark.parametrize("name", KNOWN)
def test_what_shapes_told_is_asked_where_they_do_not(name):
    assert wrong_where(name, KNOWN[name]) == []


def test_what_nothing_wants_does_not_move_layers_into_another_arm():
    pair, (tree, first) = UNSEEN["unet_mid_rename_attn_only"], proposed("unet_mid_rename_attn_only")
    block = tree["params"]["mid_block"]["resnets_1"]
    more = {**block, "aux_norm2": block["norm2"]}
    mid = {**tree["params"]["mid_block"], "resnets_1": more}
    tree = {"params": {**tree["params"], "mid_block": mid}}

    again = suggest(tree, target_of(pair["wanted"]))

    right, found = (
        from_linen(tree, target_of(pair["wanted"]), renames=rules, unexpected="ignore")
        for rules in (first.renames, again.renames)
    )
    jax.tree.map(np.testing.assert_array_equal, found, right)


def test_what_a_new_module_wants_is_no_copy_of_what_another_one_has():
    wanted = UNSEEN["siglip_two_towers"]["wanted"]
    new = {
        path.replace("vision/pool", "vision/adapter_pool"): leaf
        for path, leaf in wanted.items()
        if path == "vision/pool/probe"
    }

    found = suggest(proposed("siglip_two_towers")[0], target_of({**wanted, **new}))

    assert found.confidence == "open"
    assert ("vision", "adapter_pool", "probe") in found.unmatched_wanted


def others(name: str, count: int) -> Iterator[Mapping[int, int]]:
    """Yields all larger sizes as one, and some by chance: one as another one."""
    counted = Counter(size for shape in UNSEEN[name]["stored"].values() for size in shape if size > 1)
    sizes = [size for size, _ in counted.most_common(8)]
    yield {size: sizes[0] for size in sizes if size > 3}
    pairs = list(itertools.permutations(sizes, 2))
    random.Random(0).shuffle(pairs)
    yield from ({one: other} for one, other in pairs[:count])


def main() -> int:
    """Takes all pairs."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # What stays open is filled with zeros.
    bad = 0
    for name in UNSEEN:
        for sizes in others(name, int(sys.argv[1]) if len(sys.argv) > 1 else 5):
            if wrong := wrong_where(name, sizes):
                bad += name not in UNTOLD
                print(f"{name} with {sizes}: {len(wrong)} wrong, {wrong[:4]}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
