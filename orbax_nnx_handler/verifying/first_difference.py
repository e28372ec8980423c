"""The first module that gets the same and returns something else, and what is otherwise about its weights.

Modules are paired by their weights. A module that has another's weights is called with what that other one is
called with in Linen.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.paths import Path, natural_key, shared_levels
from orbax_nnx_handler.planning.core.recipes import Recipe, describe, shape_of
from orbax_nnx_handler.planning.suggesting.proved_recipes import (
    as_stored,
    heads_by_rotation,
    with_features_in_order,
)
from orbax_nnx_handler.planning.verdict.outcomes import Restored
from orbax_nnx_handler.verifying import (
    TOLERANCE,
    Distance,
    agree,
    are_identical,
    are_the_same,
    changes_more_than_rounding,
    compare_inputs,
    exceeds,
    lent,
)
from orbax_nnx_handler.verifying.pairing import compare_outputs
from orbax_nnx_handler.verifying.proved_rules import said_of, wrong_elsewhere
from orbax_nnx_handler.verifying.recording import Call
from orbax_nnx_handler.verifying.runs import (
    Compared,
    called_alike,
    exchanges,
    is_padding,
    narrowed,
    returned_by,
    weights_of,
)
from orbax_nnx_handler.verifying.single_module import (
    Alternative,
    ModuleRunner,
    Reached,
    alternatives,
    orders,
)
from orbax_nnx_handler.verifying.verification import (
    CALLED_IN_ANOTHER_ORDER,
    FirstDifference,
    called_like,
    differing_settings,
    unit_name,
)

_MOST_TRIED, _MOST_BEFORE, _LIKELY, _NEARER = 400, 8, 24, 4
_LEAST, _PASSES = 150, 2
"""How many calls of modules a search may make: so many, or so many runs of all of the NNX program."""
_ROTATED = "the features of each head lie as other rotary positions pair them"


class _CannotRunError(Exception):
    """A module does not run by itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Proof:
    """A change with which a module returns what Linen's does.

    Attributes:
        module: The module.
        words: What has to be otherwise.
        recipes: The leaves that change.
        other: The module whose weights it needs, if another's.
        until: The module within it that is called with what Linen's is, where that is what was looked at.
    """

    module: Compared
    words: str
    recipes: Mapping[Path, Recipe]
    other: Compared | None = None
    until: Compared | None = None


@dataclasses.dataclass(kw_only=True)
class Search:
    """Looks for the first module that differs.

    Attributes:
        compared: Every call that was compared, in the order of the run.
        runner: Runs modules by themselves.
        restored: The plan's restored leaves.
        linen: All calls of the Linen program.
        limit: How far apart inputs may be that are the same: what is rounding in this run.
        tried: How many changes were tried.
        spent: How many calls of modules all runs took so far.
    """

    compared: Sequence[Compared]
    runner: ModuleRunner
    restored: Mapping[Path, Restored]
    linen: Sequence[Call]
    limit: float = TOLERANCE
    tried: int = 0
    spent: int = 0

    @property
    def is_spent(self) -> bool:
        """Whether to try more would take longer than a run of both programs did, or a second."""
        return self.spent > max(_LEAST, _PASSES * sum(map(len, self.runner.calls.values())))

    def first(self) -> FirstDifference | None:
        """Returns the first one, the innermost where several hold each other."""
        for one in self._differing():
            self.tried = 0
            try:
                if self._agrees(one, {}):
                    continue  # It is right on Linen's own inputs: what came in was not quite the same.
                proof = self._proved(one)
            except _CannotRunError:
                proof = None
            return self._difference(one, proof)
        return None

    def set_up_otherwise(self, *, whatever: bool) -> FirstDifference | None:
        """Returns the first module with another epsilon, or whatever other number, and another output."""
        self.tried = 0
        one = next((x for x in self.compared if x.has_another_constant(whatever=whatever)), None)
        return None if one is None else self._difference(one, None)

    def _differing(self) -> Iterator[Compared]:
        """Yields modules whose output differs, but not those whose surroundings make up for it."""
        for certain in (True, False):
            for one in self.compared:
                if self._differs(one) and one.found.is_certain == certain and not self._made_up_for(one):
                    yield from () if self._is_put_right(one) else (one,)

    def _gets_the_same(self, one: Compared) -> bool:
        inputs = one.found.inputs
        return one.gets_the_same or (bool(inputs.compared) and not exceeds(inputs, self.limit))

    def _gets_other_numbers(self, one: Compared) -> bool:
        """Tells whether inputs differ, and not by their order alone, which its weights follow."""
        outputs = one.found.outputs
        follows = bool(outputs.compared) and not exceeds(outputs, self.limit) and one.is_reordered_before
        return not self._gets_the_same(one) and not follows

    def _differs(self, one: Compared) -> bool:
        """Tells whether a module's outputs differ, inputs that are apart by rounding allowed for."""
        inputs, outputs = one.found.inputs, one.found.outputs
        if one.found.differs or one.gets_the_same:
            return one.found.differs
        changes = bool(outputs.compared) and changes_more_than_rounding(inputs, outputs, one.calls)
        return changes and self._gets_the_same(one)

    def _made_up_for(self, one: Compared) -> bool:
        """Tells whether a module around it returns the same all the same: features in another order."""
        around = [other for other in self._around(one) if other.found.is_certain and other.gets_the_same]
        nearest = max(around, key=lambda other: len(other.path), default=None)
        return nearest is not None and nearest.agrees

    def _is_put_right(self, one: Compared) -> bool:
        """Tells whether what comes of a module's numbers, in another order than Linen's, is the same again.

        So it is where the next module that differs is called with what Linen calls it, or another one, with.
        """
        if not one.is_reordered:
            return False
        behind = (x for x in self.compared if x.nnx.call.order > one.nnx.call.order and not x.encloses(one))
        following = next((x for x in behind if self._is_doubted(x)), None)
        if following is None or self._gets_the_same(following):
            return following is not None
        return any(called_alike(following, self.compared))  # It has the weights of another one.

    def _is_doubted(self, one: Compared) -> bool:
        return not self._gets_the_same(one) or (self._differs(one) and not one.is_reordered)

    def _around(self, one: Compared) -> list[Compared]:
        """Returns the calls that a call was made in: of each module around it the next to return."""
        found: dict[Path, Compared] = {}
        for other in self.compared:
            if other.nnx.call.order >= one.nnx.call.order and other.encloses(one):
                found.setdefault(other.path, other)
        return list(found.values())

    def _inside(self, one: Compared) -> list[Compared]:
        """Returns the calls that were made in a call: since the module returned the last time."""
        start, end = self.runner.start(one.path, one.nnx.call), one.nnx.call.order
        return [x for x in self.compared if start < x.nnx.call.order <= end and one.encloses(x)]

    def _difference(self, one: Compared, proof: _Proof | None) -> FirstDifference:
        at = proof.module if proof is not None else one
        inside, every = self._inside(at), self.compared
        after, before = self._between(inside)
        weights = self._doubtful(at, inside)
        others = [*wrong_elsewhere(self.runner, every, at, proof.recipes, proof.other)] if proof else []
        unknown = {p for p, calls in self.runner.calls.items() if calls[0].shapes} - {x.path for x in every}
        return FirstDifference(
            module=at.found,
            place=self._place(at, proof, after, before),
            weights=tuple(self.restored[leaf] for leaf in weights),
            is_partial=bool(weights) or any(path[: len(at.path)] == at.path for path in unknown),
            rest=self._rest(at, after, before),
            after=None if after is None else after.pair.nnx,
            before=None if before is None else before.pair.nnx,
            is_reordered_before=before is not None and before.is_reordered_before,
            proved="" if proof is None else proof.words,
            until=None if proof is None or proof.until is None else proof.until.pair.nnx,
            changes={} if proof is None else proof.recipes,
            elsewhere={leaf: recipe for _, _, made in others for leaf, recipe in made.items()},
            also=said_of(others),
            layer=None if proof is None else self._layer(at),
            tried=self.tried,
            is_cut=self.is_spent,
            settings=differing_settings(at.linen.call, at.nnx.call),
            reordered=at.is_reordered,
            unlike=at.unlike if proof is None else (),
            residual=returned_by(self.runner, at, after, before)[1] if after and not proof else "",
        )

    def _place(
        self, one: Compared, proof: _Proof | None, after: Compared | None, before: Compared | None
    ) -> Path:
        """Returns the innermost module around what has to change, or around where the difference arises."""
        if proof is None:
            between = [after.path[:-1], before.path[:-1]] if after and before else [()]
            place = max(one.path, self._holder(shared_levels(between)), key=len)
            if after and (returned := returned_by(self.runner, one, after, before)[0]):
                return max(place, returned, key=len)
            return narrowed(self.runner, self.linen, one, place, before) if before else place
        # Of what is alike in several layers, or experts, the first is named.
        leaves = sorted(proof.recipes, key=natural_key, reverse=True)
        firsts = {tuple(key for key in leaf if not isinstance(key, int)): leaf for leaf in leaves}
        holders = [self._holder(leaf) for leaf in firsts.values()]
        common = self._holder(shared_levels(holders))
        if common or one.path == () == max(holders, key=len):
            return common
        return min(holders, key=lambda path: self.runner.calls[path][0].order)

    def _rest(self, one: Compared, after: Compared | None, before: Compared | None) -> tuple[Path, ...]:
        """Returns modules around a call, not around the next one, whose outputs nobody compares."""
        within = after.nnx.call.within if after else ()
        known = {one.path, *(before.nnx.call.within if before else ()), *(x.path for x in self.compared)}
        return tuple(path for path in reversed(within) if path not in known)

    def _between(self, inside: Sequence[Compared]) -> tuple[Compared | None, Compared | None]:
        """Returns the last module that still agrees, and the outermost first one that gets something else."""
        held = {id(one) for one in inside}
        doubted = [
            one
            for one in inside
            if one.found.inputs.compared  # Of words and floats nobody knows.
            and self._gets_other_numbers(one)
            and not is_padding(one, inside)
            and not any(id(other) in held and other.agrees for other in self._around(one))
        ]
        if not doubted:
            return next((one for one in reversed(inside) if self._agrees_still(one)), None), None
        first = doubted[0]
        around = [one for one in self._around(first) if id(one) in held and not self._gets_the_same(one)]
        before = min([first, *around], key=lambda one: len(one.path))
        earlier = [one for one in inside if one.nnx.call.order < first.nnx.call.order]
        after = [one for one in earlier if self._agrees_still(one) and not before.encloses(one)]
        return after[-1] if after else None, before

    def _agrees_still(self, one: Compared) -> bool:
        return self._gets_the_same(one) and bool(one.found.outputs.compared) and not self._differs(one)

    def _holder(self, path: Path) -> Path:
        """Returns the innermost module around a path that was called."""
        depths = range(len(path), 0, -1)
        return next((path[:depth] for depth in depths if path[:depth] in self.runner.calls), ())

    def _doubtful(self, one: Compared, inside: Sequence[Compared]) -> list[Path]:
        """Returns the leaves of a module that lie in no module within it that is compared by itself."""
        known = (other for other in inside if other.found.inputs.compared or not other.found.inputs.left)
        sure = {other.path for other in known if other.found.outputs.compared}
        own = (leaf for leaf in one.pair.leaves if not any(leaf[: len(path)] == path for path in sure))
        return [leaf for leaf in own if leaf in self.restored]

    def _proved(self, one: Compared) -> _Proof | None:
        inside = self._inside(one)
        known = self._misplaced(inside) or self._in_another_order(inside)
        if known is not None:
            return self._in_its_branch(known, one, inside)
        layer = self._layer(one)
        doubtful = {leaf: self.runner.recipe(leaf, layer) for leaf in self._doubtful(one, inside)}
        # What is called later than the first module that gets something else has no part in that.
        _, until = self._between(inside)
        apart = {leaf for other in inside if not other.gets_the_same for leaf in other.pair.leaves}
        names = sorted(apart - doubtful.keys(), key=natural_key)
        others = {leaf: self.runner.recipe(leaf, layer) for leaf in names}
        late = {leaf for leaf in one.pair.leaves if until and self._is_later(leaf, until)} | others.keys()
        shown = {leaf: recipe for leaf, recipe in doubtful.items() if leaf not in late}
        comparable = [x for x in inside if x.found.outputs.compared and not {*x.pair.leaves} & late]
        likes = self.runner.likes(one.path, layer, {} if until else shown)
        plain = alternatives({**doubtful, **others}, likes, self.runner.shapes, late)
        turned = self._rotated(one, layer, [Alternative(words="", recipes={})], late)
        before = [orders(shown, self.runner.shapes), exchanges(self.runner, comparable, layer)]
        both = self._rotated(one, layer, itertools.chain(*before), late)
        moved, some = exchanges(self.runner, comparable, layer), _LIKELY // 2
        first = itertools.chain(itertools.islice(plain, _LIKELY), turned, itertools.islice(moved, some))
        ways = itertools.chain(first, itertools.islice(both, some), plain, moved, both)
        known = {frozenset[tuple[Path, Recipe]]()}  # What changes nothing, or was tried, is not tried again.
        for way in itertools.islice(ways, _MOST_TRIED):
            made = frozenset(way.recipes.items() - doubtful.items() - others.items())
            if made in known:
                continue
            if self.is_spent:
                break
            known.add(made)
            self.tried += 1
            if self._agrees(one, way.recipes, until=until):
                return _Proof(module=one, words=way.words, recipes=way.recipes, until=until)
        return self._with_others(one)

    def _is_later(self, leaf: Path, until: Compared) -> bool:
        """Tells whether a leaf is first used when a call has begun: in the call, or after it."""
        holder, path = self._holder(leaf), until.path
        is_around = path[: len(holder)] == holder != path
        is_later = self.runner.calls[holder][0].order > until.nnx.call.order
        return holder[: len(path)] == path or (is_later and not is_around)

    def _in_its_branch(self, known: _Proof, one: Compared, inside: Sequence[Compared]) -> _Proof | None:
        """Returns the exchange with which all of a module agrees, where two have each other's inputs.

        In two branches either these have each other's weights, or those before them that get the same have.
        """
        here, there = known.module, known.other
        if there is None or not one.encloses(there) or not are_the_same(here.linen.inputs, there.nnx.inputs):
            return known
        end = max(here.nnx.call.order, there.nnx.call.order)
        before = [each for each in reversed(inside) if each.agrees and each.nnx.call.order < end]
        pairs = itertools.combinations(before, 2)
        alike = [pair for pair in pairs if are_the_same(pair[0].nnx.inputs, pair[1].nnx.inputs)]
        if not alike:
            return known
        for pair in [(here, there), *alike[:_MOST_BEFORE]]:
            for way in exchanges(self.runner, pair, self._layer(one)):
                self.tried += 1
                if self._agrees(one, way.recipes):
                    proof = _Proof(module=one, words=way.words, recipes=way.recipes)
                    return known if pair[0] is here else proof
        return None

    def _rotated(
        self, one: Compared, layer: int | None, before: Iterable[Alternative], late: Collection[Path]
    ) -> Iterator[Alternative]:
        """Yields the queries and keys in a module for another way of turning them by their positions.

        That is done after another change, for a port may differ in both.
        """
        leaves = [leaf for leaf in one.pair.leaves if leaf in self.restored and leaf not in late]
        now = {leaf: self.runner.recipe(leaf, layer) for leaf in leaves}
        for way in before:
            for changed in heads_by_rotation({**now, **way.recipes}, self.runner.shapes):
                words = f"{fold_paths(changed)}: {_ROTATED}"
                words = f"{way.words}; {words}" if way.words else words
                yield Alternative(words=words, recipes={**way.recipes, **changed})

    def _misplaced(self, inside: Sequence[Compared]) -> _Proof | None:
        """Returns the outermost module that is called with what another one is called with in Linen."""
        doubted = [one for one in inside if not one.gets_the_same]
        first = next((found for one in doubted if (found := self._with_others(one)) is not None), None)
        if first is None:
            return None
        around = sorted((x for x in doubted if x.encloses(first.module)), key=lambda one: len(one.path))
        return next((found for one in around if (found := self._with_others(one)) is not None), first)

    def _with_others(self, one: Compared) -> _Proof | None:
        """Returns the module with the weights of a module that is called alike, if they are right for it."""
        try:
            for other in called_alike(one, self.compared):
                recipes = weights_of(self.runner, other, one, self._layer(one))
                self.tried += bool(recipes)
                if recipes and self._agrees(one, recipes, other):
                    return _Proof(
                        module=one, words=called_like(one.found, other.found), recipes=recipes, other=other
                    )
        except _CannotRunError:
            return None
        return None

    def _in_another_order(self, inside: Sequence[Compared]) -> _Proof | None:
        """Returns the first module called with the same features in another order, a weight in that order."""
        one = next((one for one in inside if self._gets_other_numbers(one)), None)
        found = None if one is None else one.order_of_features()
        if one is None or found is None:
            return None
        layer, shapes, size = self._layer(one), self.runner.shapes, math.prod(found[0])
        now = [(leaf, self.runner.recipe(leaf, layer)) for leaf in self._doubtful(one, self._inside(one))]
        # Rules may have put them in a wrong order already.
        for leaf, recipe in [*now, *((leaf, as_stored(recipe, shapes)) for leaf, recipe in now)]:
            for axis, length in enumerate(shape_of(recipe, shapes)):
                made = with_features_in_order(recipe, axis, *found, shapes) if length == size else recipe
                self.tried += made != recipe
                if made != recipe and self._agrees(one, {leaf: made}, one):
                    words = (
                        f"{unit_name(one.pair.nnx)} {CALLED_IN_ANOTHER_ORDER}, and {leaf[-1]} has to follow"
                    )
                    return _Proof(module=one, words=f"{words}: {describe(made)}", recipes={leaf: made})
        return None

    def _layer(self, one: Compared) -> int | None:
        try:
            return self.runner.layer_at(one.path, one.nnx.call)
        except LookupError as error:
            raise _CannotRunError from error

    def _agrees(
        self,
        one: Compared,
        changed: Mapping[Path, Recipe],
        other: Compared | None = None,
        until: Compared | None = None,
    ) -> bool:
        """Tells whether a module by itself returns what Linen's does, on what that was called with.

        Or whether it calls one within it, until which it is run, with what Linen's is called with.
        """
        layer = self._layer(one)
        inputs = one.nnx.inputs if other is one else lent(one.nnx.inputs, (other or one).linen.inputs)
        if not changed and are_identical(inputs, one.nnx.inputs):
            return False  # It has been run.
        stop, calls = (
            (None, one.calls)
            if until is None
            else self.runner.end_at(until.path, until.nnx.call, one.path, one.nnx.call)
        )
        self.spent += 1 + calls  # To make its weights takes as long as a call.
        try:
            outputs = self.runner.run(one.path, layer, one.nnx.call, inputs, changed, stop)
        except Reached as reached:
            assert until is not None
            found = compare_inputs(until.linen.inputs, reached.args[0])
            return agree(found) and not changes_more_than_rounding(Distance(), found, one.calls)
        # The caller's module may fail in any way when it is called outside of its program.
        except Exception as error:
            raise _CannotRunError from error
        found = compare_outputs((other or one).linen, one.nnx, outputs)
        if not found.compared or changes_more_than_rounding(Distance(), found, one.calls):
            return False
        # Of few digits, chance brings outputs near enough.
        return not (changed and found.coarse) or _NEARER * found.relative <= one.found.outputs.relative
