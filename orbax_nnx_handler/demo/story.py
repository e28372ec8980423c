"""Text that the model writes by itself.

The disk between the two programs, through stock Orbax alone.

How the demo speaks: headings, a sentence, figures, and what the library itself prints.

The story: a Linen program stops, an NNX program carries on, and a layer goes missing.
"""

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
from orbax_nnx_handler.demo.data import ENCODED, TEXT, Size, batch_at, decode
from orbax_nnx_handler.demo.nnx_model import Decoder, Training
from orbax_nnx_handler.demo.train import (
    make_mesh,
    make_optimizer,
    make_target,
    start_linen,
    train_linen,
    train_nnx,
)

TEMPERATURE = 0.6


def write_on(training: Training, size: Size, letters: int) -> str:
    """Returns how the model continues the end of the text, drawing from its stream of chance."""
    ending = jnp.asarray(ENCODED[-size.time :])
    written = _write(training.model, ending, jax.random.split(training.sampling(), letters))
    return " ".join(decode(np.asarray(written)).split())


@nnx.jit
def _write(model: Decoder, window: jax.Array, keys: jax.Array) -> jax.Array:
    def write_one(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model(window[None])[0, -1]
        letter = jax.random.categorical(key, logits / TEMPERATURE).astype(window.dtype)
        return jnp.append(window[1:], letter), letter

    return jax.lax.scan(write_one, window, keys)[1]


def save_linen(root: pathlib.Path, step: int, state: TrainState) -> None:
    """Saves a Linen program's state as such programs do."""
    with ocp.CheckpointManager(root) as manager:
        manager.save(step, args=ocp.args.StandardSave(state))


def copy_without(name: str, source: pathlib.Path, destination: pathlib.Path, step: int) -> None:
    """Writes the checkpoint again without the module of that name and its moments."""
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


MARGIN = "   "
WIDEST = 96


class Voice:
    """Speaks to one terminal, in colour; plain, without a trailing space, where that is a pipe."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.chapters = 0

    def title(self, title: str, sentence: str) -> None:
        """Opens the demo."""
        self._line()
        self._line(Text(title, style="bold"))
        self._line(Text(sentence, style="dim"))

    def chapter(self, heading: str) -> None:
        """Opens a chapter."""
        self.chapters += 1
        self._line()
        self._line(Text(f"{self.chapters}  {heading}", style="bold cyan"))
        self._line()

    def say(self, sentence: str) -> None:
        """Says one sentence."""
        width = min(self.console.width, WIDEST) - len(MARGIN)
        for line in textwrap.wrap(sentence, width):
            self._line(Text(MARGIN).append(line))

    def code(self, *lines: str) -> None:
        """Shows lines of the user's program, before what they print."""
        for line in lines:
            self._line(Text(MARGIN).append(line, "green"))
        self._line()

    def figures(self, **figures: str) -> None:
        """Shows one figure a row, its name before it."""
        longest = max(map(len, figures))
        for name, figure in figures.items():
            label = name.replace("_", " ").ljust(longest)
            self._line(Text(MARGIN).append(label, "dim").append(f"   {figure}"))

    def columns(self, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Shows a table of figures, right-aligned."""
        widths = [max(len(row[i]) for row in (names, *rows)) for i in range(len(names))]
        for row in (names, *rows):
            cells = "   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            self._line(Text(MARGIN).append(cells, "dim" if row is names else ""))

    def quote(self, words: object, most: int | None = None) -> None:
        """Shows what the library itself prints, word for word.

        Args:
            words: Anything that prints itself.
            most: Lines to show; the rest is counted. None for all.
        """
        lines = str(words).splitlines()
        shown = lines[:most]
        if len(shown) < len(lines):
            shown.append(f"… and {len(lines) - len(shown)} more lines")
        for line in shown:
            self._line(Text(MARGIN).append("│ ", "dim").append(line))

    def pause(self) -> None:
        """Leaves a line empty."""
        self._line()

    def end(self, sentence: str) -> None:
        """Closes the demo."""
        self._line()
        self._line(Text(sentence, style="dim"))

    def _line(self, line: Text | None = None) -> None:
        # Soft-wrapped: a path in a message stays whole, for the reader to copy.
        self.console.print(line or Text(), soft_wrap=True)


LOST = 1
"""The layer that goes missing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What every chapter shares.

    Attributes:
        voice: Who tells it.
        root: A directory for the checkpoints.
        size: How large the model is.
        optimizer: The optimizer of both programs.
        mesh: Where the NNX program lives.
        stop: The step at which the Linen program saves and stops.
        end: The step before which both programs are compared.
    """

    voice: Voice
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
class Ending:
    """What the story came to, as numbers.

    Attributes:
        logits_apart: The largest difference of a logit between the two programs.
        linen_losses: The loss of each step after the checkpoint, in Linen.
        nnx_losses: The same in NNX, restored.
        error: How the checkpoint without a layer was refused.
        filled_losses: The same losses with that layer initialised anew.
    """

    logits_apart: float
    linen_losses: list[float]
    nnx_losses: list[float]
    error: RestoreError
    filled_losses: list[float]


def tell(voice: Voice | None = None, size: Size | None = None, stop: int = 300, end: int = 331) -> Ending:
    """Tells the whole story; see `Scene` for what it takes."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        scene = Scene(
            voice=voice or Voice(),
            root=pathlib.Path(directory),
            size=size or Size(),
            optimizer=make_optimizer(),
            mesh=make_mesh(),
            stop=stop,
            end=end,
        )
        ending = play(scene)
    scene.voice.end(f"The whole story took {time.perf_counter() - began:.0f} s.")
    return ending


def play(scene: Scene) -> Ending:
    """Plays the chapters in order."""
    scene.voice.title(
        "From Linen to NNX, without a wrong value",
        "A checkpoint that a Linen program wrote comes up in NNX on a mesh of eight devices.",
    )
    linen = train_and_save(scene)
    show_plan(scene)
    training = restore_on_mesh(scene)
    logits_apart = compare_logits(scene, linen, training)
    linen_losses, nnx_losses = carry_on(scene, linen, training)
    return Ending(
        logits_apart=logits_apart,
        linen_losses=linen_losses,
        nnx_losses=nnx_losses,
        error=lose_a_layer(scene),
        filled_losses=fill_the_layer(scene, nnx_losses),
    )


def train_and_save(scene: Scene) -> TrainState:
    """A Linen program trains and saves, knowing nothing of this package."""
    scene.voice.chapter("A Linen program trains, and saves with a stock CheckpointManager")
    began = time.perf_counter()
    state, losses = train_linen(start_linen(scene.size, scene.optimizer), range(scene.stop), scene.size)
    took = time.perf_counter() - began
    save_linen(scene.root / "linen", scene.stop, state)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    scene.voice.figures(
        text=f"{len(TEXT):,} letters of Alice's Adventures in Wonderland",
        model=f"decoder of {scene.size.layers} layers, {parameters:,} parameters, AdamW",
        training=f"{scene.stop} steps in {took:.0f} s, loss {losses[0]:.2f} → {losses[-1]:.2f}",
        on_disk=f"{size_on_disk(scene.root / 'linen') / 1e6:.1f} MB, step {scene.stop}",
    )
    return state


def show_plan(scene: Scene) -> None:
    """The verdict, before a byte of an array is read."""
    scene.voice.chapter("The plan, from metadata alone")
    scene.voice.code("print(plan_restore(path, target))")
    scene.voice.quote(plan_restore(scene.root / "linen", scene.target))


def restore_on_mesh(scene: Scene) -> Training:
    """The NNX program comes up through the same manager, with one line of configuration."""
    scene.voice.chapter("The restore, straight onto eight devices")
    scene.voice.code(
        "manager = CheckpointManager(path, item_handlers=NNXLinenHandler())",
        "state = manager.restore(step, args=NNXLinenRestore(target))",
        "print(handler.report)",
    )
    handler = NNXLinenHandler()
    with ocp.CheckpointManager(scene.root / "linen", item_handlers=handler) as manager:
        training = manager.restore(scene.stop, args=NNXLinenRestore(scene.target))
    scene.voice.quote(handler.report, most=8)
    kernel = training.model.blocks[0].wide.kernel.get_value()
    piece = kernel.sharding.shard_shape(kernel.shape)
    scene.voice.pause()
    scene.voice.say(
        f"blocks/0/wide/kernel {kernel.shape}: {piece} on each of {len(kernel.devices())} devices"
    )
    return training


def compare_logits(scene: Scene, linen: TrainState, training: Training) -> float:
    """Both programs read the same letters; returns how far their logits are apart at most."""
    scene.voice.chapter("Both programs, the same letters, the same logits")
    tokens = jnp.asarray(batch_at(scene.stop, size=scene.size.batch, time=scene.size.time)[:, :-1])
    ours = np.asarray(nnx.jit(Decoder.__call__)(training.model, tokens))
    theirs = np.asarray(jax.jit(linen.apply_fn)({"params": linen.params}, tokens))
    apart = float(np.abs(ours - theirs).max())
    scene.voice.figures(
        logits=f"{ours.size:,}, between {theirs.min():.1f} and {theirs.max():.1f}",
        largest_difference=f"{apart:.1e}, Linen on one device, NNX on eight",
    )
    return apart


def carry_on(scene: Scene, linen: TrainState, training: Training) -> tuple[list[float], list[float]]:
    """Both programs train on, the optimizer's moments where they were; returns the losses of each."""
    scene.voice.chapter("Training goes on, moments and schedule intact")
    _, theirs = train_linen(linen, scene.after, scene.size)
    ours = train_nnx(training, scene.after, scene.size, scene.mesh)
    show_losses(scene, ("Linen", theirs), ("NNX", ours))
    scene.voice.pause()
    scene.voice.say(f"The NNX model writes: {write_on(training, scene.size, 160)}")
    return theirs, ours


def lose_a_layer(scene: Scene) -> RestoreError:
    """A checkpoint that lacks a layer is refused, with everything there is to say."""
    scene.voice.chapter(f"A checkpoint that lacks layer {LOST}")
    copy_without(f"blocks_{LOST}", scene.root / "linen", scene.root / "damaged", scene.stop)
    scene.voice.code("restore(path, target)")
    try:
        restore(scene.root / "damaged", scene.target)
    except RestoreError as error:
        scene.voice.quote(f"{type(error).__name__}: {error}")
        return error
    raise AssertionError("a checkpoint without a layer was restored")


def fill_the_layer(scene: Scene, whole: list[float]) -> list[float]:
    """What is missing may be initialised, if the user says so; returns the losses from there."""
    scene.voice.chapter("The same checkpoint, with leave to initialise what is missing")
    scene.voice.code('policy={nnx.PathContains("blocks"): "init", ...: "error"}')
    handler = NNXLinenHandler(policy={nnx.PathContains("blocks"): "init", ...: "error"}, init=scene.start)
    with ocp.CheckpointManager(scene.root / "damaged", item_handlers=handler) as manager:
        training = manager.restore(scene.stop, args=NNXLinenRestore(scene.target))
    scene.voice.quote(handler.report.summary if handler.report else "")
    filled = train_nnx(training, scene.after, scene.size, scene.mesh)
    scene.voice.pause()
    show_losses(scene, ("trained layer", whole), ("new layer", filled))
    return filled


def show_losses(scene: Scene, first: tuple[str, list[float]], second: tuple[str, list[float]]) -> None:
    """Shows two runs over the same batches side by side."""
    rows = [
        [str(step), f"{one:.6f}", f"{other:.6f}", f"{abs(one - other):.1e}"]
        for step, one, other in zip(scene.after, first[1], second[1], strict=True)
        if step % 10 == 0
    ]
    scene.voice.columns(["step", first[0], second[0], "difference"], rows)
