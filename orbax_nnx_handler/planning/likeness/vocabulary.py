"""What the names of a model's parts mean: words of the field, and words that exclude each other."""

import functools
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from orbax_nnx_handler.planning.core.paths import Level, is_count

Names = tuple[str, ...]

Concepts = frozenset[str]
"""What a name says: words of the table below, and every other word as it is."""

_SPELLINGS = {
    "attn": "attention attn att mha xattention attentions",
    "attn self": "selfattention selfattn msa mhsa",
    "attn cross": "crossattention crossattn xattn encdecattention encoderattention",
    "cross": "cross encdec",
    "mlp": "mlp mlps ffn ffns ff ffw ffwd feedforward mlpblock moe",
    "norm": "norm norms ln layernorm lnorm layrnorm rmsnorm rms batchnorm bn groupnorm gn normalization "
    "normalisation instancenorm normalize normomalization lns bns gns",
    "embed": "embed embeds embedding embeddings embedder emb embs embd",
    "token embed": "wte",
    "pos embed": "wpe posembed posemb posembeds",
    "token": "word words tok token tokens vocab",
    "pos": "pos position positions positional",
    "type": "type types segment segments",
    "cls": "cls class classification",
    "dist": "dist distillation distilled",
    "patch": "patch patches",
    "q": "q query queries wq qs",
    "k": "k key keys wk ks",
    "v": "v value values val wv vs",
    **{
        " ".join(letters): (name := "".join(letters)) + f" w{name}"
        for count in (2, 3)
        for letters in itertools.permutations("qkv", count)
        if count == 3 or "q" not in letters or letters == ("q", "k")
    },
    "out": "out outp output outputs outgoing wo",
    "in": "in inp input inputs incoming",
    "up": "up ups wi wu intermediate",
    "gate": "gate gates gating g wg",
    "down": "down wd",
    "head": "head heads classifier logits logit score predictions prediction unembed unembedding",
    "enc": "enc encoder encoders",
    "enc text added": "added",
    "dec": "dec decoder decoders decoderblock",
    "vision": "vision visual visn image img rgb",
    "audio": "audio spectrogram spec mel",
    "text": "text txt language lang context",
    "pre": "pre before",
    "post": "post after",
    "first": "first start starting begin beginning initial",
    "last": "last end ending final",
    "fwd": "fwd fw forward forwards",
    "bwd": "bwd bw backward backwards reverse reversed",
    "mean": "mean mu",
    "var": "var variance",
    "std": "std stddev sigma",
    "logstd": "logstd logsigma logstds logsigmas",
    "real": "real re",
    "imag": "imag im imaginary",
    "shortcut": "shortcut skip",
    "shortcut res": "residual res resid",
    "conv": "conv convolution convolutions conv1d conv2d",
    "conv deconv": "deconv convtranspose tconv upconv",
    "downsample": "downsampler downsamplers downsampling shrink",
    "downsample shortcut": "downsample",
    "upsample": "upsample upsampler upsamplers upsampling grow",
    "triangle": "triangle triangular tri",
    "mul": "mul multiplication multiply",
    "col": "col cols column columns",
    "src": "src source",
    "tgt": "tgt target momentum",
    "generator": "gen generator",
    "discriminator": "disc discriminator",
    "spatial": "spatial space",
    "temporal": "temporal time",
    "rel": "rel relative relpos",
    "scale": "scale gain",
    "shift": "shift beta offset",
    "layerscale": "layerscale gamma lambda ls scaling",
    "expand": "expand exp expansion expanded",
    "depthwise": "depthwise dw",
    "pointwise": "pointwise pw",
    "pointwise project": "pwl project",
    "probe": "probe latent",
    "box": "box boxes bbox bboxes",
    "passage": "passage ctx document doc",
    "actor": "actor policy action pi",
    "online": "online student",
    "": "model models module modules transformer core net network backbone base layer layers block blocks h "
    "stack proj projection dense linear fc fcs lin weight weights kernel w param params cell instance dot "
    "product multi c to einsum the of and general sublayer",
}
"""Each concept with its spellings; those of the last line say nothing."""

_TOGETHER = (
    "ln f: norm last, multi head: attn, map head: attn pool, multihead: attn, enc dec: cross, "
    "encoder decoder attention: cross attn, encoder decoder: cross, encoder attn: cross attn, "
    "encoder attention: cross attn, feed forward: mlp, dense relu dense: mlp, dense gated: mlp, "
    "layer norm: norm, rms norm: norm, batch norm: norm, group norm: norm, lm head: head, embed out: head, "
    "token type: type, cls token: cls, class token: cls, class embedding: cls, mask token: mask, c fc: up, "
    "fc 1 g: gate, fc 1 x: up, dense h to 4h: up, dense 4h to h: down, attn vec: attn o, c attn: attn q k v, "
    "in proj: in, down sample: downsample, up sample: upsample, layer scale: layerscale, "
    "conv proj: conv shortcut, norm proj: norm shortcut, src attn: cross attn, log std: logstd, "
    "log stds: logstd, log sigma: logstd, log var: logvar, log variance: logvar, actor critic:, "
    "add q: enc text added q, add k: enc text added k, add v: enc text added v, add out: enc text added out, "
    "w pack: q k v, score model:, score net:, score network:, score unet:, sa norm: self attn norm, "
    "sa layer norm: self attn norm, r w: rel content, r r: rel pos, g encoder: goal enc, conv pw: conv pw, "
    "conv transpose: conv deconv, query encoder: question enc, context encoder: passage enc, "
    "q network: critic, net g: generator, net d: discriminator, full layer layer norm: last norm, "
    "negative slope: prelu, encoderdecoder: enc dec, prenorm: pre norm, postnorm: post norm, "
    "dwconv: depthwise conv, llm: text, key encoder: passage enc, encoder q: enc online, encoder k: enc tgt, "
    "qf: critic, transition: dynamics, context wq: cross attn q, context wk: cross attn k, proj m: tgt, "
    "context wv: cross attn v, context wo: cross attn o, encoder m: enc tgt, dense norm: mlp norm, "
    "c proj: out, sa q: self attn q, sa k: self attn k, sa v: self attn v, ca q: cross attn q, "
    "ca k: cross attn k, ca v: cross attn v"
)
_PHRASES: Mapping[tuple[str, ...], tuple[str, ...]] = {
    tuple(words.split()): tuple(said.split())
    for words, _, said in (each.partition(":") for each in _TOGETHER.split(","))
}
"""Words that mean something else together. `c_attn`, `c_fc`, `ln_f`: GPT-2; `dense_h_to_4h`: NeoX and Bloom;
`embed_out`: NeoX; `attn_vec_einsum`: Gemma; `DenseReluDense`: T5; `encoder_attn`: Bart and Whisper;
`conv_proj`: Flax's ResNet; `src_attn`: The Annotated Transformer; `add_q_proj`, `norm_added_q`, `to_add_out`:
diffusers' tokens of a text encoder; `W_pack`: Baichuan; `fc1_g`, `fc1_x`: timm's SwiGLU; `sa_layer_norm`:
DistilBERT; `r_w_bias`: Transformer-XL; `full_layer_layer_norm`: ALBERT; `conv_pw`: timm's, may expand."""

_APART = (
    "q k v o, up down gate, in out, pre post, first last, enc dec, self cross, attn mlp, vision text audio, "
    "fwd bwd, left right, top bottom, upper lower, inner outer, local global, high low, coarse fine, "
    "row col, odd even, real imag, min max, mean var std logvar logstd, prev next, past future, "
    "teacher online, online tgt, src tgt, generator discriminator, actor critic, user item, "
    "expand depthwise, spatial temporal, depthwise pointwise, expand project, token pos type, embed head, "
    "cls mask dist register prompt, positive negative, channel token, parent child, fast slow, wide deep, "
    "front back, long short, downsample upsample, public private, old new, clean noisy, x y z, a b, "
    "red green blue, major minor, north south east west, small large medium, tall short, hot cold, "
    "layerscale shift, scale shift, alpha shift, update reset, forget in out cell, scale bias, add mul, "
    "write read, known unknown, static dynamic, sine cosine, sin cos, width height depth, hidden visible, "
    "encode decode, sender receiver, head tail, subject object, question answer, text question, "
    "premise hypothesis, anchor positive, input target, ih hh, theta phi gate o, ir iz in hr hz hn, "
    "ii if ig io hi hf hg ho, actor v, reward v, reward critic, reward actor, v advantage, "
    "pitch energy duration, question passage, critic generator, prior posterior, ext int, hstack vstack, "
    "macaron post, macaron last, first decay, expand reduce, squeeze excite, alpha logstd"
)
_EXCLUSIVE = tuple(frozenset(words.split()) for words in _APART.split(", "))
"""Words of which one never becomes another."""
_EXCLUDING = {word: [x for x in _EXCLUSIVE if word in x] for word in frozenset[str]().union(*_EXCLUSIVE)}

_PARAMETERS = {
    "main": "kernel weight weights w scale gamma embedding embeddings table",
    "bias": "bias b beta offset shift",
    "mean": "mean running_mean moving_mean",
    "var": "var running_var moving_var variance running_variance moving_variance",
}
PARAMETER = {spelling: kind for kind, names in _PARAMETERS.items() for spelling in names.split()}
ENDING = re.compile(r"(.+)_(kernel|weights?|bias|scale)")
"""A parameter with what it is called as its own, and at the end of a name: `gate_up_proj_bias`."""

PYTORCHS = frozenset(("weight", "weights", "w"))  # Programs may keep outputs before inputs under these.
SINGLE = frozenset(("layers", "layer", "blocks", "block", "h", "stages", "stage", "resblocks"))
"""Names under which a lone number is the only layer of a model."""

RESTS = frozenset(("remainder", "remaining", "rest", "tail", "last"))
"""Names of the last layers of a list, which a program keeps apart from it."""

MARGIN = 0.75  # By how much one pairing must be better than every other one.
STRONG = frozenset(["q", "k", "v", "o", "up", "gate", "down"])  # Parts of attention, of a gated network.
_NOTHING: Concepts = frozenset()
_KNOWN, _LONGEST = frozenset(word for x in _SPELLINGS for word in x.split()), max(map(len, _PHRASES))
_MEANING = {x: tuple(said.split()) for said, spellings in _SPELLINGS.items() for x in spellings.split()}
_PLURAL = re.compile(r"(?<=[nrt]ch|.sh|.ss|..x)es$|(?<=..[^s])s$")
_WORD = re.compile(
    r"[A-Z](?=to[A-Z])|to(?=[A-Z])|\d+x\d+|\d+[a-rt-z](?![A-Za-z])|\d+|conv(?=[a-rt-z](?![a-z]))|[A-Z]+(?![a-z])"
    r"|(?<![a-zA-Z])[qkv](?=(?:content|pos|norm|proj)(?![a-z]))|(?!(?<=\d)s(?![A-Za-z]))[A-Z]?[a-z]+"
)
_FROM_TO = re.compile(r"(?<![A-Za-z])([a-vA-V])2([A-Za-z])(?![A-Za-z])")  # `gen_a2b` is `G_AB`, `i2h` `ih`.


@functools.lru_cache(maxsize=65536)
def words(name: str) -> tuple[str, ...]:
    """Returns the words of a name in order: `LayerNorm_0` is `layer`, `norm`, `0`; `5b` counts, no `1s`."""
    return tuple(part.lower() for part in _WORD.findall(_FROM_TO.sub(r"\1\2", name)))


def counts_of(name: str) -> tuple[str, ...]:
    """Returns the numbers among the words of a name."""
    return tuple(filter(str.isdecimal, words(name)))


@functools.lru_cache(maxsize=65536)
def meanings(name: str) -> tuple[str, ...]:
    """Returns the concepts of a name in the order of its words; numbers and empty words left out."""
    found, left = list[str](), words(f"net_{name}" if name.partition("_")[0] in ("G", "D") else name)
    while left:
        length = next((n for n in range(_LONGEST, 0, -1) if left[:n] in _PHRASES), 0)
        if length:
            found += _PHRASES[left[:length]]
        elif not left[0][0].isdecimal():
            one = left[0] if left[0] in _MEANING else _PLURAL.sub("", left[0])
            found += _MEANING.get(one, (one,))
        left = left[max(length, 1) :]
    return tuple(dict.fromkeys(found))


def concepts(names: Iterable[str]) -> Concepts:
    """Returns all that some names say."""
    return _NOTHING.union(*map(meanings, names))


SAID_BY = {"scale": concepts(["norm"]), "gamma": concepts(["norm"]), "embedding": concepts(["embed"])}
"""What the parameters of some parts say of them."""


@functools.lru_cache(maxsize=65536)
def exclude(one: Concepts, other: Concepts) -> bool:
    """Tells whether two names mean parts of which one is never the other: `pre` and `post`, `q` and `k`."""
    groups = (group for word in one for group in _EXCLUDING.get(word, ()))
    return any(not other.isdisjoint(group) and (one & other).isdisjoint(group) for group in groups)


def telling(words: Sequence[frozenset[str]]) -> list[frozenset[str]]:
    """Returns of several names the words that not all of them have: `ppm` of `PPM_0/Conv_1` and `Conv_1`."""
    shared = functools.reduce(frozenset[str].__and__, words) if len(words) > 1 else frozenset[str]()
    return [each - shared for each in words]


def weight(concept: str) -> float:
    """Returns how much it tells that two names share a concept."""
    if concept == "conv":
        return 0.5  # Shapes tell it.
    return 4.0 if concept in STRONG else 2.0 if concept in _KNOWN else 0.5 + 0.5 * (len(concept) > 1)


@functools.lru_cache(maxsize=65536)
def likeness(one: Concepts, other: Concepts) -> float:
    """Returns how much two names say alike; what only one of them says counts a little against it."""
    left, right = one - other, other - one
    shared = sum(map(weight, one & other)) + _abbreviated(left, right) + _abbreviated(right, left)
    return shared - 0.25 * min(len(one ^ other), 6)


def _abbreviated(short: Concepts, said: Concepts) -> int:
    """Returns how many words begin one other word alone: `pred` and `predictor`.

    A letter may only count: in a coupling layer of RealNVP `s` is the scale and `t` the translation.
    """
    words = [word for word in short - _KNOWN if len(word) > 2 or word in ("s", "t")]
    begun = [sum(long != word and long.startswith(word) for long in said - _KNOWN) for word in words]
    return begun.count(1)


def parameter_of(name: str) -> str:
    """Returns the parameter that a name ends in; one called `output_kernel` is none of a layer's kernels."""
    last = name.rsplit("_", 1)[-1]
    return last if last in PYTORCHS else name


@functools.lru_cache(maxsize=65536)
def directions(names: tuple[str, ...]) -> frozenset[tuple[Sequence[str], Sequence[str]]]:
    """Returns what leads to what by a path's names: `image_to_token` never is `token_to_image`."""
    around = (each for x in names for each in zip(words(x), words(x)[1:], words(x)[2:], strict=False))
    return frozenset((meanings(at), meanings(to)) for at, middle, to in around if middle in ("to", "2"))


@functools.lru_cache(maxsize=65536)
def same_name(one: str, other: str) -> bool:
    """Tells whether two numbered levels are called alike, by their names without numbers."""
    if one == other or any(map(str.isdecimal, one + other)):
        return one == other  # `stage1_block0` counts blocks, not stages.
    return bool(said := {*meanings(one)}) and said == {*meanings(other)}


def same_number(one: Level, held: tuple[int, ...], other: Level, others: tuple[int, ...]) -> bool | None:
    """Tells whether two levels have one number among those of their siblings; None where nothing tells."""
    in_turns = len(held) == len(others) and {one.style, other.style} == {"_", "/"}  # Of layers and functions.
    in_turns |= len(held) != len(others)  # Its sibling has another name.
    is_shifted = len(held) == len(others) > 1 and held != others
    is_shifted &= (is_count(held) and is_count(others)) or {*held}.isdisjoint(others)
    bases = [x.base if x.style else x.base.lower() for x in (one, other)]  # `Q1` is no `q2`.
    are_called_so = bases[0] == bases[1] and one.style == other.style and not is_shifted  # From 0, from 1.
    if (held[0] == others[0] and not in_turns) or are_called_so:
        return one.number == other.number
    if len(held) == len(others) and one.number is not None and other.number is not None:
        is_told = len(held) > 1 or {one.number, other.number} == {0, 1}  # A lone `norm2` is no first one.
        return held.index(one.number) == others.index(other.number) if is_told else None
    return None


def networks_outputs(names: Collection[str]) -> set[str]:
    """Returns which outputs beside queries lead back from a network, by how the others are spelled.

    `wo` beside `wq` is an attention's, and beside `wi` and `to_q`, which has its own `to_out`, a network's.
    """
    every = {name: (set(meanings(name)), _spelling(name)) for name in names}
    said = {name: (found, at) for name, (found, at) in every.items() if "norm" not in found}
    around = {spelling for found, spelling in said.values() if found & set("qkv")}
    inner = [spelling for found, spelling in said.values() if found & {"in", "up"} or not found]
    outs = {name: spelling for name, (found, spelling) in said.items() if "out" in found}
    is_told = len(around) == 1 and not around.isdisjoint(outs.values())
    return {name for name, at in outs.items() if at not in around and (is_told or at in inner) and around}


def _spelling(name: str) -> tuple[str, ...]:
    """Returns what a name has beside the word that tells what it is: `w` of `wq`, `to` of `to_q`."""
    plain = ("w" if len(word) == 2 and word[0] == "w" else word for word in words(name))
    return tuple(word for word in plain if not _MEANING.get(word))


def arm(names: Iterable[str]) -> int:
    """Returns where a U-Net computes a module: on the way down, in the middle, or on the way up."""
    said = concepts(names)
    return bool(said & {"up", "dec", "out", "last"}) - bool(said & {"down", "enc", "in", "first"})


FUSED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "gating_einsum": (("gate", "up"), "Gemma"),
    "kv_einsum": (("k", "v"), "Gemma"),
    "qkv_einsum": (("q", "k", "v"), "Gemma"),
    "in_proj": (("q", "k", "v"), "PyTorch's attention"),
    "c_attn": (("q", "k", "v"), "GPT-2"),
    "Wqkv": (("q", "k", "v"), "FlashAttention's modules"),
    "w12": (("gate", "up"), "DINOv2 and TIPS"),
    "w13": (("gate", "up"), "vLLM"),
}
"""Names of fused parts that do not say their order themselves, and whose convention tells it."""

UNTOLD = re.compile(
    r"key_?value|wqkv|linear_q?kv|(fused|mixed|packed|grouped|layernorm|combined)_?q?kv|"
    r"q?kv_?(fused|packed|combined)|kv_(b|up)(_proj)?$"
)
"""Arrays of queries, keys and values that programs hold head by head or in groups, or side by side.

`query_key_value`: NeoX, Bloom; `linear_qkv`, `mixed_qkv`, `key_value`: Megatron; `wqkv`: InternLM2;
`kv_b_proj`: DeepSeek; `layernorm_qkv`: Transformer Engine and ESM.
"""

_OWN_ORDER: Sequence[Names] = (("dense_i",), ("dense_h",), ("norm_out", "linear"))
"""Arrays of several parts in an order of their own: the gates of NNX's cells, diffusers' scale and shift."""


def may_hold_otherwise(one: Names, other: Names) -> bool:
    """Tells whether one of two arrays, whose shapes agree, may hold its parts in another order."""
    ends = [[names[-len(end) :] == end for end in _OWN_ORDER] for names in (one, other)]
    return ends[0] != ends[1]


NUMBERED: Mapping[tuple[str, tuple[int, ...]], tuple[tuple[str, ...], str]] = {
    **{
        ("wi", counted): (roles, "T5 and MaxText: wi_0 is the activated one")
        for counted, roles in (((0, 1), ("gate", "up")), ((0,), ("gate",)), ((1,), ("up",)))
    },
    ("w", (1, 2, 3)): (("gate", "down", "up"), "Llama: w1 is the activated one, w2 leads back"),
    ("w", (1, 3)): (("gate", "up"), "Llama: w1 is the activated one"),
    **{("qkv", (*range(n),)): (tuple("qkvo"[:n]), "The Annotated Transformer") for n in (3, 4)},
}
"""Numbered layers of a gated network, or of an attention in a list that says no more, by known programs."""

COMPUTED: Mapping[tuple[float, ...], tuple[tuple[str, ...], ...]] = {
    (3.0, 1.0): (("q", "k", "v"), ("o",)),
    (1.0, 2.0, 1.0): (("q",), ("k", "v"), ("o",)),
}
"""What the layers that Linen numbered in an attention hold, by how much larger each is than the last one."""


def place_of(names: Names) -> tuple[Names, str]:
    """Returns the part that a leaf belongs to and what it is there."""
    above, last = names[:-1], names[-1]
    kind = PARAMETER.get(last)
    if kind is not None:
        return above, kind
    ending = None if "layerscale" in meanings(last) else ENDING.fullmatch(last)
    if ending is not None and PARAMETER.get(ending[2]):
        return (*above, ending[1]), PARAMETER[ending[2]]
    return names, "main"


def order_word(found: Collection[str]) -> int:
    """Returns -1 for a name that means the beginning of something, 1 for its end, 0 for neither or both."""
    low = bool({"pre", "first", "in", "up", "expand", "stem"}.intersection(found))
    high = bool({"post", "last", "out", "down", "pointwise"}.intersection(found))
    return high - low


PLACING = frozenset(("pre", "post", "first", "last", "in", "out", "attn", "mlp", "self", "cross"))
"""The words that tell where a norm stands in its block."""

_SELF, _CROSS, _MLP, END = 10.0, 20.0, 30.0, 100.0
BEFORE_NETWORK, OF_EITHER = _MLP - 1, (_SELF + 2, _CROSS + 2)  # Behind the attention, or there.


def same_place(one: float, other: float) -> bool:
    """Tells whether two norms may stand in the same place of a block.

    What comes after the attention comes before the network that follows it: Llama's
    `post_attention_layernorm` is Gemma's `pre_ffw_norm`.
    """
    low, high = sorted(x - 1 if x in OF_EITHER else x for x in (one, other))
    if low == -END or high == END:
        return low != -END or high != END
    if high - low <= 1:
        return True
    return (low, high) in {
        (after, before + side)
        for after, before in ((_SELF + 1, _MLP), (_SELF + 1, _CROSS), (_CROSS + 1, _MLP))
        for side in (-1, 0)
    }


def component(said: Iterable[str]) -> float | None:
    """Returns where a part of a block stands in the order of computation."""
    found = set(said)
    if "cross" in found:
        return _CROSS
    if found & {"attn", "self"}:
        return _SELF
    return _MLP if found & {"mlp", "expert", "experts"} else None


def letters(told: Iterable[frozenset[str]]) -> list[str | None]:
    """Returns the letters by which parts are counted, `conv_a` and `conv_b`, from what tells them apart."""
    return [min(words) if len(words) == 1 and words <= {*"abcd"} else None for words in told]


def last_of_block(places: Sequence[float | None]) -> int | None:
    """Returns which norm of a block is its last one, of its network, where all others are attentions'."""
    kinds = [None if place is None else round(place, -1) for place in places]
    lasts = [at for at, kind in enumerate(kinds) if kind in (_MLP, END)]
    attends = all(kind in (_SELF, _CROSS, _MLP, END) for kind in kinds) and len(kinds) > 2
    return lasts[0] if attends and len(lasts) == 1 else None


def placed(positions: Sequence[float | None]) -> list[float | None]:
    """Returns places, the only unknown one at the other end: `norm` beside `final_norm`, or `mlp_norm`."""
    known = {position for position in positions if position is not None}
    ends = (_MLP - 1, _MLP) if len(positions) == 2 else ()
    if positions.count(None) == 1 and known and all(abs(x) >= END or x in ends for x in known):
        return [0.0 if position is None else position for position in positions]
    return list(positions)


def in_strict_order(keys: Sequence[Any]) -> list[int] | None:
    """Returns the places in the order of their keys; None where a key is not known or is there twice."""
    if None in keys or len(set(keys)) < len(keys):
        return None
    return sorted(range(len(keys)), key=lambda at: keys[at])
