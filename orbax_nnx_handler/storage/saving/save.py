"""From NNX state to the arguments with which stock Orbax saves it as a Linen program would."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from orbax_nnx_handler.planning.core.containers import Nested, nodes_of
from orbax_nnx_handler.planning.mapping.modules import layers_inside
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.storage.checkpoint.random_state import add_leftovers
from orbax_nnx_handler.storage.saving.linen_tree import Flavour, LinenTree, arrange, is_nnx
from orbax_nnx_handler.storage.saving.optax_tree import Transformation
from orbax_nnx_handler.storage.saving.values import with_gates, without_rules
from orbax_nnx_handler.storage.saving.written import Written

_UNCERTAIN = (
    "The optimizer state of a bare nnx.State does not tell how many empty states end it; they were left out. "
    "A Linen program whose optimizer has some refuses the shorter list. Save the module that holds the "
    "nnx.Optimizer, or pass tx= with the state."
)


def linen_save(
    given: ocp.args.PyTreeSave,
    flavour: Flavour = "linen",
    tx: Transformation | None = None,
    rules: Sequence[Rule] = (),
) -> ocp.args.PyTreeSave:
    """Returns the save arguments for NNX state in the layout of a Linen program.

    Nothing is copied but the step, which Linen counts as int32, and the gates of
    recurrent cells, which Linen stores one by one; arrays stay where they are, for
    Orbax to write in the background.

    Args:
        given: Stock arguments; `save_args` mirror the item. Returned as they are where
            the item is no NNX state.
        flavour: The layout.
        tx: The optimizer's transformation, for the empty states of a bare State.
        rules: The rules of the restore; they are undone.

    Raises:
        RuleError: See `without_rules`.
        ValueError: See `arrange` and `add_leftovers`.
    """
    if not is_nnx(given.item):
        return given
    arranged = arrange_certain(given.item, flavour, tx)
    tree = in_linen_form(arranged.tree, flavour, rules)
    _warn(layers_inside(path for path, _ in nodes_of(tree)))
    return dataclasses.replace(
        given,
        item=tree,
        save_args=_save_args(given, flavour, tx, rules, arranged.tree),
        custom_metadata=add_leftovers(given.custom_metadata, arranged.random),
    )


def arrange_certain(item: Any, flavour: Flavour, tx: Transformation | None = None) -> LinenTree:
    """Arranges as `arrange` does, and warns where the optimizer's empty states are not known."""
    arranged = arrange(item, flavour, tx)
    if not arranged.certain and flavour == "linen":
        _warn(_UNCERTAIN)
    return arranged


def _warn(text: str) -> None:
    if text and jax.process_index() == 0:
        logging.warning("%s", text)


def in_linen_form(
    tree: Nested, flavour: Flavour, rules: Sequence[Rule] = (), like: Nested | None = None
) -> Nested:
    """Returns an arranged tree with its values in the form that a Linen program reads.

    The gates of recurrent cells are apart, rules are undone, and steps are counted
    in int32.

    Args:
        tree: The tree of `arrange`; its values are arrays, abstract arrays, leaves of
            a conversion, or save args.
        flavour: Its layout.
        rules: The rules of the restore.
        like: Where the tree is one of save args, the tree that they are for.

    Raises:
        RuleError: See `without_rules`.
    """
    shown = None if like is None else with_gates(like)
    written = without_rules(with_gates(tree, like), rules, flavour, shown)
    if "step" in written:
        written["step"] = linen_step(written["step"])
    return written


def _save_args(
    given: ocp.args.PyTreeSave,
    flavour: Flavour,
    tx: Transformation | None,
    rules: Sequence[Rule],
    like: Nested,
) -> Any:
    if given.save_args is None:
        return None
    arranged = arrange(given.save_args, flavour, tx, like=given.item)
    return in_linen_form(arranged.tree, flavour, rules, like)


def linen_step(step: Any) -> Any:
    """Returns a step count in Linen's dtype: NNX counts in uint32, Linen in int32."""
    if getattr(step, "dtype", None) != np.uint32:
        return step
    if isinstance(step, jax.ShapeDtypeStruct):
        return step.update(dtype=np.dtype(np.int32))
    if isinstance(step, Written):
        return dataclasses.replace(step, dtype=np.dtype(np.int32))
    return step.astype(np.int32)
