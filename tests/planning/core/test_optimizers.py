"""Where an optimizer lies in a tree without types, and which `opt_state` is a module of the model."""

import pytest

from orbax_nnx_handler.planning.core.leaves import optimizer_owners, owner_of
from orbax_nnx_handler.planning.core.paths import parse


def owners(*paths: str) -> set[str]:
    return {"/".join(map(str, owner)) for owner in optimizer_owners(map(parse, paths))}


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["opt_state/0/mu/w", "opt_state/0/count"], {""}),
        (["opt_state/mine/w", "step"], {""}),
        (["g_opt/opt_state/foo/w/value", "g_opt/step/value", "gen/w/value"], {"g_opt"}),
        (["gen/opt_state/foo/w", "gen/step/value"], set()),
        (["opt/opt_state/count/w"], set()),
        (["opt/opt_state/count/value"], {"opt"}),
        (["gen/opt_state/kernel", "gen/head/kernel", "step"], set()),
        (["opt_state/decoder/scale", "conv/step"], set()),
        (["opt/opt_state/0/mu/opt_state/mu/w", "opt/step", "opt_state/w"], {"opt"}),
        (["opt/opt_state/inner_states/a/inner_state/0/count"], {"opt"}),
        (["w"], set()),
    ],
)
def test_an_optimizer_has_its_step_beside_it_or_is_arranged_by_optax(paths, expected):
    assert owners(*paths) == expected


def test_a_path_within_moments_belongs_to_the_outer_optimizer():
    path = parse("opt/opt_state/0/mu/opt_state/w")
    assert owner_of(path, {("opt",), ("opt", "opt_state", "0", "mu")}) == ("opt",)
    assert owner_of(parse("gen/opt_state/w"), {("opt",)}) is None
