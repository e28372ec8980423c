"""Known pairs of which the stored leaves of one part of a model are gone: nothing may take their place.

`python -m tests.planning.suggesting.absent` takes several parts of every pair away.
"""

import itertools
import logging
import random
import re
import sys

from flax import traverse_util

from orbax_nnx_handler import suggest
from orbax_nnx_handler.planning.core.recipes import reads
from tests.planning.plans import plan_of
from tests.planning.suggesting.pairs import UNSEEN, proposed, restored_under, target_of, wrong_in

TIED = ("lm_head", "head", "logits", "output", "decoder")
"""Of an output layer that is not stored, the embedding is the weights: they are tied."""


def taken_instead(name, seed=0, part=""):
    """Takes the stored leaves of a part away, in each layer; returns the part, and what is wrong then.

    A leaf is wrong that is restored although its own are gone, or from another leaf than before.
    """
    tree, found = proposed(name)
    pair, target = UNSEEN[name], target_of(UNSEEN[name]["wanted"])
    plan = plan_of(target, tree, found.renames, policy="warn", unexpected="ignore")
    open_ = {*found.unmatched_wanted}
    sources = {path: {*reads(item.recipe)} for path, item in plan.restored.items() if path not in open_}
    parts = sorted({_part(path) for path in sources})
    if not parts:
        return "", {}
    part = part or random.Random(f"{name}{seed}").choice(parts)
    gone = set(itertools.chain(*(each for path, each in sources.items() if _part(path) == part)))
    stored = {path: leaf for path, leaf in traverse_util.flatten_dict(tree).items() if path not in gone}
    left = traverse_util.unflatten_dict(stored)

    after = suggest(left, target)

    state = restored_under(after.renames, left, pair)
    plan = plan_of(target, left, after.renames, policy="warn", unexpected="ignore")
    lost = {path for path, each in sources.items() if each & gone}
    told = plan.restored.keys() - {*after.unmatched_wanted}
    other = wrong_in(state, pair)
    wrong = {path for path in told if path in lost or "/".join(map(str, path)) in other}
    return part, {path: {*reads(plan.restored[path].recipe)} for path in wrong if not _is_tied(path, plan)}


def _part(path):
    return re.sub(r"\d+", "#", "/".join(map(str, path[:-1])))


def _is_tied(path, plan):
    tables = [at for at in reads(plan.restored[path].recipe) if {*at[-2:]} & {"embedding", "emb_var"}]
    return bool(tables) and any(word in str(path) for word in TIED)


def main():
    logging.getLogger("absl").setLevel(logging.ERROR)  # What is gone is filled with zeros.
    wrong = {}
    for name, seed in itertools.product(UNSEEN, range(2)):
        part, found = taken_instead(name, seed)
        if found:
            wrong[name, part] = found
            print(name, part, next(iter(found.items())))
    print(f"{2 * len(UNSEEN)} parts were taken away; of {len(wrong)} another one took the place")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main() > 0)
