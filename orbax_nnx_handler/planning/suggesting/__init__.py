"""Proposes rules where the names of checkpoint and target differ."""

import dataclasses
from collections.abc import Iterable, Sequence

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, Tokens, segments
from orbax_nnx_handler.planning.core.recipes import Read, reads, shape_of
from orbax_nnx_handler.planning.layouts.layout import Stored
from orbax_nnx_handler.planning.mapping.choice import best_mapping
from orbax_nnx_handler.planning.mapping.modules import derive
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.suggesting.modules import (
    Module,
    ModuleLeaf,
    Order,
    Signatures,
    creation_order,
    number_of,
    order_of,
    tree_of,
)
from orbax_nnx_handler.planning.suggesting.pairing import Pairing
from orbax_nnx_handler.planning.suggesting.proposals import (
    Confidence,
    Proposal,
    Question,
    Suggestion,
    proposals_of,
)
from orbax_nnx_handler.planning.target.roles import of_role, roles_of
from orbax_nnx_handler.planning.target.target import Target
from orbax_nnx_handler.planning.verdict.judge import judge

__all__ = [
    "Confidence",
    "Order",
    "Proposal",
    "Question",
    "Suggestion",
    "creation_order",
    "order_of",
    "propose",
]


def propose(
    target: Target, stored: Stored, options: RestoreOptions, order: Order | None = None
) -> Suggestion:
    """Proposes rules for the weights that have no stored leaf of their name and shape.

    Structure counts first, then shapes, then the order of creation (Linen numbers
    its automatic names in it), then names.

    Args:
        target: What the caller wants.
        stored: What the checkpoint holds.
        options: As for a plan; its rules are applied first and not proposed again.
        order: The order in which the target's modules are created, where it is known.

    Raises:
        RestoreError: No layout fits, the rules do not, or the trees are nested too deep.
    """
    verdict = judge(target, stored, options)
    mapping, _ = best_mapping(roles_of(target.leaves), stored, options)
    wanted = [
        ModuleLeaf(
            tokens=item.tokens,
            names=segments(item.path),
            collection=item.collection,
            shape=item.leaf.shape,
            number=number_of(item.leaf.dtype),
            source=item.leaf.path,
        )
        for item in of_role(roles_of(target.leaves), "model")
        if item.leaf.path not in verdict.restored
    ]
    used = {path for item in verdict.restored.values() for path in reads(item.recipe)}
    entries = [entry for entry in mapping.applied.entries if not used.intersection(entry.sources)]
    try:
        pairing, wanted_root = _best_pairing(wanted, entries, order or {})
    except RecursionError as error:
        raise RestoreError("target or checkpoint is nested deeper than Python can follow.") from error
    proposals = proposals_of(pairing.pairs, wanted_root, mapping.applied.entries, used)
    return _suggestion(proposals, _questions(pairing, wanted_root), target, stored, options)


def _best_pairing(
    wanted: Sequence[ModuleLeaf], entries: Sequence[Entry], order: Order
) -> tuple[Pairing, int]:
    """Pairs the two trees at the depths, and in NNX's own arrangement or not, that pair the most."""
    typed = all(leaf.collection for leaf in wanted) and all(entry.collection for entry in entries)
    ours = tree_of(wanted if typed else _untyped(wanted), order)
    # The order may be that of a larger item than the target.
    ordered = all(leaf.tokens[0] in order.get((), ()) for leaf in wanted)
    best: tuple[Pairing, int] | None = None
    for leaves in (_plain(entries), _arranged(entries)):
        theirs = tree_of(leaves if typed else _untyped(leaves))
        for left in _depths(ours):
            for right in _depths(theirs):
                pairing = Pairing(Signatures(), ordered)
                pairing.pair(left, right)
                if best is None or len(_covered(pairing)) > len(_covered(best[0])):
                    best = (pairing, max(0, len(left.path) - len(right.path)))
    assert best is not None
    return best


def _covered(pairing: Pairing) -> set[Path]:
    return {pair.wanted.source for pair in pairing.pairs}


def _untyped(leaves: Iterable[ModuleLeaf]) -> list[ModuleLeaf]:
    return [dataclasses.replace(leaf, collection=None) for leaf in leaves]


_WRAPPERS = 8
"""How many names above a model are tried; each is tried against each of the other side's."""


def _depths(module: Module) -> list[Module]:
    """Returns the tree and what it wraps: a target's model may stand below other names."""
    found = [module]
    while found[-1].wraps is not None and len(found) <= _WRAPPERS:
        found.append(found[-1].wraps)
    return found


def _plain(entries: Sequence[Entry]) -> list[ModuleLeaf]:
    return [_leaf(entry, entry.tokens, entry.segments) for entry in entries]


def _leaf(entry: Entry, tokens: Tokens, names: tuple[str, ...]) -> ModuleLeaf:
    return ModuleLeaf(
        tokens=tokens,
        names=names,
        collection=entry.collection,
        shape=entry.shape,
        number=number_of(entry.cast or entry.dtype),
        source=entry.sources[0],
    )


def _arranged(entries: Sequence[Entry]) -> list[ModuleLeaf]:
    """Returns the stored leaves with the gates of recurrent cells as NNX fuses them."""
    plain = {entry.tokens: entry for entry in entries if isinstance(entry.recipe, Read)}
    by_path = {entry.sources[0]: entry for entry in plain.values()}
    derived, homeless = derive(
        {
            tokens: StoredLeaf(path=e.sources[0], shape=e.shape, dtype=e.dtype, key_impl=None)
            for tokens, e in plain.items()
        }
    )
    shapes = {path: entry.shape for path, entry in by_path.items()}
    consumed = {path for item in derived for path in reads(item.recipe)} | {
        item.leaf.path for item in homeless
    }
    kept = [entry for entry in entries if entry.sources[0] not in consumed]
    made: list[ModuleLeaf] = []
    for item in derived:
        first = by_path[next(iter(reads(item.recipe)))]
        leaf = _leaf(first, item.path, (*first.segments[:-2], *item.path[-2:]))
        made.append(dataclasses.replace(leaf, shape=shape_of(item.recipe, shapes)))
    return [*_plain(kept), *made]


def _suggestion(
    proposals: tuple[Proposal, ...],
    questions: tuple[Question, ...],
    target: Target,
    stored: Stored,
    options: RestoreOptions,
) -> Suggestion:
    """Returns the proposal with what is left when it is followed."""
    rules = (*options.renames, *(proposal.rule for proposal in proposals))
    problem = ""
    try:
        verdict = judge(target, stored, dataclasses.replace(options, renames=rules))
        problem = "\n".join(str(fault) for fault in verdict.faults)
    except RestoreError as error:
        problem = str(error)
        verdict = judge(target, stored, options)
    weights = {item.leaf.path for item in of_role(roles_of(target.leaves), "model")}
    return Suggestion(
        proposals=proposals,
        questions=questions,
        unmatched_wanted=tuple(path for path in (*verdict.missing, *verdict.mismatched) if path in weights),
        unmatched_stored=tuple(
            path for path in verdict.unexpected if verdict.sides.placements[path].section == "model"
        ),
        problem=problem,
    )


def _questions(pairing: Pairing, above: int) -> tuple[Question, ...]:
    """Returns the choices as questions; one for all layers of a group that leave the same choice."""
    found = (
        Question(
            stored=tuple(_spelled(path) for path in choice.stored),
            wanted=tuple(_spelled(path[above:]) for path in choice.wanted),
            grounds=choice.grounds,
        )
        for choice in pairing.choices
    )
    return tuple(dict.fromkeys(found))


def _spelled(tokens: Tokens) -> str:
    """Returns a module's path with its own number, but `*` for the layers it is in."""
    above = ("#*" if token.startswith("#") else token for token in tokens[:-1])
    return "/".join((*above, *tokens[-1:])).replace("/#", "_").removeprefix("#")
