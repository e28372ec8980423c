"""Pairs whose target calls some modules by words that mean nothing: less is found, none is wrong.

No name tells then, so what shapes and the modules around do not tell either stays open.
"""

import itertools
import random
import re

import pytest

from orbax_nnx_handler import suggest
from tests.planning.suggesting.pairs import UNSEEN, nested, target_of, wrong_under
from tests.sampled import every

SYLLABLES = [*map("".join, itertools.product("bklmnrstvwxz", "aeiou"))]


def renamed(wanted, words):
    """Returns the wanted leaves with modules of some names called otherwise, with the same numbers."""

    def name(old):
        base = re.sub(r"_?\d+$", "", old)
        return words.get(base, base) + old[len(base) :]

    found = {}
    for path, leaf in wanted.items():
        *modules, last = path.split("/")
        found["/".join([*map(name, modules), last])] = leaf
    return found


def left_and_wrong(name, words):
    pair = {**UNSEEN[name], "wanted": renamed(UNSEEN[name]["wanted"], words)}
    tree = nested(pair["stored"])
    found = suggest(tree, target_of(pair["wanted"]))
    left = {"/".join(map(str, path)) for path in found.unmatched_wanted}
    return left, wrong_under(found.renames, tree, pair) - left


@pytest.mark.parametrize(
    ("name", "words"),
    every(
        2,
        [
            ("flux", {"attn": "peloto", "to_out": "lofiba", "to_q": "fiyoxi"}),
            ("qformer", {"attention": "wezape", "output_query": "mihuke", "dense": "penulo"}),
            ("ddpm_ho", {"down": "vukimi", "block": "kemivu", "mid": "sisiki", "up": "zaravu"}),
            ("coatnet", {"rel_pos": "tokipe"}),
            ("controlnet", {"attn": "huhuwe", "blocks": "dududu"}),
            ("recurrentgemma", {"rg_lru": "vutoyo", "temporal_pre_norm": "webafi"}),
            ("qformer", {"crossattention": "rabara"}),
            ("mmdit", {"add_q_proj": "rayoja", "add_v_proj": "baxifi", "to_k": "dubadu"}),
            ("lxmert", {"language_mlp_norm": "mimifi"}),
            ("segformer", {"key": "fifinu"}),
            ("segformer", {"dense": "kizake", "key": "fifinu"}),
            ("segformer", {"output": "rakebe", "value": "lomipe"}),
            ("timesfm", {"o_proj": "kijavu"}),
            ("genie", {"lam": "kiwesi", "patch_up": "pevudu", "query": "vuyoto", "tokenizer": "jatofi"}),
            ("bloom_fused", {"embed_norm": "fidunu"}),
            ("perch_conformer", {"ffn1_layer_norm": "bekili"}),
            ("spectrogram_diffusion", {"to_q": "nimivu"}),
            (
                "pointnet",
                {"bn": "tofivu", "fstn": "toraza", "stn": "pepepe", "conv": "siwelo", "fc": "nukeke"},
            ),
        ],
    ),
)
def test_modules_whose_names_mean_nothing_are_never_taken_for_others(name, words):
    _, wrong = left_and_wrong(name, words)

    assert not wrong


def test_square_of_heads_whose_role_no_name_tells_is_asked_about_both_ways():
    left, _ = left_and_wrong("timesfm", {"o_proj": "kijavu"})

    assert left == {f"stacked_transformer/layers/{layer}/self_attn/kijavu/kernel" for layer in range(3)}


@pytest.mark.parametrize("name", ["vitdet", "beit", "sac", "resnet_flax"])
def test_no_leaf_is_wrong_under_random_names(name):
    rng = random.Random(name)
    names = {re.sub(r"_?\d+$", "", x) for path in UNSEEN[name]["wanted"] for x in path.split("/")[:-1]}
    words = {
        each: "".join(rng.choices(SYLLABLES, k=3)) for each in sorted(names) if each and rng.random() < 0.5
    }

    _, wrong = left_and_wrong(name, words)

    assert not wrong
