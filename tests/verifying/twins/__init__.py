"""Small models written twice, by people who never met: other names, fused and divided weights, scans."""

from tests.verifying.twins.convolutional import RESNET, UNET
from tests.verifying.twins.decoders import GEMMA, GPT, LLAMA, MIXTURES
from tests.verifying.twins.encoders import BERT, SPEECH, TRANSLATOR, VIT, LinenEncoderBlock
from tests.verifying.twins.recurrent import BILSTM, REVIEWS
from tests.verifying.twins.twin import Twin

TWINS = (GPT, VIT, TRANSLATOR, BILSTM, LLAMA, GEMMA, MIXTURES, BERT, SPEECH, REVIEWS, RESNET, UNET)

__all__ = [
    "BERT",
    "BILSTM",
    "GEMMA",
    "GPT",
    "LLAMA",
    "MIXTURES",
    "RESNET",
    "REVIEWS",
    "SPEECH",
    "TRANSLATOR",
    "TWINS",
    "UNET",
    "VIT",
    "LinenEncoderBlock",
    "Twin",
]
