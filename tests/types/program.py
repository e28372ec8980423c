"""A user's program, for type checkers: what comes back is of the target's own type, and options are known."""

from typing import Any, assert_type

from orbax_nnx_handler import (
    NNXLinenHandler,
    NNXLinenRestore,
    RestoreReport,
    from_linen,
    plan_restore,
    restore,
    to_linen,
)


class Model:
    """Stands for a module of the user's."""

    width: int


def restored(path: str, target: Model, directory: Any) -> Model:
    """Restores in every way there is."""
    assert_type(restore(path, target), Model)
    assert_type(restore(path, {"model": target}, policy="init", init=Model), dict[str, Model])
    assert_type(restore(path, (target, path), layout="maxtext", dtype="stored"), tuple[Model, str])
    assert_type(from_linen({"params": {}}, target, unexpected="ignore"), Model)
    assert_type(to_linen(target), dict[str, Any])

    handler = NNXLinenHandler(policy={...: "warn"}, layout="t5x", renames=[("a", "b")])
    arguments = NNXLinenRestore(target, policy="error", dtype="target")
    assert_type(arguments, NNXLinenRestore[Model])
    assert_type(handler.restore(directory, args=arguments), Model)
    assert_type(handler.report, RestoreReport | None)
    handler.restore(directory)
    if plan_restore(path, target).fits:
        return restore(path, target)
    return from_linen({}, target, renames=[("stem", "encoder")])
