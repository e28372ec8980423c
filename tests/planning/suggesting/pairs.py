"""Linen programs and NNX models by somebody else, as names and shapes, and what stays open of them."""

import json
from pathlib import Path

FOREIGN = json.loads((Path(__file__).parent / "foreign_pairs.json").read_text())
UNSEEN = json.loads((Path(__file__).parent / "unseen_pairs.json").read_text())

OPEN = {
    "bloom": 12,
    "bloom_fused": 4,
    "siglip_two_towers": 2,
    "vae_flax": 2,
    "sac": 4,
    "graphnet": 28,
    "nerf": 48,
    "recurrentgemma": 28,
    "dinov2_giant": 12,
    "transformer_xl_ppo": 28,
    "hypernerf": 4,
    "segformer": 16,
    "gpt_oss": 8,
    "simba": 4,
    "savi": 4,
    "genie": 200,
    "rt1": 20,
    "s4": 12,
    "drq": 20,
    "ncsnpp": 1,
    "maxtext_gemma2": 61,
    "deeplab": 12,
    "deformable_detr": 8,
    "qformer": 4,
    "evoformer": 44,
    "perceiver": 36,
}
"""Leaves that stay open.

An array that holds queries, keys and values head by head is none of the rules' (Bloom); a logarithm of a
variance is not that of a deviation (vae_flax); `t` and `b` may be anything (siglip_two_towers); networks and
parts of one shape that Linen numbered (sac, simba, graphnet, nerf, savi, genie, rt1) take the order of
creation, which a state has forgotten. How keys and values lie in an array of a layer that Linen numbered
(segformer), which half of an array is the gate (recurrentgemma, dinov2_giant), whether gates and what they
gate lie in turns (gpt_oss), which of square layers that stand beside each other is which
(transformer_xl_ppo), whether a square matrix is transposed (recurrentgemma), and what `v` and `w` are
(hypernerf), which of `out` and `out2` is the gate (s4), which norm of a decoder with deformable
attention is which (deformable_detr), which of the layers of an attention that Linen numbered is which
(perceiver), and which of `a` and `b` is left (evoformer), only outputs tell. Not found yet: the bias of
queries and of values in one for all three (qformer), layers of two kinds scanned in one block by names alone
(maxtext_gemma2), critics beside a copy of theirs (drq), norms by the convolutions before them (deeplab), a
lone vector (ncsnpp).
"""
