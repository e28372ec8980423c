"""The broken restores, each as short as a user's own mistake."""

import dataclasses
import inspect
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from orbax_nnx_handler import restore
from tests.gallery import models
from tests.gallery.models import Size, decoder, linen_decoder, save, train_state, training

ADAM = optax.adam(1e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken:
    """A restore that must fail.

    Attributes:
        title: What went wrong, in the reader's words.
        topic: The chapter of the page.
        story: What the checkpoint holds and what the target wants.
        provoke: Makes the checkpoint under a directory and restores from it.
    """

    title: str
    topic: str
    story: str
    provoke: Callable[[pathlib.Path], Any]


GALLERY: list[Broken] = []


def broken(
    topic: str, title: str
) -> Callable[[Callable[[pathlib.Path], Any]], Callable[[pathlib.Path], Any]]:
    """Adds a function to the gallery; its docstring tells the story."""

    def add(provoke: Callable[[pathlib.Path], Any]) -> Callable[[pathlib.Path], Any]:
        story = inspect.cleandoc(provoke.__doc__ or "")
        GALLERY.append(Broken(title=title, topic=topic, story=story, provoke=provoke))
        return provoke

    return add


DEPTH, WIDTH, NAMES = "Layers", "Sizes", "Names"
ARRANGED, PARTS, TYPES, TARGETS, RULES, PLACES = (
    "Arrangement",
    "Parts",
    "Types and values",
    "Targets",
    "Rules and policies",
    "Paths",
)


@broken(DEPTH, "Another number of layers")
def fewer_layers(root: pathlib.Path) -> Any:
    """The stored decoder has four layers, the target's has six; layers one by one on both sides."""
    save(root / "1200" / "default", train_state(linen_decoder(Size(layers=4)), ADAM))
    return restore(root, training(lambda: models.Decoder(Size(layers=6), nnx.Rngs(0)), ADAM))


@broken(DEPTH, "Another number of layers, stacked on both sides")
def fewer_scanned_layers(root: pathlib.Path) -> Any:
    """Four layers stacked by `nn.scan` are stored, the target stacks six."""
    save(root / "1200" / "default", train_state(linen_decoder(Size(layers=4), scanned=True), None))
    return restore(root, decoder(Size(layers=6), scanned=True))


@broken(DEPTH, "Fewer layers one by one than the target stacks")
def fewer_layers_to_stack(root: pathlib.Path) -> Any:
    """Four layers are stored one by one, the target stacks six: the plan knows which are missing."""
    save(root / "1200" / "default", train_state(linen_decoder(Size(layers=4)), None))
    return restore(root, decoder(Size(layers=6), scanned=True))


@broken(DEPTH, "More layers stacked than the target wants")
def more_scanned_layers(root: pathlib.Path) -> Any:
    """Six stacked layers are stored, the target has four, one by one. Nothing is truncated."""
    save(root / "1200" / "default", train_state(linen_decoder(Size(layers=6), scanned=True), None))
    return restore(root, decoder(Size(layers=4)))


@broken(DEPTH, "A layer in the middle is absent")
def hole_in_the_layers(root: pathlib.Path) -> Any:
    """Somebody took layer 1 of four out of the checkpoint: no difference in depth, but a hole."""
    params = linen_decoder(Size(layers=4))
    del params["layers_1"]
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, decoder(Size(layers=4)))


@broken(DEPTH, "Stacked on one side, and another width as well")
def scanned_and_wider(root: pathlib.Path) -> Any:
    """Layers are stacked in the checkpoint and one by one in the target, and no layer has its shape."""
    save(root / "1200" / "default", train_state(linen_decoder(Size(width=16, hidden=64), scanned=True), None))
    return restore(root, decoder(Size(width=24, hidden=72, heads=2)))


@broken(DEPTH, "Stacked, but on which axis?")
def unclear_axis(root: pathlib.Path) -> Any:
    """As many layers as features: a square kernel tells no axis."""
    rows = {"kernel": np.zeros((4, 4, 4), np.float32)}
    save(
        root / "1200" / "default",
        {"params": {"layers": {"mix": rows}, "head": {"kernel": np.zeros((4, 2), np.float32)}}},
    )
    kernel = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    layers = {at: {"mix": {"kernel": nnx.Param(kernel)}} for at in range(4)}
    head = {"kernel": nnx.Param(jax.ShapeDtypeStruct((4, 2), jnp.float32))}
    return restore(root, nnx.State({"layers": layers, "head": head}))


@broken(WIDTH, "Another width")
def other_width(root: pathlib.Path) -> Any:
    """The target is twice as wide as the checkpoint: one factor explains all mismatches."""
    save(root / "1200" / "default", train_state(linen_decoder(Size(width=16, hidden=64)), ADAM))
    size = Size(width=32, hidden=128, heads=4)
    return restore(root, training(lambda: models.Decoder(size, nnx.Rngs(0)), ADAM))


@broken(WIDTH, "Another vocabulary")
def other_vocabulary(root: pathlib.Path) -> Any:
    """The tokenizer has 259 entries, and the target pads them to 320."""
    save(root / "1200" / "default", train_state(linen_decoder(Size(vocabulary=259)), None))
    return restore(root, decoder(Size(vocabulary=320)))


@broken(WIDTH, "Another number of heads")
def other_heads(root: pathlib.Path) -> Any:
    """The same width divided among four heads on disk and eight in the target."""
    save(root / "1200" / "default", train_state(linen_decoder(Size(heads=4)), None))
    return restore(root, decoder(Size(heads=8)))


@broken(WIDTH, "Another number of experts")
def other_experts(root: pathlib.Path) -> Any:
    """Eight experts are stored, the target routes to sixteen."""
    save(root / "1200" / "default", {"params": _experts(8, np.zeros)})
    target = jax.tree.map(nnx.Param, _experts(16, lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)))
    return restore(root, nnx.State(target))


def _experts(count: int, make: Callable[..., Any]) -> dict[str, Any]:
    layer = {
        "up": make((count, 16, 64), np.float32),
        "down": make((count, 64, 16), np.float32),
        "bias": make((count, 64), np.float32),
    }
    return {
        "moe": {"experts": layer, "router": {"kernel": make((16, count), np.float32)}},
        "head": {"kernel": make((16, 32), np.float32)},
    }


@broken(WIDTH, "Another number of classes")
def other_classes(root: pathlib.Path) -> Any:
    """A classifier for 10 classes is stored, the target tells 5 apart: the rest of the model fits."""
    tree = models.variables(models.LinenConvNet(), jnp.zeros((1, 8, 8, 3)))
    save(root / "1200" / "default", train_state(tree["params"], None, batch_stats=tree["batch_stats"]))

    def build() -> models.ConvNet:
        model = models.ConvNet(nnx.Rngs(0))
        model.classes = nnx.Linear(24, 5, rngs=nnx.Rngs(0))
        return model

    return restore(root, nnx.eval_shape(build))


@broken(ARRANGED, "Queries, keys and values in one array")
def fused(root: pathlib.Path) -> Any:
    """The Linen program computed all three with one kernel, the target has three."""
    params = linen_decoder()
    for block in (params["layers_0"], params["layers_1"]):
        parts = [block["attention"].pop(name)["kernel"] for name in ("query", "key", "value")]
        block["attention"]["qkv"] = {"kernel": np.stack(parts, axis=1)}
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, decoder())


@broken(ARRANGED, "Heads and head size as one axis")
def merged_heads(root: pathlib.Path) -> Any:
    """The queries are stored as a matrix, as a Dense layer has them."""
    params = linen_decoder()
    for block in (params["layers_0"], params["layers_1"]):
        kernel = block["attention"]["query"]["kernel"]
        block["attention"]["query"]["kernel"] = kernel.reshape(16, 16)
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, decoder())


@broken(ARRANGED, "A kernel turned")
def turned(root: pathlib.Path) -> Any:
    """The head was stored as (outputs, inputs), as other frameworks have it."""
    params = linen_decoder()
    params["head"]["kernel"] = params["head"]["kernel"].T
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, decoder())


@broken(NAMES, "Names that Linen gave")
def automatic_names(root: pathlib.Path) -> Any:
    """The Linen program named no module, so the checkpoint says `Dense_0`; the target says `encode`."""
    params = models.variables(models.LinenMlp(), jnp.zeros((1, 32)))["params"]
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, nnx.eval_shape(lambda: models.Mlp(nnx.Rngs(0))))


@broken(NAMES, "A module of another name")
def renamed_module(root: pathlib.Path) -> Any:
    """The output layer is called `logits_dense` on disk and `head` in the target."""
    params = linen_decoder()
    params["logits_dense"] = params.pop("head")
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, decoder())


@broken(NAMES, "Layers of another name, stacked")
def renamed_layers(root: pathlib.Path) -> Any:
    """The stacked layers are called `blocks` on disk; the target wants `layers`, one by one."""
    params = linen_decoder(scanned=True)
    params["blocks"] = params.pop("layers")
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, decoder())


@broken(NAMES, "Layers that are counted from one")
def counted_from_one(root: pathlib.Path) -> Any:
    """`layers_1` to `layers_3` are stored, the target's list begins at 0. By name two of three would fit."""
    params = linen_decoder(Size(layers=3))
    params |= {f"layers_{at + 1}": params[f"layers_{at}"] for at in (2, 1, 0)}
    del params["layers_0"]
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, decoder(Size(layers=3)))


@broken(NAMES, "A checkpoint of another model")
def another_model(root: pathlib.Path) -> Any:
    """The path of an image classifier, the target of a language model."""
    tree = models.variables(models.LinenConvNet(), jnp.zeros((1, 8, 8, 3)))
    save(root / "1200" / "default", train_state(tree["params"], None, batch_stats=tree["batch_stats"]))
    return restore(root, decoder())


@broken(PARTS, "No optimizer was saved")
def no_optimizer(root: pathlib.Path) -> Any:
    """The checkpoint holds weights only, the target a whole train state."""
    save(root / "1200" / "default", {"params": linen_decoder()})
    return restore(root, training(lambda: models.Decoder(Size(), nnx.Rngs(0)), ADAM))


@broken(PARTS, "Another optimizer")
def other_optimizer(root: pathlib.Path) -> Any:
    """Trained with SGD and momentum, to be continued with Adam."""
    save(root / "1200" / "default", train_state(linen_decoder(), optax.sgd(0.1, momentum=0.9)))
    return restore(root, training(lambda: models.Decoder(Size(), nnx.Rngs(0)), ADAM))


@broken(PARTS, "A moment more")
def moment_more(root: pathlib.Path) -> Any:
    """Trained with Adam, to be continued with AMSGrad, which keeps the largest second moment as well."""
    save(root / "1200" / "default", train_state(linen_decoder(), ADAM))
    amsgrad = optax.amsgrad(1e-3)
    return restore(root, training(lambda: models.Decoder(Size(), nnx.Rngs(0)), amsgrad))


@broken(PARTS, "No optimizer, a new head and more layers")
def several_parts(root: pathlib.Path) -> Any:
    """Three causes at once: the one policy at the end fills all of them and nothing else."""

    def build() -> models.Decoder:
        model = models.Decoder(Size(layers=3), nnx.Rngs(0))
        model.classifier = nnx.Linear(16, 5, rngs=nnx.Rngs(0))
        return model

    save(root / "1200" / "default", {"params": linen_decoder()})
    return restore(root, training(build, ADAM))


@broken(PARTS, "No biases")
def no_biases(root: pathlib.Path) -> Any:
    """The Linen program was built with `use_bias=False`, the target was not."""
    tree = models.variables(models.LinenMlp(), jnp.zeros((1, 32)))["params"]
    names = {"Dense_0": "encode", "Dense_1": "mix", "Dense_2": "classes"}
    params = {names[name]: {"kernel": layer["kernel"]} for name, layer in tree.items()}
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, nnx.eval_shape(lambda: models.Mlp(nnx.Rngs(0))))


@broken(PARTS, "An embedding that is the output layer too")
def tied(root: pathlib.Path) -> Any:
    """The Linen program used its embedding twice and stored no output layer."""
    params = linen_decoder()
    del params["head"]
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, decoder())


@broken(PARTS, "A collection was not saved")
def no_statistics(root: pathlib.Path) -> Any:
    """The Linen program saved `params` and forgot `batch_stats`."""
    tree = models.variables(models.LinenConvNet(), jnp.zeros((1, 8, 8, 3)))
    save(root / "1200" / "default", train_state(tree["params"], None))
    return restore(root, nnx.eval_shape(lambda: models.ConvNet(nnx.Rngs(0))))


@broken(PARTS, "LoRA weights on a base checkpoint")
def lora(root: pathlib.Path) -> Any:
    """The base model is stored; the target carries LoRA weights beside two of its layers."""

    def build() -> models.Decoder:
        model = models.Decoder(Size(), nnx.Rngs(0))
        for block in model.layers:
            block.adapter = nnx.LoRA(16, 2, 64, rngs=nnx.Rngs(0))
        return model

    save(root / "1200" / "default", train_state(linen_decoder(), None))
    return restore(root, nnx.eval_shape(build))


@broken(PARTS, "A new head")
def new_head(root: pathlib.Path) -> Any:
    """A classifier on top of a pretrained decoder: its head was never trained."""

    def build() -> models.Decoder:
        model = models.Decoder(Size(), nnx.Rngs(0))
        model.classifier = nnx.Linear(16, 5, rngs=nnx.Rngs(0))
        return model

    save(root / "1200" / "default", train_state(linen_decoder(), None))
    return restore(root, nnx.eval_shape(build))


@broken(PARTS, "A weight was lost")
def lost_weight(root: pathlib.Path) -> Any:
    """The head is gone from the checkpoint, but Adam's moments of it are there: it is not new."""
    tree = train_state(linen_decoder(), ADAM)
    del tree["params"]["head"]
    save(root / "1200" / "default", tree)
    return restore(root, training(lambda: models.Decoder(Size(), nnx.Rngs(0)), ADAM))


@broken(PARTS, "Leaves that nobody wants")
def unexpected(root: pathlib.Path) -> Any:
    """With `unexpected="error"`, leftovers are as wrong as gaps."""
    params = linen_decoder()
    params["draft_head"] = {"kernel": np.zeros((16, 256), np.float32)}
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, decoder(), unexpected="error")


@broken(PARTS, "Two layouts at once")
def two_layouts(root: pathlib.Path) -> Any:
    """A tree that can be read in two ways, which would give two results."""
    kernel = np.zeros((4, 2), np.float32)
    save(
        root / "1200" / "default",
        {"params": {"params": {"head": {"kernel": kernel}}, "head": {"kernel": kernel}}},
    )
    leaf = nnx.Param(jax.ShapeDtypeStruct((4, 2), jnp.float32))
    return restore(root, nnx.State({"model": {"head": {"kernel": leaf}}}))


@broken(TYPES, "Integers for floats")
def quantised(root: pathlib.Path) -> Any:
    """The head was stored as int8; without its scale it is no weight."""
    params = linen_decoder()
    params["head"]["kernel"] = np.zeros((16, 256), np.int8)
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, decoder())


@broken(TYPES, "A quantised checkpoint")
def quantised_with_scales(root: pathlib.Path) -> Any:
    """The kernels of one layer are int8, with a scale beside each."""
    params = linen_decoder()
    for name in ("up", "down"):
        kernel = params["layers_0"][name]["kernel"]
        params["layers_0"][name] = {"kernel": kernel.astype(np.int8), "kernel_scale": kernel[0]}
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, decoder())


@broken(TYPES, "Random keys of another implementation")
def other_keys(root: pathlib.Path) -> Any:
    """An `rbg` key is stored, the target draws from `threefry2x32`."""

    def build(impl: str) -> nnx.State:
        leaves = {"rngs": {"key": nnx.RngKey(jax.random.key(0, impl=impl))}, "scale": nnx.Param(jnp.zeros(3))}
        return nnx.State(leaves)

    save(root / "1200" / "default", nnx.to_pure_dict(build("rbg")))
    return restore(root, build("threefry2x32"))


@broken(TYPES, "A stored value without a counterpart")
def gru_bias(root: pathlib.Path) -> Any:
    """Linen's `GRUCell` has a bias in `hn` that NNX's lacks. Zeros may be left out; these are not zeros."""
    cell = models.nn.GRUCell(4, parent=None)
    params = models.variables(cell, jnp.zeros((1, 4)), jnp.zeros((1, 3)))["params"]
    params["hn"]["bias"] += 0.5
    save(root / "1200" / "default", {"params": {"cell": params}})
    target = nnx.eval_shape(lambda: nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))))
    return restore(root, target)


@broken(TYPES, "A damaged file")
def damaged(root: pathlib.Path) -> Any:
    """A chunk of one array is gone from the disk. It does not come back as zeros."""
    item = root / "1200" / "default"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(
            item, args=ocp.args.PyTreeSave({"params": {"head": {"kernel": np.ones((4, 2), np.float32)}}})
        )
    (item / "params.head.kernel" / "0.0").unlink()
    leaf = nnx.Param(jax.ShapeDtypeStruct((4, 2), jnp.float32))
    return restore(root, nnx.State({"head": {"kernel": leaf}}))


@broken(TYPES, "An array that is gone")
def gone(root: pathlib.Path) -> Any:
    """The whole array was not copied. It is no missing weight, so no policy fills it."""
    item = root / "1200" / "default"
    tree = {"params": {"head": {"kernel": np.ones((4, 2), np.float32)}, "norm": {"scale": np.ones(4)}}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(item, args=ocp.args.PyTreeSave(tree))
    shutil.rmtree(item / "params.head.kernel")
    leaf = nnx.Param(jax.ShapeDtypeStruct((4, 2), jnp.float32))
    return restore(root, nnx.State({"head": {"kernel": leaf}}), policy="warn")


@broken(TYPES, "Everything at once")
def everything(root: pathlib.Path) -> Any:
    """A missing norm, a vocabulary of another size, and a head of the wrong kind: one error lists all."""
    params = linen_decoder()
    del params["norm"]
    params["embed"]["embedding"] = np.zeros((250, 16), np.float32)
    params["head"]["kernel"] = np.zeros((16, 256), np.int32)
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, decoder())


@broken(TYPES, "Pickled objects in a NumPy archive")
def pickled(root: pathlib.Path) -> Any:
    """Arrays of two lengths were stored as one, for which NumPy took an array of objects."""
    ragged = np.empty(2, object)
    ragged[:] = [np.zeros(2), np.zeros(3)]
    np.savez(root / "weights.npz", scale=ragged, bias=np.zeros(3, np.float32))
    target = {"scale": nnx.Param(jnp.zeros(3)), "bias": nnx.Param(jnp.zeros(3))}
    return restore(root / "weights.npz", nnx.State(target))


@broken(TARGETS, "An empty target")
def empty_target(root: pathlib.Path) -> Any:
    """The filter of `nnx.state` matched nothing: the model has no LoRA weights."""
    save(root / "1200" / "default", train_state(linen_decoder(), None))
    return restore(root, nnx.state(decoder(), nnx.LoRAParam))


@broken(TARGETS, "A sharding that does not divide")
def indivisible(root: pathlib.Path) -> Any:
    """A vocabulary of 259 is to be divided over eight devices."""
    save(root / "1200" / "default", train_state(linen_decoder(Size(vocabulary=259)), None))
    sharding = NamedSharding(jax.make_mesh((8,), ("model",)), PartitionSpec(None, "model"))
    args = {"head": {"kernel": ocp.ArrayRestoreArgs(sharding=sharding)}}
    return restore(root, decoder(Size(vocabulary=259)), args)


@broken(RULES, "A filter that matches nothing")
def unused_filter(root: pathlib.Path) -> Any:
    """A typo in a filter would leave the rule without effect."""
    save(root / "1200" / "default", train_state(linen_decoder(), None))
    return restore(root, decoder(), policy={nnx.PathContains("clasifier"): "init", ...: "error"})


@broken(RULES, "A rename that matches nothing")
def unused_rename(root: pathlib.Path) -> Any:
    """A rename whose left side is stored nowhere."""
    save(root / "1200" / "default", train_state(linen_decoder(), None))
    return restore(root, decoder(), renames=[("logits_dense", "head")])


@broken(RULES, "Two leaves renamed to one")
def two_to_one(root: pathlib.Path) -> Any:
    """After the rename two stored leaves claim one wanted leaf."""
    params = linen_decoder()
    params["old_head"] = {"kernel": np.zeros((16, 256), np.float32)}
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, decoder(), renames=[("old_head", "head")])


@broken(RULES, 'Policy "init" without initial values')
def no_init(root: pathlib.Path) -> Any:
    """The target is abstract, so somebody has to say how its weights begin."""
    params = linen_decoder()
    del params["head"]
    save(root / "1200" / "default", train_state(params, None))
    return restore(root, decoder(), policy="init")


@broken(PLACES, "A step that is not there")
def no_such_step(root: pathlib.Path) -> Any:
    """Steps 1000 and 1200 exist, the path says 1100."""
    for step in ("1000", "1200"):
        save(root / step / "default", {"params": {"scale": np.zeros(3, np.float32)}})
    return restore(root / "1100", nnx.State({"scale": nnx.Param(jnp.zeros(3))}))


@broken(PLACES, "A directory above the manager's")
def above_the_root(root: pathlib.Path) -> Any:
    """The path names the experiment; its checkpoints lie one level below."""
    save(
        root / "experiment" / "checkpoints" / "1200" / "default",
        {"params": {"scale": np.zeros(3, np.float32)}},
    )
    return restore(root / "experiment", nnx.State({"scale": nnx.Param(jnp.zeros(3))}))


@broken(PLACES, "A directory inside an item")
def inside_an_item(root: pathlib.Path) -> Any:
    """The path names a directory of the database, a part of the item."""
    item = save(root / "1200" / "default", {"params": {"scale": np.zeros(3, np.float32)}})
    return restore(item / "d", nnx.State({"scale": nnx.Param(jnp.zeros(3))}))


@broken(PLACES, "A save that was interrupted")
def interrupted(root: pathlib.Path) -> Any:
    """The job died while it wrote its first checkpoint."""
    whole = save(root / "whole", {"params": {"scale": np.zeros(3, np.float32)}})
    shutil.move(whole, root / "run" / "1200.orbax-checkpoint-tmp-1731" / "default")
    return restore(root / "run", nnx.State({"scale": nnx.Param(jnp.zeros(3))}))


@broken(PLACES, "A NumPy archive that was cut off")
def cut_off(root: pathlib.Path) -> Any:
    """The disk was full when big_vision copied `checkpoint.npz` for its step 1200."""
    np.savez(root / "checkpoint.npz", **{"params/scale": np.zeros(3, np.float32)})
    whole = (root / "checkpoint.npz").read_bytes()
    (root / "checkpoint.npz-000001200").write_bytes(whole[:200])
    return restore(root / "checkpoint.npz-000001200", nnx.State({"scale": nnx.Param(jnp.zeros(3))}))


@broken(PLACES, "Several items, and none of the usual names")
def several_items(root: pathlib.Path) -> Any:
    """The step holds a generator and a discriminator."""
    for item in ("discriminator", "generator"):
        save(root / "1200" / item, {"params": {"scale": np.zeros(3, np.float32)}})
    return restore(root, nnx.State({"scale": nnx.Param(jnp.zeros(3))}))


@broken(PLACES, "An item that holds no arrays")
def another_item(root: pathlib.Path) -> Any:
    """The path names the position of the data pipeline, which lies beside the weights."""
    save(root / "1200" / "default", {"params": {"scale": np.zeros(3, np.float32)}})
    (root / "1200" / "iter").mkdir()
    (root / "1200" / "iter" / "process_0-of-1.json").write_text('{"position": 4800}')
    return restore(root / "1200" / "iter", nnx.State({"scale": nnx.Param(jnp.zeros(3))}))


@broken(PLACES, "Several runs below a directory")
def several_runs(root: pathlib.Path) -> Any:
    """The path names the folder of all experiments."""
    for run in ("large", "small"):
        save(root / "runs" / run / "1200" / "default", {"params": {"scale": np.zeros(3, np.float32)}})
    return restore(root / "runs", nnx.State({"scale": nnx.Param(jnp.zeros(3))}))


@broken(PLACES, "A checkpoint that holds no weights")
def no_weights(root: pathlib.Path) -> Any:
    """The item holds the step only: the program saved its weights elsewhere."""
    save(root / "1200" / "default", {"step": np.int32(1200)})
    return restore(root, decoder())


@broken(PLACES, "The wrong layout, named")
def named_layout(root: pathlib.Path) -> Any:
    """The checkpoint is no T5X checkpoint."""
    save(root / "1200" / "default", train_state(linen_decoder(), None))
    return restore(root, decoder(), layout="t5x")
