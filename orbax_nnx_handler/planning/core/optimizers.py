"""Names that optax gives to the parts of its states, and where an optimizer lies in a tree without types."""

from collections.abc import Collection, Iterable

from orbax_nnx_handler.planning.core.paths import Path

OPT_STATE = "opt_state"
"""The field of a train state, and the attribute of an `nnx.Optimizer`, that holds the state."""

CONTAINERS = frozenset(
    {
        *("inner_state", "inner_opt_state", OPT_STATE, "base_optimizer_state"),
        *("fast_state", "adv_state", "hessian_fn_state"),
    }
)
"""Fields of optax's wrappers that hold other states (`optax.transforms`, `optax.contrib`)."""

LABELLED = "inner_states"
"""The field of `optax.partition` that holds a state for each label."""

MOMENTS = frozenset(
    {
        *("mu", "nu", "nu_max", "trace", "ema", "v", "v_row", "v_col", "momentum"),
        *("acc_grads", "grad_acc", "sum_of_squares"),
    }
)
"""Fields that hold moments in optax's own states, right below the state."""

SCALARS = frozenset({"count", "mini_step", "gradient_step", "notfinite_count", "hyperparams"})
"""Fields that hold a number, or several by name."""


def is_state(path: Path) -> bool:
    """Tells whether the first key below a chain and its wrappers is a field of an optimizer."""
    names = (str(key) for key in path if not _is_container(str(key)))
    return next(names, "") in MOMENTS | SCALARS


def begins_a_state(path: Path) -> bool:
    """Tells whether a path below `opt_state` may lead to a field of an optimizer."""
    return _is_container(str(path[0])) or is_state(path)


def _is_container(key: str) -> bool:
    return key.isdecimal() or key in CONTAINERS or key == LABELLED


def optimizer_owners(paths: Iterable[Path]) -> set[Path]:
    """Returns the keys above each `opt_state` of an optimizer, where nothing but the place tells one.

    A module of a model may be called `opt_state` too. An optimizer has its step beside it, as
    `nnx.Optimizer` (flax/nnx/training/optimizer.py) and `TrainState` have, or what lies below
    it is arranged as optax arranges it.
    """
    below: dict[Path, list[Path]] = {}
    steps: set[Path] = set()
    for path in paths:
        plain = path[:-1] if len(path) > 1 and path[-1] == "value" else path
        if plain and str(plain[-1]) == "step":
            steps.add(plain[:-1])
        for at, key in enumerate(path[:-1]):
            if str(key) == OPT_STATE:
                below.setdefault(path[:at], []).append(path[at + 1 :])
    found: set[Path] = set()
    for owner in sorted(below, key=len):
        # A module within an optimizer's own moments makes no further one.
        within = owner_of((*owner, OPT_STATE), found) is not None
        if not within and (owner in steps or all(map(begins_a_state, below[owner]))):
            found.add(owner)
    return found


def owner_of(path: Path, owners: Collection[Path]) -> Path | None:
    """Returns the keys above the `opt_state` that a path lies below; None where it is none of an optimizer's.

    Args:
        path: The path.
        owners: What `optimizer_owners` returned.
    """
    for at, key in enumerate(path[:-1]):
        if str(key) == OPT_STATE and path[:at] in owners:
            return path[:at]
    return None
