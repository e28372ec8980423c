"""From what outputs prove of one module to those like it, and to rules; and what the place of calls tells.

Where nothing but an order tells, where it is asked and where something is missing, the n-th module of a kind
that one program calls may be the n-th one of the other. Only equal outputs prove it.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.lines import Sentence, counted, listed
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import Read, Recipe, Shapes, reads
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.planning.rules import Rename, Rule
from orbax_nnx_handler.planning.rules.split_and_fuse import rules_making
from orbax_nnx_handler.planning.suggesting.proved_recipes import Remade, carried_over
from orbax_nnx_handler.planning.verdict.outcomes import Restored, Verdict
from orbax_nnx_handler.verifying import (
    TOLERANCE,
    Distance,
    changes_more_than_rounding,
    fewer,
    lent,
    rounding_of,
)
from orbax_nnx_handler.verifying.pairing import compare_outputs
from orbax_nnx_handler.verifying.recording import Call
from orbax_nnx_handler.verifying.runs import Compared, weights_of
from orbax_nnx_handler.verifying.single_module import ModuleRunner
from orbax_nnx_handler.verifying.verification import FirstDifference, Verification
from orbax_nnx_handler.verifying.weights import Misfilled


def rules_remaking(
    changes: Mapping[Path, Recipe],
    restored: Mapping[Path, Restored],
    axes: Mapping[Path, int],
    now: Callable[[Path, int | None], Recipe],
    shapes: Shapes,
) -> tuple[Rule, ...]:
    """Returns the rules that make leaves as outputs prove, in all layers, out of what they are now."""
    found = list[Rule]()
    for leaf, recipe in changes.items():
        letters, axis = iter("ijklmn"), axes.get(leaf)
        name = render(tuple(f"{{{next(letters)}}}" if isinstance(key, int) else key for key in leaf))
        count = restored[leaf].wanted.shape[0] if axis == 0 else None
        for layer in (None,) if axis is None else range(count or 0):
            made = rules_making(recipe, now(leaf, layer), name, shapes, count)
            if made:
                found += [rule for rule in made if rule not in found]
                break
    return tuple(found)


def made_as_called(
    asked: Collection[Path],
    ordered: Collection[str],
    verdict: Verdict,
    places: Mapping[Path, Path],
    ours: Mapping[Path, int],
    theirs: Mapping[Path, int],
) -> tuple[Remade, ...]:
    """Returns how leaves are made of what Linen calls where the target calls their module; none as they are.

    Of leaves that are missing or asked about, and of those that nothing but an order tells.

    Args:
        asked: The leaves that are asked about.
        ordered: The rules that rest on an order, as they are quoted.
        verdict: What its rules make.
        places: Where the stored leaves lie among Linen's modules.
        ours: Which call of all is the first of each module of the target.
        theirs: The same of Linen's.
    """
    items = ((path, x) for path, x in verdict.restored.items() if isinstance(x.recipe, Read))
    left = {p: x for p, x in items if p in asked or not {*ordered}.isdisjoint(x.reason.split("; "))}
    stored = dict.fromkeys([*itertools.chain(*(reads(x.recipe) for x in left.values())), *verdict.unexpected])
    shapes = {path: placed.leaf.shape for path, placed in verdict.sides.placements.items()}
    wanted = {path: (path, x.wanted.shape) for path, x in (*left.items(), *verdict.missing.items())}
    known = {path: (places[path], shapes[path]) for path in stored if path in places}
    found = paired_in_turn((wanted, ours), (known, theirs))
    now = {path: item.recipe for path, item in verdict.restored.items()}
    is_new = any(now.get(leaf) != Read(path) for leaf, path in found.items())
    return tuple(Remade(leaf=leaf, layer=None, recipe=Read(path)) for leaf, path in found.items() if is_new)


_MOST_NAMED = 6


def wrong_elsewhere(
    runner: ModuleRunner,
    compared: Sequence[Compared],
    one: Compared,
    changes: Mapping[Path, Recipe],
    other: Compared | None,
) -> Iterator[tuple[Compared, Compared, Mapping[Path, Recipe]]]:
    """Yields modules like one, in other layers or of other experts, in which the same is wrong as in it.

    Each runs with weights made so on what Linen's is called with, for as many calls as the program has.

    Args:
        runner: Knows the recipes.
        compared: Every call that was compared.
        one: The module.
        changes: What has to be otherwise in it.
        other: The module whose weights it needs, if another's: then those after it need others' too.

    Yields:
        The module, the one that it has to be like, and its leaves that change.
    """
    names = _without_numbers(one.path)
    calls = [each for each in compared if each.found.is_certain and _without_numbers(each.path) == names]
    alike = list({each.path: each for each in reversed(calls)}.values())[::-1]
    if any(each.pair.nnx.layer is not None or each.found.outputs.coarse for each in alike):
        return
    # Of layers, the first that is called in Linen is the first here.
    in_order = sorted(alike, key=lambda each: each.linen.call.order) if other else alike
    left = sum(map(len, runner.calls.values()))
    for each, like in zip(alike, in_order, strict=True):
        if each is one or each.agrees or (other and like is each) or each.calls > left:
            continue
        left -= each.calls
        made = weights_of(runner, like, each, None) if other else _made_alike(runner, one, each, changes)
        try:
            inputs = lent(each.nnx.inputs, like.linen.inputs, whatever=True)
            outputs = runner.run(each.path, None, each.nnx.call, inputs, made) if made else []
        # The caller's module may fail in any way when it is called outside of its program.
        except Exception:
            continue
        found = compare_outputs(like.linen, each.nnx, outputs)
        if found.compared and not changes_more_than_rounding(Distance(), found, each.calls):
            yield each, like, made


def said_of(others: Sequence[tuple[Compared, Compared, Any]]) -> str:
    """Returns in which other modules the same is wrong, in words."""
    if not others:
        return ""
    ones = fold_paths(one.path for one, _, _ in others)
    likes = ", ".join(render(like.path) for _, like, _ in others[:_MOST_NAMED])
    likes += ", ..." if len(others) > _MOST_NAMED else ""
    moved = any(one is not like for one, like, _ in others)
    needed = f": needed are, in this order, the weights that {likes} were given" if moved else ""
    return f" The same is wrong in {ones}{needed}."


def _made_alike(
    runner: ModuleRunner, one: Compared, other: Compared, changes: Mapping[Path, Recipe]
) -> dict[Path, Recipe]:
    """Returns what changes in a module like one; nothing where it has other leaves."""
    length, recipes = len(one.path), runner.recipes
    places = {leaf: (*other.path, *leaf[length:]) for leaf in one.pair.leaves}
    if not recipes.keys() >= {*places.values()}:
        return {}
    pairs = [(recipes[leaf], recipes[place]) for leaf, place in places.items()]
    return {places[leaf]: carried_over(recipe, pairs) for leaf, recipe in changes.items() if leaf in places}


def _without_numbers(path: Path) -> Path:
    return tuple(key for key in path if not isinstance(key, int))


def rules_to_blame(
    first: FirstDifference | None,
    restored: Mapping[Path, Restored],
    runner: ModuleRunner,
    given: Sequence[Rule],
) -> list[Rule]:
    """Returns the given rules that make what is proved wrong.

    Where another leaf has what one needs, they are those by which only one of the two is made. Else a rule
    that also makes what is right beside the leaf is not to blame, where another one is left.
    """
    if first is None or not first.proved:
        return []
    made, module, found = first.made_otherwise(restored), first.module.nnx.path, set[str]()
    holders = {runner.recipe(leaf, first.layer): leaf for leaf in runner.recipes}
    by = {leaf: {*item.reason.split("; ")} for leaf, item in restored.items()}
    beside = (leaf for leaf in by if leaf not in made and leaf[: len(module)] == module)
    sure = {told for leaf in beside for told in by[leaf]}
    names = {rule.quoted for rule in given if isinstance(rule, Rename)}
    for leaf, recipe in made.items():
        if recipe in holders and (apart := by[leaf] ^ by[holders[recipe]]):
            found |= apart & names or apart
            continue
        is_name = not {*reads(recipe)} <= {*reads(restored[leaf].recipe)}
        told = by[leaf] & names if is_name else by[leaf] - names
        found |= told - sure or told
    return [rule for rule in given if rule.quoted in found]


_Called = tuple[Mapping[Path, tuple[Path, Shape]], Mapping[Path, int]]


def paired_in_turn(wanted: _Called, stored: _Called) -> Mapping[Path, Path]:
    """Returns wanted leaves with the stored ones of the modules that are called in the same place.

    Modules are of a kind that hold the same names and shapes. Of a kind, both programs call as many.

    Args:
        wanted: The wanted leaves with their place among modules and their shape, and which call of all is
            the first of each module.
        stored: The same of the stored ones.
    """
    ours, theirs = _by_kind(*wanted), _by_kind(*stored)
    kinds = [kind for kind, some in ours.items() if len(some) == len(theirs.get(kind, ()))]
    pairs = itertools.chain(*(zip(ours[kind], theirs[kind], strict=True) for kind in kinds))
    return {leaf: other[key] for one, other in pairs for key, leaf in one.items()}


def _by_kind(
    leaves: Mapping[Path, tuple[Path, Shape]], calls: Mapping[Path, int]
) -> Mapping[frozenset[object], list[dict[object, Path]]]:
    """Returns what modules hold, by what that is called and shaped, each kind in the order of the calls."""
    held: dict[Path, dict[object, Path]] = defaultdict(dict)
    for leaf, (place, shape) in leaves.items():
        depths = range(len(place) - 1, -1, -1)
        owner = next((place[:depth] for depth in depths if place[:depth] in calls), None)
        if owner is not None:
            held[owner][place[len(owner) :], shape] = leaf
    kinds: dict[frozenset[object], list[dict[object, Path]]] = defaultdict(list)
    for owner in sorted(held, key=calls.__getitem__):
        kinds[frozenset(held[owner])].append(held[owner])
    return kinds


_EQUAL, _NEAR = 1e-4, 1e-2
_NEARER = 30
"""How much nearer than any other answer one has to be where the code differs a little too."""


def tells(best: float, next_: float, coarse: float = 0.0) -> bool:
    """Tells whether the nearest answer is right, from how far apart outputs are under it and the next one.

    `coarse` is what right ones may be apart, where they were computed in fewer digits than float32's.
    """
    if best <= _EQUAL:
        return next_ > _EQUAL and next_ > _NEARER * best
    return best <= max(_NEAR, 2 * coarse) and next_ > _NEARER * max(best, coarse)


def why_open(missing: Sequence[Path], where: str, *, is_equal: bool) -> str:
    """Returns why outputs do not answer what is open, in words; `where` is the first module that differs."""
    ran = "both programs were run"
    if missing:
        leaves = counted(len(missing), "leaf is", "leaves are")
        return (
            f"{ran}, but {leaves} still without a source, so that outputs tell little: write rules for "
            f"{fold_paths(missing)} first, or settle the rest by a rule."
        )
    if is_equal:
        return (
            f"{ran}, and return the same under more than one answer to what is open: either these inputs do "
            "not show the difference, and others of several tokens and examples may, or the programs "
            "treat both alike. Settle it by a rule."
        )
    first = f", first in {where}" if where else ""
    return (
        f"{ran}: under the first answer to what is open they do not return the same{first}, and no module by "
        "itself tells another one. Correct what differs first, try the answers with "
        "verify(renames=found.answered(...)), or settle it by a rule."
    )


# Which words say it.


def in_words(
    verification: Verification, plan: RestorePlan, blamed: Sequence[Rule], wrong: Misfilled | None
) -> str:
    """Returns what outputs prove of a proposal, or what they say against it.

    Args:
        verification: What both programs return.
        plan: The plan that they ran under.
        blamed: Given rules that make what is proved wrong.
        wrong: What is filled from what the Linen program does not use.
    """
    zeros = f", with {counted(len(plan.missing), 'leaf', 'leaves')} at zero" if plan.missing else ""
    if verification.equal:
        said = ", but: " + " ".join(verification.remarks) if verification.remarks else ""
        proved = "" if said else "proved by outputs: "
        said = ". But: ".join([said, *verification.without_effect])
        return f"{proved}both programs return the same within {verification.relative:.1e}{zeros}{said}"
    first = verification.first
    if wrong and wrong.wanted:
        return f"not proven: the programs return different values under these rules{zeros}. {wrong.words}."
    if verification.relative <= verification.tolerance:  # By wrong weights.
        return f"not proven: {' '.join([*verification.remarks, *_of(first, blamed)])}"
    apart = f"{verification.relative:.1e} apart, tolerance {verification.tolerance:g}"
    way = ". Where that is rounding, as in deep models, raise the tolerance"
    where = f", first in {first.path}: {' '.join(_of(first, blamed))}" if first else way
    return f"not proven: the programs return different values under these rules{zeros} ({apart}){where}"


def _of(first: FirstDifference | None, blamed: Sequence[Rule]) -> Iterator[str]:
    """Yields what is known of the first difference, and which given rules make what is proved wrong."""
    if first is None:
        return
    yield from (line.text for line in first.sentences if isinstance(line, Sentence))
    if blamed:
        said = listed(rule.quoted for rule in blamed)
        yield f"Given rules make it so: correct or take out {said}, and run it again."


def in_fewer_digits(linen: Call | None, ours: Call | None, outputs: Iterable[Distance]) -> Iterator[str]:
    """Yields what it means that programs return fewer digits than float32's, from these calls on."""
    last = max((one.coarse for one in outputs if one.relative > TOLERANCE), default=0.0)
    found = {"linen_apply": linen, "nnx_apply": ours}
    low = {name: (call, fewer(call.outputs)) for name, call in found.items() if call is not None}
    first = [
        f"{name} computes in {dtype}, first {'in ' + fold_paths([call.path]) if call.path else 'at its end'}"
        for name, (call, dtype) in low.items()
    ]
    if first:
        others = [f"{name} in float32" for name in found if name not in low]
        apart = max(rounding_of(dtype) for _, dtype in low.values())
        yield (
            f"{', and '.join([*first, *others])}: differences of up to {apart:g} at each module may be its "
            "rounding, and small mistakes do not show. To prove more, let "
            f"{' and '.join(low)} run modules made with dtype=jnp.float32."
        )
    elif last:
        yield (
            "outputs are cast to fewer digits than float32's behind all modules: differences of up to "
            f"{last:g} may be rounding, and small mistakes do not show. To prove more, return them uncast."
        )
