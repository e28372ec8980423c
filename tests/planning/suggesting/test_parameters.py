"""Which parameters make one part: a scale with its shift, a kernel with its bias, a norm and no token."""

from tests.planning.suggesting.proposals import check, filled, proposed, restored

NORMED = {"h_{}/ln_1": "blocks/{}/norm1", "h_{}/ln_2": "blocks/{}/norm2", "ln_f": "final_norm"}


def test_what_shifts_beside_a_scale_is_a_bias():
    pairs = [(path.format(at), aim.format(at)) for path, aim in NORMED.items() for at in range(3)]
    paths = {
        f"{path}/{leaf}": f"{aim}/{called}"
        for path, aim in pairs
        for leaf, called in (("scale", "scale"), ("bias", "shift"))
    }
    stored = filled(dict.fromkeys(paths, (8,)))

    found, values = proposed(stored, dict.fromkeys(paths.values(), (8,)))

    assert not found.questions
    check(values, {aim: stored[path] for path, aim in paths.items()})


def test_a_module_that_another_part_tells_does_not_take_a_token_for_its_norm():
    stored = filled(
        {
            "vit/embeddings/position_embeddings": (1, 17, 8),
            "vit/embeddings/cls_token": (1, 1, 8),
            "vit/layernorm/scale": (8,),
            "vit/layernorm/bias": (8,),
        }
    )
    aims = ("encoder/pos_embedding", "class_token", "encoder/ln/weight", "encoder/ln/bias")
    right = dict(zip(aims, stored.values(), strict=True))

    found, values = proposed(stored, {aim: value.shape for aim, value in right.items()})

    assert not found.questions
    check(values, right)


def test_the_bias_of_an_ensemble_may_have_an_axis_in_the_place_of_the_inputs():
    sizes = ((5, 9, 16), (5, 16, 16), (5, 16, 14))
    shapes = {f"Dense_{at}/kernel": size for at, size in enumerate(sizes)}
    shapes |= {f"Dense_{at}/bias": size[::2] for at, size in enumerate(sizes)}
    stored = filled(shapes)
    right = {f"lin{at}_w": stored[f"Dense_{at}/kernel"] for at in range(3)}
    right |= {f"lin{at}_b": stored[f"Dense_{at}/bias"][:, None] for at in range(3)}

    found, values = proposed(stored, {aim: value.shape for aim, value in right.items()})

    assert not found.questions
    check(values, right)


def test_weights_and_a_bias_that_begin_alike_are_one_layer():
    stored = filled({"sop_classifier/kernel": (8, 2), "sop_classifier/bias": (2,)})
    aims = ("seq_relationship/output_weights", "seq_relationship/output_bias")
    right = dict(zip(aims, stored.values(), strict=True))
    shapes = {path: value.shape for path, value in right.items()}

    found, _ = proposed(stored, shapes)

    check(restored(stored, shapes, found.answered([0] * len(found.questions))), right)


def test_two_layers_that_are_called_a_gate_are_both_halves_of_an_array_and_asked_about():
    shapes = {"gating_einsum": (2, 8, 24), "linear": (24, 8)}
    stored = filled({f"layer_{at}/mlp/{path}": shape for at in range(2) for path, shape in shapes.items()})
    right = {
        f"block_{at}/{aim}/kernel": stored[f"layer_{at}/mlp/gating_einsum"][half]
        for at in range(2)
        for half, aim in enumerate(("ffw_gating", "ffw_gating_2"))
    }
    lead_back = {f"block_{at}/ffw_linear/kernel": stored[f"layer_{at}/mlp/linear"] for at in range(2)}
    wanted = {path: value.shape for path, value in (right | lead_back).items()}

    found, values = proposed(stored, wanted)

    check(values, lead_back)
    assert len(found.questions) == 1
    check(restored(stored, wanted, found.answered([0])), right | lead_back)
