"""A count goes where its moments go, and to nobody else."""

from collections.abc import Iterable

import pytest

from orbax_nnx_handler.planning.mapping.optimizer import pair_scalars

Tokens = tuple[str, ...]


def tokens(path: str) -> Tokens:
    return tuple(f"#{key}" if key.isdecimal() else key for key in path.split("/"))


def paired(wanted: Iterable[str], stored: Iterable[str], moments: dict[str, str | None]) -> dict[str, str]:
    found = pair_scalars(
        {tokens(path): () for path in wanted},
        {tokens(path): () for path in stored},
        {tokens(slot): None if to is None else tokens(to) for slot, to in moments.items()},
        [tokens(to) for to in moments.values() if to is not None],
    )
    return {"/".join(a).replace("#", ""): "/".join(b).replace("#", "") for a, b in found.items()}


@pytest.mark.parametrize(
    ("moments", "found"),
    [
        ({"0/mu": "0/mu"}, {"0/count": "0/count", "1/count": "1/count"}),
        ({"0/mu": "1/0/mu"}, {"0/count": "1/0/count", "1/count": "1/1/count"}),
        ({"0/mu": "inner_state/0/mu"}, {"0/count": "inner_state/0/count", "1/count": "inner_state/1/count"}),
        ({"0/mu": "1/mu", "1/ema": "0/ema"}, {"0/count": "1/count", "1/count": "0/count"}),
    ],
    ids=["same", "in a chain", "injected", "swapped"],
)
def test_counts_follow_the_moments_beside_them(moments: dict[str, str | None], found: dict[str, str]) -> None:
    assert paired(found, found.values(), moments) == found


def test_a_count_whose_moments_are_not_stored_takes_no_other() -> None:
    assert paired(["0/count", "1/count"], ["7/count"], {"0/mu": None}) == {"1/count": "7/count"}


def test_a_count_of_other_moments_is_not_taken_by_place_or_name() -> None:
    moments = {"1/mu": "0/mu", "2/ema": "2/ema"}

    assert paired(["0/count", "1/count"], ["0/count"], moments) == {"1/count": "0/count"}
    assert paired(["0/count"], ["0/count"], {"1/mu": "0/mu"}) == {}


def test_of_two_names_left_over_none_is_taken() -> None:
    assert paired(["a/count"], ["b/count", "c/count"], {}) == {}
    assert paired(["a/count"], ["b/count"], {}) == {"a/count": "b/count"}
