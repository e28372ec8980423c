"""Random programs under rules: modules and networks of other names, exchanged ones, matrices turned.

The rules say all that has changed, so every element comes back, moments and streams included, also where
layers are held the other way; and what is saved under the rules comes back under them. Nothing here is the
package's but the rules themselves.
"""

import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from orbax_nnx_handler import RestoreError, Transpose, from_linen, restore, save, to_linen
from tests.laws.fuzz.programs import (
    LAYERS,
    Changed,
    Network,
    drawn_arrangement,
    drawn_program,
    elements,
    numbered,
)
from tests.laws.fuzz.trial import Outcome

_NEW = {
    "layers": ("transformer", "stack_of", "layer_list"),
    "blocks": ("encoder_blocks", "cells"),
    "enc": ("enc_layers", "lower"),
    "dec": ("dec_layers", "upper"),
    "out": ("head", "final"),
}
_NETWORKS = {
    "gen": "generator",
    "disc": "discriminator",
    "actor": "policy_net",
    "critic": "value_net",
    "encoder": "tower_a",
    "decoder": "tower_b",
    "teacher": "mentor",
    "student": "pupil",
    "q1": "first_q",
    "q2": "second_q",
    "ema": "average",
}
_SINGLE = ("bare", "model", "optimizer", "average", "average and optimizer")
_SEVERAL = ("side by side", "side by side, optimizers", "nested")
FORMS = (*_SINGLE, *_SEVERAL, "side by side, one optimizer", "module")
LAYOUTS = ("linen", "maxtext", "memory", "own names")
KINDS = ("modules", "modules", "networks", "both", "modules exchanged", "networks exchanged", "turned")


def try_renamed(seed: int, place: pathlib.Path) -> Outcome:
    """Draws a program and rules, saves it, restores it into what the rules make of it, and compares."""
    rng = random.Random(seed)
    names = rng.sample(LAYERS, rng.randint(1, 2))
    here = drawn_arrangement(rng, names)
    there = here if rng.random() < 0.6 else drawn_arrangement(rng, names)
    form, layout = rng.choice(FORMS), rng.choice(LAYOUTS)
    make = drawn_program(rng, form, 2 * seed)
    saved = numbered(make(here))
    changed, tops = _drawn_changes(rng, saved, form, here)
    modules, turned = changed.names, changed.turned
    if turned is not None:  # Of a list of layers, each one's matrix.
        there = here
    joint = "/" if layout == "own names" else "_"  # Between a list and its number, as it is stored.
    rules: list[Any] = [
        (f"{old}{joint}{{i}}", f"{new}{joint}{{i}}") if here.get(old) == "list" else (old, new)
        for old, new in modules.items()
    ]
    rules += [*tops.items(), *([Transpose(f"{turned[0]}{joint}{{i}}/{turned[1]}", (1, 0))] if turned else ())]
    rng.shuffle(rules)

    def wanted() -> Any:
        item = make(there, changed)
        return {tops.get(key, key): part for key, part in item.items()} if tops else item

    kind = "turned" if turned else " and ".join(["modules"] * bool(modules) + ["networks"] * bool(tops))
    tag = f"{form}, {kind or 'no rules'}"
    detail = f"{layout}, {dict(here)} -> {dict(there)}, {rules}: "
    try:
        target = nnx.eval_shape(wanted)
        if layout == "memory":
            result = from_linen(to_linen(saved), target, renames=rules)
        elif layout == "own names":
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(place / "saved", nnx.to_pure_dict(nnx.split(saved)[1]))
            result = restore(place / "saved", target, renames=rules)
        else:
            save(place / "saved", saved, layout=layout)
            result = restore(place / "saved", target, renames=rules)
        held = {modules.get(name, name): held for name, held in there.items()}
        have = elements(result, held)
        again = _saved_again(place / "again", result, target, rules, layout)
    except RestoreError as error:
        said = " | ".join(str(error).splitlines()[:6])
        return Outcome(seed, "refused without need", "must restore", tag, detail + said)
    except Exception as error:
        return Outcome(seed, "crashed", "must restore", tag, f"{detail}{type(error).__name__}: {error}")
    want = _moved(elements(saved, here), modules, tops, turned)
    if layout == "memory":  # Of random streams, `to_linen` keeps none.
        have = {path: value for path, value in have.items() if "rngs" not in path}
    wrong = [path for path in have if path not in want or not np.array_equal(have[path], want[path])]
    if again is not None and not wrong:
        detail += "saved again: "
        back = elements(again, held)
        wrong = [path for path in have if path not in back or not np.array_equal(have[path], back[path])]
    return Outcome(seed, "wrong" if wrong else "right", "must restore", tag, detail + str(wrong[:3]))


def _saved_again(place: pathlib.Path, item: Any, target: Any, rules: Sequence[Any], layout: str) -> Any:
    """Returns what is restored under rules that were undone by a save, or None if they cannot be."""
    if layout == "memory":
        return None
    try:
        save(place, item, layout="maxtext" if layout == "maxtext" else "linen", renames=rules)
    except RestoreError:
        return None  # Of several train states it says so, and takes the plan.
    return restore(place, target, renames=rules)


def _drawn_changes(
    rng: random.Random, saved: Any, form: str, arrangement: Mapping[str, str]
) -> tuple[Changed, Mapping[str, str]]:
    """Returns what is changed in the networks, and what their containers are called."""
    names, kind = [*arrangement], rng.choice(KINDS)
    modules, tops = dict[str, str](), dict[str, str]()
    if kind in ("modules", "both"):
        modules = {name: rng.choice(_NEW[name]) for name in rng.sample([*names, "out"], rng.randint(1, 2))}
    if kind in ("networks", "both"):
        tops = _renamed_networks(rng, saved, form)
    if kind == "modules exchanged" and len(names) == 2:
        modules = {names[0]: names[1], names[1]: names[0]}
    if kind == "networks exchanged" and form in _SEVERAL:
        one, other = (key for key in saved if not key.endswith("_opt"))
        tops = _with_optimizers(saved, {one: other, other: one})
    turned = _matrix(saved, arrangement) if kind == "turned" and form in _SINGLE else None
    return Changed(modules, turned), tops


def _renamed_networks(rng: random.Random, saved: Any, form: str) -> dict[str, str]:
    keys = [key for key in saved if key in _NETWORKS] if isinstance(saved, dict) else []
    if form == "side by side, one optimizer":
        return {}  # One of the two is the root's model: no level has its name.
    chosen = rng.sample(keys, rng.randint(1, len(keys))) if keys else []
    return _with_optimizers(saved, {key: _NETWORKS[key] for key in chosen})


def _with_optimizers(saved: Mapping[str, Any], networks: Mapping[str, str]) -> dict[str, str]:
    """Returns what networks are called, with the optimizers that are called after them."""
    optimizers = {f"{old}_opt": f"{new}_opt" for old, new in networks.items()}
    return {**networks, **{old: new for old, new in optimizers.items() if old in saved}}


def _matrix(saved: Any, arrangement: Mapping[str, str]) -> tuple[str, str] | None:
    """Returns a list of layers and the name of a matrix in each, if the first network has one."""
    network: Network = next(iter(saved.values())) if isinstance(saved, dict) else saved
    for name, held in arrangement.items():
        layer = getattr(network, name)[0] if held == "list" else None
        for key, value in vars(layer).items() if layer else ():
            if isinstance(value, nnx.Variable) and value.ndim == 2:
                return name, key
    return None


def _moved(
    values: Mapping[tuple[str, ...], np.ndarray],
    modules: Mapping[str, str],
    tops: Mapping[str, str],
    turned: tuple[str, str] | None,
) -> dict[tuple[str, ...], np.ndarray]:
    """Returns the saved elements by their paths in the target, as the rules make them."""
    found = dict[tuple[str, ...], np.ndarray]()
    for path, value in values.items():
        is_turned = turned is not None and turned[0] in path and path[-1] == turned[1]
        top, *below = path
        names = (tops.get(top, modules.get(top, top)), *(modules.get(key, key) for key in below))
        found[names] = value.T if is_turned else value
    return found
