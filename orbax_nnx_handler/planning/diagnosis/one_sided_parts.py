"""Parts that one side lacks or has in another form: a collection, biases, a head, LoRA, codes, random keys.

And what the checkpoint is as a whole: without a weight, or of another layout than was asked for.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

import jax.numpy as jnp
from flax import nnx

from orbax_nnx_handler.planning import layouts
from orbax_nnx_handler.planning.core.dtypes import KEY_IMPLEMENTATIONS, same_key, scales_of
from orbax_nnx_handler.planning.core.errors import Cause, Hint, UnknownLayoutError, as_python
from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.lines import counted, listed
from orbax_nnx_handler.planning.core.paths import (
    Path,
    Tokens,
    canonical,
    is_number,
    render,
    segments,
    spelled,
)
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence
from orbax_nnx_handler.planning.diagnosis.ways import selecting
from orbax_nnx_handler.planning.layouts.layout import Placement, is_copy_name
from orbax_nnx_handler.planning.mapping.roots import strip
from orbax_nnx_handler.planning.rules import Copy, Rename, Transpose

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
    names = [name for name in segments(path) if name != "value"]
    return names[-1] if names else "value"


def find_collections(evidence: Evidence) -> Iterable[Cause]:
    """Yields collections of which nothing is stored, where the layout keeps collections apart."""
    stored = {item.collection for item in evidence.stored_weights.values()}
    if not any(path in evidence.restored for path in evidence.weights):
        return
    # A layout without collections holds them all in one tree: what is left over may be the missing one.
    if None in stored and evidence.free_weights:
        return
    missing: dict[str, list[Path]] = defaultdict(list)
    for path in evidence.missing_weights:
        collection = evidence.weights[path].collection
        if collection is not None and collection != "params" and collection not in stored:
            missing[collection].append(path)
    wanted = Counter(item.collection for item in evidence.weights.values())
    for collection, paths in missing.items():
        kind = evidence.missing[paths[0]].wanted.kind
        # A parameter of a subclass of nnx.Param is looked for in `params` as well: new, not left out. A bare
        # nnx.Variable (a table that nnx.RoPE computes) has no collection in Linen that could have been saved.
        known = kind is not None and kind is not nnx.Variable and not issubclass(kind, nnx.Param)
        if len(paths) == wanted[collection] and known:
            free = [i for i in evidence.free_weights.values() if not is_copy_name(i.collection or "")]
            elsewhere = {evidence.stored_below(item): item for item in free}
            found = [elsewhere.get(evidence.below[path]) for path in paths]
            if all(found):
                yield _other_collection(collection, paths, [item for item in found if item is not None])
                continue
            there = listed(sorted(repr(name) for name in stored if name)) or "bare parameters"
            yield Cause(
                kind="CollectionMissing",
                text=f"the collection {collection!r} was not saved: 0 of its {len(paths)} leaves are stored, "
                f"the checkpoint holds {there}.",
                paths=tuple(paths),
                way=Hint(f"save it from the Linen program too (a field {collection} of the train state)."),
                filters=selecting(evidence, paths),
                may_be_initialised=True,
                facts={"collection": collection, "count": len(paths)},
            )


def _other_collection(collection: str, paths: list[Path], stored: list[Placement]) -> Cause:
    """Returns the cause where the leaves of a collection are stored in another one."""
    other = listed(sorted({repr(item.collection) for item in stored}))
    rules = [Rename(spelled(item.leaf.path), "/".join((collection, *segments(item.path)))) for item in stored]
    shown = repr([(rule.pattern, rule.replacement) for rule in rules[:3]])
    shown = shown if len(rules) <= 3 else f"{shown[:-1]}, ...], one pair for each of the {len(rules)}"
    return Cause(
        kind="CollectionMissing",
        text=f"the {counted(len(paths), 'leaf', 'leaves')} of the collection {collection!r} are stored in "
        f"{other}: the program kept them there.",
        paths=tuple(paths),
        way=Hint(f"if they are the same, pass renames={shown}.", {"renames": rules}),
        facts={"collection": collection, "count": len(paths)},
    )


def find_lost_weights(evidence: Evidence) -> Iterable[Cause]:
    """Yields missing weights whose moments are restored."""
    kept = {parameter for path, (_, parameter) in evidence.moments.items() if path in evidence.restored}
    lost = [path for path in evidence.missing_weights if evidence.below[path] in kept]
    if lost:
        names, one = fold_paths(lost), len(lost) == 1
        yield Cause(
            kind="LostWeights",
            text=f"the optimizer's moments of {names} are stored and "
            f"{'the weight itself is' if one else 'the weights themselves are'} not: "
            f"{'it is' if one else 'they are'} no new part of the model, but left out of the checkpoint.",
            paths=evidence.with_moments(lost),
            way=Hint(f"restore another step, or find out why {'it was' if one else 'they were'} not saved."),
            facts={"names": names},
        )


def find_new_parts(evidence: Evidence) -> Iterable[Cause]:
    """Yields a part of the target of which nothing is stored, where all the rest is there."""
    missing = evidence.missing_weights
    known = evidence.explained.union(missing)
    rest = [path for path in evidence.weights if path not in known]
    # With anything else wrong, the missing leaves may be what the wrong ones were renamed from.
    if (
        not missing
        or not rest
        or evidence.free_weights
        or any(path not in evidence.restored for path in rest)
    ):
        return
    lora = [
        path for path in missing if issubclass(evidence.missing[path].wanted.kind or object, nnx.LoRAParam)
    ]
    held = {other[:length] for other in rest for length in range(1, len(other) + 1)}
    modules = {_new_module(path, held) for path in missing if path not in lora}
    if None in modules or len(missing) >= len(rest) + len(lora):
        return
    paths = evidence.with_moments(missing)
    names = [fold_paths(filter(None, modules))] if modules else []
    names += [counted(len(lora), "LoRA weight")] if lora else []
    yield Cause(
        kind="NewPart",
        text=f"nothing is stored for {listed(names)}, and everything for the other "
        f"{'weight' if len(rest) == 1 else f'{len(rest)} weights'}: the checkpoint's model did not have "
        f"{'this part' if len(names) == 1 else 'these parts'}.",
        paths=paths,
        filters=selecting(evidence, paths),
        may_be_initialised=True,
        facts={"names": tuple(names), "complete": len(rest)},
    )


def _new_module(path: Path, held: Collection[Path]) -> Path | None:
    """Returns the highest module above a weight under which nothing is stored; None for a lone weight."""
    for length in range(1, len(path)):
        prefix = path[:length]
        if prefix not in held:
            return prefix if isinstance(prefix[-1], str) else None
    return None


def find_biases(evidence: Evidence) -> Iterable[Cause]:
    """Yields modules that have no stored bias, though all else of them is stored."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in evidence.missing_weights:
        if evidence.below[path][-1] == "bias":
            groups[_module_name(evidence.below[path])].append(path)
    if not groups:
        return
    stored = {
        _module_name(evidence.stored_below(i))
        for i in evidence.stored_weights.values()
        if _is_bias(evidence, i)
    }
    wanted = {_module_name(tokens) for tokens in evidence.below.values() if tokens[-1] == "bias"}
    without = {name: paths for name, paths in groups.items() if name not in stored}
    paths = [path for each in without.values() for path in each]
    # One bias that is not there proves nothing about how the module was built.
    if len(paths) < 2 or not all(_has_siblings(evidence, path) for path in paths):
        return
    everywhere = not stored and without.keys() == wanted
    explained = evidence.with_moments(paths)
    modules = [] if everywhere else sorted(without)
    where = f"no {listed(modules)} has a stored bias" if modules else "no bias is stored at all"
    yield Cause(
        kind="NoBias",
        text=f"{where}, while the other weights of the same modules are there: the checkpoint's modules were "
        f"built without ({counted(len(paths), 'bias', 'biases')} missing).",
        paths=explained,
        way=Hint("build the target's with use_bias=False. A bias that begins at zero computes the same."),
        filters=selecting(evidence, explained),
        may_be_initialised=True,
        facts={"count": len(paths), "modules": tuple(modules)},
    )


def _is_bias(evidence: Evidence, placement: Placement) -> bool:
    return evidence.stored_below(placement)[-1] == "bias"


def _module_name(tokens: Tokens) -> str:
    """Returns the name of a weight's module without its number: `norm` for `norm1` and `norm_1`."""
    names = [token for token in tokens[:-1] if not is_number(token)]
    return re.sub(r"\d+$", "", names[-1]) if names else ""


def _has_siblings(evidence: Evidence, path: Path) -> bool:
    module = evidence.below[path][:-1]
    return any(
        tokens[:-1] == module and other in evidence.restored
        for other, tokens in evidence.below.items()
        if len(tokens) == len(module) + 1
    )


def find_tied(evidence: Evidence) -> Iterable[Cause]:
    """Yields an output layer that is missing and has the shape of a stored embedding, turned."""
    if len(evidence.missing_weights) != 1 or evidence.free_weights:
        return
    (path,) = evidence.missing_weights
    leaf = evidence.missing[path].wanted
    # The words of an output layer, or else any square kernel would do.
    is_output = any(w in str(key).lower() for key in path for w in ("head", "logits", "output", "unembed"))
    embeddings = [
        item.leaf
        for item in evidence.stored_weights.values()
        if item.leaf.shape == leaf.shape[::-1] and "embed" in render(item.leaf.path).lower()
    ]
    if is_output and len(leaf.shape) == 2 and len(embeddings) == 1:
        explained = evidence.with_moments([path])
        output, embedding = render(path), render(embeddings[0].path)
        rules = [Copy(embedding, spelled(path)), Transpose(spelled(path), (1, 0))]
        yield Cause(
            kind="TiedEmbedding",
            text=f"nothing is stored for {output}, and its shape {leaf.shape} is that of {embedding} "
            "turned: the checkpoint's model may use its embedding as output layer (tied).",
            paths=explained,
            way=Hint(
                f"if so, pass renames={as_python(rules)}, or build the target tied (nnx.Embed.attend).",
                {"renames": rules},
            ),
            facts={"output": output, "embedding": embedding},
        )


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


_SHORT = 3


def find_given_layout(evidence: Evidence) -> Iterable[Cause]:
    """Yields the verdict that the layout was named, and is not that of the checkpoint."""
    placements = evidence.sides.placements
    if not evidence.missing_weights or not placements:
        return
    stored = {path: item.leaf for path, item in placements.items()}
    try:
        fitting = [layout.title for layout in layouts.candidates(stored, "auto")]
    except UnknownLayoutError:
        return
    if evidence.verdict.layout not in fitting:
        given, found = evidence.verdict.layout, fitting[:_SHORT]
        yield Cause(
            kind="LayoutGiven",
            text=f"the checkpoint was read as {given}, as layout=... asks, but does not have the form "
            f"of one: it looks like {' or '.join(found)}.",
            paths=evidence.with_moments(evidence.missing_weights),
            way=Hint("leave layout=... out: it is found out from the metadata.", {"layout": "auto"}),
            facts={"given": given, "found": tuple(found)},
        )


def find_no_weights(evidence: Evidence) -> Iterable[Cause]:
    """Yields the verdict that nothing in the checkpoint is a weight."""
    leaves = [item.leaf for item in evidence.sides.placements.values()]
    # A few scalars are a step and counts, whichever names they carry.
    if not evidence.missing_weights or len(leaves) > _SHORT or any(leaf.shape for leaf in leaves):
        return
    if all(path in evidence.verdict.missing for path in evidence.weights):
        paths = [*evidence.missing_weights, *evidence.of_role(evidence.missing, "optimizer")]
        stored = fold_paths(leaf.path for leaf in leaves)
        held = f"all it holds is {stored}" if stored else "it is empty"
        yield Cause(
            kind="NoWeights",
            text=f"the checkpoint holds no weights: {held}.",
            paths=tuple(paths),
            way=Hint(
                "look for another item or step: `orbax-nnx tree CHECKPOINT` lists them.", command="tree"
            ),
            facts={"stored": stored},
        )


_NONE: list[Path] = []


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
    """Yields stored streams beside wanted ones of the same module, under names that do not meet.

    Flax 0.11 took the stream's name out of a module's own stream:
    `drop/rngs/default/key` became `drop/rngs/key`.
    """
    stored: dict[Tokens, list[Path]] = defaultdict(list)
    for path in [*evidence.verdict.unexpected, *evidence.verdict.skipped]:
        module = _module_of(canonical(evidence.sides.placements[path].path))
        if module is not None:
            stored[module].append(path)
    for path, item in evidence.verdict.defaulted.items():
        wanted = evidence.sides.wanted[path]
        module = _module_of(wanted.tokens)
        sources = next((s for m, s in stored.items() if module and m and _same_end(m, module)), _NONE)
        if item.source != "target" and wanted.role == "random" and path[-1] == "key" and sources:
            there = render(next((s for s in sources if "key" in segments(s)), sources[0]))
            here = render(path)
            renames = [(there, here)]
            yield Cause(
                kind="RandomLayout",
                text=f"the checkpoint holds random streams in the layout of another Flax ({there}), and "
                f"nothing says which of them is {here}: that stream starts afresh.",
                paths=(path, *sources),
                way=Hint(f"pass renames={renames!r} to go on with that stream.", {"renames": renames}),
                facts={"stored": there, "wanted": here},
            )


def _module_of(tokens: Tokens) -> Tokens | None:
    names = tokens[:-1] if tokens[-1] == "value" else tokens
    return names[: names.index("rngs") + 1] if "rngs" in names and names[-1] in ("key", "count") else None


def _same_end(one: Tokens, other: Tokens) -> bool:
    size = min(len(one), len(other))
    return size > 1 and one[-size:] == other[-size:]


_WRAPPED = {"scale": "scales", "u": "batch_stats", "sigma": "batch_stats"}
"""What a wrapper keeps of a weight in Linen, and the field of NNX's (flax/nnx/nn/normalization.py)."""
_FIELDS = {"layer_instance", *_WRAPPED.values()}


def find_wrappers(evidence: Evidence) -> Iterable[Cause]:
    """Yields the one normalising wrapper of a module that is called otherwise: Linen numbers it by itself."""
    stored: dict[Tokens, set[str]] = defaultdict(set)
    for item in evidence.free_weights.values():
        *module, wrapper, key = ("", "", *item.path)
        if str(key).count("/") > 1 and str(key).rpartition("/")[-1] in _WRAPPED and wrapper:
            stored[canonical(tuple(module[2:]))].add(str(wrapper))
    wanted: dict[Tokens, set[str]] = defaultdict(set)
    lost: dict[Tokens, list[Path]] = defaultdict(list)
    for path in evidence.missing_weights if stored else ():
        at = next((at for at, key in enumerate(path) if at and key in _FIELDS), None)
        if at is not None:
            module = strip(canonical(path[: at - 1]), evidence.root)
            wanted[module].add(str(path[at - 1]))
            lost[module].append(path)
    for module in stored.keys() & wanted.keys():
        if len(stored[module]) == len(wanted[module]) == 1:
            (one,), (other,) = stored[module], wanted[module]
            rules = [Rename(one, other)]
            yield Cause(
                kind="OtherWrapper",
                text=f"the normalising wrapper {other!r} is stored as {one!r}.",
                paths=evidence.with_moments(lost[module]),
                way=Hint(f"if it is the same, pass renames=[{rules[0]}].", {"renames": rules}),
                facts={"stored": one, "wanted": other},
            )
