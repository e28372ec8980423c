"""One checkpoint of each codebase and form, by name: what detection is measured on."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from tests.layouts import language, writers
from tests.layouts.programs import (
    nnx_state,
    perceptron,
    random_tree,
    random_variables,
    trained,
    vision_transformer,
)

CHECKPOINTS = Path(__file__).parent.parent / "cases" / "checkpoints"


TRAINING = "model, statistics and optimizer; logits now and after two more steps"
WEIGHTS_AND_MOMENTS = "model and optimizer; logits now and after two more steps"
LOGITS = "weights; logits"
VALUES = "weights; every value"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixture:
    """A checkpoint and the layout it must be read under.

    Attributes:
        name: The codebase and the form.
        layout: The name of its layout.
        shown: What the suite restores of it, and how it compares.
        write: Writes it below a directory and returns the path that a user would pass.
    """

    name: str
    layout: str
    shown: str
    write: Callable[[Path], Path]

    def __str__(self) -> str:
        return self.name


def _adam() -> Any:
    return trained(perceptron("adam"))


def _adafactor() -> Any:
    return trained(perceptron("adafactor"))


def _early_scenic(root: Path) -> Path:
    tree = writers.early_scenic_tree(_adam(), writers.flax_optim_slots(_adam()))
    return writers.write_flax(root, tree, orbax=False)


def big_vision_adam() -> optax.GradientTransformation:
    """big_vision's chain around Adam."""
    return writers.big_vision_optimizer(optax.scale_by_adam())


def _big_vision(root: Path) -> Path:
    params = random_variables(vision_transformer(big_vision_adam))["params"]
    return writers.write_big_vision(root, params, big_vision_adam().init(params))


def _big_vision_npz(root: Path) -> Path:
    params = random_variables(vision_transformer(big_vision_adam))["params"]
    tree = writers.big_vision_tree(params, big_vision_adam().init(params))
    return writers.write_big_vision_npz(root, tree, copies=[2])


def _early_big_vision(root: Path) -> Path:
    tree = writers.flax_optim_tree(_adam(), writers.flax_optim_slots(_adam()))
    return writers.write_big_vision_npz(root, {"opt": tree, "extra": {"accum_train_time": np.float64(12.5)}})


def _gemma(form: str) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        shapes = jax.eval_shape(lambda: language.LinenGemma().init(jax.random.key(0), language.TOKENS))
        params = random_tree(shapes)["params"]
        return writers.write_standard(root / "gemma", writers.gemma_tree(params, form, language.KINDS))

    return write


def _openpi(root: Path) -> Path:
    params, opt_state = nnx_state(perceptron("adam"))
    train_state = {"step": np.int32(3), "opt_state": writers.boxed_moments(opt_state), "params": {}}
    items = {"params": {"params": writers.boxed(params)}, "train_state": train_state}
    return writers.write_items(root / "run", items)


def _openpi_weights(root: Path) -> Path:
    params, _ = nnx_state(perceptron("adam"))
    return writers.write_items(root / "run", {"params": {"params": writers.boxed(params)}})


def _tunix(root: Path) -> Path:
    params, opt_state = nnx_state(perceptron("adam"))
    optimizer = {"step": {"value": np.uint32(3)}, "opt_state": {0: _boxed_all(opt_state[0])}}
    items = {"model_params": writers.boxed(params), "optimizer_state": optimizer}
    return writers.write_items(root / "run", items)


def _boxed_all(moments: Any) -> Any:
    return {name: writers.boxed(field) for name, field in moments._asdict().items()}


def _variables(root: Path) -> Path:
    state = _adam()
    return writers.write_standard(root / "v", {"params": state.params, "batch_stats": state.statistics})


FIXTURES = (
    Fixture(
        name="T5X, optax",
        layout="t5x",
        shown=TRAINING,
        write=lambda root: writers.write_t5x(root / "m", writers.t5x_tree(_adam())),
    ),
    Fixture(
        name="T5X, Adafactor",
        layout="t5x",
        shown=TRAINING,
        write=lambda root: writers.write_t5x(root / "m", writers.t5x_adafactor_tree(_adafactor())),
    ),
    Fixture(
        name="T5X, its own format",
        layout="t5x",
        shown=TRAINING,
        write=lambda root: writers.write_t5x_native(root, writers.t5x_adafactor_tree(_adafactor())),
    ),
    Fixture(
        name="Scenic",
        layout="scenic",
        shown=TRAINING,
        write=lambda root: writers.write_flax(root, writers.scenic_state(_adam()), orbax=False),
    ),
    Fixture(name="Scenic, early", layout="scenic", shown=TRAINING, write=_early_scenic),
    Fixture(
        name="Kauldron",
        layout="kauldron",
        shown=TRAINING,
        write=lambda root: writers.write_kauldron(root / "m", _adam()),
    ),
    Fixture(name="big_vision", layout="big_vision", shown=WEIGHTS_AND_MOMENTS, write=_big_vision),
    Fixture(name="big_vision, npz", layout="big_vision", shown=WEIGHTS_AND_MOMENTS, write=_big_vision_npz),
    Fixture(
        name="big_vision, early", layout="big_vision", shown=WEIGHTS_AND_MOMENTS, write=_early_big_vision
    ),
    Fixture(name="Gemma, flat", layout="gemma", shown=LOGITS, write=_gemma("flat")),
    Fixture(name="Gemma, stacked", layout="gemma", shown=LOGITS, write=_gemma("stacked")),
    Fixture(name="Gemma, nested", layout="params", shown=LOGITS, write=_gemma("nested")),
    Fixture(name="openpi", layout="openpi", shown=TRAINING, write=_openpi),
    Fixture(name="openpi, weights only", layout="openpi_weights", shown=VALUES, write=_openpi_weights),
    Fixture(name="Tunix", layout="tunix", shown=TRAINING, write=_tunix),
    Fixture(
        name="flax.training, msgpack",
        layout="train_state",
        shown=TRAINING,
        write=lambda root: writers.write_flax(root, writers.flax_state(_adam()), orbax=False),
    ),
    Fixture(
        name="flax.training, Orbax",
        layout="train_state",
        shown=TRAINING,
        write=lambda root: writers.write_flax(root, writers.flax_state(_adam()), orbax=True),
    ),
    Fixture(
        name="Linen variables",
        layout="variables",
        shown="weights and statistics; the modules above",
        write=_variables,
    ),
    Fixture(
        name="MaxText",
        layout="maxtext",
        shown="model and optimizer; digests of every value",
        write=lambda _: CHECKPOINTS / "llama2_scanned",
    ),
)
