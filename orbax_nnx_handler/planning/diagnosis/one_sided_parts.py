"""Parts that one side lacks or has in another form: a collection, biases, a head, an optimizer, a step.

And a checkpoint without any weight.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

from flax import nnx

from orbax_nnx_handler.planning.core.errors import Cause, Hint, as_python, fill_hint
from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.leaves import begins_a_state, differing_axes, is_optax_state
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
from orbax_nnx_handler.planning.diagnosis.ways import rules_for_fields, selecting, weights_alone
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS, Placement, field_of, is_copy_name
from orbax_nnx_handler.planning.likeness.shapes import ways
from orbax_nnx_handler.planning.likeness.vocabulary import concepts
from orbax_nnx_handler.planning.mapping.roots import strip
from orbax_nnx_handler.planning.rules import Copy, Rename, Transpose, as_rules


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
        if len(paths) == wanted[collection] and known and evidence.kept_aside.isdisjoint(paths):
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


def find_fields(evidence: Evidence) -> Iterable[Cause]:
    """Yields networks whose fields lie beside the stored train states, called after them (`outer_params`)."""
    placed = evidence.sides.placements.values()
    beside = {str(item.leaf.path[0]) for item in placed if item.section == "other"}
    for name in dict.fromkeys(str(path[0]) for path in evidence.missing_weights) if beside else ():
        kinds = [kind for kind in (*FLAX_COLLECTIONS, "opt_state", "step") if f"{name}_{kind}" in beside]
        rules = [(f"{name}_{kind}", f"{name}/{kind}") for kind in kinds]
        lost = [path for path in evidence.missing if str(path[0]) == name]
        found = evidence.restored_under([*evidence.verdict.renames, *as_rules(rules)]) if rules else None
        if found is not None and found.keys() >= {*evidence.restored, *lost}:
            fields = [repr(field) for field, _ in rules]
            lie, ties = ("lie", "their names tie them") if len(fields) > 1 else ("lies", "its name ties it")
            yield Cause(
                kind="OtherNetwork",
                text=f"{listed(fields)} {lie} beside the stored train states, and only {ties} to {name!r}.",
                paths=tuple(lost),
                way=Hint(f"if they are one network, pass renames={rules!r}.", {"renames": rules}),
                facts={"stored": tuple(field for field, _ in rules), "wanted": (name,)},
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
    """Yields a part of the target of which nothing is stored, where all the rest is there.

    Whatever else lies unused is no reason to look on where none of it has the shapes, in any arrangement.
    """
    missing = evidence.missing_weights
    known = evidence.explained.union(missing)
    rest = [path for path in evidence.weights if path not in known]
    elsewhere = not evidence.perhaps_stored.isdisjoint(missing)
    if not missing or not rest or elsewhere or any(path not in evidence.restored for path in rest):
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
    of_size = [row for row in (_of_another_size(evidence, path) for path in missing) if row]
    held = f", or has it in another size ({listed(of_size[:_SHORT])})" if of_size else ""
    yield Cause(
        kind="NewPart",
        text=f"nothing is stored for {listed(names)}{' in its shapes' if held else ''}, and everything for "
        f"the other {'weight' if len(rest) == 1 else f'{len(rest)} weights'}: the checkpoint's model did not "
        f"have {'this part' if len(names) == 1 else 'these parts'}{held}.",
        paths=paths,
        way=Hint("if it is the same part, build the target with the stored sizes." if held else ""),
        filters=selecting(evidence, paths),
        may_be_initialised=True,
        facts={"names": tuple(names), "complete": len(rest)},
    )


def _of_another_size(evidence: Evidence, path: Path) -> str:
    """Returns in words the one unused matrix of another size on one axis; empty for none, or more."""
    shape = evidence.shape(path)
    free = (one for one, item in evidence.free_weights.items() if item.path[-1] == path[-1])
    near = [one for one in free if len(shape) > 1 and len(differing_axes(evidence.shape(one), shape)) == 1]
    return f"{render(near[0])} {evidence.shape(near[0])} for {render(path)} {shape}" if len(near) == 1 else ""


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
    """Yields a missing matrix that has the shape of the one stored table of its size, as it is or turned.

    The words of an output layer tell that both are one, or else any square kernel would do. Without them,
    and where no axis has the other's size, the table comes first, and a new part is the other way.
    """
    missing = evidence.missing_weights
    if len(missing) != 1 or len(evidence.shape(missing[0])) != 2:
        return
    leaf, turned = evidence.missing[missing[0]].wanted, evidence.shape(missing[0])[::-1]
    alike = [path for path in evidence.stored_weights if evidence.shape(path) in (leaf.shape, turned)]
    tables = [path for path in alike if "embed" in render(path).lower()]
    is_output = any(w in render(leaf.path).lower() for w in ("head", "logits", "output", "unembed"))
    is_table = any(_BESIDE_TOKENS & concepts(segments(path)) for path in (leaf.path, *tables))
    others = (path for path in evidence.free_weights if path not in tables)
    is_free = any(ways(evidence.shape(path), leaf.shape) for path in others)
    if len(tables) != 1 or is_table or is_free or not (is_output or leaf.shape != turned):
        return
    output, embedding = render(leaf.path), render(tables[0])
    is_turned = evidence.shape(tables[0]) != leaf.shape or (
        leaf.shape == turned and leaf.path[-1] == "kernel"
    )
    turn = [Transpose(spelled(leaf.path), (1, 0))] if is_turned else []
    rules = [Copy(embedding, spelled(leaf.path)), *turn]
    explained = evidence.with_moments(missing)
    yield Cause(
        kind="TiedEmbedding",
        text=f"nothing is stored for {output}, and its shape {leaf.shape} is that of {embedding}"
        f"{' turned' if is_turned else ''}: the checkpoint's model may use "
        f"{'its embedding as output layer' if is_output else 'that for both'} (tied).",
        paths=explained,
        way=Hint(
            f"if so, pass renames={as_python(rules)}, or build the target tied (nnx.Embed.attend).",
            {"renames": rules},
        ),
        filters=() if is_output else selecting(evidence, explained),
        may_be_initialised=not is_output,
        facts={"output": output, "embedding": embedding},
    )


_BESIDE_TOKENS = frozenset(("pos", "type", "patch", "cls"))
"""What tables beside that of the tokens are of, in the words of `likeness.vocabulary`."""
_SHORT = 3


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


def find_steps(evidence: Evidence) -> Iterable[Cause]:
    """Yields that one step is stored where the target counts more than once: no count is read twice."""
    lost = evidence.of_role(evidence.missing, "step")
    placements = evidence.sides.placements
    steps = [path for path, item in placements.items() if item.section == "step" and not item.leaf.shape]
    if not lost or len(steps) != 1 or evidence.weights.keys().isdisjoint(evidence.restored):
        return
    taken = [at for at, item in evidence.restored.items() if reads(item.recipe) == (steps[0],)]
    if len(lost) > 1:
        yield _step_of_all(evidence, lost, render(steps[0]), is_wanted=bool(taken))
    for path in taken if len(lost) == 1 else ():
        if path[:-1] == lost[0][: len(path) - 1] or lost[0][:-1] == path[: len(lost[0]) - 1]:
            yield _second_step(lost[0], path, render(steps[0]))


def _step_of_all(evidence: Evidence, lost: Sequence[Path], stored: str, *, is_wanted: bool) -> Cause:
    fill = fill_hint(selecting(evidence, lost), len(lost))
    words = f"set these from {stored!r} in the program; for the restore, {fill.words}"
    return Cause(
        kind="SecondStep",
        text=f"{stored!r} is the one stored step, and no name says which of the {len(lost)} that are missing "
        "it is.",
        paths=tuple(lost),
        way=dataclasses.replace(
            fill, words=words if is_wanted else f"add {stored!r} to the target, and {words}"
        ),
        facts={"stored": stored, "wanted": tuple(map(render, lost))},
    )


def _second_step(path: Path, other: Path, stored: str) -> Cause:
    ours, theirs = render(path), render(other)
    return Cause(
        kind="SecondStep",
        text=f"{stored!r} is the one stored step, and the target wants two: {theirs!r} takes it, and nothing "
        f"is left for {ours!r}.",
        paths=(path,),
        way=Hint(f"leave {theirs!r} out of the target, and set it from {ours!r} in the program."),
        facts={"stored": stored, "wanted": (theirs, ours)},
    )


def find_no_optimizer(evidence: Evidence) -> Iterable[Cause]:
    """Yields that no optimizer was saved, or only what no layout takes for that of a network."""
    wanted = [path for path, item in evidence.sides.wanted.items() if item.role == "optimizer"]
    lost = evidence.of_role(evidence.missing, "optimizer")
    stored = [item for item in evidence.sides.placements.values() if item.section == "optimizer"]
    elsewhere = _like_optimizers(evidence) if lost else []
    every = [*lost, *evidence.of_role(evidence.missing, "step")]
    if rules := rules_for_fields(evidence, every, [*elsewhere, *evidence.unknown_steps]):
        yield _by_names(every, rules)
        return
    is_known = stored and not (elsewhere and all(map(_is_by_network, stored)))
    if not lost or is_known or not any(path in evidence.restored for path in evidence.weights):
        return
    if elsewhere:
        yield _unknown_place(evidence, every, elsewhere)
        return
    found = "there are weights"
    if evidence.weights_complete:
        found = f"all {counted(len(evidence.weights), 'weight')} are there"
    yield Cause(
        kind="NoOptimizer",
        text=f"no optimizer was saved: {found}, and 0 of the optimizer's {len(wanted)} leaves.",
        paths=tuple(every),
        way=Hint(weights_alone(evidence)),
        filters=selecting(evidence, every),
        may_be_initialised=True,
        facts={"moments": len(wanted), "weights": len(evidence.weights)},
    )


def _by_names(lost: Sequence[Path], rules: list[tuple[str, str]]) -> Cause:
    fields = listed([repr(field) for field, _ in rules])
    return Cause(
        kind="OptimizerNested",
        text=f"optimizers or steps may be stored in {fields}, and no layout or rule says of which network.",
        paths=tuple(lost),
        way=Hint(f"if they belong to what they are called after, add renames={rules!r}.", {"renames": rules}),
        facts={"stored": fields, "wanted": ""},
    )


def _like_optimizers(evidence: Evidence) -> list[Path]:
    """Returns the keys below which nothing is read and all is arranged as optax arranges a state.

    The first keys of a path, or `opt_state` and a network's name below it.
    """
    below: dict[Path, list[Path]] = defaultdict(list)
    for path, item in evidence.sides.placements.items():
        if item.section == "other" or path in evidence.unexpected:
            depth = len(field_of(item)) if _is_by_network(item) else 0
            below[path[: depth + 1]].append(path[depth + 1 :])
    places = (top for top, paths in below.items() if "opt_state" in str(top[-1]) or is_optax_state(paths))
    return sorted(places, key=render)


def _is_by_network(item: Placement) -> bool:
    """Tells whether a leaf lies below a network's name in `opt_state`."""
    return item.section == "optimizer" and len(item.path) > 1 and not begins_a_state(item.path)


def _unknown_place(evidence: Evidence, lost: Sequence[Path], places: Sequence[Path]) -> Cause:
    """Returns that optimizers are stored, and no layout tells whose they are."""
    where = listed([repr(render(place)) for place in places])
    step = ", 'step': tree['step']" if ("step",) in evidence.sides.placements else ""
    keys = "".join(f"[{key!r}]" for key in places[0])
    tree = f"{{'params': ..., 'opt_state': tree{keys}{step}}}"
    return Cause(
        kind="OptimizerNested",
        text=f"what looks like an optimizer is stored below {where}, and no name tells of which network.",
        paths=tuple(lost),
        way=Hint(f"load the tree with Orbax, and pass from_linen({tree}, target), network by network."),
        facts={"stored": ", ".join(map(render, places)), "wanted": ""},
    )
