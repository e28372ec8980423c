"""What must hold of what is proposed for a pair that was written without a look at the search.

The suite takes every fourth pair of which something stays open, and every tenth of the others.
`python -m tests.planning.suggesting.unseen` takes all, and exits 1 where something is wrong.
"""

import logging
import os
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from flax import nnx

from orbax_nnx_handler import to_linen
from tests.planning.plans import leaves_of, plan_of
from tests.planning.suggesting.pairs import OPEN, UNSEEN, proposed, restored_under, target_of, wrong_in
from tests.sampled import every

SAMPLE = [
    *every(4, [name for name in UNSEEN if name in OPEN]),
    *every(10, [name for name in UNSEEN if name not in OPEN]),
]


def restored_of(name: str) -> Any:
    """Returns what is restored under the rules that are proposed for a pair."""
    tree, found = proposed(name)
    return restored_under(found.renames, tree, UNSEEN[name])


def faults_of_proposal(name: str, state: Any) -> list[str]:
    """Returns the leaves that have another value than the right one, or that are open and should not be."""
    _, found = proposed(name)
    left = {"/".join(map(str, path)) for path in found.unmatched_wanted}
    faults = [f"{path} is wrong" for path in sorted(wrong_in(state, UNSEEN[name]) - left)]
    return faults if len(left) == OPEN.get(name, 0) else [*faults, f"{len(left)} leaves are open"]


def faults_of_save(name: str, state: Any) -> list[str]:
    """Returns the stored leaves that a save under the same rules does not write as they were."""
    tree, found = proposed(name)

    def covered(item: Any) -> Any:
        flat = nnx.to_flat_state(item)
        return nnx.from_flat_state(
            [(path, leaf) for path, leaf in flat if path not in found.unmatched_wanted]
        )

    def on_host(leaf: Any) -> Any:
        # With arrays of NumPy's no program is compiled for what each pair's rules undo.
        return leaf.replace(np.asarray(leaf.get_value()))

    plan = plan_of(covered(target_of(UNSEEN[name]["wanted"])), tree, found.renames, unexpected="ignore")
    if not plan.fits:
        return [str(plan)]

    layout = "maxtext" if "params" in tree["params"] else "linen"
    held = nnx.map_state(lambda _, leaf: on_host(leaf), covered(state))
    saved = leaves_of(to_linen(held, layout=layout, renames=found.renames))

    stored = {path: leaf for path, leaf in leaves_of(tree).items() if path not in plan.unexpected}
    one_side = [f"{path} is on one side only" for path in sorted(saved.keys() ^ stored.keys())]
    both = saved.keys() & stored.keys()
    return one_side + [
        f"{path} differs" for path in sorted(both) if not np.array_equal(saved[path], stored[path])
    ]


def main() -> int:
    """Takes all pairs."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # What stays open is filled with zeros.
    bad = 0
    for name in UNSEEN:
        state = restored_of(name)
        nothing = OPEN.get(name) == len(UNSEEN[name]["wanted"])
        for fault in faults_of_proposal(name, state) + ([] if nothing else faults_of_save(name, state)):
            bad += 1
            print(f"{name}: {fault}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
