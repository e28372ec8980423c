"""The demo step by step: a Linen program stops, an NNX program continues, a layer goes missing."""

import dataclasses
import pathlib
import tempfile
import textwrap
import time
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh
from rich.console import Console
from rich.text import Text

from orbax_nnx_handler import NNXLinenHandler, NNXLinenRestore, RestoreError, plan_restore, restore
from orbax_nnx_handler.commands.demo.programs import (
    TEXT,
    NNXDecoder,
    Size,
    Training,
    batch_at,
    make_mesh,
    make_optimizer,
    make_target,
    sample,
    start_linen,
    train_linen,
    train_nnx,
)

MARGIN = "   "
WIDEST = 96


class Printer:
    """Prints to one console: in colour on a terminal, plain and without trailing spaces in a pipe."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.sections = 0

    def title(self, title: str, sentence: str) -> None:
        """Prints the title of the demo."""
        self._line()
        self._line(Text(title, style="bold"))
        self._line(Text(sentence, style="dim"))

    def section(self, heading: str) -> None:
        """Prints a numbered heading."""
        self.sections += 1
        self._line()
        self._line(Text(f"{self.sections}  {heading}", style="bold cyan"))
        self._line()

    def text(self, sentence: str) -> None:
        """Prints one sentence, wrapped."""
        width = min(self.console.width, WIDEST) - len(MARGIN)
        for line in textwrap.wrap(sentence, width):
            self._line(Text(MARGIN).append(line))

    def code(self, *lines: str) -> None:
        """Prints lines of the user's program, ahead of their output."""
        for line in lines:
            self._line(Text(MARGIN).append(line, "green"))
        self._line()

    def figures(self, **figures: str) -> None:
        """Prints one figure a row, after its name."""
        longest = max(map(len, figures))
        for name, figure in figures.items():
            label = name.replace("_", " ").ljust(longest)
            self._line(Text(MARGIN).append(label, "dim").append(f"   {figure}"))

    def table(self, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table of figures, right-aligned."""
        widths = [max(len(row[i]) for row in (names, *rows)) for i in range(len(names))]
        for row in (names, *rows):
            cells = "   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            self._line(Text(MARGIN).append(cells, "dim" if row is names else ""))

    def output(self, value: object, most: int | None = None) -> None:
        """Prints what the library itself prints, at most so many lines of it."""
        lines = str(value).splitlines()
        shown = lines[:most]
        if len(shown) < len(lines):
            shown.append(f"… and {len(lines) - len(shown)} more lines")
        for line in shown:
            self._line(Text(MARGIN).append("│ ", "dim").append(line))

    def blank(self) -> None:
        """Prints an empty line."""
        self._line()

    def end(self, sentence: str) -> None:
        """Prints the last sentence of the demo."""
        self._line()
        self._line(Text(sentence, style="dim"))

    def _line(self, line: Text | None = None) -> None:
        # Soft-wrapped: a path in a message stays whole, for the reader to copy.
        self.console.print(line or Text(), soft_wrap=True)


REMOVED_LAYER = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What every step of the demo needs.

    Attributes:
        printer: Where the demo is printed.
        root: A directory for the checkpoints.
        size: How large the model is.
        optimizer: The optimizer of both programs.
        mesh: The devices of the NNX program.
        stop: The step at which the Linen program saves and stops.
        end: The step at which both programs end.
    """

    printer: Printer
    root: pathlib.Path
    size: Size
    optimizer: optax.GradientTransformation
    mesh: Mesh
    stop: int
    end: int

    @property
    def target(self) -> Training:
        """Shapes, dtypes and shardings of the NNX program's state."""
        return make_target(self.size, self.optimizer, self.mesh)

    @property
    def after(self) -> range:
        """The steps that both programs take after the checkpoint."""
        return range(self.stop, self.end)

    def start(self) -> Training:
        """Builds the NNX program's state with its initial values."""
        return Training(self.size, self.optimizer, nnx.Rngs(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the demo found, as numbers.

    Attributes:
        logit_difference: The largest difference of a logit between the two programs.
        linen_losses: The loss of each step after the checkpoint, in Linen.
        nnx_losses: The same in NNX, restored.
        error: How the checkpoint without a layer was refused.
        filled_losses: The same losses with that layer initialised.
    """

    logit_difference: float
    linen_losses: list[float]
    nnx_losses: list[float]
    error: RestoreError
    filled_losses: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain dicts, lists, strings and numbers."""
        return {
            "logit_difference": self.logit_difference,
            "linen_losses": self.linen_losses,
            "nnx_losses": self.nnx_losses,
            "refused": {"type": type(self.error).__name__, "message": str(self.error)},
            "filled_losses": self.filled_losses,
        }


def run(printer: Printer | None = None, size: Size | None = None, stop: int = 300, end: int = 331) -> Outcome:
    """Runs and prints the whole demo; `Setup` describes the arguments."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        setup = Setup(
            printer=printer or Printer(),
            root=pathlib.Path(directory),
            size=size or Size(),
            optimizer=make_optimizer(),
            mesh=make_mesh(),
            stop=stop,
            end=end,
        )
        outcome = run_steps(setup)
    setup.printer.end(f"The demo took {time.perf_counter() - began:.0f} s.")
    return outcome


def run_steps(setup: Setup) -> Outcome:
    """Runs the steps in order."""
    setup.printer.title(
        "From Linen to NNX, without a wrong value",
        "A checkpoint that a Linen program wrote is restored into NNX on a mesh of eight devices.",
    )
    linen = train_and_save(setup)
    show_plan(setup)
    training = restore_on_mesh(setup)
    logit_difference = compare_logits(setup, linen, training)
    linen_losses, nnx_losses = continue_training(setup, linen, training)
    return Outcome(
        logit_difference=logit_difference,
        linen_losses=linen_losses,
        nnx_losses=nnx_losses,
        error=restore_without_layer(setup),
        filled_losses=initialise_missing_layer(setup, nnx_losses),
    )


def train_and_save(setup: Setup) -> TrainState:
    """Trains and saves in Linen, without this package."""
    setup.printer.section("A Linen program trains, and saves with a stock CheckpointManager")
    began = time.perf_counter()
    state, losses = train_linen(start_linen(setup.size, setup.optimizer), range(setup.stop), setup.size)
    took = time.perf_counter() - began
    save_linen(setup.root / "linen", setup.stop, state)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    setup.printer.figures(
        text=f"{len(TEXT):,} letters of Alice's Adventures in Wonderland",
        model=f"decoder of {setup.size.layers} layers, {parameters:,} parameters, AdamW",
        training=f"{setup.stop} steps in {took:.0f} s, loss {losses[0]:.2f} → {losses[-1]:.2f}",
        on_disk=f"{size_on_disk(setup.root / 'linen') / 1e6:.1f} MB, step {setup.stop}",
    )
    return state


def show_plan(setup: Setup) -> None:
    """Prints the plan, before a byte of an array is read."""
    setup.printer.section("The plan, from metadata alone")
    setup.printer.code("print(plan_restore(path, target))")
    setup.printer.output(plan_restore(setup.root / "linen", setup.target))


def restore_on_mesh(setup: Setup) -> Training:
    """Restores the NNX program through the same manager, with one line of configuration."""
    setup.printer.section("The restore, straight onto eight devices")
    setup.printer.code(
        "manager = CheckpointManager(path, item_handlers=NNXLinenHandler())",
        "state = manager.restore(step, args=NNXLinenRestore(target))",
        "print(handler.report)",
    )
    handler = NNXLinenHandler()
    with ocp.CheckpointManager(setup.root / "linen", item_handlers=handler) as manager:
        training = manager.restore(setup.stop, args=NNXLinenRestore(setup.target))
    setup.printer.output(handler.report, most=8)
    kernel = training.model.blocks[0].wide.kernel.get_value()
    piece = kernel.sharding.shard_shape(kernel.shape)
    setup.printer.blank()
    setup.printer.text(
        f"blocks/0/wide/kernel {kernel.shape}: {piece} on each of {len(kernel.devices())} devices"
    )
    return training


def compare_logits(setup: Setup, linen: TrainState, training: Training) -> float:
    """Runs both programs on the same letters; returns the largest difference of a logit."""
    setup.printer.section("Both programs, the same letters, the same logits")
    tokens = jnp.asarray(batch_at(setup.stop, size=setup.size.batch, time=setup.size.time)[:, :-1])
    ours = np.asarray(nnx.jit(NNXDecoder.__call__)(training.model, tokens))
    theirs = np.asarray(jax.jit(linen.apply_fn)({"params": linen.params}, tokens))
    difference = float(np.abs(ours - theirs).max())
    setup.printer.figures(
        logits=f"{ours.size:,}, between {theirs.min():.1f} and {theirs.max():.1f}",
        largest_difference=f"{difference:.1e}, Linen on one device, NNX on eight",
    )
    return difference


def continue_training(setup: Setup, linen: TrainState, training: Training) -> tuple[list[float], list[float]]:
    """Continues training in both programs, moments included; returns the losses of each."""
    setup.printer.section("Training goes on, moments and schedule intact")
    _, theirs = train_linen(linen, setup.after, setup.size)
    ours = train_nnx(training, setup.after, setup.size, setup.mesh)
    show_losses(setup, ("Linen", theirs), ("NNX", ours))
    setup.printer.blank()
    setup.printer.text(f"The NNX model writes: {sample(training, setup.size, 160)}")
    return theirs, ours


def restore_without_layer(setup: Setup) -> RestoreError:
    """Tries to restore a checkpoint that lacks a layer; returns the error."""
    setup.printer.section(f"A checkpoint that lacks layer {REMOVED_LAYER}")
    copy_without(f"blocks_{REMOVED_LAYER}", setup.root / "linen", setup.root / "damaged", setup.stop)
    setup.printer.code("restore(path, target)")
    try:
        restore(setup.root / "damaged", setup.target)
    except RestoreError as error:
        setup.printer.output(f"{type(error).__name__}: {error}")
        return error
    raise AssertionError("a checkpoint without a layer was restored")


def initialise_missing_layer(setup: Setup, whole: list[float]) -> list[float]:
    """Restores the same checkpoint, initialises what is missing, and trains; returns the losses."""
    setup.printer.section("The same checkpoint, with a policy that initialises what is missing")
    setup.printer.code('policy={nnx.PathContains("blocks"): "init", ...: "error"}')
    handler = NNXLinenHandler(policy={nnx.PathContains("blocks"): "init", ...: "error"}, init=setup.start)
    with ocp.CheckpointManager(setup.root / "damaged", item_handlers=handler) as manager:
        training = manager.restore(setup.stop, args=NNXLinenRestore(setup.target))
    setup.printer.output(handler.report.summary if handler.report else "")
    filled = train_nnx(training, setup.after, setup.size, setup.mesh)
    setup.printer.blank()
    show_losses(setup, ("trained layer", whole), ("new layer", filled))
    return filled


def show_losses(setup: Setup, first: tuple[str, list[float]], second: tuple[str, list[float]]) -> None:
    """Shows two runs over the same batches side by side."""
    rows = [
        [str(step), f"{one:.6f}", f"{other:.6f}", f"{abs(one - other):.1e}"]
        for step, one, other in zip(setup.after, first[1], second[1], strict=True)
        if step % 10 == 0
    ]
    setup.printer.table(["step", first[0], second[0], "difference"], rows)


def save_linen(root: pathlib.Path, step: int, state: TrainState) -> None:
    """Saves a Linen program's state as such programs do."""
    with ocp.CheckpointManager(root) as manager:
        manager.save(step, args=ocp.args.StandardSave(state))


def copy_without(name: str, source: pathlib.Path, destination: pathlib.Path, step: int) -> None:
    """Copies a checkpoint without the module of that name and its moments."""
    with ocp.CheckpointManager(source) as manager:
        tree = manager.restore(step, args=ocp.args.StandardRestore())
    with ocp.CheckpointManager(destination) as manager:
        manager.save(step, args=ocp.args.StandardSave(_without(name, tree)))


def size_on_disk(root: pathlib.Path) -> int:
    """Returns the bytes of all files below a directory."""
    return sum(file.stat().st_size for file in root.rglob("*") if file.is_file())


def _without(name: str, tree: Any) -> Any:
    if isinstance(tree, dict):
        branches = cast(dict[str, Any], tree)
        return {key: _without(name, branch) for key, branch in branches.items() if key != name}
    if isinstance(tree, list | tuple):
        return [_without(name, branch) for branch in cast(list[Any], tree)]
    return tree
