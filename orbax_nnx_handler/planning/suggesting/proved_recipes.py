"""The links of a proposal, remade by recipes that outputs prove."""

import dataclasses
from collections.abc import Sequence

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.paths import Path, canonical, is_number
from orbax_nnx_handler.planning.core.recipes import Recipe, Shapes
from orbax_nnx_handler.planning.likeness.links import Link
from orbax_nnx_handler.planning.likeness.module_parts import Leaf
from orbax_nnx_handler.planning.likeness.shapes import Joint, Way, chain_of, cuts_of, lifted, shaping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remade:
    """A wanted leaf that is made otherwise than was thought; the layer is told where it is scanned."""

    leaf: Path
    layer: int | None
    recipe: Recipe


def remade_links(links: Sequence[Link], changes: Sequence[Remade], shapes: Shapes) -> list[Link]:
    """Returns links under which some leaves are made otherwise, and those alike in other layers too.

    A change that moves weights from one module to another changes its own leaf alone, and one that no
    link can say changes none.
    """
    found, settled = list(links), set[int]()
    for change in changes:
        for at, link in enumerate(found):
            # Among the links as they were: two that change places are still known.
            if (other := _remade(link, change, links, shapes)) is None:
                continue
            settled.add(at)
            order = [link.stored.index(leaf) for leaf in other.stored if leaf in link.stored]
            for to, like in enumerate(found):
                if to not in settled and len(order) == len(link.stored) and _looks(like) == _looks(link):
                    stored = tuple(like.stored[number] for number in order)
                    found[to] = dataclasses.replace(
                        like, stored=stored, ways=other.ways, joint=other.joint, after=other.after
                    )
            found[at] = other
            break
    return found


def _looks(link: Link) -> tuple[object, ...]:
    """Returns what the links of one leaf in all layers share."""
    sides = ([_template(leaf) for leaf in side] for side in (link.wanted, link.stored))
    return link.ways, link.joint, link.after, *sides


def _template(leaf: Leaf) -> tuple[str, ...]:
    return tuple(token for token in canonical(leaf.names) if not is_number(token))


def _remade(link: Link, change: Remade, every: Sequence[Link], shapes: Shapes) -> Link | None:
    part = next((at for at, leaf in enumerate(link.wanted) if leaf.source == change.leaf), None)
    layers = link.layers
    if part is None or link.source.made or not shapes.keys() >= {*recipes.reads(change.recipe)}:
        return None
    if layers is not None and layers.stacks and change.layer not in (None, link.layer):
        return None
    whole, after = chain_of(change.recipe)
    if isinstance(whole, recipes.Concat | recipes.Stack):
        return _rejoined(link, whole, after, shapes)
    if link.joint is not None and not link.is_split:
        return None
    steps = shaping(after, shapes)
    cuts, source = cuts_of(whole)
    if source is None:
        return None
    if link.is_split:
        assert link.joint is not None
        if source != link.source.source or len(cuts) != 1 or link.joint.part_at(cuts[0]) != part:
            return None
        return dataclasses.replace(link, ways=(*link.ways[:part], (Way(steps),), *link.ways[part + 1 :]))
    if cuts and layers is None:
        found = lifted(cuts, steps, shapes[source], link.wanted[part].shape)
        if found is None:
            return None
        steps = found
    stored = next(
        (x for one in every if one.layers == layers for x in one.stored if x.source == source), None
    )
    return None if stored is None else dataclasses.replace(link, stored=(stored,), ways=((Way(steps),),))


def _rejoined(
    link: Link, whole: recipes.Concat | recipes.Stack, after: Sequence[Recipe], shapes: Shapes
) -> Link | None:
    """Returns a fuse of the same parts in another order, each or the whole shaped otherwise."""
    sources = [leaf.source for leaf in link.stored]
    parts = [chain_of(part) for part in whole.sources]
    reads = [cuts_of(part)[1] for part, _ in parts]
    if link.joint is None or link.is_split or len({*sources}) < len(sources) or {*reads} != {*sources}:
        return None
    order = [sources.index(path) for path in reads if path is not None]
    sizes = link.joint.sizes
    ways = tuple((Way(shaping(steps, shapes)),) for _, steps in parts)
    joint = Joint(
        whole.axis,
        isinstance(whole, recipes.Stack),
        tuple(sizes[at] for at in order) if sizes is not None else None,
        ways,
    )
    stored = tuple(link.stored[at] for at in order)
    return dataclasses.replace(link, stored=stored, ways=ways, joint=joint, after=shaping(after, shapes))
