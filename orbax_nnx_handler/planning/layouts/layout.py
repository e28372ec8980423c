"""What each stored leaf is, in the words of a Linen program."""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal

from orbax_nnx_handler.planning.core.leaves import FACTORED, MOMENTS, StoredLeaf, derived, record
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical

Stored = Mapping[Path, StoredLeaf]
"""All stored leaves of a checkpoint, by path."""

_FACTORED = frozenset({*FACTORED, "v"})

Section = Literal["model", "optimizer", "step", "aux", "other"]


@record
class Placement:
    """One stored leaf and the part of a train state it belongs to.

    Attributes:
        leaf: The stored leaf.
        section: `model` (a variable of a collection), `optimizer`, `step`, `aux`
            (an NNX leftover under `nnx_aux`, or a random key that the program
            kept), or `other` (a dataset position, metadata: never wanted).
        path: Keys within the collection, within the optimizer state, or within
            the NNX module for `aux`; for the rest, all keys.
        collection: The Linen collection of a model leaf; None where the layout
            keeps no collections apart (an `nnx.State`, a pure dict).
        owner: Keys from the item's root to the train state that the leaf lies in; for
            an optimizer under an attribute of its own (`g_opt/opt_state`), that included.
        slot: The optimizer slot (`("0", "mu")`) where the layout itself tells
            slot and parameter apart (T5X keeps the slot last); None where the
            planner finds it by comparing with the parameters, as optax needs.
            On a `step`, `("count",)` where the optimizers keep no count of their own.
    """

    leaf: StoredLeaf
    section: Section
    path: Path
    collection: str | None = None
    owner: Path = ()
    slot: tuple[str, ...] | None = None

    @derived
    def tokens(self) -> Tokens:
        """The canonical path."""
        return canonical(self.path)

    @property
    def own(self) -> Path:
        """The keys of what lies aside, below its train state: those of its model's attribute and below."""
        is_below_item = self.leaf.path[1:] == self.path
        return below_owner(self.path, canonical(self.owner)) if is_below_item else self.path

    @property
    def is_unused(self) -> bool:
        """Whether it is the one zero that a factored state keeps for a moment that a parameter has not.

        optax/_src/factorized.py `scale_by_factored_rms` and Flax's Adafactor write `zeros((1,))`, for a
        stack of layers as for one.
        """
        names = {str(key) for key in (*(self.slot or ()), *self.path)}
        return self.section == "optimizer" and self.leaf.shape == (1,) and not _FACTORED.isdisjoint(names)


def several(placed: Mapping[Path, Placement]) -> frozenset[Path]:
    """Returns the owners of stored weights, if there are several."""
    owners = frozenset(item.owner for item in placed.values() if item.section == "model")
    return owners if len(owners) > 1 else frozenset[Path]()


def network_of(weight: Placement, size: int) -> Path:
    """Returns the owner of a stored weight; without collections, what is above the keys of its name."""
    path = weight.leaf.path
    return path[: len(path) - size] if weight.collection is None and not weight.owner else weight.owner


def below_owner(path: Path, owner: Tokens) -> Path:
    """Returns the keys of a path below an owner, of whose first levels a program may have more or fewer."""
    names = canonical(path)
    for at in range(len(owner)):
        end = owner[at:]
        below = next((n + len(end) for n in range(len(names)) if names[n : n + len(end)] == end), 0)
        if below:
            return next(path[n:] for n in range(len(path) + 1) if len(canonical(path[:n])) >= below)
    return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScannedBlocks:
    """Layers that a program scans block by block: layer = prefix + cycle * block size + position.

    The prefix is the layers that have their own numbers and lie before the scan; what the
    last whole cycle leaves over lies behind it.

    Attributes:
        layers: The layers' name where the same program writes each by itself (`layers_3`).
        name: The scan's name.
        source: Where the program's source says so.
        numbered: Names of the members of a block that have their position's number
            (`layers` for `name/layers_0`, `name/layers_1`).
        inner_scan: The first member, where it is a scan of several layers itself.
        after: The members behind it, one layer each, in order.
        remainder: The module that holds what is left over, with the members of a block.
        modules: What is left over, where it is modules that Linen numbers by itself.
    """

    layers: str
    name: str
    source: str
    numbered: frozenset[str] = frozenset()
    inner_scan: str = ""
    after: tuple[str, ...] = ()
    remainder: str = ""
    modules: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """Where a layout keeps the parts of a train state, below its owner: the way back from placements.

    Attributes:
        params: The keys above the parameters.
        collections: Those above the other collections, each below its own name; None where all lie with
            the parameters.
        opt_state: Those above the optimizer's state.
        step: Those of the step.
        boxed: Whether every path ends in `value`.
        joined: Whether the owner's name and the field's are one key.
    """

    params: Path = ("params",)
    collections: Path | None = ()
    opt_state: Path = ("opt_state",)
    step: Path = ("step",)
    boxed: bool = False
    joined: bool = False

    def path(self, section: Section, collection: str | None, below: Path, owner: Path) -> Path:
        """Returns where a leaf lies, by its path in its collection or in the optimizer's state."""
        field = self.field(section, collection)
        whole = (*field, *(() if section == "step" else below))
        if self.joined and owner and field:
            whole = (f"{owner[-1]}_{field[0]}", *whole[1:])
            owner = owner[:-1]
        boxed = self.boxed and str(whole[-1]) != "value"
        return (*owner, *whole, *(("value",) if boxed else ()))

    def field(self, section: Section, collection: str | None) -> Path:
        """Returns the keys above the leaves of a part, those of the step whole."""
        if section in ("step", "optimizer"):
            return self.step if section == "step" else self.opt_state
        if self.collections is None or collection in ("params", None):
            return self.params
        return (*self.collections, collection)

    def above(self, known: Placement) -> Path:
        """Returns the keys above a train state that a stored leaf lies in."""
        field = () if self.joined else self.field(known.section, known.collection)
        whole, size = known.leaf.path, len(field)
        starts = range(len(whole) - size + 1) if field else ()
        return next((whole[:at] for at in starts if whole[at : at + size] == field), known.owner)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How one family of programs arranges a checkpoint.

    Attributes:
        name: The value of the argument `layout=`.
        title: The name in messages ("MaxText").
        fits: Tells from paths, shapes and dtypes whether a tree can be read so.
        place: Reads the tree; gives every stored leaf exactly one placement.
        keys: The keys by which it tells the parts of a checkpoint. A model may have a
            module of that name, and then the tree may be meant as it is.
        scan_axis: The axis along which its program stacks scanned parameters, where that is fixed.
        is_certain: Tells whether a tree that fits has the program's own module names too; without
            them its keys may be any program's, and no axis follows from them.
        scans: The names under which its program scans blocks of layers.
        fields: Where it keeps the parts of a train state.
    """

    name: str
    title: str
    fits: Callable[[Stored], bool]
    place: Callable[[Stored], tuple[Placement, ...]]
    keys: frozenset[str] = frozenset()
    scan_axis: int | None = None
    is_certain: Callable[[Stored], bool] | None = None
    scans: tuple[ScannedBlocks, ...] = ()
    fields: Fields = dataclasses.field(default_factory=Fields)

    def of_tree(self, stored: Stored) -> "Layout":
        """Returns the layout with only what the names of this tree let it know."""
        certain = self.is_certain is None or self.is_certain(stored)
        return self if certain else dataclasses.replace(self, scan_axis=None)


FLAX_COLLECTIONS = ("params", "batch_stats", "cache", "intermediates", "perturbations")
"""The collections that Flax names itself, by Variable type (flax/nnx/variablelib.py `VariableTypeCache`)."""
STATISTICS = frozenset(FLAX_COLLECTIONS) - {"params"}
"""Those of what a program computes, and averages no further than it does."""


_GENERAL_WORDS = frozenset(
    {"params", "param", "parameters", "weights", "variables", "state", "net", "network", "model"}
)
_COPIES = frozenset(
    {"ema", "grads", "grad", "gradients", "mask", "masks", "averages", "swa", "polyak"}
    | {"old", "prev", "previous", "backup", "bak", "stale"}
)
FOLLOWERS = frozenset({"teacher", "target", "slow"})
"""Words of a network that is trained by nothing: it is set to another one's weights, or follows them."""

_AVERAGES = frozenset({"ema", "swa", "polyak", "avg", "average", "averages", "averaged"})
_FOLLOWING = (
    _AVERAGES
    | FOLLOWERS
    | {
        *(
            "old",
            "prev",
            "previous",
            "backup",
            "momentum",
            "shadow",
            "ref",
            "reference",
            "lagged",
            "bar",
            "frozen",
        )
    }
)
"""Words of a network that a target may want in the place of the one that it follows."""
_OF_KEYS, _NETWORKS = frozenset({"k", "key"}), frozenset({"encoder", "enc", "network", "net", "backbone"})


def words_of(name: str) -> set[str]:
    """Returns the words of a name that tell it from other networks and collections: `ema` of `ema_params`."""
    return {"ema" if word in _AVERAGES else word for word in _split(name)} - _GENERAL_WORDS


def _split(name: str) -> set[str]:
    return set(map(str.lower, re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^A-Za-z_]+", name)))


def is_copy_name(name: str) -> bool:
    """Tells whether a level names a copy of a collection: `ema_params`, `old_batch_stats`, `grads`."""
    words = words_of(name)
    copied = "_batch_stats" in name or not {"params", "weights", "variables"}.isdisjoint(name.split("_"))
    return (copied and bool(words)) or (bool(words) and words <= _COPIES)


@functools.lru_cache(maxsize=65536)
def is_copy_level(level: str) -> bool:
    """Tells whether a level above a whole model says that it is a copy: `ema`, `unet_ema`, `EMAModel`.

    One word of averages is enough there, since no module of the model's own is called so.
    """
    return is_copy_name(level) or not _AVERAGES.isdisjoint(_split(level))


def says_copy(level: str) -> bool:
    """Tells whether a word of a level says that it is a copy, as `ema` does and `student_params` does not."""
    return not (_COPIES | _AVERAGES).isdisjoint(_split(level))


@functools.lru_cache(maxsize=65536)
def follows(level: str) -> bool:
    """Tells whether a network's name says that it follows another one, or keeps it: `old_policy`.

    So does one of keys in momentum contrast, `key_encoder` or `encoder_k`, and ALBEF's `text_encoder_m`.
    But a `reference_encoder` reads what something is to be like.
    """
    said = _split(level)
    if "encoder" in said and not said.isdisjoint(("ref", "reference")):
        return False
    if "m" in said and not said.isdisjoint(_NETWORKS | {"proj"}):
        return True
    is_of_keys = len(said) > 1 and len(said - _OF_KEYS) == 1 and said - _OF_KEYS <= _NETWORKS
    return is_of_keys or not _FOLLOWING.isdisjoint(said)


def is_copy_beside(name: str, kind: str) -> bool:
    """Tells whether a program's own collection is called a copy, and the type that it is wanted for is not.

    `lora_old` and `ema_codebook` are no collections of the types `LoRAParam` and `Codebook`.
    """
    words = (word for word in name.lower().split("_") if word in _COPIES or word == "target")
    return any(word not in kind.lower() for word in words)


def repeats_beside(model: Mapping[Tokens, object], named: Iterable[str]) -> set[Tokens]:
    """Returns modules that by name copy or follow one beside them, and hold nothing that it lacks.

    So are `target_params` beside `params`, and `target_network` beside `online_network`.

    Args:
        model: The paths of a model's leaves, each with what tells whether two are alike.
        named: The names of a target; what it calls so is no copy that it can do without.
    """
    said = set[str]().union(*map(_split, {*named}))
    if said & _FOLLOWING:
        return set()  # Whichever the target calls so may be any of them.
    followed = {name: _followed(name) for name in {name for path in model for name in path[:-1]}}
    copies = {name for name, words in followed.items() if words and said.isdisjoint(_split(name) - words)}
    held: dict[Tokens, dict[str, set[object]]] = defaultdict(lambda: defaultdict(set))
    for path, kind in model.items() if copies else ():
        for at, name in enumerate(path[:-1]):
            held[path[:at]][name].add((path[at + 1 :], kind))
    return {
        (*above, name)
        for above, modules in held.items()
        for name in copies & modules.keys()
        for other in modules.keys() - copies
        if (followed[name] <= _split(other) or "online" in _split(other)) and modules[name] <= modules[other]
    }


def copies_beside(paths: Iterable[Tokens], named: Iterable[str]) -> set[str]:
    """Returns the names of modules that by a word are copies, where one lies beside what it is a copy of.

    Args:
        paths: The paths of a model's leaves.
        named: The names of a target; what it calls so is none.
    """
    said = set[str]().union(*map(_split, {*named}))
    modules = {path[:at] for path in paths for at in range(1, len(path))}
    followed = {
        names: words for names in modules if (words := _followed(names[-1])) and not said & _FOLLOWING
    }
    beside = defaultdict[Tokens, set[frozenset[str]]](set)
    for names in modules if followed else ():
        beside[names[:-1]].add(frozenset(_split(names[-1])))
    marks = {
        word
        for names, words in followed.items()
        if frozenset(words) in beside[names[:-1]] or any("online" in each for each in beside[names[:-1]])
        for word in {*_split(names[-1])} - words
    }
    return {names[-1] for names, words in followed.items() if {*_split(names[-1])} - words <= marks}


def _followed(name: str) -> set[str]:
    """Returns what a module that by name is a copy is one of: `critic` of `target_critic`; else nothing."""
    words = _split(name)
    return words - copied if (copied := words & (_COPIES | _AVERAGES | FOLLOWERS - {"teacher"})) else set()


def holds_no_weights(level: str, collection: str | None) -> bool:
    """Tells whether a level above weights says that they are none, or others: `ema_params`, `batch_stats`.

    Optax's `trace` and its like say so above a tree that names no collection: a module may be called `mu`.
    """
    is_moment = collection is None and level in MOMENTS
    return is_copy_name(level) or level in FLAX_COLLECTIONS[1:] or level == "opt_state" or is_moment


def is_of_parameters(collection: str | None) -> bool:
    """Tells whether a collection holds parameters, or a copy of them, which is stacked as they are.

    Of `lora_params` no word says that it is a copy.
    """
    if collection is None or collection == "params":
        return True
    is_copy = words_of(collection) <= _COPIES | {"target"}
    return is_copy and is_copy_name(collection) and "stats" not in collection


def above_groups(owner: Tokens, collection: str | None) -> tuple[Tokens, ...]:
    """Returns what a `ScanAxis` for a collection of a train state may have in front of a group's path."""
    named = () if collection is None else ((collection,), (*owner, collection))
    return ((), owner, *named) if is_of_parameters(collection) else named


def tops(stored: Stored) -> set[str]:
    """Returns the first keys of a tree, as strings."""
    return {str(path[0]) for path in stored if path}


def has_subtree(stored: Stored, key: str) -> bool:
    """Tells whether a first key holds a subtree rather than one leaf."""
    return any(len(path) > 1 and path[0] == key for path in stored)


def field_of(item: Placement) -> Path:
    """Returns the keys of the field of a train state that a leaf lies in."""
    whole, depth = item.leaf.path, len(item.leaf.path) - len(item.path)
    return whole if item.section == "step" else whole[:depth]


def lies_in(item: Placement, fields: Collection[Path]) -> Path | None:
    """Returns the innermost of some fields that a leaf lies in, or is."""
    path = item.leaf.path
    return next((path[:at] for at in range(len(path), 0, -1) if path[:at] in fields), None)


def in_its_field(item: Placement, fields: Mapping[Path, tuple[Section, str | None, Path]]) -> Placement:
    """Returns a leaf as a part of the train state that its field is said to be of."""
    field = lies_in(item, fields)
    if field is None:
        return item
    path, (section, collection, owner) = item.leaf.path, fields[field]
    return dataclasses.replace(
        item, section=section, collection=collection, owner=owner, path=path[len(field) :] or path
    )
