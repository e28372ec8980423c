"""Gemma: the released weights, with the module's path in one key.

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

from orbax_nnx_handler.planning.core.paths import Path, segments
from orbax_nnx_handler.planning.layouts.layout import Layout, Placement, Stored

_TEXT, _IMAGES = "transformer", "SigLiPFromPatches_0"
_STACKED, _KIND = "stacked_layers", "attention_type_"


def _fits(stored: Stored) -> bool:
    return bool(stored) and all(_is_flat(path) for path in stored)


def _is_flat(path: Path) -> bool:
    return len(path) > 1 and str(path[0]).startswith((f"{_TEXT}/", f"{_IMAGES}/"))


def _place(stored: Stored) -> tuple[Placement, ...]:
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
    fits=_fits,
    place=_place,
    scan_axis=0,  # gemma/gm/ckpts/_compat.py `stack_params`
)
