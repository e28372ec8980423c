"""Copies of the weights (averages, gradients, target networks): stored alone, or wanted under another name.

A copy is used only where the target or a rule names it; so the rule is what the hints give.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from flax import nnx

from orbax_nnx_handler.planning.core.errors import Cause, Hint
from orbax_nnx_handler.planning.core.lines import counted, listed
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, render, segments
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS, is_copy_name, words_of
from orbax_nnx_handler.planning.mapping.roots import is_named


def find_copies(evidence: Evidence) -> Iterable[Cause]:
    """Yields the verdict that the missing weights lie in a copy."""
    if not evidence.missing_weights or not evidence.free_weights:
        return
    yield from _only_a_copy(evidence)
    yield from _named_otherwise(evidence)
    yield from _in_another_collection(evidence)


def _in_another_collection(evidence: Evidence) -> Iterable[Cause]:
    """Yields missing weights of a type without a known collection whose path lies in some collection."""
    stored: dict[Tokens, list[Path]] = defaultdict(list)
    for path, item in evidence.free_weights.items():
        if item.collection is not None and not is_copy_name(item.collection):
            stored[evidence.stored_below(item)].append(path)
    met: dict[Path, Path] = {}
    for path in evidence.missing_weights:
        found = stored.get(evidence.below[path], [])
        # A custom type is rather kept in a custom collection.
        own = [one for one in found if evidence.free_weights[one].collection not in FLAX_COLLECTIONS]
        found = own or found
        if len(found) == 1 and not _has_collection(evidence, path):
            met[path] = found[0]
    if met:
        rules = [(render(source), render(path)) for path, source in met.items()]
        shown = repr(rules) if len(rules) <= _MOST else f"{repr(rules[:_MOST])[:-1]}, ...]"
        where = listed(sorted({repr(evidence.free_weights[source].collection) for source in met.values()}))
        kinds = listed(sorted({getattr(evidence.missing[path].wanted.kind, "__name__", "") for path in met}))
        yield Cause(
            kind="OtherCollection",
            text=f"{counted(len(met), 'wanted leaf', 'wanted leaves')} of type {kinds} "
            f"{'has its path' if len(met) == 1 else 'have their paths'} in {where}; "
            "no name says that the type is kept there.",
            paths=(*evidence.with_moments(list(met)), *met.values()),
            way=Hint(f"if they are the same, pass renames={shown}.", {"renames": rules}),
            facts={"count": len(met)},
        )


_MOST = 6


def _has_collection(evidence: Evidence, path: Path) -> bool:
    kind = evidence.missing[path].wanted.kind
    return kind is None or (kind is not nnx.Variable and is_named(kind))


def _only_a_copy(evidence: Evidence) -> Iterable[Cause]:
    """Yields the verdict that nothing but a copy is stored: a tree, a train state or all of `params`."""
    free = evidence.free_weights
    kept_apart = any(item.collection not in (None, "params") for item in free.values())
    if kept_apart or len(free) < len(evidence.stored_weights):
        return
    first = segments(next(iter(free)))
    for at, name in enumerate(first[:-1]):
        if not is_copy_name(name):
            continue
        depth = at + 1 + (first[at + 1] == "params")
        level = first[:depth]
        stored = {_end(segments(path)[depth:]): path for path in free if _is_below(path, level)}
        met = [path for path in evidence.missing_weights if _below_model(evidence, path) in stored]
        if len(stored) == len(free) and met:
            yield Cause(
                kind="OnlyACopy",
                text=f"all that is stored lies below {name!r}, the name of a copy; "
                "a copy is used only where the target or a rule names it.",
                paths=(*evidence.with_moments(met), *free),
                way=_if_meant("/".join(level), "params"),
                facts={"stored": "/".join(level), "count": len(stored)},
            )
            return


def _named_otherwise(evidence: Evidence) -> Iterable[Cause]:
    """Yields the fields of the target that are called after a stored copy and hold its weights."""
    fields: dict[str, dict[Tokens, Path]] = defaultdict(dict)
    for path in evidence.missing_weights:
        if len(path) > 1 and isinstance(path[0], str):
            fields[path[0]][canonical(path[1:])] = path
    pairs = list(_pairs(evidence, fields))
    for field, copy, sources in pairs:
        others = {path[0] for path in evidence.missing_weights} - {one for one, *_ in pairs}
        # What `params` holds meets by itself once the copies are out of the way.
        met = (
            [path for other in others for path in fields.get(str(other), {}).values()]
            if len(others) == 1
            else []
        )
        lost = list(fields[field].values())
        yield Cause(
            kind="CopyRenamed",
            text=f"the stored collection {copy!r} holds the weights of the wanted {field!r}; "
            "a copy is used only where the target or a rule names it.",
            paths=(*evidence.with_moments([*lost, *met]), *sources),
            way=_if_meant(copy, field),
            facts={"stored": copy, "wanted": field, "count": len(lost)},
        )


def _pairs(
    evidence: Evidence, fields: Mapping[str, Mapping[Tokens, Path]]
) -> Iterable[tuple[str, str, Sequence[Path]]]:
    copies: dict[str, dict[Tokens, Path]] = defaultdict(dict)
    for path, item in evidence.free_weights.items():
        if item.collection is not None and item.collection not in FLAX_COLLECTIONS and not item.owner:
            copies[item.collection][_end(item.path)] = path
    for field, wanted in fields.items():
        alike = [
            copy
            for copy in copies
            if words_of(copy) & words_of(field) and wanted.keys() <= copies[copy].keys()
        ]
        if len(alike) == 1:
            yield field, alike[0], [copies[alike[0]][tokens] for tokens in wanted]


def _below_model(evidence: Evidence, path: Path) -> Tokens:
    tokens = evidence.below[path]
    return tokens[1:] if tokens[:1] == ("model",) else tokens


def _is_below(path: Path, level: Sequence[str]) -> bool:
    return segments(path)[: len(level)] == tuple(level)


def _end(path: Path) -> Tokens:
    tokens = canonical(path)
    return tokens[:-1] if len(tokens) > 1 and tokens[-1] == "value" else tokens


def _if_meant(stored: str, wanted: str) -> Hint:
    rule = (stored, wanted)
    return Hint(f"if that is what you want, pass renames={[rule]!r}.", {"renames": [rule]})
