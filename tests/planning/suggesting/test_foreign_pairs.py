"""Linen models of known programs and NNX models by somebody else: what is proposed is right, value by value.

`foreign_pairs.json` holds names and shapes of both sides (transformers 4.57, MLP-Mixer, Flax's lm1b;
bonsai, jimm, Tunix, MaxText and own implementations) and, for each wanted leaf that is stored, how
NumPy makes it.
"""

import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import from_linen, to_linen
from tests.planning.plans import leaves_of, plan_of
from tests.planning.suggesting.foreign import arrays_of, nested, proposed, target_of
from tests.planning.suggesting.pairs import FOREIGN, keys
from tests.planning.suggesting.settled import part_of_its_own, spoilt
from tests.sampled import checkered, every


def made(recipe, arrays):
    if isinstance(recipe, str):
        return arrays[recipe]
    what, source, how = recipe
    if what == "slice":
        axis, start, size = how
        return np.take(made(source, arrays), range(start, start + size), axis)
    if what in ("stack", "concatenate"):
        return getattr(np, what)([made(part, arrays) for part in source], axis=how)
    return getattr(np, what)(made(source, arrays), how)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_proposal_for_another_programs_model_is_right_for_every_leaf_that_is_stored(name):
    pair = FOREIGN[name]
    arrays = arrays_of(pair)

    found = proposed(name)

    state = from_linen(
        nested(arrays), target_of(pair), renames=found.renames, policy="warn", unexpected="ignore"
    )
    values = {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}
    covered = set(values) - set(found.unmatched_wanted)
    truth = {keys(path): made(recipe, arrays) for path, recipe in pair["truth"].items()}
    assert [path for path in covered if not np.array_equal(values[path], truth.get(path))] == []
    assert truth.keys() <= covered


@pytest.mark.parametrize(("name", "by"), checkered(FOREIGN, ["plan", "rules"]))
def test_what_a_proposal_restores_saves_back_as_it_was_stored(name, by):
    pair = FOREIGN[name]
    arrays = arrays_of(pair)
    found = proposed(name)
    flat = nnx.to_flat_state(target_of(pair))
    covered = nnx.from_flat_state([(path, leaf) for path, leaf in flat if path not in found.unmatched_wanted])
    state = from_linen(nested(arrays), covered, renames=found.renames, unexpected="ignore")
    plan = plan_of(covered, nested(arrays), found.renames, unexpected="ignore")

    saved = leaves_of(to_linen(state, renames=plan if by == "plan" else found.renames))

    unused = {"/".join(map(str, path)) for path in plan.unexpected}
    back = {"/".join(map(str, path)): np.asarray(leaf) for path, leaf in saved.items()}
    assert set(back) == set(arrays) - unused
    assert unused == {"/".join(map(str, path)) for path in found.unmatched_stored}
    assert [path for path in back if not np.array_equal(back[path], arrays[path])] == []


@pytest.mark.parametrize("name", every(2, FOREIGN))
def test_a_part_of_the_rules_is_built_upon_and_nothing_becomes_wrong(name):
    pair, part = FOREIGN[name], part_of_its_own(name, [*FOREIGN])

    assert not spoilt(name, part, target_of(pair), nested(arrays_of(pair)), proposed(name).renames)
