"""What a caller may choose, once for a handler and again for one restore."""

import dataclasses
from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import Any, Literal, cast

from flax import nnx

from orbax_nnx_handler.planning.core.errors import Hint, RestoreError, UnusedRuleError, as_python
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.layouts import check_layout
from orbax_nnx_handler.planning.rules import Rule, as_rules

DEFAULT_BYTES = 1_000_000_000
"""How much a process that converts may grow where no bound is given."""

UnexpectedPolicy = Literal["error", "warn", "ignore"]
DefaultSource = Literal["target", "init", "seed", "zeros"]


Policy = Literal["error", "warn", "init"]
Policies = Policy | Mapping[Any, Policy]
"""One policy, or NNX filters to policies; the first match wins, `...` is the rest."""

POLICIES: tuple[Policy, ...] = ("error", "warn", "init")


def check_policy(policy: Any) -> None:
    """Raises where a value is no policy.

    Raises:
        ValueError: Names the value and the three policies.
    """
    values = list(cast(Mapping[Any, Any], policy).values()) if isinstance(policy, Mapping) else [policy]
    for value in values:
        if value not in POLICIES:
            raise ValueError(f"policy is one of {', '.join(map(repr, POLICIES))}, not {value!r}")


def resolve(
    policies: Policies, variables: Mapping[Path, Any], overrides: Mapping[Path, Policy]
) -> dict[Path, Policy]:
    """Returns the policy of every leaf.

    Raises:
        UnusedRuleError: A filter other than `...` matches no leaf.
    """
    check_policy(policies)
    if not isinstance(policies, Mapping):
        chosen: dict[Path, Policy] = dict.fromkeys(variables, policies)
    else:
        chosen = _by_filter(policies, variables)
    return {**chosen, **overrides}


def _by_filter(policies: Mapping[Any, Policy], variables: Mapping[Path, Any]) -> dict[Path, Policy]:
    rules: list[tuple[Any, Callable[[Path, Any], bool], Policy]]
    rules = [(key, _predicate(key), policy) for key, policy in policies.items()]
    used: set[int] = set()
    chosen: dict[Path, Policy] = {}
    rest: Policy = "error"
    for path, variable in variables.items():
        matching = [at for at, (_, predicate, _) in enumerate(rules) if predicate(path, variable)]
        used.update(matching)
        chosen[path] = rules[matching[0]][2] if matching else rest
    unused = [
        key for at, (key, _, _) in enumerate(rules) if at not in used and not isinstance(key, EllipsisType)
    ]
    if unused:
        _raise_unused(unused, variables)
    return chosen


def _predicate(key: Any) -> Callable[[Path, Any], bool]:
    try:
        return cast(Callable[[Path, Any], bool], nnx.filterlib.to_predicate(key))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the policy's key {key!r} is no NNX filter.\n"
            'hint: a filter is a type of Variables, nnx.PathContains("head"), or ... for the rest.'
        ) from error


def _raise_unused(unused: list[Any], variables: Mapping[Path, Any]) -> None:
    quoted = "\n".join(f"  {_quoted(key)}" for key in unused)
    example = render(next(iter(variables), ()))
    one = len(unused) == 1
    text = next((key for key in unused if isinstance(key, str)), None)
    more = f"; a text is a tag, and a name in the path is nnx.PathContains({text!r})" if text else ""
    raise UnusedRuleError(
        f"{'1 filter' if one else f'{len(unused)} filters'} of the policy {'matches' if one else 'match'} "
        f"no leaf of the target:\n{quoted}",
        hints=[
            Hint(
                f"a filter sees paths such as {example!r} key by key, and Variable types{more}; "
                "correct it or take it out."
            )
        ],
    )


def _quoted(key: Any) -> str:
    return as_python(key) if isinstance(key, type) else repr(key)


DtypeChoice = Literal["target", "stored"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleReplica:
    """How one process reads replicated data and copies it to the others; `True` stands for the defaults.

    ```python
    over_slices = SingleReplica(replica_axis_index=0, broadcast_memory_limit_bytes=10**9)
    handler = NNXLinenHandler(single_replica=over_slices)
    ```

    Attributes:
        replica_axis_index: The axis of a leaf's mesh along which it is copied; each process reads
            for itself what lies in copies along other axes. None: all axes along which copies lie.
        broadcast_memory_limit_bytes: What each device may hold for the copying, beside the
            arrays themselves. Leaves are copied in groups of this size; on an accelerator, one leaf
            may exceed it. None: no bound of its own.

    Raises:
        ValueError: The bound is not a positive number of bytes.
    """

    replica_axis_index: int | None = None
    broadcast_memory_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        limit = self.broadcast_memory_limit_bytes
        if limit is not None and limit < 1:
            raise ValueError(f"broadcast_memory_limit_bytes is a positive number of bytes, not {limit}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreOptions:
    """The settings of a restore.

    Attributes:
        policy: What a missing weight becomes: `error`, `warn` (zeros), `init`, or
            a mapping of NNX filters to these, first match wins, `...` is the rest.
        layout: The layout's name, or `auto`.
        renames: Rules from stored to wanted names.
        init: Builds the target with real values, for `policy="init"`.
        unexpected: What to do about stored leaves that the target does not want.
        dtype: `target` casts to the target's dtypes, `stored` keeps the disk's.
        single_replica: Whether, and how, one of the processes that hold a part of a leaf
            alike reads it, and the others get it over the mesh.
    """

    policy: Policies = "error"
    layout: str = "auto"
    renames: tuple[Rule, ...] = ()
    init: Callable[[], Any] | None = None
    unexpected: UnexpectedPolicy = "warn"
    dtype: DtypeChoice = "target"
    single_replica: bool | SingleReplica = False

    @classmethod
    def of(cls, **chosen: Any) -> "RestoreOptions":
        """Returns the defaults with some values replaced; see `override`."""
        return cls().override(**chosen)

    def override(self, **chosen: Any) -> "RestoreOptions":
        """Returns the options with every value that is not None replaced.

        Raises:
            ValueError: A value is none of the choices.
            UnknownLayoutError: No layout has that name.
            RestoreError: `init` is no function.
            RuleError: `renames` holds something that is no rule.
        """
        new = dataclasses.replace(
            self, **{name: value for name, value in chosen.items() if value is not None}
        )
        check_policy(new.policy)
        check_layout(new.layout)
        check_init(new.init)
        check_choice("unexpected", new.unexpected, ("error", "warn", "ignore"))
        check_choice("dtype", new.dtype, ("target", "stored"), _OTHER_DTYPE)
        single: Any = new.single_replica
        if not isinstance(single, bool | SingleReplica):
            raise ValueError(f"single_replica is True, False or a SingleReplica, not {single!r}")
        return dataclasses.replace(new, renames=as_rules(new.renames))


def check_init(init: Any) -> None:
    """Raises a RestoreError where what is to build the target is no function."""
    if init is not None and (not callable(init) or isinstance(init, nnx.Module)):
        raise RestoreError(
            f"init is a {type(init).__name__}, not a function.",
            hints=["pass the function that builds the target: init=make_model, not init=make_model()."],
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...], hint: str = "") -> None:
    """Raises a ValueError where an argument is none of its choices."""
    # What cannot be compared with a text, such as an array, is none of them either.
    if not (isinstance(value, str) and value in choices):
        more = f"\nhint: {hint}" if hint else ""
        raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}, not {value!r}{more}")


_OTHER_DTYPE = (
    "weights come in the target's dtypes: build it in the dtype that is wanted, such as "
    "nnx.Linear(..., param_dtype=jnp.bfloat16)."
)
