"""Known pairs of which the stored leaves of a module are gone: nothing may take their place.

`python -m tests.planning.suggesting.absent` takes several modules of every pair away.
"""

import itertools
import logging
import random
import re
import sys
from collections import Counter

from flax import traverse_util

from orbax_nnx_handler import suggest
from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.recipes import reads
from tests.planning.plans import plan_of
from tests.planning.suggesting.pairs import UNSEEN, proposed, restored_under, target_of, wrong_in

TIED = ("lm_head", "head", "logits", "output", "decoder")
"""Of an output layer that is not stored, the embedding is the weights: they are tied."""

_MOST = 0.6
"""A module that holds more of a model is not taken away."""


def taken_instead(name, seed=0, part=""):
    """Takes the stored leaves of a module away, in each layer; returns the module, and what is wrong then.

    A leaf is wrong that is restored although its own are gone, or from another leaf than before. A part whose
    path has numbers is taken away in that layer alone.
    """
    tree, found = proposed(name)
    pair, target = UNSEEN[name], target_of(UNSEEN[name]["wanted"])
    plan = plan_of(target, tree, found.renames, policy="warn", unexpected="ignore")
    open_ = {*found.unmatched_wanted}
    sources = {path: {*reads(item.recipe)} for path, item in plan.restored.items() if path not in open_}
    held = Counter(module for path in sources for module in {*_modules(path)})
    parts = sorted(module for module, count in held.items() if count <= _MOST * len(sources))
    if not parts:
        return "", {}
    part = part or random.Random(f"{name}{seed}").choice(parts)
    gone = set(itertools.chain(*(each for path, each in sources.items() if _is_in(part, path))))
    stored = {path: leaf for path, leaf in traverse_util.flatten_dict(tree).items() if path not in gone}
    left = traverse_util.unflatten_dict(stored)

    after = suggest(left, target)

    try:
        state = restored_under(after.renames, left, pair)
    except RestoreError:
        return part, {}  # Nothing is filled while what is left may be what is gone, and nothing is restored.
    plan = plan_of(target, left, after.renames, policy="warn", unexpected="ignore")
    lost = {path for path, each in sources.items() if each & gone}
    told = plan.restored.keys() - {*after.unmatched_wanted}
    other = wrong_in(state, pair)
    wrong = {path for path in told if path in lost or "/".join(map(str, path)) in other}
    return part, {path: {*reads(plan.restored[path].recipe)} for path in wrong if not _is_tied(path, plan)}


def _modules(path):
    """Returns the modules around a leaf, numbers left out."""
    return [re.sub(r"\d+", "#", "/".join(map(str, path[:at]))) for at in range(1, len(path))]


def _is_in(part, path):
    return part in _modules(path) or "/".join(map(str, path)).startswith(f"{part}/")


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
    print(f"{2 * len(UNSEEN)} modules were taken away; of {len(wrong)} another one took the place")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main() > 0)
