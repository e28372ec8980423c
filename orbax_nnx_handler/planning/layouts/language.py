"""Language models' programs: T5X and MaxText.

**T5X**, and `flax.optim` before it, have parameters under `target`, the rest under `state`.
T5X saves `FlaxOptimTrainState.state_dict()` (t5x/train_state.py), whose form it
took over from `flax.optim`: `target/<parameter>`, `state/step` and
`state/param_states`, with T5X's mutable collections under `flax_mutables`. The
msgpack file of T5X's own format holds that tree under `optimizer`, beside a
`version`; a train state with a `flax.optim` optimizer in it looks the same.

An optimizer written for T5X or `flax.optim` keeps its slots below each
parameter (`param_states/<parameter>/v_row`), a wrapped optax one keeps the
parameters below each slot (`param_states/0/mu/<parameter>`). Which it is shows
in the tree: the former ends one level below a parameter's path.

Adafactor's `v_row` and `v_col` are not always optax's. optax takes the two largest
axes; `v_row` has lost the largest, of equal ones the last. T5X with
`logical_factor_rules` (t5x/adafactor.py, in nearly all of its configurations)
goes by the names of the axes: `v_row` has lost the column, which for the output
of an attention is the first axis. Both moments have the same meaning to either
program, so that only which axis each has lost must be found, from the shapes.

**MaxText** has a variables dict under `params`, and decoder layers scanned block by block.
A model of one kind of layer is scanned as `layers` or written as `layers_0`,
`layers_1`, ... (layers/decoders.py `Decoder.__call__`). A model of several kinds is
scanned in blocks of them, under names of its own, which are listed in `SCANS`. Its
sources are paths below `src/maxtext` of MaxText's repository.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from orbax_nnx_handler.planning.core.leaves import FACTORED, Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.layouts.layout import Fields, Layout, Placement, ScannedBlocks, Stored
from orbax_nnx_handler.planning.layouts.linen import KEYS, owners_of, place_with

Naming = Literal["same", "swapped", "unknown"]


def optax_naming(parameter: Shape, moments: Mapping[str, Shape]) -> Naming:
    """Returns how optax's names for two factored moments relate to the stored ones.

    Returns:
        `unknown` where the shapes would be the same under either naming.
    """
    shapes = [moments.get(name) for name in FACTORED]
    if len(parameter) < 2 or None in shapes or shapes == [(1,), (1,)]:
        return "same"
    largest, second = np.argsort(parameter)[::-1][:2]
    by_optax = [_without(parameter, int(axis)) for axis in (largest, second)]
    if by_optax[0] == by_optax[1] == shapes[0]:
        return "unknown"
    return "swapped" if shapes == by_optax[::-1] else "same"


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])


WRAPPER = "optimizer"

_FIELDS = frozenset({"target", "state", "flax_mutables"})

# Slots that mean what an optax slot of another name means; `v_row`, `v_col` and `v` have optax's names.
_OPTAX_NAMES = {
    "m": "ema",  # t5x/adafactor.py `new_m`; `optax.adafactor` keeps it in `optax.ema`.
    "grad_ema": "mu",  # `flax.optim.Adam`
    "grad_sq_ema": "nu",
    "momentum": "trace",  # `flax.optim.Momentum`
    "G": "sum_of_squares",  # `flax.optim.Adagrad`
}


def holds_optimizer(stored: Stored, prefix: Path) -> bool:
    """Tells whether a subtree is a `flax.optim` optimizer's state dict."""
    depth = len(prefix)
    if not any(path[depth : depth + 1] == ("target",) and path[:depth] == prefix for path in stored):
        return False  # Nearly every tree.
    below = [path[depth:] for path in stored if path[:depth] == prefix]
    has_target = any(len(path) > 1 and path[0] == "target" for path in below)
    if not {path[1] for path in below if path[0] == "state" and len(path) > 1} <= {"step", "param_states"}:
        return False  # A train state of another program beside a target network.
    return has_target and ("state", "step") in below and {str(path[0]) for path in below} <= _FIELDS


def place_optimizer(stored: Stored, prefix: Path) -> tuple[Placement, ...]:
    """Places the leaves below `prefix`, a `flax.optim` optimizer's state dict."""
    depth = len(prefix)
    mine = [path for path in stored if path[:depth] == prefix]
    parameters = {path[depth + 1 :] for path in mine if path[depth : depth + 1] == ("target",)}
    placed = [_placement(stored, path, path[depth:], parameters) for path in mine]
    placed = _named_as_in_optax(
        placed, {path: stored[(*prefix, "target", *path)].shape for path in parameters}
    )
    if not any(item.section == "optimizer" and item.slot is None for item in placed):
        # No optax here: these optimizers count their steps in `state/step` and nowhere else.
        placed = [_as_count(item) if item.section == "step" else item for item in placed]
    return tuple(placed)


def _named_as_in_optax(placed: Sequence[Placement], parameters: Mapping[Path, Shape]) -> list[Placement]:
    """Gives factored moments optax's names; those that nothing tells apart belong to no one."""
    moments: dict[Path, dict[str, Shape]] = defaultdict(dict)
    for item in placed:
        if item.slot is not None and item.slot[-1] in FACTORED:
            moments[item.path][str(item.slot[-1])] = item.leaf.shape
    naming: dict[Path, Naming] = {
        path: optax_naming(parameters[path], shapes) for path, shapes in moments.items()
    }
    return [
        _renamed(item, naming[item.path]) if item.slot is not None and item.slot[-1] in FACTORED else item
        for item in placed
    ]


def _renamed(moment: Placement, naming: Naming) -> Placement:
    if naming == "unknown":
        return dataclasses.replace(moment, section="other", path=moment.leaf.path)
    if naming == "swapped":
        row, column = FACTORED
        return dataclasses.replace(moment, slot=(column if moment.slot == (row,) else row,))
    return moment


def _as_count(step: Placement) -> Placement:
    return dataclasses.replace(step, slot=("count",))


def _placement(stored: Stored, path: Path, below: Path, parameters: set[Path]) -> Placement:
    leaf, top, rest = stored[path], below[:1], below[1:]
    if top == ("target",) and rest:
        return Placement(leaf=leaf, section="model", collection="params", path=rest)
    if top == ("flax_mutables",) and len(rest) > 1:
        return Placement(leaf=leaf, section="model", collection=str(rest[0]), path=rest[1:])
    if below == ("state", "step"):
        return Placement(leaf=leaf, section="step", path=path)
    if below[:2] != ("state", "param_states") or len(below) < 3:
        return Placement(leaf=leaf, section="other", path=path)
    if below[2:-1] in parameters:
        slot = str(below[-1])
        return Placement(
            leaf=leaf, section="optimizer", path=below[2:-1], slot=(_OPTAX_NAMES.get(slot, slot),)
        )
    return Placement(leaf=leaf, section="optimizer", path=below[2:])


def _prefix(stored: Stored) -> Path | None:
    return next((prefix for prefix in ((), (WRAPPER,)) if holds_optimizer(stored, prefix)), None)


def _fits(stored: Stored) -> bool:
    if holds_optimizer(stored, ()):
        return True
    return holds_optimizer(stored, (WRAPPER,)) and all(path[0] in (WRAPPER, "version") for path in stored)


def _place(stored: Stored) -> tuple[Placement, ...]:
    prefix = _prefix(stored)
    placed = place_optimizer(stored, prefix) if prefix is not None else ()
    known = {placement.leaf.path for placement in placed}
    others = [path for path in stored if path not in known]
    return (*placed, *(Placement(leaf=stored[path], section="other", path=path) for path in others))


T5X = Layout(
    name="t5x",
    title="T5X",
    fits=_fits,
    place=_place,
    keys=_FIELDS,
    fields=Fields(
        params=("target",),
        collections=("flax_mutables",),
        opt_state=("state", "param_states"),
        step=("state", "step"),
    ),
)


SCANS = (
    ScannedBlocks(
        layers="layers",
        name="layers",
        numbered=frozenset({"layers", "layer"}),
        remainder="layers_remainder",
        source="layers/decoders.py `_apply_gemma3_scanned_blocks`; "
        "`...ScannableBlock.__init__` of models/gemma3.py, llama4.py, gpt_oss.py, olmo3.py, envy.py "
        "(`layers_{i}`), qwen3.py and qwen3_5.py (`layer_{i}`)",
    ),
    ScannedBlocks(
        layers="layers",
        name="scanned_blocks",
        inner_scan="local_layers",
        after=("global_layer",),
        numbered=frozenset({"layers"}),  # Of what is left over alone: the others lie in the inner scan.
        remainder="layers_remainder",
        modules="Gemma4DecoderLayerToLinen",
        source="models/gemma4.py `Gemma4ScannableBlock.__init__`; layers/decoders.py "
        "`_apply_gemma4_scanned_blocks`, whose remainder has no name of its own (its class has that of "
        "layers/nnx_wrappers.py `to_linen_class`); layers/nnx_decoders.py `_init_scanned_gemma4`; "
        "checkpoint_conversion/utils/param_mapping.py (`layers_remainder/layers_{i}`)",
    ),
    ScannedBlocks(
        layers="layers",
        name="scanned_blocks",
        numbered=frozenset({"layers"}),
        remainder="layers_remainder",
        source="models/deepseek4.py `DeepSeek4ScannableBlock.__init__`; layers/decoders.py "
        "`_apply_deepseek4_scanned_blocks`; checkpoint_conversion/utils/param_mapping.py",
    ),
)
"""The scans whose blocks have names of their own.

`dense_layers` and `moe_layers` (layers/decoders.py `Decoder.__call__`) need no entry: each is
a group of layers of one kind, with the same name where its layers have numbers.
"""


MODULES = (("token_embedder",), ("decoder", "decoder_norm"))
"""Modules of every MaxText model (models/models.py `TransformerLinenPure`, layers/decoders.py `Decoder`)."""


def _is_maxtext(stored: Stored) -> bool:
    # Collections of one variables dict: `params/params/...`, beside it at most other collections.
    return bool(_doubled(stored))


def _has_its_modules(stored: Stored) -> bool:
    """Tells whether MaxText wrote the tree: any program may save its variables dict under `params`.

    One of the modules tells it: a checkpoint that has lost the other one is MaxText's still.
    """
    return all(
        any(path[: len(above) + len(module)] == (*above, *module) for path in stored for module in MODULES)
        for above in _doubled(stored)
    )


def _doubled(stored: Stored) -> list[Path]:
    """Returns the keys `params/params`, with those above them, that parameters lie under."""
    if not any(path.count("params") > 1 for path in stored):
        return []  # Nearly every tree.
    above = [(*owner, "params", "params") for owner in owners_of(stored) or ((),)]
    return [keys for keys in above if _is_variables_dict(stored, keys[:-1])]


def _is_variables_dict(stored: Stored, above: Path) -> bool:
    """Tells whether `params` below these keys may be a collection: no leaf lies beside it.

    Beside a leaf it is a module. A subtree beside it may be either, and both readings are tried.
    """
    below = [path[len(above) :] for path in stored if path[: len(above)] == above]
    if not any(path[:1] == ("params",) and len(path) > 1 for path in below):
        return False
    return all(len(path) > 1 for path in below)


MAXTEXT = Layout(
    name="maxtext",
    title="MaxText",
    fits=_is_maxtext,
    place=lambda stored: place_with(stored, 2),
    keys=KEYS,
    scan_axis=1,  # configs/base.yml: param_scan_axis: 1
    is_certain=_has_its_modules,
    scans=SCANS,
    fields=Fields(params=("params", "params")),
)
