"""The story: a Linen program stops, an NNX program carries on, and a layer goes missing."""

import dataclasses
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh

from orbax_nnx_handler import NNXLinenHandler, NNXLinenRestore, RestoreError, plan_restore, restore
from orbax_nnx_handler.demo.checkpoints import copy_without, save_linen, size_on_disk
from orbax_nnx_handler.demo.mesh import make_mesh, make_target
from orbax_nnx_handler.demo.nnx_model import Decoder, Training
from orbax_nnx_handler.demo.sample import write_on
from orbax_nnx_handler.demo.size import Size
from orbax_nnx_handler.demo.text import TEXT, batch_at
from orbax_nnx_handler.demo.train import make_optimizer, start_linen, train_linen, train_nnx
from orbax_nnx_handler.demo.voice import Voice

STOP = 400
"""The step at which the Linen program saves and stops."""
END = 431
"""The step at which the comparison ends."""
LOST = 1
"""The layer that goes missing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What every chapter shares."""

    voice: Voice
    root: pathlib.Path
    size: Size
    optimizer: optax.GradientTransformation
    mesh: Mesh

    @property
    def target(self) -> Training:
        """Shapes, dtypes and shardings of the NNX program's state."""
        return make_target(self.size, self.optimizer, self.mesh)

    def start(self) -> Training:
        """Builds the NNX program's state with its initial values."""
        return Training(self.size, self.optimizer, nnx.Rngs(1))


def tell(voice: Voice | None = None) -> None:
    """Tells the whole story."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        scene = Scene(
            voice=voice or Voice(),
            root=pathlib.Path(directory),
            size=Size(),
            optimizer=make_optimizer(),
            mesh=make_mesh(),
        )
        scene.voice.title(
            "From Linen to NNX, without a wrong value",
            "A checkpoint that a Linen program wrote comes up in NNX on a mesh of eight devices.",
        )
        linen = train_and_save(scene)
        show_plan(scene)
        training = restore_on_mesh(scene)
        compare_logits(scene, linen, training)
        losses = carry_on(scene, linen, training)
        lose_a_layer(scene)
        fill_the_layer(scene, losses)
        scene.voice.end(f"The whole story took {time.perf_counter() - began:.0f} s.")


def train_and_save(scene: Scene) -> TrainState:
    """A Linen program trains and saves, knowing nothing of this package."""
    scene.voice.chapter("A Linen program trains, and saves with a stock CheckpointManager")
    began = time.perf_counter()
    state, losses = train_linen(start_linen(scene.size, scene.optimizer), range(STOP), scene.size)
    took = time.perf_counter() - began
    save_linen(scene.root / "linen", STOP, state)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    scene.voice.figures(
        [
            ("text", f"{len(TEXT):,} letters of Alice's Adventures in Wonderland"),
            ("model", f"decoder of {scene.size.layers} layers, {parameters:,} parameters, AdamW"),
            ("training", f"{STOP} steps in {took:.0f} s, loss {losses[0]:.2f} → {losses[-1]:.2f}"),
            ("on disk", f"{size_on_disk(scene.root / 'linen') / 1e6:.1f} MB, step {STOP}"),
        ]
    )
    return state


def show_plan(scene: Scene) -> None:
    """The verdict, before a byte of an array is read."""
    scene.voice.chapter("The plan, from metadata alone")
    scene.voice.say("print(plan_restore(path, target))")
    scene.voice.quote(plan_restore(scene.root / "linen", scene.target))


def restore_on_mesh(scene: Scene) -> Training:
    """The NNX program comes up through the same manager, with one line of configuration."""
    scene.voice.chapter("The restore, straight onto eight devices")
    scene.voice.say("CheckpointManager(path, item_handlers=NNXLinenHandler())")
    handler = NNXLinenHandler()
    with ocp.CheckpointManager(scene.root / "linen", item_handlers=handler) as manager:
        training = manager.restore(STOP, args=NNXLinenRestore(scene.target))
    scene.voice.quote(handler.report)
    kernel = training.model.blocks[0].wide.kernel.get_value()
    piece = kernel.sharding.shard_shape(kernel.shape)
    scene.voice.say(
        f"blocks/0/wide/kernel {kernel.shape} lives on {len(kernel.devices())} devices, {piece} on each"
    )
    return training


def compare_logits(scene: Scene, linen: TrainState, training: Training) -> None:
    """Both programs read the same letters."""
    scene.voice.chapter("Both programs, the same letters")
    tokens = jnp.asarray(batch_at(STOP, size=scene.size.batch, time=scene.size.time)[:, :-1])
    ours = np.asarray(nnx.jit(Decoder.__call__)(training.model, tokens))
    theirs = np.asarray(jax.jit(linen.apply_fn)({"params": linen.params}, tokens))
    scene.voice.figures(
        [
            ("logits", f"{ours.size:,}, between {theirs.min():.1f} and {theirs.max():.1f}"),
            ("largest difference", f"{np.abs(ours - theirs).max():.1e}"),
        ]
    )


def carry_on(scene: Scene, linen: TrainState, training: Training) -> list[float]:
    """Both programs train on, with the optimizer's moments where they were; returns the losses."""
    scene.voice.chapter("Training goes on, moments and schedule intact")
    _, theirs = train_linen(linen, range(STOP, END), scene.size)
    ours = train_nnx(training, range(STOP, END), scene.size, scene.mesh)
    show_losses(scene.voice, ("Linen", theirs), ("NNX", ours))
    scene.voice.say(f"And the NNX model writes: {write_on(training, scene.size, 160)}")
    return ours


def lose_a_layer(scene: Scene) -> None:
    """A checkpoint that lacks a layer is refused, with everything there is to say."""
    scene.voice.chapter(f"A checkpoint that lacks layer {LOST}")
    copy_without(f"blocks_{LOST}", scene.root / "linen", scene.root / "damaged", STOP)
    try:
        restore(scene.root / "damaged", scene.target)
    except RestoreError as error:
        scene.voice.quote(f"{type(error).__name__}: {error}")


def fill_the_layer(scene: Scene, whole: list[float]) -> None:
    """What is missing may be initialised, if the user says so."""
    scene.voice.chapter("The same checkpoint, with leave to initialise what is missing")
    scene.voice.say('policy={nnx.PathContains("blocks"): "init", ...: "error"}')
    handler = NNXLinenHandler(policy={nnx.PathContains("blocks"): "init", ...: "error"}, init=scene.start)
    with ocp.CheckpointManager(scene.root / "damaged", item_handlers=handler) as manager:
        training = manager.restore(STOP, args=NNXLinenRestore(scene.target))
    scene.voice.quote(handler.report)
    filled = train_nnx(training, range(STOP, END), scene.size, scene.mesh)
    show_losses(scene.voice, ("trained layer", whole), ("new layer", filled))


def show_losses(voice: Voice, first: tuple[str, list[float]], second: tuple[str, list[float]]) -> None:
    """Shows two runs over the same batches side by side."""
    voice.columns(
        ["step", first[0], second[0], "difference"],
        [
            [str(step), f"{one:.6f}", f"{other:.6f}", f"{abs(one - other):.1e}"]
            for step, one, other in zip(range(STOP, END), first[1], second[1], strict=True)
            if step % 10 == 0
        ],
    )
