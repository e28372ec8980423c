"""What a caller may choose, once for a handler and again for one restore."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

from orbax_nnx_handler.planning.plan import UnexpectedPolicy
from orbax_nnx_handler.planning.policies import Policies, check_policy
from orbax_nnx_handler.planning.rules import Rule, as_rules

DtypeChoice = Literal["target", "stored"]


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
        single_replica: Whether one of the processes that hold a part of a leaf alike
            reads it, and the others get it over the mesh.
    """

    policy: Policies = "error"
    layout: str = "auto"
    renames: tuple[Rule, ...] = ()
    init: Callable[[], Any] | None = None
    unexpected: UnexpectedPolicy = "warn"
    dtype: DtypeChoice = "target"
    single_replica: bool = False

    @classmethod
    def of(
        cls,
        *,
        policy: Policies = "error",
        layout: str = "auto",
        renames: Iterable[Rule | tuple[str, str]] = (),
        init: Callable[[], Any] | None = None,
        unexpected: UnexpectedPolicy = "warn",
        dtype: DtypeChoice = "target",
        single_replica: bool = False,
    ) -> "RestoreOptions":
        """Returns checked options.

        Raises:
            ValueError: A value is none of the choices.
        """
        check_policy(policy)
        _check_choice("unexpected", unexpected, ("error", "warn", "ignore"))
        _check_choice("dtype", dtype, ("target", "stored"))
        return cls(
            policy=policy,
            layout=layout,
            renames=as_rules(renames),
            init=init,
            unexpected=unexpected,
            dtype=dtype,
            single_replica=single_replica,
        )

    def override(self, **chosen: Any) -> "RestoreOptions":
        """Returns the options with every value that is not None replaced.

        Raises:
            ValueError: A value is none of the choices.
        """
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return RestoreOptions.of(
            **settings | {name: value for name, value in chosen.items() if value is not None}
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}, not {value!r}")
