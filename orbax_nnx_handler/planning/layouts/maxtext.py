"""MaxText: a variables dict under `params`, and decoder layers scanned block by block.

A model of one kind of layer is scanned as `layers` or written as `layers_0`,
`layers_1`, ... (layers/decoders.py `Decoder.__call__`). A model of several kinds is
scanned in blocks of them, under names of its own, which are listed in `SCANS`. All
sources are paths below `src/maxtext` of MaxText's repository.
"""

from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.layouts.layout import Fields, Layout, ScannedBlocks, Stored
from orbax_nnx_handler.planning.layouts.linen import KEYS, owners_of, place_with

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
