"""What was kept of weights that a rule has replaced is left: moments, steps, statistics (laws 3 and 8).

Last: statistics that are stored once, and wanted of a model and of its averages.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from orbax_nnx_handler.planning.core.dtypes import is_count_dtype
from orbax_nnx_handler.planning.core.paths import (
    Path,
    Tokens,
    canonical,
    shared_levels,
    spelled,
    trained_by,
    without_box,
)
from orbax_nnx_handler.planning.core.recipes import Add, Read, Recipe, reads
from orbax_nnx_handler.planning.layouts.layout import (
    FLAX_COLLECTIONS,
    STATISTICS,
    Placement,
    field_of,
    is_copy_level,
)
from orbax_nnx_handler.planning.rules import Copy, Rename
from orbax_nnx_handler.planning.target.roles import Wanted
from orbax_nnx_handler.planning.verdict.claims import stored_name
from orbax_nnx_handler.planning.verdict.elements import common_end
from orbax_nnx_handler.planning.verdict.outcomes import Verdict
from orbax_nnx_handler.planning.verdict.states import Claim, labels_of, slot_of


class _Made(NamedTuple):
    """A weight of the result.

    Attributes:
        name: Its path.
        read: The name of what a rule reads it from, where another stored leaf has its own; else None.
        is_changed: Whether a rule does more to it than to add a constant.
        item: The weight.
    """

    name: Tokens
    read: Tokens | None
    is_changed: bool
    item: Wanted

    def is_trained(self, network: Tokens) -> bool:
        """Tells whether it is neither a statistic nor in a copy below the network whose keys are given."""
        levels = map(str, self.name[len(network) :])
        return self.item.collection not in FLAX_COLLECTIONS[1:] and not any(map(is_copy_level, levels))

    def is_unlike(self, moment: Tokens) -> bool:
        """Tells whether a moment's stored name is not that of what is read, or that of the weight as well."""
        return self.read is not None and common_end(moment, self.read) <= common_end(moment, self.name)


_STATISTICS = "batch_stats"

REPLACED = "a rule has replaced the weights that it was kept for"
"""Why nothing that has trained other weights is read."""

_Kept = tuple[int, Path, Path, str]
"""A law, a leaf that breaks it, what that is read from, and why."""


class ReplacedWeights:
    """What was kept of weights that a rule has replaced by others is read no more (laws 3 and 8).

    Where a rule exchanges two networks, or drops one and makes another one take its name, what lies at an
    optimizer's own path has trained other weights than the ones that it would train from now on. The
    optimizer's weights are those of its moments' names, and of these the ones that it lies beside or is
    called after; where nothing tells, all of them. Statistics are kept of the weights that they lie beside.
    What a rule names is at the rule's word.
    """

    def __init__(
        self,
        weights: Sequence[tuple[Wanted, Recipe, object]],
        placed: Mapping[Path, Placement],
        by_rule: Set[Path],
        called: Mapping[Path, Set[Tokens]],
        wanted: Sequence[Wanted],
    ) -> None:
        """Takes what the result is made from, what rules name, and which owners they give to optimizers."""
        self._placed, self._by_rule, self._called, self._wanted = placed, by_rule, called, wanted
        some = (item for item in wanted if item.role in ("optimizer", "step")) if called else ()
        self._owners = {canonical(item.owner) for item in some}
        self._beside = Counter(without_box(item.leaf.path)[:-1] for item in wanted if by_rule)
        self._made: dict[Tokens, _Made] = {}
        self._moments = _OfMoments()
        self._by_end: dict[Tokens, list[Tokens]] = defaultdict(list)
        if not by_rule or not self._are_kept(weights):
            return  # Nearly every plan.
        if all(by_rule.isdisjoint(reads(recipe)) for _, recipe, _ in weights):
            return
        whole = {path: canonical(path) for path in placed}
        models = {path: item for path, item in placed.items() if item.section == "model"}
        names = whole | {at: stored_name(item) for at, item in models.items()}
        owners = {canonical(item.owner) for item in models.values()} - {()}
        level = len(shared_levels([names[path] for path in models], 1))
        # What no layout knows for a train state has its collection between owner and name.
        plain = {tuple(key for key in name if key != "params"): path for path, name in whole.items()}
        known = (*whole.values(), *names.values(), *plain)
        stored = {name[at:]: at for name in known for at in range(level + 1)}
        above = len(shared_levels([canonical(item.leaf.path) for item, _, _ in weights], 1))
        for item, recipe, _ in weights:
            name, read = canonical(item.leaf.path), reads(recipe)
            if self._is_step_alone(item):
                continue
            own = {each[path][at:] for path in read for each in (names, whole) for at in range(level + 1)}
            spelt = [name[at:] for at in range(above + 1)]
            is_elsewhere = own.isdisjoint(spelt) or plain.get(name, read[0]) not in read
            is_moved = not by_rule.isdisjoint(read) and is_elsewhere
            home = max((at for at in owners if name[: len(at)] == at), key=len, default=None)
            is_own = home in (None, *(canonical(placed[path].owner) for path in read))
            found = next((at for at in range(above + 1) if spelt[at] in stored), None)
            source = names[read[0]] if is_moved and not (found is None and is_own) else None
            if source is not None and found is not None:
                source = name[:found] + source[stored[spelt[found]] :]
            self._made[name] = _Made(name, source, _is_changed(recipe), item)
            for at in range(len(name)):
                self._by_end[name[at:]].append(name)
        if not any(made.read is not None or made.is_changed for made in self._made.values()):
            self._made.clear()

    def _are_kept(self, weights: Sequence[tuple[Wanted, Recipe, object]]) -> bool:
        """Tells whether anything wanted is kept of weights."""
        return any(item.role in ("optimizer", "step") for item in self._wanted) or any(
            item.collection == _STATISTICS or self._is_step_alone(item) for item, _, _ in weights
        )

    def _is_step_alone(self, item: Wanted) -> bool:
        """Tells whether a number is the step of an optimizer that keeps nothing else, in a pure dict."""
        path = without_box(item.leaf.path)
        is_step = item.leaf.kind is None and item.leaf.shape == () and str(path[-1]) == "step"
        return is_step and len(path) > 1 and self._beside[path[:-1]] == 1 and is_count_dtype(item.leaf.dtype)

    def kept(self, leaves: Sequence[tuple[Wanted, Recipe, object]]) -> Iterator[_Kept]:
        """Yields what is read of an optimizer, and of statistics, though their weights were replaced."""
        by_part: dict[tuple[Path, Tokens], list[Claim]] = defaultdict(list)
        is_moved = any(made.read is not None for made in self._made.values())
        for item, recipe, _ in leaves if self._made or self._called else ():
            # Where weights are only changed, a moment that a recipe changes too is that of its weight.
            is_open = self._made and (is_moved or isinstance(recipe, Read))
            if item.role == "model":
                if is_open and self._is_step_alone(item):
                    by_part[without_box(item.leaf.path)[:-1], ()].append((item, recipe))
                continue
            if is_open:
                by_part[item.owner, self._moments.of(item)[0]].append((item, recipe))
            if self._called and any(
                self._is_called_otherwise(canonical(item.owner), path) for path in reads(recipe)
            ):
                yield 3, item.leaf.path, reads(recipe)[0], "a rule calls it otherwise"
        names: dict[tuple[Path, Tokens], set[Tokens]] = defaultdict(set)
        for item in self._wanted if by_part else ():
            labels, name = self._moments.of(item)
            if name and name[-1:] in self._by_end:
                for each in {(), labels}:
                    names[item.owner, each].add(name)
        for (owner, labels), some in by_part.items():
            known = names.get((owner, labels), set[Tokens]())
            yield from self._kept_by(self._trained(labels[-1:] or canonical(owner), known), known, some)
        yield from self._statistics(leaves if is_moved else ())

    def _statistics(self, leaves: Iterable[tuple[Wanted, Recipe, object]]) -> Iterator[_Kept]:
        """Yields statistics that are not read from where all weights of their module, or network, are."""
        some = [(item, reads(recipe)) for item, recipe, _ in leaves if item.collection == _STATISTICS]
        below: dict[Tokens, list[_Made]] = defaultdict(list)
        for name, made in self._made.items() if some else ():
            for at in range(len(name) if made.item.collection != _STATISTICS else 0):
                below[name[:at]].append(made)
        for item, read in some:
            name = canonical(item.leaf.path)
            beside = next((below[name[:at]] for at in range(len(name) - 1, -1, -1) if name[:at] in below), ())
            if read and self._by_rule.isdisjoint(read) and _are_others(beside):
                yield 3, item.leaf.path, read[0], REPLACED

    def _is_called_otherwise(self, owner: Tokens, path: Path) -> bool:
        """Tells whether a rule gives a leaf to another optimizer, one that is wanted or has another name."""
        called = self._called.get(path, set[Tokens]())
        if not called or any(_is_part(owner, at) for at in called):
            return False
        own = canonical(self._placed[path].owner)
        is_old = bool(owner and own) and _is_part(owner, own)
        return is_old or all(any(_is_part(each, at) for each in self._owners) for at in called)

    def _kept_by(
        self, trained: Mapping[Tokens, Mapping[Tokens, _Made]], known: Set[Tokens], leaves: Sequence[Claim]
    ) -> Iterator[_Kept]:
        is_replaced = any(_are_others(made.values()) for made in trained.values())
        for item, recipe in leaves:
            path, read, name = item.leaf.path, reads(recipe), self._moments.of(item)[1]
            if not read or not self._by_rule.isdisjoint(read):
                continue
            if name not in known:
                if is_replaced:
                    yield 3, path, read[0], REPLACED
                continue
            there = self._placed[read[0]]
            some = [network[at + name] for at, network in trained.items() if at + name in network]
            is_known = len(some) == len(trained) == 1
            for made in some or [self._made[at] for at in self._like(name)]:
                is_raw = isinstance(recipe, Read) and made.item.leaf.shape == item.leaf.shape and not is_known
                if made.is_unlike(canonical(there.slot or ()) + there.tokens) or (made.is_changed and is_raw):
                    yield 8, path, read[0], REPLACED
                    break

    def _like(self, name: Tokens) -> Sequence[Tokens]:
        """Returns the weights that have the longest end of a moment's name."""
        return next(self._by_end[name[at:]] for at in range(len(name)) if name[at:] in self._by_end)

    def _trained(self, owner: Tokens, names: Set[Tokens]) -> Mapping[Tokens, Mapping[Tokens, _Made]]:
        """Returns the weights of each network that an optimizer may train, by its keys and theirs."""
        names = {name for name in names if name in self._by_end}  # Weights may be missing.
        some = next(iter(names), None)
        heads: list[Tokens] = [at[: len(at) - len(some)] for at in self._by_end.get(some, ())] if some else []
        heads = [head for head in heads if all(head + name in self._made for name in names)]
        if heads:
            trained = {head: {head + name: self._made[head + name] for name in names} for head in heads}
        else:  # Without moments, or where they have names of their own.
            level = len(shared_levels([*self._made], 1))
            above = [at for at in (owner, owner[:-1]) if at or not owner]
            beside = [at for at in above if any(name[: len(at)] == at for name in self._made)]
            heads = beside[:1] or list(dict.fromkeys(name[: level + 1] for name in self._made))
            below = {at: {n: w for n, w in self._made.items() if n[: len(at)] == at} for at in heads}
            trained = {
                at: {n: w for n, w in ws.items() if w.is_trained(at)} or ws for at, ws in below.items()
            }
        named = trained_by(owner, heads)
        return {at: made for at, made in trained.items() if len(named) != 1 or at in named}


def _is_part(one: Tokens, other: Tokens) -> bool:
    """Tells whether one owner is the other one, above or below levels of either side."""
    short, long = sorted((one, other), key=len)
    return short in (long[: len(short)], long[len(long) - len(short) :])


def _are_others(weights: Collection[_Made]) -> bool:
    """Tells whether weights come from others than those that were trained at their paths."""
    return bool(weights) and {made.read or made.name for made in weights}.isdisjoint(
        made.name for made in weights
    )


class _OfMoments(dict[Tokens, tuple[Tokens, Tokens]]):
    """The labels above each leaf of an optimizer, and its name of its parameter: nothing for what is none."""

    def __missing__(self, tokens: Tokens) -> tuple[Tokens, Tokens]:
        place, field = slot_of(tokens)
        found = self[tokens] = labels_of(place), field[1:]
        return found

    def of(self, item: Wanted) -> tuple[Tokens, Tokens]:
        """Returns both for a wanted leaf; nothing for a step or a weight."""
        return self[item.tokens] if item.role == "optimizer" else ((), ())


def _is_changed(recipe: Recipe) -> bool:
    """Tells whether a rule does more to what is read than to add a constant."""
    while isinstance(recipe, Add):
        recipe = recipe.source
    return not isinstance(recipe, Read)


# Statistics that are stored once, and wanted of a model and of its averages.


def statistics_kept_once(
    verdict: Verdict, missing: Iterable[Path]
) -> Iterator[tuple[Path, list[Path], list[Copy | Rename]]]:
    """Yields wanted copies whose parameters are restored, their missing statistics, and rules for them."""
    held = {item.path for item in _copies_left(verdict)}
    for (owner, above), paths in _lost_statistics(verdict, missing).items():
        is_copied = any(path[len(owner) :] in held for path in paths)
        if not is_copied and (rules := statistics_of_both(verdict, owner, above, paths)):
            yield owner, paths, rules


def open_statistics(
    verdict: Verdict, missing: Sequence[Path]
) -> Iterator[tuple[Path, Sequence[Path], Sequence[Copy | Rename]]]:
    """Yields those, and where a copy of the statistics lies unused: `ema_batch_stats` beside `ema_params`."""
    yield from statistics_kept_once(verdict, missing)
    held = {(item.path, item.leaf.shape): field_of(item) for item in _copies_left(verdict)}
    for (owner, _), paths in _lost_statistics(verdict, missing).items():
        ends = ((path[len(owner) :], verdict.sides.wanted[path].leaf.shape) for path in paths)
        fields = {held.get(end, ()) for end in ends}
        if () not in fields:
            yield owner, paths, [Rename(spelled(field), spelled(owner)) for field in sorted(fields)]


def _lost_statistics(verdict: Verdict, missing: Iterable[Path]) -> Mapping[tuple[Path, Path], list[Path]]:
    """Returns the missing statistics of each wanted copy, and the stored train state of which it is one."""
    lost: dict[tuple[Path, Path], list[Path]] = defaultdict(list)
    for path in (p for p in missing if verdict.sides.wanted[p].collection in STATISTICS):
        owners = ((path[:depth], _copy_of(verdict, path[:depth])) for depth in range(1, len(path)))
        if (pair := next(((at, above) for at, above in owners if above is not None), None)) is not None:
            lost[pair].append(path)
    return lost


def _copies_left(verdict: Verdict) -> Iterator[Placement]:
    """Yields the leaves of stored copies that nothing is made of."""
    for path in (*verdict.unexpected, *verdict.skipped):
        item = verdict.sides.placements.get(path)
        if item is not None and item.section == "model" and item.collection not in FLAX_COLLECTIONS:
            yield item


def statistics_of_both(
    verdict: Verdict, owner: Path, above: Path, lost: Iterable[Path]
) -> list[Copy | Rename]:
    """Returns the rules that give a network the statistics which are stored once for it and for another.

    A program that averages its parameters runs both on one `batch_stats`.

    Args:
        verdict: The verdict under the rules so far.
        owner: Where the network is wanted.
        above: The stored train state in which its parameters are a copy.
        lost: What is missing of the network.
    """
    wanted = {path: item for path, item in verdict.sides.wanted.items() if item.role == "model"}
    kinds = STATISTICS.intersection(wanted[path].collection or "" for path in lost if path in wanted)
    every = (x for x in verdict.sides.placements.values() if x.section == "model" and x.collection in kinds)
    fields = sorted({field_of(item) for item in every if item.owner == above}) if owner else []
    others = (path for path, item in wanted.items() if item.collection in kinds)
    rule = Copy if any(path[: len(owner)] != owner for path in others) else Rename
    return [rule(spelled(field), spelled(owner)) for field in fields]


def _copy_of(verdict: Verdict, level: Path) -> Path | None:
    """Returns the train state of which all that is restored below a level is a copy."""
    made = (item.recipe for path, item in verdict.restored.items() if path[: len(level)] == level)
    sources = [verdict.sides.placements.get(source) for recipe in made for source in reads(recipe)]
    held = {(x.owner, x.collection in FLAX_COLLECTIONS) for x in sources if x and x.section == "model"}
    above, is_own = held.pop() if len(held) == 1 else ((), True)
    return above if not is_own else above[:-1] if above else None
