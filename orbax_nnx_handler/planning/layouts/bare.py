"""Trees without a train state around them: bare params, Gemma's weights, what NNX saves, an optax state.

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
"""

from collections.abc import Collection

from orbax_nnx_handler.planning.core.dtypes import is_weight_called_step
from orbax_nnx_handler.planning.core.leaves import is_optax_state, optimizer_owners, owner_of
from orbax_nnx_handler.planning.core.paths import Path, segments
from orbax_nnx_handler.planning.layouts.layout import Layout, Placement, Stored, has_subtree


def _owners(stored: Stored) -> set[Path]:
    return optimizer_owners(
        path for path, leaf in stored.items() if not is_weight_called_step(path, leaf.dtype)
    )


def _place(stored: Stored) -> tuple[Placement, ...]:
    owners = _owners(stored)
    return tuple(_placement(stored, path, owners) for path in stored)


def _place_params(stored: Stored) -> tuple[Placement, ...]:
    # Modules may be called anything, `params` and `opt_state` included.
    return tuple(
        Placement(leaf=leaf, section="step" if path == ("step",) else "model", path=path)
        for path, leaf in stored.items()
    )


def _placement(stored: Stored, path: Path, owners: Collection[Path]) -> Placement:
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
    return bool(stored) and not has_subtree(stored, "params") and not _is_nnx_state(stored)


NNX_STATE = Layout(name="nnx_state", title="nnx.State", fits=_is_nnx_state, place=_place)
NNX_PURE_DICT = Layout(name="nnx_pure_dict", title="NNX pure dict", fits=_is_pure_dict, place=_place)
PARAMS = Layout(name="params", title="bare params", fits=_is_params, place=_place_params)


def _place_state(stored: Stored) -> tuple[Placement, ...]:
    return tuple(
        Placement(leaf=leaf, section="step" if path == ("step",) else "optimizer", path=path)
        for path, leaf in stored.items()
    )


OPTAX_STATE = Layout(name="optax_state", title="optax state", fits=is_optax_state, place=_place_state)


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
