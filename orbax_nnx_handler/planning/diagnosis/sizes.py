"""Sizes: one dimension behind many mismatches, identified by where it stands, never by its size.

And kinds of numbers: codes of quantised weights, random keys and streams of another kind.
"""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

import jax.numpy as jnp
from flax import nnx

from orbax_nnx_handler.planning.core.dtypes import KEY_IMPLEMENTATIONS, same_key, scales_of
from orbax_nnx_handler.planning.core.errors import Cause, Hint, as_python
from orbax_nnx_handler.planning.core.leaves import differing_axes
from orbax_nnx_handler.planning.core.lines import counted, listed, share
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, render, segments, spelled
from orbax_nnx_handler.planning.core.recipes import Read, reads
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence
from orbax_nnx_handler.planning.rules import Drop

_SIZES = Hint("build the target with the stored sizes; a weight is never cut or padded.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """One axis of one weight on which the two sides differ.

    Attributes:
        path: The wanted weight.
        axis: The axis.
        rank: How many axes it has.
        stored: The stored size.
        wanted: The wanted size.
    """

    path: Path
    axis: int
    rank: int
    stored: int
    wanted: int

    @property
    def names(self) -> tuple[str, ...]:
        """The path's names in lower case."""
        return tuple(part.lower() for part in segments(self.path))

    @property
    def module(self) -> str:
        """The name of the module that has the weight."""
        return self.names[-2] if len(self.names) > 1 else ""


def dimension_name(places: Sequence[Place], most: int) -> str:
    """Returns what a dimension is, or an empty text.

    Args:
        places: Where it stands.
        most: In how many weights the size of the whole model would differ.
    """
    for name, is_it in _NAMES:
        if all(is_it(place) for place in places):
            return name
    embeds = any(_embeds(place) for place in places)
    if embeds and all(_is_vocabulary(place) for place in places):
        return "the vocabulary"
    return "the hidden size" if len({place.path for place in places}) >= max(most, 3) else ""


def output_modules(evidence: Evidence, places: Sequence[Place]) -> Sequence[Path]:
    """Returns the module of which only the output differs in size, or that of each of several networks.

    A copy of a network has its head as well, under the same path in another collection.
    """
    recipes = {place.path[:-1]: evidence.mismatched[place.path].recipe for place in places}
    modules = list(recipes)
    if not all(place.axis == place.rank - 1 for place in places) or not all(modules):
        return ()
    if len(modules) == 1:
        return modules
    placed = evidence.sides.placements
    sources = [placed[recipe.path] for recipe in recipes.values() if isinstance(recipe, Read)]
    inner = min((item.path[:-1] for item in sources), key=len, default=())
    alike = [item for item in sources if item.path[item.section == "other" : -1] == inner]
    networks = {item.leaf.path[: -1 - len(inner)] for item in alike}
    are_one = len(networks) == len(modules) and len({module[-1] for module in modules}) == 1
    return modules if inner and are_one else ()


def modules_of(places: Sequence[Place]) -> str:
    """Returns where a dimension stands that has no name of its own: `a dimension of down and up`."""
    modules = {names[-2] for place in places if len(names := segments(place.path)) > 1}
    return f"a dimension of {listed(sorted(modules))}" if 0 < len(modules) <= _FEW else ""


_FEW = 3


def is_attention(path: Path) -> bool:
    """Tells from its path whether a weight is an attention's."""
    words = ("query", "key", "value", "attention", "attn")
    return any(any(word in part.lower() for word in words) for part in segments(path)[:-1])


def _is_experts(place: Place) -> bool:
    if any("router" in part for part in place.names) or place.module == "gate":
        return place.axis == place.rank - 1
    # Axis 1 where the layers are stacked before the experts.
    last = min(2, place.rank - 1)
    return place.axis < last and any("expert" in part or "moe" in part for part in place.names)


def _is_positions(place: Place) -> bool:
    return any("pos" in part for part in place.names) and place.axis == place.rank - 2


def _embeds(place: Place) -> bool:
    return any("embed" in part for part in place.names) and not any("pos" in part for part in place.names)


def _is_vocabulary(place: Place) -> bool:
    """Embeddings have the vocabulary first, output layers last."""
    is_output = any(word in part for part in place.names for word in ("head", "logits", "output"))
    return place.axis == 0 if _embeds(place) else is_output and place.axis == place.rank - 1


def _is_out(place: Place) -> bool:
    return any(part in ("out", "o", "o_proj", "output", "attn_vec_einsum") for part in place.names[-2:])


def _is_heads(place: Place) -> bool:
    """Queries, keys and values have heads and head size last; the way out has them first."""
    if not is_attention(place.path) or place.rank < 2:
        return False
    return place.rank > 2 and place.axis < place.rank - 2 if _is_out(place) else place.axis == place.rank - 2


def _is_shared_heads(place: Place) -> bool:
    return _is_heads(place) and any(part in ("key", "value", "k", "v", "kv") for part in place.names[-2:])


def _is_head_size(place: Place) -> bool:
    if not is_attention(place.path) or place.rank < 2:
        return False
    return place.rank > 2 and place.axis == place.rank - (2 if _is_out(place) else 1)


_NAMES: Iterable[tuple[str, Callable[[Place], bool]]] = (
    ("the number of experts", _is_experts),
    ("the number of positions", _is_positions),
    ("the number of key and value heads", _is_shared_heads),
    ("the number of heads", _is_heads),
    ("the size of a head", _is_head_size),
)


Pair = tuple[int, int]
"""A size in the checkpoint and in the target."""


def find_heads(evidence: Evidence) -> Iterable[Cause]:
    """Yields the verdict that the same features are divided among another number of heads."""
    divided: dict[tuple[Pair, ...], list[Path]] = defaultdict(list)
    for path in evidence.mismatched_weights:
        item = evidence.mismatched[path]
        pairs = tuple((place.stored, place.wanted) for place in _places(evidence, path))
        same_size = math.prod(item.stored_shape) == math.prod(item.wanted.shape)
        if len(pairs) == 2 and same_size and is_attention(path):
            divided[pairs].append(path)
    if len(divided) == 1:
        ((heads, size), paths) = divided.popitem()
        stored, wanted = (f"{counted(heads[side], 'head')} of {size[side]}" for side in (0, 1))
        explained = share(len(paths), len(evidence.mismatched_weights), "mismatched weight")
        yield Cause(
            kind="HeadsDivided",
            text=f"the division into heads differs: {stored} stored, {wanted} wanted. "
            f"This explains {explained}.",
            paths=evidence.with_moments(paths),
            way=_SIZES,
            facts={"stored": (heads[0], size[0]), "wanted": (heads[1], size[1])},
        )


def find_dimensions(evidence: Evidence) -> Iterable[Cause]:
    """Yields the dimensions that explain the mismatched shapes: few of them, or none."""
    places: dict[Pair, list[Place]] = defaultdict(list)
    for path in evidence.mismatched_weights:
        for place in _places(evidence, path):
            places[place.stored, place.wanted].append(place)
    most = _most(evidence)
    named = {pair: dimension_name(found, most) for pair, found in places.items()}
    widths = [
        pair for pair in places if named[pair] not in _NO_WIDTH and not output_modules(evidence, places[pair])
    ]
    if _one_width(widths, places, most):
        yield _cause(evidence, sorted(widths), places, "")
        places = {pair: found for pair, found in places.items() if pair not in widths}
    outputs = {pair: output_modules(evidence, found) for pair, found in places.items() if not named[pair]}
    # A model has one head; where several modules differ so, it is not a head that differs.
    heads = {pair: modules for pair, modules in outputs.items() if modules}
    for pair, found in sorted(places.items(), key=lambda item: -len(_paths(item[1]))):
        if pair in heads and len(heads) == 1:
            yield _output(evidence, pair, found, heads[pair])
        # A size that stands in one weight explains nothing: its row says as much.
        elif named[pair] or len(_paths(found)) > 1:
            yield _cause(evidence, [pair], places, named[pair] or modules_of(found))


_NO_WIDTH = ("the vocabulary", "the number of positions", "the number of experts")


def _places(evidence: Evidence, path: Path) -> list[Place]:
    item = evidence.mismatched[path]
    stored, wanted = item.stored_shape, item.wanted.shape
    return [
        Place(path=path, axis=axis, rank=len(wanted), stored=stored[axis], wanted=wanted[axis])
        for axis in differing_axes(stored, wanted)
    ]


def _paths(places: Iterable[Place]) -> list[Path]:
    return list(dict.fromkeys(place.path for place in places))


def _most(evidence: Evidence) -> int:
    """Returns how many weights a dimension must differ in to be that of the whole model."""
    compared = evidence.restored.keys() | evidence.verdict.mismatched.keys()
    return len(compared & evidence.weights.keys()) // 2 + 1


def _one_width(pairs: Sequence[Pair], places: Mapping[Pair, Sequence[Place]], most: int) -> bool:
    """Tells whether several sizes grow together: by one ratio, and in most of the model.

    Two sizes that happen to double, each in a few weights, are two differences.
    """
    paths = {place.path for pair in pairs for place in places[pair]}
    ratios = {Fraction(wanted, stored) for stored, wanted in pairs if stored}
    return len(pairs) > 1 and len(ratios) == 1 and all(stored for stored, _ in pairs) and len(paths) >= most


def _cause(
    evidence: Evidence, pairs: Sequence[Pair], places: Mapping[Pair, Sequence[Place]], name: str
) -> Cause:
    paths = _paths(place for pair in pairs for place in places[pair])
    alone = all((p.stored, p.wanted) in pairs for path in paths for p in _places(evidence, path))
    ratio = _ratio(pairs[0])
    if len(pairs) == 1:
        what = f"{name or 'a dimension'} differs: {pairs[0][0]} stored, {pairs[0][1]} wanted"
    else:
        sizes = listed(f"{stored} stored for {wanted} wanted" for stored, wanted in pairs)
        what = f"{name or 'the width of the model'} differs: {sizes}"
    explained = share(len(paths), len(evidence.mismatched_weights), "mismatched weight")
    return Cause(
        kind="DimensionDiffers",
        text=f"{what}{f' (ratio {ratio})' if ratio else ''}. "
        f"This {'explains' if alone else 'shows in'} {explained}.",
        paths=evidence.with_moments(paths),
        way=_SIZES,
        facts={"name": name, "pairs": tuple(pairs), "ratio": ratio, "count": len(paths)},
    )


def _ratio(pair: Pair) -> str:
    """Returns wanted over stored where it tells something: 32000 padded to 32128 has no telling ratio."""
    if not pair[0]:
        return ""
    ratio = Fraction(pair[1], pair[0])
    return str(ratio) if max(ratio.numerator, ratio.denominator) <= 64 else ""


def _output(evidence: Evidence, pair: Pair, places: Sequence[Place], modules: Sequence[Path]) -> Cause:
    """One module has another number of outputs, and nothing else differs with it: a head."""
    paths = _paths(places)
    recipes = (evidence.mismatched[path].recipe for path in paths)
    sources = (evidence.stored_weights.get(each.path) for each in recipes if isinstance(each, Read))
    source = next(filter(None, sources), None)
    stored, wanted = pair
    names, have = listed([repr(render(module)) for module in modules]), "has" if len(modules) == 1 else "have"
    same = f"build the target with {stored}"
    way = Hint(f"{same}; a weight is never cut or padded.")
    if source is not None and len(source.path) > 1:
        renames = [Drop(spelled(source.path[:-1]), "a new head")]
        policy = {nnx.PathContains(str(modules[0][-1])): "init", ...: "error"}
        way = Hint(
            f"{same}; or leave the stored one behind and begin a new one, with "
            f"renames={as_python(renames)} and policy={as_python(policy)}; "
            "an abstract target needs init=..., a function that builds it, as well.",
            {"renames": renames, "policy": policy},
            needs_init=True,
        )
    return Cause(
        kind="OtherOutput",
        text=f"{names} {have} {counted(stored, 'output')} in the checkpoint and {wanted} in the target.",
        paths=evidence.with_moments(paths),
        way=way,
        facts={"module": ", ".join(map(render, modules)), "stored": stored, "wanted": wanted},
    )


_Scales = Mapping[Path, tuple[Path, ...]]


def quantised_weights(evidence: Evidence) -> Mapping[str, Mapping[Path, tuple[str, ...]]]:
    """Returns the wanted leaves that codes stand for, by stored dtype, each with the names of its scales.

    A wanted leaf is either mapped to codes, or missing where codes lie in a dict of its
    name (`kernel/{qvalue, scale}`).
    """
    placements = evidence.sides.placements
    used = {path for item in evidence.mismatched.values() for path in reads(item.recipe)}
    used |= {path for item in evidence.restored.values() for path in reads(item.recipe)}
    scales = scales_of((item.leaf for item in placements.values()), placements.keys() - used)
    found: dict[str, dict[Path, tuple[str, ...]]] = defaultdict(dict)
    for path, codes in _codes_of(evidence, scales):
        found[str(placements[codes].leaf.dtype)][path] = tuple(_name(scale) for scale in scales[codes])
    return found


def _codes_of(evidence: Evidence, scales: _Scales) -> Iterable[tuple[Path, Path]]:
    for path, item in evidence.mismatched.items():
        codes = next((source for source in reads(item.recipe) if source in scales), None)
        if codes is not None and jnp.issubdtype(item.wanted.dtype, jnp.floating):
            yield path, codes
    boxes: dict[Tokens, Path] = {}
    for codes in scales:
        if codes in evidence.stored_weights:
            tokens = evidence.stored_below(evidence.stored_weights[codes])
            boxes |= {tokens[:depth]: codes for depth in range(1, len(tokens))}
    for path in evidence.missing_weights:
        if evidence.below[path] in boxes:
            yield path, boxes[evidence.below[path]]


def _name(path: Path) -> str:
    return next((name for name in reversed(segments(path)) if name != "value"), "value")


def find_quantised(evidence: Evidence) -> Iterable[Cause]:
    """Yields weights stored as codes that have scales beside them."""
    for dtype, weights in quantised_weights(evidence).items():
        names = sorted({name for scales in weights.values() for name in scales})
        yield Cause(
            kind="Quantised",
            text=f"{counted(len(weights), 'weight is', 'weights are')} stored as {dtype} with "
            f"{listed(names)} beside: the checkpoint is quantised.",
            paths=evidence.with_moments(list(weights)),
            way=Hint(
                "restore the checkpoint from before, or dequantise in the program that wrote it: "
                "codes without their scales are no weights."
            ),
            facts={"dtype": dtype, "scales": tuple(names)},
        )


def find_keys(evidence: Evidence) -> Iterable[Cause]:
    """Yields random keys of another implementation, once for each."""
    groups: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path, item in evidence.mismatched.items():
        stored = item.stored_dtype.removeprefix("key<").removesuffix(">")
        wanted = next((name for name in KEY_IMPLEMENTATIONS if same_key(name, item.wanted.dtype)), "")
        if item.kind == "key" and wanted and stored in KEY_IMPLEMENTATIONS and stored != wanted:
            groups[stored, wanted].append(path)
    for (stored, wanted), paths in groups.items():
        yield Cause(
            kind="KeyImplementation",
            text=f"the checkpoint's random keys are {stored}, the target's {wanted}.",
            paths=tuple(paths),
            way=Hint(
                "build the target under the writer's jax_default_prng_impl, or with keys of that "
                "implementation; another one would draw other numbers."
            ),
            facts={"stored": stored, "wanted": wanted},
        )


def find_random_layouts(evidence: Evidence) -> Iterable[Cause]:
    """Yields stored streams beside wanted ones of their module or network, under names that do not meet."""
    verdict, placed = evidence.verdict, evidence.sides.placements
    stored = [path for path in (*verdict.unexpected, *verdict.skipped) if placed[path].leaf.key_impl]
    # Where a plan does not fit, the cause may be theirs as well.
    fits = not verdict.mismatched and all(item.policy != "error" for item in verdict.missing.values())
    begun = [path for path, item in verdict.defaulted.items() if stored and fits and item.source != "target"]
    left: list[Path] = []
    for path in (at for at in evidence.of_role(begun, "random") if at[-1] == "key"):
        module = _module_of(evidence.sides.wanted[path].tokens)
        same = [at for at in stored if _same_end(_module_of(canonical(placed[at].path)), module)]
        if same:
            yield _other_streams([path], [at for at in same if _stream_of(at)[-1] == path[-2]] or same)
        else:
            left.append(path)
    for owners, paths in _by_network(evidence, left).items():
        aside = [path for path in stored if placed[path].section == "aux" and placed[path].owner in owners]
        if aside:
            yield _other_streams(paths, aside)


def _other_streams(wanted: Sequence[Path], stored: Sequence[Path]) -> Cause:
    here, there = render(_stream_of(wanted[0])), render(_stream_of(stored[0]))
    renames = [(there, here)]  # A key without its count would give its first numbers again.
    way = Hint(f"pass renames={renames!r} to go on with that stream.", {"renames": renames})
    which = Hint("say which it is: renames=[(stored, wanted), ...].")
    return Cause(
        kind="RandomLayout",
        text=f"the checkpoint holds random streams under other names ({there}), and nothing says which of "
        f"them is {here}: that stream starts afresh{', as others do' if wanted[1:] else ''}.",
        paths=(*wanted, *stored),
        way=which if wanted[1:] or stored[1:] else way,
        facts={"stored": there, "wanted": here},
    )


def _by_network(evidence: Evidence, paths: Sequence[Path]) -> Mapping[frozenset[Path], list[Path]]:
    """Returns paths by the stored train states of the restored weights that are nearest to each."""
    homes: dict[Path, set[Path]] = defaultdict(set)
    for at in evidence.of_role(evidence.restored, "model") if paths else ():
        for source, depth in itertools.product(reads(evidence.restored[at].recipe), range(len(at))):
            homes[at[:depth]].add(evidence.sides.placements[source].owner)
    found: dict[frozenset[Path], list[Path]] = defaultdict(list)
    for path in paths:
        above = (path[:depth] for depth in range(len(path) - 1, 0, -1))
        found[frozenset(homes[next((at for at in above if at in homes), ())])].append(path)
    return found


def _stream_of(path: Path) -> Path:
    return path[: -2 if path[-1] == "value" else -1]


def _module_of(tokens: Tokens) -> Tokens | None:
    names = tokens[:-1] if tokens[-1] == "value" else tokens
    return names[: names.index("rngs") + 1] if "rngs" in names and names[-1] in ("key", "count") else None


def _same_end(one: Tokens | None, other: Tokens | None) -> bool:
    size = min(len(one or ()), len(other or ()))
    return one is not None and other is not None and size > 1 and one[-size:] == other[-size:]
