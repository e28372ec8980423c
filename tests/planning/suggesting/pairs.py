"""Linen programs and NNX models by somebody else, as names and shapes, and what stays open of them."""

import functools
import hashlib
import json
import math
from pathlib import Path

import jax
import numpy as np
from flax import nnx, traverse_util

from orbax_nnx_handler import from_linen, suggest

FOREIGN = json.loads((Path(__file__).parent / "foreign_pairs.json").read_text())
UNSEEN = json.loads((Path(__file__).parent / "unseen_pairs.json").read_text())

OPEN = {
    "bloom": 12,
    "bloom_fused": 4,
    "vae_flax": 2,
    "sac": 4,
    "graphnet": 28,
    "nerf": 48,
    "recurrentgemma": 28,
    "dinov2_giant": 12,
    "transformer_xl_ppo": 24,
    "hypernerf": 4,
    "segformer": 16,
    "gpt_oss": 8,
    "simba": 4,
    "savi": 4,
    "genie": 200,
    "rt1": 20,
    "s4": 12,
    "drq": 4,
    "ncsnpp": 1,
    "deformable_detr": 8,
    "qformer": 4,
    "evoformer": 44,
    "perceiver": 32,
    "dual_encoder": 1,
    "inception": 50,
    "ddpm": 10,
    "qwen2": 6,
    "set_transformer": 20,
    "maxvit": 156,
    "lru_glu": 16,
    "rrdb": 8,
    "coca": 5,
    "nafnet": 20,
    "conv_tasnet": 3,
    "xcit": 24,
    "protein_mpnn": 38,
    "guided_diffusion": 6,
    "flux": 2,
    "mmdit": 2,
    "eva02": 18,
    "codegen": 9,
    "internlm2": 9,
    "gemma4_experts": 6,
    "mipnerf360": 6,
    "litgpt": 6,
    "bigs": 30,
    "ttt": 3,
    "spectrogram_diffusion": 1,
    "pegasus_x": 8,
    "gemma3n": 9,
    "dbrx": 6,
    "openelm": 8,
    "palm_fused": 21,
    "perch_conformer": 34,
    "tome": 2,
    "soundstream_unet": 2,
    "nest": 21,
    "xunet": 128,
    "structure_module": 22,
    "serl": 7,
    "mtv": 60,
    "jet": 8,
    "fvlm": 7,
    "pct": 32,
    "bert_mlm_to_cls": 4,
    "bert_pretraining_to_cls2": 2,
    "electra_pre_to_cls": 4,
    "distilbert_mlm_to_cls": 4,
    "t5_encoder_only": 2,
    "crossq": 48,
    "beit": 2,
    "beit_nolambda": 2,
    "marian": 1,
    "owl": 2,
    "owlvit": 2,
    "fnet": 6,
    "gin": 5,
    "wav2vec2_fairseq": 1,
}
"""Leaves that stay open.

An array that holds queries, keys and values may hold them head by head or in groups (bloom, codegen,
internlm2); a logarithm of a variance is not that of a deviation (vae_flax); networks and parts of one shape
that Linen numbered (sac, drq, simba, graphnet, nerf, savi, genie, rt1) are in no order that names tell.
Whether shift or scale comes first (flux, mmdit), how keys and values lie in an array of a layer that Linen
numbered (segformer), which half of an array or which of two layers is the gate (recurrentgemma,
dinov2_giant, qwen2, litgpt), whether gates and what they gate lie in turns (gpt_oss), which of square
layers that stand beside each other is which (transformer_xl_ppo), whether a square matrix is transposed
(recurrentgemma), and what `v` and `w` are (hypernerf), which of `out` and `out2` is the gate (s4, lru_glu),
which norm of a decoder with deformable attention is which (deformable_detr), which of the layers of an
attention that Linen numbered is which (perceiver, set_transformer, pct), which of `a` and `b` is left
(evoformer), which of two attentions comes first (maxvit), whether a temperature is a scale (dual_encoder,
coca), which of two last norms is the text's (coca), which of a block's convolutions of one shape is which
branch (inception, nafnet), which comes first (rrdb), which of three norms is of which part (xcit), what is
a message of nodes and what one of edges (protein_mpnn), how queries, keys and values lie in one array
(guided_diffusion), which of three square layers leads
back (eva02), which of two norms is that of the experts (gemma4_experts), and where a list of square layers
ends (mipnerf360), what `fs4` and `bs4` are (bigs), whether a square array is turned (ttt, gemma3n), which
of two numbered norms is the global one (pegasus_x), which of `w1`, `v1` and `w2` is which (dbrx), which
half of an array is the gate (openelm), which layer masks (soundstream_unet), which of two heads that Linen
numbered is the deviation's (serl) and which of the layers that Haiku counts is which (structure_module),
whether what remains of a head is meant by a new one (bert_mlm_to_cls and its like, electra_pre_to_cls,
distilbert_mlm_to_cls), or what remains of a decoder (t5_encoder_only), which of the norms of a list and
a lone one Linen numbered first (crossq), and whether a vector is a new one where each side calls it after
something else: a pooler's norm `fc_norm` (beit), the bias of logits `generator` (marian), the norm of a
`merged_class_token` (owl, owlvit), that of what mixes one of `fourier` (fnet), only outputs tell; so they
do whether one part that is called otherwise than all beside it is another one: `atom` and `node` (gin),
`codevectors` and `vars` (wav2vec2_fairseq), `label` and `species` (perch_conformer). Not found
yet: the mask's layer in a list of its own (conv_tasnet), the bias of queries and of values in one for all
three (qformer), a lone vector (ncsnpp), two levels of a U-Net that are as large (ddpm), heads that hold
queries and a part of the network (palm_fused), positions of tokens (spectrogram_diffusion), `fflayer_start`
and convolutions of dense layers (perch_conformer), a layer below `concat_mlp` beside one of that name
(tome), keys and values per head in one array, and a bias beside `proj_kernel` (nest), two lists of blocks
in the arms of a U-Net (xunet), the numbers of a layer and of a view in one name (mtv), stacks beside the
layers that hold them (jet), and norms and convolutions of which the ones beside tell the number (fvlm).
"""

KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def keys(path):
    return tuple(int(key) if key.isdecimal() else key for key in path.split("/"))


def nested(shapes):
    arrays, first = {}, 0
    for path, shape in shapes.items():
        size = math.prod(shape)
        arrays[path] = np.arange(first, first + size, dtype="float32").reshape(shape)
        first += size
    assert first < 2**24
    return traverse_util.unflatten_dict(arrays, sep="/")


def target_of(wanted):
    return nnx.from_flat_state(
        [
            (keys(path), KINDS[kind](jax.ShapeDtypeStruct(tuple(shape), "float32")))
            for path, (shape, kind, _) in wanted.items()
        ]
    )


@functools.cache
def proposed(name):
    """Returns the stored tree and what is proposed for it."""
    tree = nested(UNSEEN[name]["stored"])
    return tree, suggest(tree, target_of(UNSEEN[name]["wanted"]))


def restored_under(rules, tree, pair):
    """Returns a pair's target, restored under rules; what they don't give is zero."""
    return from_linen(tree, target_of(pair["wanted"]), renames=rules, policy="warn", unexpected="ignore")


def wrong_under(rules, tree, pair):
    """Returns the leaves that rules give another value, or none."""
    return wrong_in(restored_under(rules, tree, pair), pair)


def wrong_in(state, pair):
    """Returns the leaves of a pair's state that have another value than the right one."""
    values = {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    digests = {
        path: hashlib.sha256(np.ascontiguousarray(value, dtype="float32").tobytes()).hexdigest()[:12]
        for path, value in values.items()
    }
    return {path for path, digest in digests.items() if digest != pair["wanted"][path][2]}
