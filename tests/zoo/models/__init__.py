"""Every pair of whole models."""

from tests.zoo.models import decoder, mlp, moe, resnet, seq2seq, vit
from tests.zoo.models.base import ModelPair

MODELS: tuple[ModelPair, ...] = (
    *mlp.MODELS,
    *resnet.MODELS,
    *decoder.MODELS,
    *vit.MODELS,
    *seq2seq.MODELS,
    *moe.MODELS,
)
