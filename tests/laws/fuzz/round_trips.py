"""Random NNX states through `save` and `restore`: every element comes back, or the save is refused."""

import pathlib
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from orbax_nnx_handler import RestoreError, restore, save
from tests.laws.fuzz.models import Habits, Path, draw_model
from tests.laws.fuzz.optimizers import draw_chain, nested
from tests.laws.fuzz.train_states import Numbers, TrainState, Wanted
from tests.laws.fuzz.trees import KINDS, train_state
from tests.laws.fuzz.trial import Outcome

STREAMS = ("dropout", "params", "default", "noise", "model")


def try_round_trip(seed: int, place: pathlib.Path) -> Outcome:
    """Draws a state, saves it, restores it into its own shapes, and compares."""
    rng = random.Random(seed)
    wanted, options = _drawn(rng)
    streams = _drawn_streams(rng, {item.path[0] for item in wanted})
    state = _state(wanted, streams)
    try:
        save(place / "saved", state, **options)
    except ValueError as error:
        return Outcome(seed, "refused", "may refuse", "saved", str(error).splitlines()[0])
    except Exception as error:
        return Outcome(seed, "crashed", "may refuse", "saved", f"{type(error).__name__}: {error}")
    try:
        result = restore(place / "saved", jax.eval_shape(lambda: state))
    except RestoreError as error:
        said = " | ".join(str(error).splitlines()[:3])
        return Outcome(seed, "refused without need", "must restore", "saved", said)
    except Exception as error:
        return Outcome(seed, "crashed", "must restore", "saved", f"{type(error).__name__}: {error}")
    have, want = _values(result), _values(state)
    wrong = [path for path in want if path not in have or have[path].tobytes() != want[path].tobytes()]
    detail = f"{wrong[0]} is {have.get(wrong[0])}, was {want[wrong[0]]}" if wrong else ""
    return Outcome(seed, "wrong" if wrong else "right", "must restore", "saved", detail)


def _drawn(rng: random.Random) -> tuple[list[Wanted], dict[str, Any]]:
    state = TrainState(parts=draw_model(rng, Habits()), values={}, numbers=Numbers())
    options: dict[str, Any] = {"layout": rng.choice(("linen", "maxtext"))}
    if rng.random() < 0.3:
        return state.wanted_model(), options
    if rng.random() < 0.8:
        state.wanted_chain = draw_chain(rng)
        options["tx"] = state.wanted_chain.build()
    state.step = rng.choice((3, 2**31 - 1, 2**31, 4_000_000_000))
    return train_state(state, ()), options


def _drawn_streams(rng: random.Random, taken: set[Any]) -> dict[Path, np.ndarray]:
    """Returns keys and counts of random streams, in the model and beside it under the same names."""
    places = [("model", "rngs"), ("rngs",)] if "model" in taken else [("rngs",)]
    if rng.random() < 0.6 or "rngs" in taken:
        return {}
    names = rng.sample(STREAMS, 2)
    return {
        (*place, name, leaf): np.asarray(rng.getrandbits(31), np.uint32)
        for place in places
        for name in names
        for leaf in ("key", "count")
    }


def _state(wanted: list[Wanted], streams: dict[Path, np.ndarray]) -> Any:
    leaves = {item.path: KINDS[item.kind](jnp.asarray(item.value)) for item in wanted}
    for path, number in streams.items():
        if path[-1] == "key":
            leaves[path] = nnx.RngKey(jax.random.key(int(number)), tag=path[-2])
        else:
            leaves[path] = nnx.RngCount(jnp.asarray(number), tag=path[-2])
    return nnx.State(nested(leaves))


def _values(state: Any) -> dict[Path, np.ndarray]:
    found = {tuple(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    return {path: np.asarray(_bits(value)) for path, value in found.items()}


def _bits(value: Any) -> Any:
    return jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value
