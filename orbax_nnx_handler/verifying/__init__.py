"""Both programs run on one input and compared: their outputs, and module by module.

Here the caller's two programs and what an error of their code says, how far arrays lie apart, and what of it
is rounding.
"""

import dataclasses
import inspect
import itertools
import traceback
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from orbax_nnx_handler.planning.core.errors import VerificationError
from orbax_nnx_handler.planning.core.lines import counted
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.verdict.outcomes import Restored

Array = np.ndarray[Any, Any]

ROUNDING = 3e-6
"""What two ways of computing one module in float32 differ by, and no more, from equal inputs."""
TOLERANCE = 1e-5
"""How far apart two whole programs in float32 may be that compute the same."""
MOST_ROUNDINGS = 5
"""How much more a whole program may differ by rounding than one module in it."""
_GROWTH = 16
"""How much a module may enlarge a difference that its inputs have already."""
_MOST_AXES = 5
MASK = 1e6
"""Values beyond it are a mask's, and say nothing about how large the others are."""
_LARGE = 1e3
"""From here on, a number that comes several times is a mask's too."""
_COARSE = {"bfloat16": 2e-2, "float16": 3e-3}
"""What a module in fewer digits than float32's differs by, and no more, from one in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance:
    """How far arrays lie apart.

    Attributes:
        relative: The largest difference of two elements, divided by the larger of the element and the mean
            magnitude of its array.
        absolute: The largest difference itself.
        compared: How many arrays met one of the same size.
        left: How many met none.
        coarse: What a difference may be because the arrays were computed in fewer digits; 0 for float32.
    """

    relative: float = 0.0
    absolute: float = 0.0
    compared: int = 0
    left: int = 0
    coarse: float = 0.0

    def excess(self, allowed: float) -> tuple[float, float]:
        """Returns how much of what arrays may be apart they are, and how far they are apart."""
        return self.relative / max(allowed, float(np.finfo(np.float32).tiny)), self.relative


def distance(reference: Array, other: Array) -> tuple[float, float]:
    """Returns the relative and the absolute difference of two arrays of one size, element by element."""
    if not reference.size or reference.__array_interface__ == other.__array_interface__:
        return 0.0, 0.0  # What lies in one place is not compared.
    a, b = _numbers(reference).reshape(-1), _numbers(other).reshape(-1)
    with np.errstate(all="ignore"):
        apart = np.abs(a - b)
        apart[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
        if not np.isfinite(apart).all():
            return float("inf"), float("inf")
        if {reference.dtype.kind, other.dtype.kind} <= set("biu"):
            largest = float(apart.max())  # Of the words 200000 and 200001 none is nearly right.
            return largest, largest
        size = np.abs(a)
        usual = _usual(size)
        mean = float(usual.mean(dtype=np.float64)) if usual.size else 1.0
        relative = apart / np.maximum(size, max(mean, float(np.finfo(np.float32).tiny)))
        relative[apart == 0] = 0  # Where both are no number too.
    return float(relative.max()), float(apart.max())


def _usual(size: Array) -> Array:
    """Returns magnitudes without a mask's: beyond all numbers, or large and several times the same."""
    usual = size[size < MASK]
    while usual.size and (largest := usual.max()) >= _LARGE and 1 < (usual == largest).sum() < usual.size:
        usual = usual[usual < largest]
    return usual


def _numbers(array: Array) -> Array:
    if array.dtype == np.float64 or array.dtype.kind in "iu":
        return array.astype(np.float64)
    return array.astype(np.complex64 if array.dtype.kind == "c" else np.float32)


def compare(reference: Sequence[Array], others: Sequence[Array]) -> Distance:
    """Compares arrays, each with one of its size, whatever its shape: the nearest with each other."""
    pairs = [
        (*_nearest(array, other), one, at)
        for one, array in enumerate(reference)
        for at, other in enumerate(others)
        if comparable(array, other)
    ]
    relative = absolute = coarse = 0.0
    met, taken = set[int](), set[int]()
    for apart, largest, one, at in sorted(pairs, key=lambda pair: max(ROUNDING, pair[0])):
        if one in met or at in taken:
            continue
        relative, absolute = max(relative, apart), max(absolute, largest)
        coarse = max(coarse, rounding_of(fewer([reference[one], others[at]])))
        met.add(one)
        taken.add(at)
    left = sum(array.dtype.kind != "b" for one, array in enumerate(reference) if one not in met)
    return Distance(relative=relative, absolute=absolute, compared=len(met), left=left, coarse=coarse)


def together(found: Sequence[Distance]) -> Distance:
    """Returns how far several pairs of arrays lie apart, the furthest of them."""
    return Distance(
        relative=max((one.relative for one in found), default=0.0),
        absolute=max((one.absolute for one in found), default=0.0),
        compared=sum(one.compared for one in found),
        left=sum(one.left for one in found),
        coarse=max((one.coarse for one in found), default=0.0),
    )


def compare_inputs(reference: Sequence[Array], others: Sequence[Array]) -> Distance:
    """Compares what two modules are called with: floats alone where both have some.

    Masks and positions are a matter of taste: one side has them where the other works them out.
    """
    floats = [[array for array in arrays if array.dtype.kind not in "biu"] for arrays in (reference, others)]
    return compare(*floats) if all(floats) else compare(reference, others)


def _nearest(reference: Array, other: Array) -> tuple[float, float]:
    """Returns how far two arrays lie apart, with their axes in whichever order is nearest: NCHW is NHWC.

    Axes of one element are none: a bias of positions is (1, heads, queries, keys) or (queries, keys, heads).
    """
    apart = distance(reference, other)
    one, two = (tuple(length for length in array.shape if length != 1) for array in (reference, other))
    if apart[0] <= ROUNDING or one == two or not 2 < len(one) == len(two) <= _MOST_AXES:
        return apart
    orders = itertools.permutations(range(len(two)))
    turned = [order for order in orders if tuple(two[axis] for axis in order) == one]
    return min([apart, *(distance(reference, other.reshape(two).transpose(order)) for order in turned)])


def comparable(one: Array, other: Array) -> bool:
    """Tells whether two arrays are of one size and both floats, or neither."""
    return one.size == other.size and (one.dtype.kind in "biu") == (other.dtype.kind in "biu")


def is_float(array: Array) -> bool:
    """Tells whether an array holds floats, of however many digits."""
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def fewer(arrays: Iterable[Array]) -> str:
    """Returns the dtype of the fewest digits, if those are fewer than float32's."""
    noted = ((array.dtype, cast("dict[str, str]", array.dtype.metadata or {})) for array in arrays)
    names = {metadata.get(_DIGITS, str(dtype)) for dtype, metadata in noted}
    return max(names & _COARSE.keys(), key=rounding_of, default="")


def rounding_of(dtype: str) -> float:
    """Returns what a module that computes in a dtype differs by from one in float32."""
    return _COARSE.get(dtype, 0.0)


_DIGITS = "digits"


def in_digits(array: Array, dtype: str) -> Array:
    """Returns floats that are to be compared by the digits of another dtype, which is noted in their own."""
    if not is_float(array) or fewer([array]):
        return array
    return array.view(np.dtype(array.dtype, metadata={_DIGITS: dtype}))


def exceeds(distance: Distance, limit: float) -> bool:
    """Tells whether a difference is more than a limit, where the arrays have the digits for it."""
    return distance.relative > max(limit, distance.coarse)


def changes_more_than_rounding(inputs: Distance, outputs: Distance, calls: int = 1) -> bool:
    """Tells whether outputs lie further apart than rounding explains.

    Args:
        inputs: How far the inputs lie apart.
        outputs: How far the outputs do.
        calls: Of how many modules, one after the other, the outputs come: each rounds.
    """
    rounding = max(ROUNDING, outputs.coarse) * min(MOST_ROUNDINGS, calls**0.5)
    return exceeds(outputs, max(rounding, _GROWTH * inputs.relative))


def same_numbers(reference: Sequence[Array], others: Sequence[Array]) -> bool:
    """Tells whether the arrays, each in its place, hold the same numbers, some of them in another order."""
    pairs = [*zip(reference, others, strict=False)]
    if len(reference) != len(others) or not all(itertools.starmap(comparable, pairs)):
        return False
    pairs = [(_flat(a), _flat(b)) for a, b in pairs]
    moved = [(a, b) for a, b in pairs if distance(a, b)[0] > 10 * ROUNDING]
    return bool(moved) and all(distance(np.sort(a), np.sort(b))[0] <= 10 * ROUNDING for a, b in moved)


def _flat(array: Array) -> Array:
    return _numbers(array).reshape(-1)


def agree(inputs: Distance) -> bool:
    """Tells whether inputs agree; not where none could be compared, as one that is padded already."""
    return _are_near(inputs, TOLERANCE) and bool(inputs.compared or not inputs.left)


def are_the_same(reference: Sequence[Array], others: Sequence[Array]) -> bool:
    """Tells whether inputs are the same, each of the reference's met by one of its size."""
    inputs = compare_inputs(reference, others)
    return bool(inputs.compared) and not inputs.left and _are_near(inputs, TOLERANCE)


def _are_near(found: Distance, limit: float) -> bool:
    """Tells whether arrays are the same but for what the modules before them have rounded."""
    return not exceeds(found, max(limit, MOST_ROUNDINGS * found.coarse))


def without_counterpart(reference: Sequence[Array], others: Sequence[Array]) -> list[str]:
    """Returns which inputs of one call the other one has nothing like, in words.

    Of floats the size tells, for what they hold is compared; masks and positions have to be the same ones, or
    each other's opposites.
    """
    left, found = [*others], list[str]()
    for array in reference:
        at = next((at for at, other in enumerate(left) if _is_like(array, other)), None)
        if at is None:
            found.append(f"{array.dtype}[{','.join(map(str, array.shape))}]")
        else:
            del left[at]
    return found


def _is_like(one: Array, other: Array) -> bool:
    if not comparable(one, other) or one.dtype.kind not in "biu":
        return comparable(one, other)
    a, b = one.reshape(-1), other.reshape(-1)
    return np.array_equal(a, b) or (a.dtype == b.dtype == np.bool_ and np.array_equal(a, ~b))


_BEGINNING = 64


def begin_alike(reference: Sequence[Array], others: Sequence[Array]) -> bool:
    """Tells from a few elements whether it is worth comparing all."""
    pairs = zip(reference, others, strict=False)
    floats = [(a, b) for a, b in pairs if a.size == b.size and a.dtype.kind not in "biu"]
    starts = [(a.reshape(-1)[:_BEGINNING], b.reshape(-1)[:_BEGINNING]) for a, b in floats]
    return all(_are_near(compare([a], [b]), 100 * TOLERANCE) for a, b in starts)


def lent(own: Sequence[Array], reference: Sequence[Array], *, whatever: bool = False) -> list[Array]:
    """Returns a call's inputs with Linen's numbers, where they are the same ones but for their digits.

    Args:
        own: The inputs.
        reference: Linen's.
        whatever: Whether Linen's of the same size are taken also where they differ, in their order.
    """
    if whatever:
        left = [*filter(is_float, reference)]
        return [_next_of_size(array, left) if is_float(array) else array for array in own]
    lent: list[Array] = []
    for array in own:
        floats = filter(is_float, reference if is_float(array) else ())
        near = [other for other in floats if other.size == array.size]
        nearest = min(near, key=lambda other: distance(other, array)[0], default=None)
        close = nearest is not None and _are_near(compare([nearest], [array]), ROUNDING * 1000)
        lent.append(
            nearest.reshape(array.shape).astype(array.dtype) if nearest is not None and close else array
        )
    return lent


def _next_of_size(array: Array, left: list[Array]) -> Array:
    at = next((at for at, other in enumerate(left) if other.size == array.size), None)
    return array if at is None else left.pop(at).reshape(array.shape).astype(array.dtype)


_OF_ONE_LAYER = frozenset(("kernel", "bias", "scale", "mean", "var", "embedding"))


def mixed_sources(weights: Iterable[Restored]) -> str:
    """Returns which leaves of one layer come from two Linen modules, in words; nothing where none do."""
    first: dict[Path, tuple[str, frozenset[Path]]] = {}
    for item in weights:
        path, read = item.wanted.path, frozenset(source[1:-1] for source in reads(item.recipe))
        if str(path[-1]) not in _OF_ONE_LAYER or not read:
            continue
        name, beside = first.setdefault(path[:-1], (render(path), read))
        if beside.isdisjoint(read):
            here, there = (", ".join(sorted(map(render, some))) for some in (read, beside))
            return f"{render(path)} comes from {here}, and {name} from {there}: check their rules."
    return ""


def inputs_in_words(inputs: Sequence[Any]) -> str:
    """Returns how many inputs there are and what each is: `1 input (float32[2,16])`."""
    shown = [
        f"{each.dtype}[{','.join(map(str, each.shape))}]" if hasattr(each, "dtype") else type(each).__name__
        for each in inputs
    ]
    return counted(len(inputs), "input") + (f" ({', '.join(shown)})" if shown else "")


_COMPILED = (
    "both programs run operation by operation: pass the function that was compiled, not its executable."
)


def hint_for(error: Exception, otherwise: str) -> str:
    """Returns the way out of an error of the caller's code: of one that says what is wrong, its own."""
    return _COMPILED if "Disable jit is not supported" in str(error) else otherwise


def error_in_words(error: Exception) -> str:
    """Returns what an error of the caller's code is, and where in that code it was raised."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename
    ]
    own = __file__.rpartition("/")[0]
    place = next((frame for frame in reversed(frames) if not frame.filename.startswith(own)), None)
    where = f"\nat {place.filename}:{place.lineno}" if place is not None else ""
    return f"{type(error).__name__}: {error}{where}"


def opened_up(tree: Any) -> Any:
    """Returns a tree with its dataclasses as dicts.

    Raises:
        VerificationError: A leaf is no array and no number.
    """

    def opened(leaf: Any) -> Any:
        if is_dataclass(leaf):
            fields = dataclasses.fields(leaf)
            return {field.name: opened_up(getattr(leaf, field.name)) for field in fields}
        is_key = jnp.issubdtype(getattr(leaf, "dtype", "f4"), jax.dtypes.prng_key)
        if is_key or np.asarray(leaf).dtype.kind not in _NUMBERS:
            if waits := inspect.iscoroutine(leaf):
                leaf.close()  # Nobody waits for it.
            raise VerificationError(
                f"a program returns a {type(leaf).__name__}, which cannot be compared.",
                hints=[_WAIT if waits else "let both functions return arrays alone."],
            )
        return leaf

    return jax.tree.map(opened, tree, is_leaf=is_dataclass)


def are_identical(one: Any, other: Any) -> bool:
    """Tells whether two programs return the very same numbers."""
    found = [[np.asarray(leaf) for leaf in jax.tree.leaves(opened_up(tree))] for tree in (one, other)]
    return len(found[0]) == len(found[1]) and all(itertools.starmap(_equal, zip(*found, strict=True)))


def _equal(one: Array, other: Array) -> bool:
    return np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")


def is_dataclass(leaf: Any) -> bool:
    """Tells whether a leaf of what a program returns is a dataclass that JAX does not know."""
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)


_WAIT = "pass a function that waits for it: lambda *args: asyncio.run(function(*args))."
_NUMBERS = "biufcV"
"""Kinds of NumPy's dtypes; JAX's own floats are V."""


def as_jax(value: Any) -> Any:
    """Returns a NumPy array of numbers as JAX's: `nnx.scan` carries no other where nothing is compiled."""
    is_array = isinstance(value, np.ndarray) and value.dtype.kind in "biufc"
    return jnp.asarray(cast(Any, value)) if is_array else cast(Any, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The caller's two functions and what they are called with.

    Attributes:
        linen: Called with the variables and the inputs.
        nnx: Called with the restored target and the inputs.
        inputs: The inputs.
    """

    linen: Callable[..., Any]
    nnx: Callable[..., Any]
    inputs: Sequence[Any]

    def __post_init__(self) -> None:
        functions = (("linen_apply", self.linen, LINEN), ("nnx_apply", self.nnx, NNX))
        for name, function, example in functions:
            if not callable(function) or isinstance(function, nn.Module | nnx.Module):
                raise VerificationError(
                    f"{name} is a {type(function).__name__}, not a function.", hints=[f"pass {example}."]
                )
        if not isinstance(self.inputs, list | tuple):
            raise VerificationError(
                f"inputs is of type {type(self.inputs).__name__}: both programs are called with a tuple.",
                hints=["pass a tuple, of one where there is one input: (x,)."],
            )
        object.__setattr__(self, "inputs", jax.tree.map(as_jax, self.inputs))


LINEN, NNX = "linen_model.apply", "lambda model, x: model(x)"


def programs_of(given: Any) -> Programs:
    """Returns both programs out of what a caller passes as one argument.

    Raises:
        VerificationError: It is no `(linen_apply, nnx_apply, inputs)`.
    """
    parts = cast("Sequence[Any]", given if isinstance(given, tuple | list) else ())
    if len(parts) != 3:
        what = f"a {type(cast(Any, given)).__name__}" + (f" of {len(parts)}" if parts else "")
        raise VerificationError(
            f"verify is {what}: it takes (linen_apply, nnx_apply, inputs).",
            hints=[f"pass verify=({LINEN}, {NNX}, (x,))."],
        )
    return Programs(linen=parts[0], nnx=parts[1], inputs=parts[2])


def check_tolerance(tolerance: Any) -> None:
    """Raises a ValueError for what is no tolerance."""
    if tolerance is not None and not (isinstance(tolerance, Real) and float(tolerance) >= 0):
        raise ValueError(f"tolerance is a number from 0 on, such as 1e-4, not {tolerance!r}")
