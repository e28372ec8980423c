"""What programs of NNX save and load: whole states, openpi and Tunix; and weights or an optax state alone.

`nnx.state(...)` saved by Orbax has a last level `value` under every leaf,
`nnx.to_pure_dict` has not. Both keep model variables of every type together and
the optimizer under its attribute, so only `opt_state` and the `step` beside it
tell anything about a leaf.

An optax state is `tx.init(params)`, saved beside an item of weights. On disk a chain
is a list, a named tuple a dict of its fields (optax/_src/transform.py, optax/transforms):
`0/count`, `0/mu/<parameter>`. Nothing is a parameter there.

gemma/gm/ckpts/_checkpoint.py reads three forms. *Nested* is the model's own
tree, which is bare params and needs no layout. *Flat* is
`{"transformer/layer_0/attn/q_einsum": {"w": ...}}`. *Stacked* keeps the layers of
one kind of attention together, `transformer/stacked_layers/attention_type_1/...`:
with k kinds, element i of kind j is layer i * k + j.

Both are placed under the nested names, as `gm.ckpts.load_params` would return
them: without `transformer`, the image encoder as `vision_encoder`, and without
the `w` that only the released files have below `mlp/linear` and
`mlp/gating_einsum`.

openpi/training/checkpoints.py saves each step as two items: `params`, the tree
`{"params": nnx.state(model)}`, and `train_state` with `step` and `opt_state`.
Every path of `params` ends in `value` (the released checkpoints have it taken
away and are Linen variables to all appearance). Where the training kept an
average of its weights, `params` holds the average and `train_state/params` the
weights that the optimizer's moments belong to; the two items are then not read
together, since only the caller knows which weights are wanted.

tunix/sft/checkpoint_manager.py saves `nnx.state(model)` as `model_params` and
`nnx.state(optimizer, nnx.OptState)` as `optimizer_state`; in both every path
ends in `value`. One of the items alone is an `nnx.State`.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.core.dtypes import is_weight_called_step
from orbax_nnx_handler.planning.core.leaves import (
    is_optax_state,
    is_state,
    lone_optimizers,
    optimizer_owners,
    owner_of,
)
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, segments, without_box
from orbax_nnx_handler.planning.layouts.layout import Fields, Layout, Placement, Stored, has_subtree, tops
from orbax_nnx_handler.planning.layouts.linen import owners_of


def _owners(stored: Stored) -> set[Path]:
    return optimizer_owners(
        path for path, leaf in stored.items() if not is_weight_called_step(path, leaf.dtype)
    )


def _place_tree(stored: Stored) -> tuple[Placement, ...]:
    owners = _owners(stored)
    placed = tuple(_in_tree(stored, path, owners) for path in stored)
    networks = _networks(placed)
    return tuple(_in_network(item, networks) for item in placed) if networks else placed


def _networks(placed: Sequence[Placement]) -> set[Path]:
    """Returns the keys above each network, where several or one apart have optimizers of their own.

    The names of an optimizer's moments tell: they are those of all its network's weights, below one level.
    Where that is the root, or other weights lie elsewhere, what has been trained are parts of one model.
    """
    models = [item for item in placed if item.section == "model"]
    alone = _steps_alone(models)
    weights = [item.path for item in models if item.path not in alone]
    moments = [item for item in placed if item.section == "optimizer" and item.owner]
    longest = {item.owner: item for item in sorted(moments, key=lambda item: len(item.path))}
    some = {
        at for item in longest.values() for at in _above(item.tokens, _levels(_like(item.tokens, models)))
    }
    beside = {at for at in some if any(owner[:-1] == at[:-1] for owner in longest)}
    if len(_beside(weights, some)) < 2 and some == beside:
        return set()  # Nearly every program: one moment tells.
    levels, trained = _levels(weights), dict[Path, set[Path]]()
    for item in moments:
        if above := _above(item.tokens, levels):
            trained[item.owner] = trained.get(item.owner, above) & above
    own = set[Path]().union(*trained.values())
    above = {at[:depth] for at in own for depth in range(len(at))}
    found = {at for at in _beside(weights, own) if at in own or at not in above}
    found = {at for at in found if not any(at[:depth] in found for depth in range(len(at)))}
    parents = {at[:depth] for at in found for depth in range(len(at))}
    is_whole = all(path[:-1] in parents or _within(path, found) is not None for path in weights)
    return found if (len(found) > 1 or found != beside) and is_whole and () not in found else set()


def _steps_alone(models: Sequence[Placement]) -> set[Path]:
    """Returns the steps with nothing beside them, as of optimizers that keep no state (`optax.sgd`)."""
    beside = Counter(without_box(item.path)[:-1] for item in models)
    steps = (item.path for item in models if without_box(item.path)[-1:] == ("step",) and not item.leaf.shape)
    return {path for path in steps if beside[without_box(path)[:-1]] == 1}


def _like(moment: Tokens, weights: Sequence[Placement]) -> list[Path]:
    """Returns the weights that have the name of a moment, the longest that any has."""
    names = (moment[at:] for at in range(1, len(moment)) if is_state(moment[at - 1 :]))
    found = ([item.path for item in weights if item.tokens[-len(name) :] == name] for name in names)
    return next((paths for paths in found if paths), list[Path]())


def _levels(weights: Iterable[Path]) -> Mapping[Tokens, set[Path]]:
    """Returns what lies above the weights of a name, by each end of their paths."""
    levels: dict[Tokens, set[Path]] = defaultdict(set)
    for path in weights:
        for at in range(len(path)):
            levels[canonical(path[at:])].add(path[:at])
    return levels


def _beside(weights: Iterable[Path], levels: Collection[Path]) -> set[Path]:
    """Returns some levels, and those beside them that have weights below."""
    parents = {at[:-1] for at in levels}
    depths = {len(at) for at in levels}
    return {path[:depth] for path in weights for depth in depths if path[: max(depth - 1, 0)] in parents}


def _above(moment: Tokens, levels: Mapping[Tokens, set[Path]]) -> set[Path]:
    """Returns what lies above the weights that have the name of a moment, the longest that they have."""
    starts = (at for at in range(1, len(moment)) if moment[at:] in levels and is_state(moment[at - 1 :]))
    return next((levels[moment[at:]] for at in starts), set[Path]())


def _within(path: Path, networks: Collection[Path]) -> Path | None:
    return next((path[:at] for at in range(len(path)) if path[:at] in networks), None)


def _in_network(item: Placement, networks: Collection[Path]) -> Placement:
    own = _within(item.path, networks)
    if item.section != "model" or own is None:
        return item
    return dataclasses.replace(item, path=item.path[len(own) :], owner=own)


def _place_params(stored: Stored) -> tuple[Placement, ...]:
    # Modules may be called anything, `params` and `opt_state` included.
    return tuple(
        Placement(leaf=leaf, section="step" if path == ("step",) else "model", path=path)
        for path, leaf in stored.items()
    )


def _in_tree(stored: Stored, path: Path, owners: Collection[Path]) -> Placement:
    owner, leaf = owner_of(path, owners), stored[path]
    if owner is not None:
        return Placement(leaf=leaf, section="optimizer", path=path[len(owner) + 1 :], owner=owner)
    plain = path[:-1] if str(path[-1]) == "value" else path
    if plain and str(plain[-1]) == "step" and (plain[:-1] in owners or len(plain) == 1):
        return Placement(leaf=leaf, section="step", path=path, owner=plain[:-1])
    return Placement(leaf=leaf, section="model", path=path)


def _is_nnx_state(stored: Stored) -> bool:
    return bool(stored) and not has_subtree(stored, "params") and all(_ends_in_value(path) for path in stored)


def _ends_in_value(path: Path) -> bool:
    return len(path) > 1 and segments(path)[-1] == "value"


def _is_pure_dict(stored: Stored) -> bool:
    return _is_bare(stored) and bool(_owners(stored))


def _is_params(stored: Stored) -> bool:
    return _is_bare(stored) and not _owners(stored)


def _is_bare(stored: Stored) -> bool:
    if not stored or _is_nnx_state(stored):
        return False
    # Networks may lie below `params`: no collection has an `nnx.Optimizer` of its own beside it.
    return not has_subtree(stored, "params") or bool(lone_optimizers(stored))


_TOGETHER = Fields(params=(), collections=None)
_BOXED = Fields(params=(), collections=None, boxed=True)

NNX_STATE = Layout(name="nnx_state", title="nnx.State", fits=_is_nnx_state, place=_place_tree, fields=_BOXED)
NNX_PURE_DICT = Layout(
    name="nnx_pure_dict", title="NNX pure dict", fits=_is_pure_dict, place=_place_tree, fields=_TOGETHER
)
PARAMS = Layout(name="params", title="bare params", fits=_is_params, place=_place_params, fields=_TOGETHER)


def _place_state(stored: Stored) -> tuple[Placement, ...]:
    return tuple(
        Placement(leaf=leaf, section="step" if path == ("step",) else "optimizer", path=path)
        for path, leaf in stored.items()
    )


def _is_state(stored: Stored) -> bool:
    """Tells an optax state from a tuple of networks and optimizers, whose steps lie beside their states."""
    if not is_optax_state(stored) or owners_of(stored):
        return False
    return not any((*owner, "step") in stored for owner in _owners(stored))


OPTAX_STATE = Layout(name="optax_state", title="optax state", fits=_is_state, place=_place_state)


_TEXT, _IMAGES = "transformer", "SigLiPFromPatches_0"
_STACKED, _KIND = "stacked_layers", "attention_type_"


def _is_gemma(stored: Stored) -> bool:
    return bool(stored) and all(_is_flat(path) for path in stored)


def _is_flat(path: Path) -> bool:
    return len(path) > 1 and str(path[0]).startswith((f"{_TEXT}/", f"{_IMAGES}/"))


def _place_gemma(stored: Stored) -> tuple[Placement, ...]:
    return tuple(
        Placement(leaf=leaf, section="model", collection="params", path=_nested(path))
        for path, leaf in stored.items()
    )


def _nested(path: Path) -> Path:
    top, *below = segments(path)
    if top == _IMAGES:
        below = ["vision_encoder", *below]
    if len(below) > 2 and below[-3] == "mlp" and below[-1] == "w":
        below = below[:-1]
    if len(below) > 2 and below[0] == _STACKED and below[1].startswith(_KIND):
        # Blocks of the layers `layer_0`, `layer_1`, ...: one position in the block a kind.
        below = ["layer", *below[1:]]
    return tuple(below) or path


GEMMA = Layout(
    name="gemma",
    title="Gemma",
    fits=_is_gemma,
    place=_place_gemma,
    scan_axis=0,  # gemma/gm/ckpts/_compat.py `stack_params`
)


_WEIGHTS: Path = ("params", "params")


def _is_step(stored: Stored) -> bool:
    weights = [path for path in stored if path[:1] == ("params",)]
    in_place = bool(weights) and all(path[:2] == _WEIGHTS and len(path) > 2 for path in weights)
    return in_place and tops(stored) == {"params", "train_state"} and ("train_state", "step") in stored


def _place_step(stored: Stored) -> tuple[Placement, ...]:
    return tuple(_placement(stored, path) for path in stored)


def _placement(stored: Stored, path: Path) -> Placement:
    leaf, rest = stored[path], path[2:]
    if path == ("train_state", "step"):
        return Placement(leaf=leaf, section="step", path=path)
    if path[:2] == ("train_state", "opt_state") and rest:
        return Placement(leaf=leaf, section="optimizer", path=rest)
    if path[:2] == _WEIGHTS:
        return _model(stored, path, rest)
    return Placement(leaf=leaf, section="other", path=path)


def _is_weights(stored: Stored) -> bool:
    boxed = all(len(path) > 2 and path[-1] == "value" for path in stored)
    return boxed and tops(stored) == {"params"}


def _place_weights(stored: Stored) -> tuple[Placement, ...]:
    return tuple(_model(stored, path, path[1:]) for path in stored)


def _model(stored: Stored, path: Path, rest: Path) -> Placement:
    # No collection: it is the whole state of an NNX model, statistics and random state included.
    return Placement(leaf=stored[path], section="model" if rest else "other", path=rest or path)


def _is_train_state(stored: Stored) -> bool:
    weights = [path for path in stored if path[:1] == ("params",)]
    boxed = all(len(path) > 2 and path[-1] == "value" for path in weights)
    return bool(weights) and boxed and tops(stored) == {"params", "opt_state", "step"}


def _place_train_state(stored: Stored) -> tuple[Placement, ...]:
    return tuple(_in_train_state(stored, path) for path in stored)


def _in_train_state(stored: Stored, path: Path) -> Placement:
    top, rest = path[0], path[1:]
    if top == "step":
        return Placement(leaf=stored[path], section="other" if rest else "step", path=path)
    if top == "opt_state" and rest:
        return Placement(leaf=stored[path], section="optimizer", path=rest)
    return _model(stored, path, rest)


OPENPI = Layout(
    name="openpi",
    title="openpi",
    fits=_is_step,
    place=_place_step,
    keys=frozenset({"params", "train_state"}),
    fields=Fields(
        params=_WEIGHTS,
        collections=None,
        opt_state=("train_state", "opt_state"),
        step=("train_state", "step"),
    ),
)
OPENPI_WEIGHTS = Layout(
    name="openpi_weights",
    title="openpi weights",
    fits=_is_weights,
    place=_place_weights,
    fields=Fields(collections=None),
)
OPENPI_TRAIN_STATE = Layout(
    name="openpi_train_state",
    title="openpi train state",
    fits=_is_train_state,
    place=_place_train_state,
    keys=frozenset({"params", "opt_state", "step"}),
    fields=Fields(collections=None),
)


_MODEL, _OPTIMIZER = "model_params", "optimizer_state"


def _is_tunix(stored: Stored) -> bool:
    boxed = all(len(path) > 2 and path[-1] == "value" for path in stored)
    return boxed and _MODEL in tops(stored) and tops(stored) <= {_MODEL, _OPTIMIZER}


def _place_tunix(stored: Stored) -> tuple[Placement, ...]:
    return tuple(_in_item(stored, path) for path in stored)


def _in_item(stored: Stored, path: Path) -> Placement:
    leaf, rest = stored[path], path[1:]
    if path[0] == _MODEL and rest:
        return Placement(leaf=leaf, section="model", path=rest)
    if path[0] == _OPTIMIZER and rest in (("step",), ("step", "value")):
        return Placement(leaf=leaf, section="step", path=path)
    if path[0] == _OPTIMIZER and len(rest) > 1 and rest[0] == "opt_state":
        return Placement(leaf=leaf, section="optimizer", path=rest[1:])
    return Placement(leaf=leaf, section="other", path=path)


TUNIX = Layout(
    name="tunix",
    title="Tunix",
    fits=_is_tunix,
    place=_place_tunix,
    keys=frozenset({_MODEL, _OPTIMIZER}),
    fields=Fields(
        params=(_MODEL,),
        collections=None,
        opt_state=(_OPTIMIZER, "opt_state"),
        step=(_OPTIMIZER, "step"),
        boxed=True,
    ),
)
