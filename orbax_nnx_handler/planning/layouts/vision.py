"""Vision programs: big_vision, Scenic and Kauldron.

**Scenic** has `global_step`, and all collections under `model_state`:
scenic/train_lib/train_utils.py `TrainState`, saved by `flax.training.checkpoints`.
Early Scenic kept `flax.optim`'s optimizer, parameters inside, under `optimizer`,
and the batch statistics without their collection's name under `model_state`
(scenic/train_lib/pretrain_utils.py reads both still).

**Kauldron** has the collections other than `params` under `collections`:
kauldron/train/train_step.py `TrainState`: `step`, `params`, `collections`,
`opt_state`, saved by `StandardSave` as the item `default`. A model without other
collections leaves `collections` empty; that tree is a Flax TrainState.

**big_vision** has `params` and `opt`, with the optimizer's fields numbered:
big_vision/train.py saves `{"params": ..., "opt": ..., "chrono": ...}`. The names
of its arrays come from big_vision/utils.py `tree_flatten_with_names`, to which
an optax state is a plain tuple: the second moments of `scale_by_adam` are not at
`1/inner_state/nu/<parameter>` but at `1/0/2/<parameter>`. The numbers are turned
back into optax's names here. What allows it: every element with state in the
chain of big_vision/optax.py `make` is an `optax.masked`, whose one field is
`inner_state`, and the optimizers it is used with differ in number and kind of
their fields.

Other programs that save `{"params", "opt"}` through Orbax have names already;
these stay as they are.

Before it came to optax, `opt` was a whole `flax.optim` optimizer, parameters
included: `opt/target/...`, `opt/state/step`, `opt/state/param_states/...`
(big_vision/utils.py `load_params` still reads the first of these). What else lay
beside it is none of the train state.

Published weights are the parameters alone, with or without the keys above them.
They are told by the name of the scanned blocks.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from itertools import pairwise

from orbax_nnx_handler.planning.core.leaves import lone_optimizers
from orbax_nnx_handler.planning.core.paths import Path, natural_key
from orbax_nnx_handler.planning.layouts.language import WRAPPER, holds_optimizer, place_optimizer
from orbax_nnx_handler.planning.layouts.layout import Fields, Layout, Placement, Stored, has_subtree

_STATISTICS = "batch_stats"


def _fits_scenic(stored: Stored) -> bool:
    has_params = has_subtree(stored, "params") or holds_optimizer(stored, (WRAPPER,))
    return ("global_step",) in stored and has_params


def _place_scenic(stored: Stored) -> tuple[Placement, ...]:
    optimizer = place_optimizer(stored, (WRAPPER,)) if holds_optimizer(stored, (WRAPPER,)) else ()
    known = {placement.leaf.path for placement in optimizer}
    unnamed = _lacks_collections(stored)
    rest = [_scenic_placement(stored, path, unnamed) for path in stored if path not in known]
    return (*optimizer, *rest)


def _scenic_placement(stored: Stored, path: Path, unnamed: bool) -> Placement:
    leaf, top, rest = stored[path], path[0], path[1:]
    if path == ("global_step",):
        # An old optimizer counts the same steps itself; one of the two is enough.
        counted = (WRAPPER, "state", "step") in stored
        return Placement(leaf=leaf, section="other" if counted else "step", path=path)
    if top == "opt_state" and rest:
        return Placement(leaf=leaf, section="optimizer", path=rest)
    if top == "model_state" and unnamed and rest:
        return Placement(leaf=leaf, section="model", collection=_STATISTICS, path=rest)
    if top == "model_state" and len(rest) > 1:
        return Placement(leaf=leaf, section="model", collection=str(rest[0]), path=rest[1:])
    if top == "rng":
        return Placement(leaf=leaf, section="aux", path=path)
    if top in ("metadata", "model_state") or not rest:
        return Placement(leaf=leaf, section="other", path=path)
    return Placement(leaf=leaf, section="model", collection=str(top), path=rest)


def _lacks_collections(stored: Stored) -> bool:
    """Tells whether `model_state` holds modules and not collections of modules."""
    below = {path[1] for path in stored if path[0] == "model_state" and len(path) > 1}
    modules = {path[1] for path in stored if path[0] == "params" and len(path) > 1}
    modules |= {path[2] for path in stored if path[:2] == (WRAPPER, "target") and len(path) > 2}
    return bool(below) and _STATISTICS not in below and below <= modules


SCENIC = Layout(
    name="scenic",
    title="Scenic",
    fits=_fits_scenic,
    place=_place_scenic,
    keys=frozenset({WRAPPER}),
    fields=Fields(collections=("model_state",), step=("global_step",)),
)


_KAULDRON_FIELDS = frozenset({"step", "params", "collections", "opt_state"})


def _fits_kauldron(stored: Stored) -> bool:
    named = any(len(path) > 2 and path[0] == "collections" for path in stored)
    return (
        named and has_subtree(stored, "params") and {path[0] for path in stored if path} <= _KAULDRON_FIELDS
    )


def _place_kauldron(stored: Stored) -> tuple[Placement, ...]:
    return tuple(_kauldron_placement(stored, path) for path in stored)


def _kauldron_placement(stored: Stored, path: Path) -> Placement:
    leaf, top, rest = stored[path], path[0], path[1:]
    if path == ("step",):
        return Placement(leaf=leaf, section="step", path=path)
    if top == "opt_state" and rest:
        return Placement(leaf=leaf, section="optimizer", path=rest)
    if top == "params" and rest:
        return Placement(leaf=leaf, section="model", collection="params", path=rest)
    if top == "collections" and len(rest) > 1:
        return Placement(leaf=leaf, section="model", collection=str(rest[0]), path=rest[1:])
    return Placement(leaf=leaf, section="other", path=path)


KAULDRON = Layout(
    name="kauldron",
    title="Kauldron",
    fits=_fits_kauldron,
    place=_place_kauldron,
    keys=_KAULDRON_FIELDS,
    fields=Fields(collections=("collections",)),
)


# `rng` by trainers/proj/cappa, `state` by trainers/proj/uvim/vqvae.py: Linen's collection of that name.
_FIELDS_OF_STATE = frozenset({"params", "state", "opt", "chrono", "rng"})
_COLLECTIONS = frozenset({"params", "state"})
_FLAX_OPTIM: Path = ("opt",)
_SCANNED = ("Transformer", "encoderblock")  # The blocks of models/vit.py; without a scan they have numbers.
_FIELDS_OF_FLAX_OPTIM = {"target", "state"}

# Fields of optax states by the kinds of their fields: `c` is a scalar count, `p` a tree like the parameters.
_FIELDS = {
    "cppp": ("count", "v_row", "v_col", "v"),  # FactoredState
    "cpp": ("count", "mu", "nu"),  # ScaleByAdamState
    "cp": ("count", "mu"),  # ScaleByLionState
    "p": ("trace",),  # TraceState
    "c": ("count",),  # ScaleByScheduleState
}
# `scale_by_adafactor` of big_vision averages with `optax.ema`, whose fields look like Lion's.
_AFTER_FACTORED = {"cp": ("count", "ema")}


def _fits(stored: Stored) -> bool:
    if _is_of_flax_optim(stored):
        return True
    has_both = has_subtree(stored, "params") and has_subtree(stored, "opt")
    if not has_both or not {path[0] for path in stored} <= _FIELDS_OF_STATE:
        return False
    return not any(owner[:1] == _FLAX_OPTIM for owner in lone_optimizers(stored))


def _is_of_flax_optim(stored: Stored) -> bool:
    fields = {path[1] for path in stored if path[:1] == _FLAX_OPTIM and len(path) > 2}
    # Not only one optimizer's: the list of states of a `MultiOptimizer` is no reason to miss the weights.
    return fields == _FIELDS_OF_FLAX_OPTIM and not has_subtree(stored, "params")


def _place(stored: Stored) -> tuple[Placement, ...]:
    if not _is_of_flax_optim(stored):
        return _place_numbered(stored)
    beside = [path for path in stored if path[:1] != _FLAX_OPTIM]
    others = [Placement(leaf=stored[path], section="other", path=path) for path in beside]
    return (*place_optimizer(stored, _FLAX_OPTIM), *others)


def _place_numbered(stored: Stored) -> tuple[Placement, ...]:
    parameters = {_text(path[1:]) for path in stored if path[0] == "params"}
    slots = {path: _slot(path[1:], parameters) for path in stored if path[0] == "opt" and len(path) > 1}
    kinds = {slot: "c" if len(slot) == len(path) - 1 else "p" for path, slot in slots.items()}
    names = _named(kinds)
    step = _step(slots, names)
    return tuple(
        Placement(leaf=stored[path], section="step", path=path, slot=("count",))
        if path == step
        else _placement(stored, path, slots, names)
        for path in stored
    )


def _step(slots: Mapping[Path, Path], names: Mapping[Path, Path]) -> Path | None:
    """Returns the count of the first schedule, which is the step (big_vision/optax.py `get_count`)."""
    fields = Counter(slot[:-1] for slot in set(slots.values()))
    counts = [
        path
        for path, slot in slots.items()
        if slot in names and names[slot][-1] == "count" and fields[slot[:-1]] == 1
    ]
    return min(counts, default=None, key=natural_key)


def _placement(
    stored: Stored, path: Path, slots: Mapping[Path, Path], names: Mapping[Path, Path]
) -> Placement:
    leaf, top, rest = stored[path], path[0], path[1:]
    if top == "opt" and rest:
        slot = slots[path]
        return Placement(leaf=leaf, section="optimizer", path=(*names.get(slot, slot), *rest[len(slot) :]))
    if top in _COLLECTIONS and rest:
        return Placement(leaf=leaf, section="model", collection=str(top), path=rest)
    return Placement(leaf=leaf, section="other", path=path)


def _text(path: Path) -> Path:
    return tuple(str(key) for key in path)


def _slot(path: Path, parameters: Collection[Path]) -> Path:
    """Returns the part of an optimizer path above the parameter's own, or all of it."""
    text = _text(path)
    return next((text[:at] for at in range(len(text)) if text[at:] in parameters), text)


def _named(kinds: Mapping[Path, str]) -> Mapping[Path, Path]:
    """Returns optax's names of numbered slots; none if any slot has a name already."""
    if not all(slot and all(str(key).isdecimal() for key in slot) for slot in kinds):
        return {}
    fields: dict[Path, dict[str, str]] = defaultdict(dict)
    for slot, kind in kinds.items():
        fields[slot[:-1]][str(slot[-1])] = kind
    factored = {state[:-1] for state, of_kind in fields.items() if _signature(of_kind) == "cppp"}
    names: dict[Path, Path] = {}
    for state, of_kind in fields.items():
        known = _AFTER_FACTORED if state[:-1] in factored else {}
        for number, name in enumerate((_FIELDS | known).get(_signature(of_kind), ())):
            names[(*state, str(number))] = (*_masked(state), name)
    return names


def _signature(of_kind: Mapping[str, str]) -> str:
    """Returns the kinds of fields 0, 1, ...; where one is absent, there is a blank."""
    return "".join(of_kind.get(str(number), " ") for number in range(len(of_kind)))


def _masked(state: Path) -> Path:
    """Writes the one field of an `optax.masked` out: `1/0` is `1/inner_state`."""
    return (state[0], "inner_state", *state[2:]) if len(state) > 1 and state[1] == "0" else state


def _weights_root(stored: Stored) -> Path | None:
    """Returns the keys above all weights, in a tree that holds nothing else."""
    roots: tuple[Path, ...] = (("params",), (*_FLAX_OPTIM, "target"), ())
    return next((root for root in roots if all(path[: len(root)] == root for path in stored)), None)


def _is_weights(stored: Stored) -> bool:
    return any(_SCANNED in pairwise(path) for path in stored if _SCANNED[0] in path)


def _place_weights(stored: Stored) -> tuple[Placement, ...]:
    root = _weights_root(stored) or ()
    return tuple(
        Placement(leaf=leaf, section="model", collection="params", path=path[len(root) :])
        for path, leaf in stored.items()
    )


_AXIS = 0
"""`variable_axes={"params": 0}` of the scanned blocks in big_vision/models/vit.py `Encoder`."""

BIG_VISION = Layout(
    name="big_vision",
    title="big_vision",
    fits=_fits,
    place=_place,
    keys=_COLLECTIONS | {"opt"},
    scan_axis=_AXIS,
    fields=Fields(opt_state=_FLAX_OPTIM),
)
BIG_VISION_WEIGHTS = Layout(
    name="big_vision_weights",
    title="big_vision weights",
    fits=_is_weights,
    place=_place_weights,
    scan_axis=_AXIS,
)
