"""What each part does in its block, as far as names tell: query or key, up or down, which norm."""

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Level, counted_apart, levels
from orbax_nnx_handler.planning.likeness.module_parts import ModulePart, containers, prefixes
from orbax_nnx_handler.planning.likeness.shapes import follow
from orbax_nnx_handler.planning.likeness.vocabulary import (
    BEFORE_NETWORK,
    COMPUTED,
    END,
    FUSED,
    NUMBERED,
    PLACING,
    STRONG,
    UNTOLD,
    Concepts,
    Names,
    component,
    concepts,
    in_strict_order,
    letters,
    meanings,
    networks_outputs,
    order_word,
    placed,
    telling,
)

_Counted = Sequence[tuple[Level, tuple[int, ...]]]
_QKV, _MLP = frozenset("qkv"), frozenset(("up", "down", "gate"))
_ENDS, _FEW = frozenset(("pre", "post", "first", "last")), 5  # More numbers than any in `NUMBERED`.
_MIXED = {"token": -1, "patch": -1, "spatial": -1, "temporal": -1, "channel": 1, "feature": 1}
"""A Mixer's order, and that of blocks of networks: DaViT's."""
_NONLOCAL = {"theta": "q", "phi": "k", "gate": "v"}  # In non-local networks, and in SAGAN; `g` is no gate.
_EITHER = {"qkv": "proj_out", "qkv_proj": "wo"}
"""What stands beside arrays by head: guided diffusion's, InternLM2's; CodeGen has `fc_in`, UvA `linear`."""


@dataclasses.dataclass(frozen=True, eq=False)
class NamedPart:
    """A part with what its names say in their context.

    Attributes:
        part: The part.
        said: All that its path says, with the roles that follow from its surroundings.
        numbers: Its numbered levels: the level, and the numbers that its siblings have.
        position: Where it stands in the order of computation, where its names tell.
        fused: The roles that it holds in one array, in their order; empty for one role.
        fact: The code base whose convention tells the order of `fused`, or the role.
        untold: The roles that it holds in one array, either side by side or head by head, or in turns.
        is_either: Whether programs differ in which comes first where a block counts them.
        way_up: Its level's number on the way up of a U-Net, which programs count from either end.
    """

    part: ModulePart
    said: Concepts
    numbers: tuple[tuple[Level, tuple[int, ...]], ...]
    position: float | None
    fused: tuple[str, ...] = ()
    fact: str = ""
    untold: tuple[str, ...] = ()
    is_either: bool = False
    way_up: int | None = None

    @property
    def place(self) -> float | None:
        """Of a norm, where it stands in its block, where its name tells."""
        return self.position if self.part.is_norm else None


def named_parts(
    parts: Sequence[ModulePart], above: Sequence[str] = (), sizes: Collection[int] | None = None
) -> list[NamedPart]:
    """Returns the parts of one context with their roles.

    Args:
        parts: The parts.
        above: The names that lead to the context; `encoder` of `encoder/layers/3`.
        sizes: How many elements the main leaves of the only parts that matter have; None for all.
    """
    # An `EncDecBlock` looks at itself too, and what is a list is no query and no value.
    context = _Context(parts, concepts(above) - {"self", "cross", "q", "v"})
    return [context.role(part) for part in parts if sizes is None or part.main_size in sizes]


class _Context:
    def __init__(self, parts: Sequence[ModulePart], above: Concepts) -> None:
        self._above, self._mixed = above, set[Names]()
        self._inside: dict[Names, set[Names]] = defaultdict(set)
        families: dict[tuple[Names, str, str], set[int]] = defaultdict(set)
        empty = [defaultdict[Names, set[str]](set) for _ in range(4)]
        self._held, self._below, self._bases, self._single = empty
        self._unknown: dict[tuple[Names, int], set[str]] = defaultdict(set)
        self._counts = Counter((part.module, part.is_norm) for part in parts)
        self._normed = {names for part in parts if part.is_norm for names in containers(part)}
        self._shapes: dict[tuple[Names, str], dict[int, Shape]] = defaultdict(dict)
        self._matrices: dict[Names, set[Shape]] = defaultdict(set)
        for part in parts:
            for prefix, level in prefixes(part):
                if level.number is not None:
                    families[prefix, level.base, level.style].add(level.number)
            if part.levels and part.levels[-1].number is not None and "main" in part.leaves:
                self._shapes[part.family][part.levels[-1].number] = part.leaves["main"].shape
            self._matrices[part.module].update(leaf.shape for leaf in part.leaves.values())
            self._single[part.module] |= part.own if len(part.own & _QKV) == 1 and not part.is_norm else set()
            self._bases[part.module].update(level.base for level in part.levels[-1:])
            if "main" in part.leaves and not (part.is_norm or part.own & STRONG - {"v"}):  # DBRX's `v1`.
                self._unknown[part.module, math.prod(part.leaves["main"].shape)].add(part.family[1])
            for names in containers(part):
                self._held[names] |= part.own
                self._inside[names[:-1]].add(names)
                below = concepts(level.base for level in levels(part.names[len(names) :]))
                self._below[names] |= below
                if "conv" in below or not (part.is_vector or below & {"attn", "mlp", "q", "k", "v", "o"}):
                    self._mixed.add(names)
        self._families = {key: tuple(sorted(numbers)) for key, numbers in families.items()}
        sides = {at: {x[0] for x in held if () != x[:1] == x[1:]} for at, held in self._matrices.items()}
        self._triples = {at: {3 * side**2 for side in held} for at, held in sides.items()}
        # PyTorch's attention, directly in a block: its `in_proj` holds three matrices like its `out_proj`.
        fused = (x for x in parts if x.names[-1:] == ("in_proj",) and x.main_size in self._triples[x.module])
        torchs = {x.module for x in fused if "out_proj" in self._bases[x.module]}
        self._around = {at: concepts((*x, *["qkv"] * (at in torchs))) for at, x in self._bases.items()}
        # BERT has a `self` in its `crossattention`, too.
        self._empty = {"self"} if sum(names[-1] == "self" for names in self._held) > 1 else set[str]()
        called = [x for x in self._held if "attn" in meanings(levels(x)[-1].base) or x[-1] in ("sa", "ca")]
        self._attentions = {names for names in called if {"q", "k"} <= self._held[names]}
        # Of two attentions that do not say which one they are, neither is known to be the first.
        unsaid = [x for x in called if x[:-1] not in called and {"self", "cross"}.isdisjoint(concepts(x))]
        self._unsaid = {"attn"} if len(unsaid) > 1 else set[str]()
        self._lacks_output = any(self._held[names].isdisjoint({"o", "out"}) for names in self._attentions)
        self._holding = Counter(x[:depth] for x in self._attentions for depth in range(len(x) + 1))
        self._has_attention = bool(torchs) or any("attn" in x.said or x.own >= _QKV for x in parts)
        # Deformable DETR numbers the norm of its cross attention first, RT-DETR that of its self attention.
        self._is_deformable = {"sampling", "cross"} <= {word for part in parts for word in part.said}
        said = concepts(base for _, base, _ in self._families)
        is_image = any(len(shape) > 3 for held in self._matrices.values() for shape in held)
        self._way_up = {"up", "dec"} & said if is_image and said & {"down", "enc"} else set[str]()
        has_actor = not self._has_attention and any("actor" in part.said for part in parts)
        self._values = {"v": "critic"} if has_actor else {}  # The value of a state.
        # In `nn.Dense(4)(nn.relu(nn.Dense(8)(x)))` Linen numbers the last layer first.
        counted = {x: [of[n] for n in sorted(of)] for x, of in self._shapes.items() if x[1][:1].isupper()}
        backwards = {at for (at, _), x in counted.items() if not follow(*x) and follow(*x[::-1])}
        self._backwards = {base for at, base in counted if at in backwards}

    def role(self, part: ModulePart) -> NamedPart:
        said = {*part.said, *self._above}
        if not (part.is_norm and self._is_one_of_several(part)):
            said |= self._surroundings(part)  # One of several norms is not about what lies around it.
        said -= {"attn"} if self._is_beside_attention(part) else set()
        said -= self._empty and self._empty - concepts(x for x in part.names if x not in self._empty)
        said |= set() if said & {"self", "cross"} else self._other_attention(part)
        counted = [(at, level) for at, level in prefixes(part) if level.number is not None]
        numbers = tuple((level, self._families[at, level.base, level.style]) for at, level in counted)
        untold = self._untold(part)
        fused, fact = self._fused(part, is_untold=bool(untold))
        said -= {"in"} & part.own if fused else set()  # The `in_proj` of a block on the way out.
        said.update(computed := () if fused else self._computed(part))
        untold = untold or (computed if len(computed) > 1 else ())
        others = _NONLOCAL if self._around[part.module] >= _NONLOCAL.keys() else self._values
        said = {others.get(word, word) for word in said}
        is_either = part.family[1] in self._backwards
        if part.is_norm:
            said -= STRONG - part.own
            is_either |= self._may_come_first(part, len(numbers[-1][1]) if numbers else 0)
        else:
            fact = self._resolve(part, said, numbers) or fact
            known = any((part.levels[-1].base, x[:_FEW]) in NUMBERED for _, x in numbers[-1:])  # `w3`, `w2`.
            is_either |= known and said.isdisjoint(("gate", "up", *"qkvo"))
            is_either |= not fact and bool(numbers) and self._may_be_gated(part, numbers[-1][1])
        way_up = next((x.number for _, x in counted if self._way_up & {*meanings(x.base)}), None)
        place = self._position(part, said)
        return NamedPart(part, frozenset(said), numbers, place, fused, fact, untold, is_either, way_up)

    def _may_come_first(self, part: ModulePart, counted: int) -> bool:
        """Tells whether programs differ in how they count a norm: XCiT's `norm3` lies before `norm2`."""
        others = [x for at in self._inside[part.module] if "attn" not in (x := {*meanings(at[-1])})]
        is_known = counted < 3 or len(others) < 2 or all("mlp" in said for said in others)
        is_known |= not (part.levels and part.levels[-1].is_automatic)
        return self._is_deformable or not (is_known or "mean" in part.leaves)

    def _surroundings(self, part: ModulePart) -> set[str]:
        """Returns what the modules around a part hold: an attention, a gated network."""
        for names in containers(part) if "attn" not in part.said else ():
            is_whole = names not in self._mixed
            is_attention = {"q", "k"} <= self._held[names] or (is_whole and "attn" in self._below[names])
            is_network = (is_whole or is_attention) and "mlp" in self._below[names]
            if is_attention or is_network:
                kind = {"attn", *({"cross"} & self._below[names])} if is_attention else {"mlp"}
                return kind if is_attention != is_network else set()
        return {"attn"} & part.said

    def _other_attention(self, part: ModulePart) -> set[str]:
        """Returns what an attention is whose neighbours all say it: `attn` beside `cross_attn`."""
        own = [names for names in containers(part) if names in self._attentions]
        for x, pair in itertools.product(own, (("attn1", "attn2"), ("sa", "ca"))):  # Diffusers', and short.
            if x[-1] in pair and {(*x[:-1], name) for name in pair} <= self._attentions:
                return {("self", "cross")[pair.index(x[-1])]}
        beside = [x for names in own for x in self._inside[names[:-1]] & self._attentions if x != names]
        kinds = {frozenset({"self", "cross"} & {*meanings(names[-1])}) for names in beside}
        return {"self", "cross"} - next(iter(kinds)) if len(kinds) == 1 and any(kinds) else set()

    def _is_beside_attention(self, part: ModulePart) -> bool:
        """Tells whether a part lies in a block that is called an attention, and beside that attention."""
        ends = ((names, levels(names)[-1]) for names in containers(part))
        # Of a list that is called so, another one may be it.
        blocks = [names[: 1 - at.width or None] for names, at in ends if "attn" in meanings(at.base)]
        blocks += [()] if "attn" in self._above else []
        own = self._attentions.intersection(containers(part)) if blocks else ()
        beside = (self._holding[names] > sum(at[: len(names)] == names for at in own) for names in blocks)
        return bool(blocks) and not part.said & {*_QKV, "o", "out"} and all(beside)

    def _fused(self, part: ModulePart, *, is_untold: bool) -> tuple[tuple[str, ...], str]:
        last, known = part.levels[-1].base if part.levels else "", FUSED.get("".join(part.names[-1:]))
        # The `in_proj` of a quantizer or of a state space model is none of an attention.
        is_in_attention = "attn" in self._above or (self._has_attention and "mlp" not in part.said)
        if known is not None and (last != "in_proj" or is_in_attention):
            # GPT-2's cross attention has its queries beside `c_attn`.
            return tuple(role for role in known[0] if role not in self._single[part.module]), known[1]
        # A norm of keys and values is one of what both are made of.
        if is_untold or (part.is_norm and part.own >= {"k", "v"}):
            return (), ""
        named = [tuple(x for x in meanings(last) if x in group) for group in (_QKV, ("gate", "up"))]
        return next((x for x in named if len(x) > 1 and x != ("up", "gate")), ()), ""  # Not ERNIE's.

    def _untold(self, part: ModulePart) -> tuple[str, ...]:
        last, bias = part.levels[-1].base if part.levels else "", part.leaves.get("bias")
        gated = tuple(word for word in meanings(last) if word in ("gate", "up"))
        if len(gated) > 1 and bias is not None and len(bias.shape) > 1:
            return gated  # Experts with biases: in GPT-OSS both take turns, else they do not.
        every = {*itertools.chain(*self._bases.values())} if last == "qkv_proj" else set[str]()
        is_either = _EITHER.get(last) in self._bases[part.module] or bool(every & {"fc_in", "linear"})
        is_either |= last not in FUSED and UNTOLD.search(last.lower()) is not None
        return tuple(word for word in meanings(last) if word in _QKV) if is_either else ()

    def _computed(self, part: ModulePart) -> tuple[str, ...]:
        """Returns an attention's roles that sizes alone tell: of `Dense_0`, `linear_0`, `att_proj`."""
        last, shapes = part.levels[-1] if part.levels else Level(""), self._shapes[part.family]
        if [*part.own] == ["attn"] and self._around[part.module].isdisjoint(_QKV):
            return COMPUTED[3.0, 1.0][0] if part.main_size in self._triples[part.module] else ()
        if last.number not in shapes or meanings(last.base) or "attn" not in part.said:
            return ()
        sizes = [math.prod(shapes[number]) for number in sorted(shapes) if len(shapes[number]) == 2]
        roles = COMPUTED.get(tuple(size / max(sizes[-1], 1) for size in sizes), ())
        return roles[last.number] if len(roles) == len(shapes) == max(shapes) + 1 else ()

    def _resolve(self, part: ModulePart, said: set[str], numbers: _Counted) -> str:
        """Adds the role that a name has only in its surroundings; returns the convention used."""
        last = part.levels[-1] if part.levels else Level("")
        # `output/dense` is called by its module, the two layers of an `out_block` are not.
        around = part.levels[-2:-1] if self._counts[part.module, False] == 1 else ()
        named = meanings(last.base) or tuple(word for level in around for word in meanings(level.base))
        own = set(named) - {"attn", "mlp", "self", "cross"}
        window = part.leaves["main"].shape[:-2] if "main" in part.leaves else ()
        is_image = len(window) == 2 and window[0] == window[1] > 1  # A kernel of 3x3 leads out of no network.
        if own & (STRONG - {"up"}) or said & {"conv", "embed"} or is_image:
            return ""
        family = numbers[-1][1] if last.number is not None else ()
        is_named = "attn" not in part.said or last.is_automatic or bool(meanings(last.base))
        known = NUMBERED.get((last.base if is_named else "qkv", family[:_FEW]))
        if known is not None and last.number is not None and self._leads_back(part, known[0], family):
            said -= {"up"}
            said.add(known[0][family.index(last.number)])
            return known[1]
        if "attn" not in part.said and self._around[part.module] >= {*_QKV, "out"}:
            said -= {"in", "out"}
            if own & {"out"}:
                near, outputs = self._around[part.module], networks_outputs(self._bases[part.module])
                said.add("down" if "mlp" in named or "o" in near or last.base in outputs else "o")
            else:
                self._resolve_mlp(said, own, family, last, is_counted=True)
            return ""
        if "attn" in said and "mlp" not in said:
            if own & {"out"} or (not own - {"enc", "text", "added"} and "proj" in last.base):
                said -= {"out"}
                said.add("o")
            elif not own and any(self._held[names] >= _QKV for names in containers(part)[:1]):
                said.add("o")
            return ""
        is_either = bool(own & {"out"}) and self._lacks_output  # Beside `attention/query`, of either.
        if "mlp" in said or (self._has_attention and not (part.is_vector or is_either)):
            # `net/0/proj`: the number above tells the place, not the name.
            is_counted = any(level.number is not None for level in part.levels[-2:-1])
            # What is as large beside them may be either, if its name does not tell.
            is_known = self._unknown[part.module, part.main_size] <= {last.base}
            are_told = is_known and self._are_in_turn(part, family)
            self._resolve_mlp(said, own, family if are_told else (), last, is_counted)
        return ""

    def _are_in_turn(self, part: ModulePart, family: Sequence[int]) -> bool:
        """Tells whether two layers may be computed in the order of their numbers, by their shapes."""
        if len(family) != 2:
            return True
        shapes = [self._shapes[part.family].get(number, ()) for number in family]
        is_turned = "main" not in part.leaves or part.leaves["main"].names[-1] != "kernel"
        are_next = follow(*shapes) or (is_turned and follow(*(shape[::-1] for shape in shapes)))
        # Of two that Linen numbered, one that leads to more and one back, shapes tell which is which.
        is_back = part.family[1][:1].isupper() and shapes[0] == shapes[1][::-1] != shapes[1]
        return are_next and not (is_back and "bias" in part.leaves) and part.family[1] not in self._backwards

    def _may_be_gated(self, part: ModulePart, family: Sequence[int]) -> bool:
        """Tells whether two layers may be a gate and what it gates: `w2` is Qwen's gate, `fc_1` Lit-GPT's."""
        two = [self._shapes[part.family].get(number, ()) for number in family[:2]]
        return len(family) == 2 and two[0] == two[1] != two[0][::-1] in self._matrices[part.module]

    def _leads_back(self, part: ModulePart, roles: Sequence[str], family: Sequence[int]) -> bool:
        """Tells whether the layer of a number leads back by its shape: in DINOv2 it is `w3`, not `w2`."""
        shapes = {role: self._shapes[part.family].get(at) for role, at in zip(roles, family, strict=True)}
        whole = 3 not in family or "down" in roles or self._counts[part.module, False] == len(family)
        return whole and shapes.pop("down", None) not in (others := {*shapes.values()}) and len(others) == 1

    def _resolve_mlp(
        self, said: set[str], own: set[str], family: Sequence[int], last: Level, is_counted: bool
    ) -> None:
        if own & _MLP:
            return
        for word, role in (("in", "up"), ("out", "down")):
            if word in own:
                said -= {word}
                said.add(role)
                return
        is_plain = not set(meanings(last.base)) - {"mlp"} and "conv" not in said
        if is_plain and last.number is not None and len(family) == 2 and family[0] < 2:
            said.add("up" if last.number == family[0] else "down")
        elif "mlp" in said and not own and "proj" in last.base and not is_counted:
            said.add("down")

    def _position(self, part: ModulePart, said: set[str]) -> float | None:
        own = set(part.own)
        if "mlp" not in said and not self._around[part.module] & {"gate", "depthwise", "pointwise"}:
            own -= {"up", "down", "expand"}  # An adapter or an hourglass leads down first.
        side = order_word(own)
        if not part.is_norm and "layerscale" not in own:
            # The arms of a U-Net go down before they go up; a network in a block goes up first.
            arms = ({"up", "down"} & concepts(level.base for level in part.levels[:-1])) - own
            side = order_word(said - self._above - arms - (part.own - own))
            return END * side if side else None
        names = [set(meanings(level.base)) for level in part.levels[:-1]]
        inner = next((words for words in reversed(names) if words & {"attn", "mlp"}), set[str]())
        around = set[str]().union(*names) - ({"attn"} if "mlp" in inner else set())
        around |= said & {"cross"} if "attn" in around else set()
        beside = self._bases[part.module]
        # Of `norm_slots` in an attention nothing is told, nor by what a module with both is called.
        near = concepts(x[-1] for x in self._inside[part.module]) if part.module else frozenset[str]()
        is_plain = not own - PLACING - {"norm"} and not near >= {"attn", "mlp"}
        # The norm of a module's outputs is told where its inputs have one, too.
        is_plain &= side <= 0 or any("norm" in x and order_word(x) < 0 for x in map(meanings, beside))
        place = component(own) or (component(around) if is_plain else None)
        if place is None and not side:
            place = component(self._beside(part, own - {"norm"}))  # `spatial_norm`, `spatial_attention`.
        if place is None and not side and not own - {"norm"} and not self._is_one_of_several(part):
            place = component(self._surroundings(part) - self._unsaid) or component(self._without_norm(part))
        if place is not None:
            return self._behind(part, place) if side > 0 and "attn" in own else place + side
        if not side and "out" in around:
            # The output of a module beside the block's own, whatever it mixes tokens by, comes before that.
            has_own = any("out" in meanings(*n) for n in self._normed if len(n) == 1)
            return component(("attn",)) if has_own and len(part.levels) > 2 else END
        side = side or -("embed" in own)  # Bart's `layernorm_embedding` is none at the end.
        return END * side if side and not self._is_of_layer(part) else None

    def _is_of_layer(self, part: ModulePart) -> bool:
        """Tells whether a norm is a layer's, wherever that lies: of `out_conv`, beside an attention."""
        said = [concepts([name]) for name in self._bases[part.module]]
        norms, layers = (concepts(()).union(*(x for x in said if ("norm" in x) is y)) for y in (True, False))
        near = concepts(names[-1] for names in self._normed if names[: len(part.module)] == part.module)
        return norms & layers >= {"in", "out"} and "attn" in norms | near

    def _behind(self, part: ModulePart, place: float) -> float:
        """Returns where a norm behind an attention stands: it may be the one before the network, too."""
        norms = [x for name in self._bases[part.module] if "norm" in (x := concepts([name])) != part.own]
        behind = [words for words in norms if words >= {"post", "attn"}]
        is_third = set[str]().union(*norms) & {"cross", "mlp"} == {"cross"}
        if (is_third or any("self" in words for words in behind)) and not part.own & {"self", "cross"}:
            return BEFORE_NETWORK  # GLM-4's `post_attention_layernorm` beside `post_self_attn_layernorm`.
        return place + (1 if behind or any("mlp" in x and "post" not in x for x in norms) else 2)

    def _beside(self, part: ModulePart, own: set[str]) -> set[str]:
        """Returns what the modules beside a part are that share a word with it which no other layer has."""
        said = [{*meanings(names[-1])} for names in self._inside.get(part.module, ())] if own else []
        layers = [x for name in self._bases[part.module] if said and "norm" not in (x := {*meanings(name)})]
        own = {x for x in own if len({component(words) for words in (*said, *layers) if x in words}) == 1}
        return {word for words in said if words & own for word in words}

    def _without_norm(self, part: ModulePart) -> set[str]:
        """Returns what the only module beside a part is that holds no norm itself: this is its norm."""
        beside = [(set(meanings(names[-1])), names in self._normed) for names in self._inside[part.module]]
        lacking = [said for said, is_normed in beside if not is_normed]
        is_one = len(beside) > 1 == len(lacking) == self._counts[part.module, True]
        return lacking[0] if is_one and all(component(said) is not None for said, _ in beside) else set()

    def _is_one_of_several(self, part: ModulePart) -> bool:
        return any(len(self._families.get((at, x.base, x.style), ())) > 1 for at, x in prefixes(part)[-1:])


def in_order(
    roles: Sequence[NamedPart], others: Sequence[NamedPart], *, to_last: bool = False
) -> list[int] | None:
    """Returns parts, beside others, in the order of computation that names tell; `to_last`: the last one."""
    are_norms = all(role.part.is_norm for role in roles)
    attend = not are_norms and all("attn" in x.said and x.said & {"self", "cross"} for x in roles)
    places = [float("cross" in x.said) if attend else x.position for x in roles]
    # A decoder looks at itself before it looks across; latents do either first, as Linen has counted.
    near = [x.said for x in roles if "cross" not in x.said]
    is_open = any(x & {"self", "attn"} and not x & {"in", "post"} for x in near) and len(near) < len(roles)
    is_counted = any(level.is_automatic for role in others for level in role.part.levels[-2:])
    is_open &= is_counted and not any("dec" in role.said for role in (*roles, *others))
    by_words = None if is_open else in_strict_order(placed(places) if are_norms else _around(places, roles))
    ups, told = {x.way_up for x in roles if is_counted} - {None}, telling([x.part.said for x in roles])
    is_either = not to_last and (len(ups) > 1 or any(x.is_either for x in roles))
    mixed = _MIXED if are_norms or all("mlp" in role.said for role in roles) else dict[str, int]()
    mixed = {"macaron": -1, "": 1} if "macaron" in map("".join, told) else mixed  # A Conformer's first one.
    by_ends = [order_word(x & _ENDS) or mixed.get("".join(x)) for x in told]  # `ffn_start`, `ffn_end`.
    by_words = by_words or in_strict_order(by_ends) or in_strict_order(letters(told))
    counted = in_strict_order([None] if is_either else _number_keys(roles))
    return by_words or counted if None in (by_words, counted) or by_words == counted else None


def _around(places: Sequence[float | None], roles: Sequence[NamedPart]) -> Sequence[float | None]:
    """Returns places, those of a list by number behind what leads in, and before what leads out."""
    within = [role for role, place in zip(roles, places, strict=True) if place is None]
    outer = [role for role, place in zip(roles, places, strict=True) if place is not None]
    if not outer or not {None, END, -END}.issuperset(places) or not are_counted(within) or are_counted(outer):
        return places  # Of two lists, `prior` and `post` of one model, neither leads into the other.
    within_ends = [(at := role.part.levels[-1].number or 0) / (at + 1) for role in roles]
    return [at if place is None else place for place, at in zip(places, within_ends, strict=True)]


def _number_keys(roles: Sequence[NamedPart]) -> list[tuple[int, ...] | None]:
    """Returns the numbers of parts whose paths differ in numbers, or in what numbered modules hold."""
    paths = [role.part.levels for role in roles]
    shapes = {tuple(level.base for level in path) for path in paths}
    # Of a list without its first ones, `w2` and `w3`, those may be called otherwise.
    are_first = all(held[0] < 2 for role in roles for _, held in role.numbers[-1:])
    are_apart = itertools.starmap(counted_apart, itertools.combinations(paths, 2))
    if not are_first or (len(shapes) > 1 and not all(are_apart)):
        return [None] * len(roles)
    return [tuple(x.number for x in role.part.levels if x.number is not None) or None for role in roles]


def are_counted(roles: Sequence[NamedPart]) -> bool:
    """Tells whether a program counts these parts: a list, or one name with a number of its own."""
    names = {tuple(level.base for level in role.part.levels) for role in roles}
    last = [level for role in roles for level in role.part.levels[-1:] if level.style]
    return len(names) == 1 and len([x for x in last if x.number is not None]) == len(roles)
