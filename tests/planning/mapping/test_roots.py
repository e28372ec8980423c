"""Where a model sits in the target and in the checkpoint."""

from orbax_nnx_handler.planning.core.paths import canonical, parse
from orbax_nnx_handler.planning.mapping.roots import find_roots


def paths(*texts: str) -> list[tuple[str, ...]]:
    return [canonical(parse(text)) for text in texts]


def test_a_models_place_in_a_tuple_is_no_layer_number() -> None:
    wanted = paths("0/layers/0/kernel", "0/layers/1/kernel")
    stored = paths("layers_0/kernel", "layers_1/kernel")

    roots = find_roots(wanted, stored)

    assert (roots.wanted, roots.stored) == (("#0",), ())


def test_a_model_wrapped_beside_a_new_head_is_found() -> None:
    wanted = paths("backbone/a/kernel", "backbone/b/kernel", "backbone/c/kernel", "head/kernel")
    stored = paths("a/kernel", "b/kernel", "c/kernel")

    roots = find_roots(wanted, stored)

    assert (roots.wanted, roots.stored) == (("backbone",), ())


def test_the_larger_halves_of_two_models_are_not_taken_for_each_other() -> None:
    wanted = paths("decoder/a/kernel", "decoder/b/kernel", "decoder/c/kernel", "head/kernel")
    stored = paths("encoder/a/kernel", "encoder/b/kernel", "encoder/c/kernel", "head/kernel")

    roots = find_roots(wanted, stored)

    assert (roots.wanted, roots.stored, roots.overlap) == ((), (), 1)


def test_two_modules_of_other_names_are_not_one_because_both_have_a_kernel() -> None:
    roots = find_roots(paths("head/kernel", "head/bias"), paths("embed/kernel", "embed/bias"))

    assert (roots.wanted, roots.stored, roots.overlap) == ((), (), 0)
