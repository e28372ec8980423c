"""A moment is its own parameter's, and in the field of its name (law 8)."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical
from orbax_nnx_handler.planning.core.recipes import Read, Recipe, reads
from orbax_nnx_handler.planning.layouts.layout import Placement
from orbax_nnx_handler.planning.target.roles import Wanted

_FACTORED = frozenset({"v_row", "v_col"})
"""Fields that may stand for each other where a parameter is transposed: each lacks one of its axes."""


def moments_astray(
    wanted: Sequence[Wanted],
    recipes: Mapping[Path, Recipe],
    placed: Mapping[Path, Placement],
    above: Collection[Tokens],
    name: Callable[[Path], Tokens],
) -> Iterator[tuple[Path, Path, str]]:
    """Yields each wanted moment that is another parameter's, or another field's: it, what it reads, why.

    Args:
        wanted: The target's leaves.
        recipes: What each is made from.
        placed: What each stored leaf is.
        above: What lies above the weights' common names in the target.
        name: The canonical name of a stored leaf of the model.
    """
    moments = [item for item in wanted if item.role == "optimizer" and item.leaf.path in recipes]
    if not moments:
        return
    weights = _weights(wanted, recipes, above)
    parameters = _parameters(placed.values(), name)
    for item in moments:
        recipe = recipes[item.leaf.path]
        for stored in (recipe.path,) if isinstance(recipe, Read) else reads(recipe):
            if placed[stored].section == "optimizer" and placed[stored].slot is None:
                why = _why_astray(item.tokens, canonical(placed[stored].path), weights, parameters)
                if why:
                    yield item.leaf.path, stored, why
                    break


def _weights(
    wanted: Iterable[Wanted], recipes: Mapping[Path, Recipe], above: Collection[Tokens]
) -> dict[Tokens, Collection[Path]]:
    """Returns what each wanted weight is read from, by its name with and without the levels above it."""
    found: dict[Tokens, Collection[Path]] = {}
    for item in wanted:
        if item.role == "model" and item.leaf.path in recipes:
            read = reads(recipes[item.leaf.path])
            for level in {(), *above}:
                if item.tokens[: len(level)] == level:
                    found.setdefault(item.tokens[len(level) :], read)
    return found


def _parameters(placements: Iterable[Placement], name: Callable[[Path], Tokens]) -> dict[Tokens, set[Path]]:
    found: dict[Tokens, set[Path]] = {}
    for item in placements:
        if item.section == "model":
            found.setdefault(name(item.leaf.path), set()).add(item.leaf.path)
    return found


def _why_astray(
    wanted: Tokens,
    stored: Tokens,
    weights: Mapping[Tokens, Collection[Path]],
    parameters: Mapping[Tokens, set[Path]],
) -> str:
    """Returns why two names are in no reading the same field of one parameter; empty if they are."""
    here = [at for at in range(1, len(wanted)) if wanted[at:] in weights]
    if not here:
        return ""
    there = [at for at in range(1, len(stored)) if stored[at:] in parameters]
    if not there:
        return ""
    own = [
        (at, of)
        for at in here
        for of in there
        if not parameters[stored[of:]].isdisjoint(weights[wanted[at:]])
    ]
    if not own:
        return "it is the moment of another parameter"
    fields = ((_field(wanted[:at]), _field(stored[:of])) for at, of in own)
    if any(one == other or {one, other} <= _FACTORED for one, other in fields):
        return ""
    return f"it is {_field(stored[: own[0][1]])}, not {_field(wanted[: own[0][0]])}"


def _field(slot: Tokens) -> str:
    # An optimizer of a whole variables dict, or of a wrapped model, has levels between field and parameter.
    names = [token for token in slot if token not in ("params", "model")]
    return names[-1] if names else ""
