"""Causes that are variants of one model: without biases, with tied embeddings, quantised.

Parts that one side has and the other has not: a collection, a head, LoRA.

The same model built otherwise: without biases, with tied embeddings, quantised.

What the checkpoint is as a whole: without a weight, or of another layout than was asked for.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import ClassVar

from flax import nnx

from orbax_nnx_handler.planning import layouts
from orbax_nnx_handler.planning.core.errors import UnknownLayoutError
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, Tokens, is_number, render
from orbax_nnx_handler.planning.diagnosis.cause import (
    Cause,
    CollectionMissing,
    LostWeights,
    NewPart,
    counted,
    listed,
)
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence, selecting
from orbax_nnx_handler.planning.diagnosis.names import LayoutGiven, NoWeights
from orbax_nnx_handler.planning.diagnosis.quantised import quantised_weights
from orbax_nnx_handler.planning.layouts.layout import Placement
from orbax_nnx_handler.planning.text.folding import fold_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoBias(Cause):
    """The checkpoint's modules have no bias.

    Attributes:
        count: Missing biases.
        modules: The names of their modules; empty where no module at all has a stored bias.
    """

    count: int
    modules: tuple[str, ...]
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        where = f"no {listed(self.modules)} has a stored bias" if self.modules else "no bias is stored at all"
        return (
            f"{where}, while the other weights of the same modules are there: the checkpoint's modules were "
            f"built without ({counted(self.count, 'bias', 'biases')} missing)."
        )

    def _way(self) -> str:
        return "build the target's with use_bias=False. A bias that begins at zero computes the same."


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiedEmbedding(Cause):
    """An output layer is missing that has the shape of a stored embedding, turned.

    Attributes:
        output: The missing weight, as its path is written.
        shape: Its shape.
        embedding: The stored embedding.
    """

    output: str
    shape: Shape
    embedding: str
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        return (
            f"nothing is stored for {self.output}, and its shape {self.shape} is that of {self.embedding} "
            "turned: the checkpoint's model may use its embedding as output layer (tied)."
        )

    def _way(self) -> str:
        return (
            "if so, build the target tied as well (nnx.Embed.attend); "
            "an output layer of its own begins untrained."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantised(Cause):
    """Codes stand where floats are wanted, with scales beside them.

    Attributes:
        dtype: The stored dtype.
        scales: The names of the leaves beside them.
        count: How many.
    """

    dtype: str
    scales: tuple[str, ...]
    count: int

    def _cause(self) -> str:
        weights = "1 weight is" if self.count == 1 else f"{self.count} weights are"
        scales = listed(self.scales)
        return f"{weights} stored as {self.dtype} with {scales} beside: the checkpoint is quantised."

    def _way(self) -> str:
        return (
            "restore the checkpoint from before, or dequantise in the program that wrote it: "
            "codes without their scales are no weights."
        )


def find_collections(evidence: Evidence) -> Iterable[Cause]:
    """Yields collections of which nothing is stored, where it can be told."""
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
        # A parameter of a subclass of nnx.Param is looked for in `params` as well: new, not left out.
        if len(paths) == wanted[collection] and kind is not None and not issubclass(kind, nnx.Param):
            yield CollectionMissing(
                paths=tuple(paths),
                collection=collection,
                filters=selecting(evidence, paths),
                count=len(paths),
                stored=tuple(sorted(name for name in stored if name)),
            )


def find_lost_weights(evidence: Evidence) -> Iterable[Cause]:
    """Yields missing weights whose moments are restored."""
    kept = {parameter for path, (_, parameter) in evidence.moments.items() if path in evidence.restored}
    lost = [path for path in evidence.missing_weights if evidence.below[path] in kept]
    if lost:
        yield LostWeights(paths=evidence.with_moments(lost), names=fold_paths(lost), count=len(lost))


def find_new_parts(evidence: Evidence) -> Iterable[Cause]:
    """Yields a part of the target of which nothing is stored, where all the rest is there."""
    missing = evidence.missing_weights
    rest = [path for path in evidence.weights if path not in set(missing) and path not in evidence.explained]
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
    modules = {_new_module(path, rest) for path in missing if path not in lora}
    if None in modules or len(missing) >= len(rest) + len(lora):
        return
    paths = evidence.with_moments(missing)
    names = [fold_paths(filter(None, modules))] if modules else []
    names += [counted(len(lora), "LoRA weight")] if lora else []
    yield NewPart(paths=paths, names=tuple(names), filters=selecting(evidence, paths), complete=len(rest))


def _new_module(path: Path, rest: Sequence[Path]) -> Path | None:
    """Returns the highest module above a weight under which nothing is stored; None for a lone weight."""
    for length in range(1, len(path)):
        prefix = path[:length]
        if not any(other[:length] == prefix for other in rest):
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
    yield NoBias(
        paths=explained,
        count=len(paths),
        modules=() if everywhere else tuple(sorted(without)),
        filters=selecting(evidence, explained),
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
        yield TiedEmbedding(
            paths=explained,
            output=render(path),
            shape=leaf.shape,
            embedding=render(embeddings[0].path),
            filters=selecting(evidence, explained),
        )


def find_quantised(evidence: Evidence) -> Iterable[Cause]:
    """Yields weights stored as codes that have scales beside them."""
    for dtype, weights in quantised_weights(evidence).items():
        names = sorted({name for scales in weights.values() for name in scales})
        paths = list(weights)
        yield Quantised(
            paths=evidence.with_moments(paths), dtype=dtype, scales=tuple(names), count=len(paths)
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
        yield LayoutGiven(
            paths=evidence.with_moments(evidence.missing_weights),
            given=evidence.verdict.layout,
            found=tuple(fitting[:_SHORT]),
        )


def find_no_weights(evidence: Evidence) -> Iterable[Cause]:
    """Yields the verdict that nothing in the checkpoint is a weight."""
    leaves = [item.leaf for item in evidence.sides.placements.values()]
    # A few scalars are a step and counts, whichever names they carry.
    if not evidence.missing_weights or len(leaves) > _SHORT or any(leaf.shape for leaf in leaves):
        return
    if all(path in evidence.verdict.missing for path in evidence.weights):
        paths = [*evidence.missing_weights, *evidence.of_role(evidence.missing, "optimizer")]
        yield NoWeights(paths=tuple(paths), stored=fold_paths(leaf.path for leaf in leaves))
