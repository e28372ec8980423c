"""What a pattern that matches nothing probably means: names that are only spelt otherwise."""

import dataclasses
import difflib
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.core.errors import RuleError
from orbax_nnx_handler.planning.core.paths import Path, parse, render, segments
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.rules.pattern import Pattern
from orbax_nnx_handler.planning.rules.rule import Rule

Names = tuple[str, ...]

_SHOWN = 3
_ALIKE = 0.6
_MOST_NAMES = 20_000
"""How many different runs of segments are compared; numbers and spellings aside, a model has hundreds."""

_NUMBER = re.compile(r"\d+")
_PLACE = re.compile(r"\{[A-Za-z_]\w*\}|(?<![^/])\*(?![^/])")
_PLACE_OR_NUMBER = re.compile(f"{_PLACE.pattern}|{_NUMBER.pattern}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearest:
    """What is nearest to a rule without effect.

    Attributes:
        paths: Stored paths, as `orbax-nnx tree` prints them.
        rule: The rule with its pattern spelt as the paths are, or None.
    """

    paths: tuple[str, ...] = ()
    rule: Rule | None = None


def nearest(rule: Rule, entries: Sequence[Entry]) -> Nearest:
    """Returns the stored paths that are nearest to a rule's pattern."""
    paths: list[str] = []
    corrected: dict[str, str] = {}
    for text in patterns_of(rule):
        runs = _alike(text, entries)
        paths += [_shown(entry) for _, entry in runs]
        written = (_spelt_as(text, names) for names, _ in runs)
        corrected[text] = next((new for new in written if new is not None and new != text), text)
    return Nearest(paths=tuple(dict.fromkeys(paths))[:_SHOWN], rule=_with_patterns(rule, corrected, entries))


def patterns_of(rule: Rule) -> tuple[str, ...]:
    """Returns the patterns of the stored leaves that a rule is for."""
    fields: Mapping[str, object] = vars(rule)
    one, several = fields.get("pattern"), fields.get("patterns")
    if fields.get("regex"):
        return ()
    if isinstance(one, str):
        return (one,)
    return tuple(map(str, several)) if isinstance(several, tuple) else ()  # pyright: ignore[reportUnknownArgumentType]


def names_optimizer_leaf(rule: Rule, entries: Iterable[Entry]) -> bool:
    """Tells whether a pattern names what lies below an `opt_state`, which rules see as one whole."""
    return _names_one_of(rule, {segments(path) for entry in entries for path in entry.leaves})


def is_for_values(rule: Rule, entries: Iterable[Entry]) -> bool:
    """Tells whether a rule on values names an optimizer or a step, which it is not for."""
    return _names_one_of(rule, [entry.whole for entry in entries if entry.section in ("optimizer", "step")])


def _names_one_of(rule: Rule, paths: Iterable[Names]) -> bool:
    patterns = [Pattern(text) for text in patterns_of(rule)]
    return any(any(pattern.spans(path)) for path in paths for pattern in patterns)


def _with_patterns(rule: Rule, corrected: Mapping[str, str], entries: Sequence[Entry]) -> Rule | None:
    """Returns the rule with other patterns, if it has an effect then."""
    if all(old == new for old, new in corrected.items()) or not dataclasses.is_dataclass(rule):
        return None
    texts = tuple(corrected.values())
    changed = {"patterns": texts} if "patterns" in vars(rule) else {"pattern": texts[0]}
    try:
        new = dataclasses.replace(rule, **changed)
        return new if new.apply(entries).matched else None
    except RuleError:
        return None


def _alike(text: str, entries: Iterable[Entry]) -> list[tuple[Names, Entry]]:
    """Returns the runs of segments that are most like a pattern, each with a leaf that has it, best first."""
    aim, numbers = _plain(text), _NUMBER.findall(_PLACE.sub("", text))
    width = len(parse(text.replace(".", "/")))
    found: dict[str, tuple[Names, Entry]] = {}
    seen: set[Names] = set()
    for entry in entries:
        for names in _runs(entry.whole, width):
            if names in seen or len(seen) == _MOST_NAMES:
                continue
            seen.add(names)
            key = "/".join(map(_plain, names))
            if key not in found or (numbers and _NUMBER.findall("/".join(names)) == numbers):
                found[key] = (names, entry)
    ratios = _ratios(aim, found)
    best = sorted(ratios, key=lambda key: -ratios[key])[:_SHOWN]
    return [found[key] for key in best if ratios[key] >= max(_ALIKE, ratios[best[0]] - 0.15)]


def _runs(whole: Names, width: int) -> Iterable[Names]:
    """Yields the runs of about so many segments; a number may be a segment of its own on one side only."""
    for length in range(max(width - 2, 1), width + 3):
        for start in range(len(whole) - length + 1):
            yield whole[start : start + length]


def _ratios(aim: str, keys: Iterable[str]) -> dict[str, float]:
    matcher = difflib.SequenceMatcher(None, "", aim, autojunk=False)
    found: dict[str, float] = defaultdict(float)
    for key in keys:
        matcher.set_seq1(key)
        if matcher.real_quick_ratio() >= _ALIKE and matcher.quick_ratio() >= _ALIKE:
            found[key] = matcher.ratio()
    return found


@functools.lru_cache(maxsize=65536)
def _plain(text: str) -> str:
    """Returns names as they are compared: no case, one separator, every number and place alike."""
    return re.sub(r"[._/]+", "/", _PLACE_OR_NUMBER.sub("#", text)).strip("/").lower()


def _spelt_as(text: str, names: Names) -> str | None:
    """Returns a pattern that matches these segments, with the places of another, or None."""
    spelt = "/".join(names)
    places = _PLACE_OR_NUMBER.findall(text)
    numbers = _NUMBER.findall(spelt)
    if len(places) == len(numbers):
        both = iter(zip(places, numbers, strict=True))

        def kept(_: "re.Match[str]") -> str:
            place, number = next(both)
            return number if place.isdecimal() else place

        written = _matching(_NUMBER.sub(kept, spelt), names)
        if written is not None:
            return written
    parts = parse(text)
    if not _PLACE.search(text):
        return spelt
    if len(parts) != len(names):
        return None
    kept_parts = [
        part if Pattern(part).match((name,)) is not None else name
        for part, name in zip(parts, names, strict=True)
    ]
    return _matching("/".join(kept_parts), names)


def _matching(text: str, names: Names) -> str | None:
    return text if Pattern(text).match(names) is not None else None


def _shown(entry: Entry) -> str:
    """Returns the path of a stored leaf; what rules have made of it, where they have."""
    source: Path = entry.whole if entry.leaves else entry.sources[0]
    stored = render(source)
    now = render(entry.whole)
    return stored if stored == now else f"{stored} (now {now})"
