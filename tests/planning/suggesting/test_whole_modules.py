"""What modules have in common: one rule renames many, and the matrices of one are transposed or none is."""

import itertools

import numpy as np
import pytest
from flax import traverse_util

from orbax_nnx_handler import Rename, suggest
from tests.planning.suggesting.proposals import abstract, check, filled, proposed, restored

WORDS = [*map("".join, itertools.product("bdfg", "aeiou"))][:20]


def modules(stored, wanted, count=32):
    """Returns modules of one size each, by both their names, with places for two words."""
    places = itertools.islice(itertools.product(WORDS, WORDS[:2]), count)
    return {stored.format(*words): (wanted.format(*words), 4 + at) for at, words in enumerate(places)}


@pytest.mark.parametrize(
    ("stored", "wanted", "rule"),
    [
        ("{0}{1}_dense", "{0}{1}_linear", ("{x}_dense", "{x}_linear")),
        ("enc_{0}{1}", "encoder_{0}{1}", ("enc_{x}", "encoder_{x}")),
        ("{0}/{1}_dense", "net/{0}/{1}_linear", ("{x}/{y}_dense", "net/{x}/{y}_linear")),
        ("{0}{1}/block", "{0}{1}/unit", ("block", "unit")),
    ],
)
def test_a_word_of_many_modules_is_renamed_at_once(stored, wanted, rule):
    pairs = modules(stored, wanted)
    tree = filled({f"{name}/kernel": (3, size) for name, (_, size) in pairs.items()})

    found, values = proposed(tree, {f"{name}/kernel": (3, size) for name, size in pairs.values()})

    assert found.renames == (Rename(*rule),)
    for name, (new, _) in pairs.items():
        np.testing.assert_array_equal(values[f"{new}/kernel"], tree[f"{name}/kernel"], err_msg=name)


def test_a_module_that_keeps_its_name_is_not_taken_along():
    pairs = modules("{0}{1}_dense", "{0}{1}_linear") | {"own_dense": ("own_dense", 99)}
    tree = filled({f"{name}/kernel": (3, size) for name, (_, size) in pairs.items()})

    found, values = proposed(tree, {f"{name}/kernel": (3, size) for name, size in pairs.values()})

    assert not found.unmatched_wanted
    for name, (new, _) in pairs.items():
        np.testing.assert_array_equal(values[f"{new}/kernel"], tree[f"{name}/kernel"], err_msg=name)


def asked(stored, wanted):
    """Returns what is suggested, and the stored values, for matrices by path in each of two layers."""
    values = filled({f"layers_{at}/{path}/kernel": x for at in range(2) for path, x in stored.items()})
    shapes = {f"layers/{at}/{path}/kernel": shape for at in range(2) for path, shape in wanted.items()}
    tree = {"params": traverse_util.unflatten_dict(values, sep="/")}
    return suggest(tree, abstract(shapes)), values, shapes


LLAMA = {"w1": (4, 6), "w2": (6, 4), "w3": (4, 6)}
DINO = {"w1": (4, 6), "w2": (4, 6), "w3": (6, 4)}
BACK = {"lin1": (6, 4), "lin2": (4, 6)}
THERE = {"lin1": (4, 6), "lin2": (6, 4)}


@pytest.mark.parametrize(
    ("stored", "wanted", "names"),
    [(LLAMA, DINO, ("w2", "w3")), (DINO, LLAMA, ("w2", "w3")), (THERE, BACK, ("lin1", "lin2"))],
    ids=["leads back last", "leads back second", "all of a module"],
)
@pytest.mark.parametrize("modules", [("", ""), ("feed_forward/", "mlp/")], ids=["one name", "two names"])
def test_names_transpose_no_matrices_that_fit_as_they_are_in_another_order(stored, wanted, names, modules):
    inside = [
        {f"{module}{name}": shape for name, shape in shapes.items()}
        for module, shapes in zip(modules, (stored, wanted), strict=True)
    ]

    found, values, shapes = asked(*inside)

    assert (found.confidence, [question.about for question in found.questions]) == ("open", ["which"])
    for answer, others in enumerate((names[::-1], names)):
        sources = {name: name for name in stored} | dict(zip(names, others, strict=True))
        made = restored(values, shapes, found.answered([answer]))
        for at, (name, source) in itertools.product(range(2), sources.items()):
            value = values[f"layers_{at}/{modules[0]}{source}/kernel"]
            path = f"layers/{at}/{modules[1]}{name}/kernel"
            np.testing.assert_array_equal(made[path], value if value.shape == shapes[path] else value.T)


def test_names_transpose_all_matrices_of_a_model_where_one_fits_no_other_way():
    found, values, shapes = asked({**THERE, "head/out": (4, 5)}, {**BACK, "head/out": (5, 4)})

    assert (found.confidence, found.questions) == ("likely", ())
    right = {path: values[path.replace("layers/", "layers_")].T for path in shapes}
    check(restored(values, shapes, found.renames), right)


def test_layers_with_biases_that_fit_exchanged_within_their_module_are_one_question():
    inside = [
        {f"{name}/kernel": shape for name, shape in some.items()}
        | {f"{name}/bias": shape[1:] for name, shape in some.items()}
        for some in (LLAMA, DINO)
    ]
    stored, shapes = (
        {f"{list_}{at}/mlp/{path}": shape for at in range(2) for path, shape in some.items()}
        for list_, some in zip(("layers_", "layers/"), inside, strict=True)
    )
    values = filled(stored)

    found = suggest({"params": traverse_util.unflatten_dict(values, sep="/")}, abstract(shapes))

    assert (found.confidence, len(found.questions)) == ("open", 1)
    others = {"w1": "w1", "w2": "w3", "w3": "w2"}
    right = {
        path: values[f"layers_{at}/mlp/{others[name]}/{leaf}"]
        for path in shapes
        for _, at, _, name, leaf in [path.split("/")]
    }
    check(restored(values, shapes, found.answered([0])), right)


def test_which_of_two_modules_is_told_apart_by_a_word_more_is_one_question_for_all_of_their_parts():
    shapes = {"conv/kernel": (4, 1, 16), "x_proj/kernel": (16, 10), "dt_proj/kernel": (2, 16), "D": (16,)}
    stored = filled(
        {
            f"block_{at}/mamba/{way}/{x}": of
            for at in range(2)
            for way in ("ab", "cd")
            for x, of in shapes.items()
        }
    )
    stored |= {f"block_{at}/mamba/in_proj/kernel": np.full((8, 32), at, "float32") for at in range(2)}
    asked = {
        f"layers/{at}/mixer/{part}{end}{leaf and '/'}{leaf}": shape
        for at, end in itertools.product(range(2), ("", "_b"))
        for part, _, leaf, shape in ((*path.partition("/"), shape) for path, shape in shapes.items())
    }

    wanted = asked | {f"layers/{at}/mixer/in_proj/kernel": (8, 32) for at in range(2)}

    found, values = proposed(stored, wanted)

    (question,) = found.questions
    assert (len(values), len(question.choices), len(question.wanted)) == (2, 2, 16)
    for ways in itertools.permutations(("ab", "cd")):
        right = {
            path: stored["/".join((f"block_{at}", "mamba", way, part.removesuffix("_b"), *leaf))]
            for path in asked
            for _, at, _, part, *leaf in [path.split("/")]
            for way in [ways[part.endswith("_b")]]
        }
        every = (restored(stored, wanted, found.answered([at])) for at in range(2))
        assert any(all(np.array_equal(made[path], x) for path, x in right.items()) for made in every)


def of_two_layers(module, layers):
    """The shapes of a module of two equal layers."""
    return {f"{module}/{layer}/kernel": (8, 8) for layer in layers}


@pytest.mark.parametrize(
    ("left", "wanted"), [("generator", "discriminator"), ("low_policy", "high_policy"), ("actor", "critic")]
)
def test_a_module_is_made_of_its_namesake_or_asked_about(left, wanted):
    # What is left is no opposite of it, and therefore had taken the place of the encoder.
    stored = of_two_layers("encoder", ["Dense_0", "Dense_1"]) | of_two_layers(left, ["Dense_0", "Dense_1"])
    shapes = of_two_layers("encoder", ["fc1", "fc2"]) | of_two_layers(wanted, ["fc1", "fc2"])
    arrays = filled(stored)

    _, values = proposed(arrays, shapes)

    right = {f"encoder/fc{at + 1}/kernel": arrays[f"encoder/Dense_{at}/kernel"] for at in (0, 1)}
    check(values, {path: x for path, x in right.items() if path in values})


@pytest.mark.parametrize("names", [("qf_a", "qf_b"), ("ffn_start", "ffn_end"), ("macaron", "final")])
def test_two_modules_are_not_torn_into_the_same_two(names):
    stored = {k: v for name in names for k, v in of_two_layers(name, ["Dense_0", "Dense_1"]).items()}
    shapes = {k: v for at in (1, 2) for k, v in of_two_layers(f"critic_{at}", ["fc1", "fc2"]).items()}
    arrays = filled(stored)

    found, values = proposed(arrays, shapes)

    right = {
        f"critic_{at}/fc{to + 1}/kernel": arrays[f"{name}/Dense_{to}/kernel"]
        for at, name in enumerate(names, 1)
        for to in (0, 1)
    }
    check(values, {path: x for path, x in right.items() if path in values})
    assert found.confidence != "certain"


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ({"a": "b_net", "b": "a_net"}, {"Dense_0": "fc1", "Dense_1": "fc2", "LayerNorm_0": "ln"}),
        ({"left": "right_view", "right": "left_view"}, {"mlp/Dense_0": "0", "mlp/Dense_1": "2", "norm": "3"}),
    ],
)
def test_nothing_of_a_module_is_settled_by_names_where_its_first_layer_tells_that_it_is_the_other_one(
    names, parts
):
    """Of all others the shapes are equal: only the first one tells, and says the opposite of the names."""
    shapes, made = {}, {}
    for wide, (path, aim) in enumerate(names.items()):
        for at, (part, called) in enumerate(parts.items()):
            leaf, shape = ("kernel", (16, 16)) if "Dense" in part else ("scale", (16,))
            shapes[f"{aim}/{called}/{leaf}"] = (16 + 2 * wide, 16) if at == 0 else shape
            made[f"{aim}/{called}/{leaf}"] = f"{path}/{part}/{leaf}"
    stored = filled({made[aim]: shape for aim, shape in shapes.items()})

    _, values = proposed(stored, shapes)

    check(values, {aim: stored[made[aim]] for aim in values})
