"""Writes train states exactly as each codebase does, from its own source.

None of the codebases is installed: their trees, names and files are made here
by the calls that their savers make (Orbax, `flax.serialization`, TensorStore).
The functions say where in the source that is.
"""

import io
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import serialization, struct, traverse_util
from flax.training import checkpoints
from jax.experimental.array_serialization.serialization import GlobalAsyncCheckpointManager

from tests.layouts.programs import STEP, Trained, as_numpy


def t5x_tree(state: Trained) -> dict[str, Any]:
    """T5X with a wrapped optax optimizer: optimizers.py `OptaxWrapper.state_dict`."""
    flat = traverse_util.flatten_dict(serialization.to_state_dict(state.opt_state), sep="/")
    states = traverse_util.unflatten_dict(
        flat, sep="/"
    )  # Empty dicts are lost, as `state_dict` there intends.
    return {
        "target": state.params,
        "state": {"step": jnp.asarray(state.step, jnp.int32), "param_states": states},
        "flax_mutables": {"batch_stats": state.statistics},
    }


def t5x_adafactor_tree(state: Trained, *, row_last: Collection[str] = ()) -> dict[str, Any]:
    """T5X with its own Adafactor: adafactor.py `init_state`, slots below each parameter.

    Its `logical_factor_rules` go by the names of axes (`embed` is the row). In the modules of
    `row_last` that is the second axis, so that T5X's `v_row` has lost the first one.
    """
    factored, average = state.opt_state[0], state.opt_state[4]
    slots = {"v_row": factored.v_row, "v_col": factored.v_col, "v": factored.v, "m": average.ema}
    flat = {
        (*path, slot): leaf
        for slot, tree in slots.items()
        for path, leaf in traverse_util.flatten_dict(tree).items()
    }
    for module in row_last:
        row, column = (module, "kernel", "v_row"), (module, "kernel", "v_col")
        flat[row], flat[column] = flat[column], flat[row]
    return {
        "target": state.params,
        "state": {
            "step": jnp.asarray(state.step, jnp.int32),
            "param_states": traverse_util.unflatten_dict(flat),
        },
        "flax_mutables": {"batch_stats": state.statistics},
    }


def flax_optim_tree(state: Trained, slots: Mapping[str, Any]) -> dict[str, Any]:
    """`flax.optim` (Flax before 0.6): `Optimizer.state_dict`, slots below each parameter."""
    flat = {
        (*path, slot): leaf
        for slot, tree in slots.items()
        for path, leaf in traverse_util.flatten_dict(tree).items()
    }
    return {
        "target": state.params,
        "state": {"step": np.int32(state.step), "param_states": traverse_util.unflatten_dict(flat)},
    }


def write_t5x(root: Path, tree: dict[str, Any]) -> Path:
    """checkpoints.py `OrbaxCheckpointManagerInterface`: item `state`, steps `checkpoint_<n>`."""
    options = ocp.CheckpointManagerOptions(step_prefix="checkpoint")
    handlers = {"state": ocp.PyTreeCheckpointHandler(use_ocdbt=True)}
    with ocp.CheckpointManager(root, options=options, item_handlers=handlers) as manager:
        manager.save(STEP, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))
    return root


def write_t5x_native(root: Path, tree: dict[str, Any]) -> Path:
    """checkpoints.py `Checkpointer.save`: arrays by TensorStore, the tree with their specs by msgpack.

    Parameters and slots have mesh axes and so a spec; steps and counts have none and stay in the tree.
    """
    directory = root / f"checkpoint_{STEP}"
    directory.mkdir(parents=True)
    written = {}
    for path, leaf in traverse_util.flatten_dict(tree).items():
        written[path] = _write_spec(directory, ".".join(path), np.asarray(leaf))
    contents = {"version": 3, "optimizer": traverse_util.unflatten_dict(written)}
    (directory / "checkpoint").write_bytes(serialization.to_bytes(contents))
    return directory


def _write_spec(directory: Path, name: str, value: np.ndarray) -> Any:
    if value.ndim == 0:
        return value
    spec = {
        "driver": "zarr",
        "dtype": value.dtype.name,
        "kvstore": {"driver": "file", "path": name},
        "metadata": {"compressor": {"id": "gzip"}, "shape": value.shape, "chunks": value.shape},
    }
    absolute = {**spec, "kvstore": {"driver": "file", "path": f"{directory}/{name}"}}
    ts.open(absolute, create=True).result().write(value).result()
    return ts.Spec(spec).to_json()  # What `serialization` keeps of a spec there.


@struct.dataclass
class FlaxState:
    """The fields of flax/training/train_state.py `TrainState` that are saved, and statistics beside them."""

    step: Any
    params: Any
    opt_state: Any
    batch_stats: Any


def flax_state(state: Trained) -> FlaxState:
    """A Flax train state with batch statistics."""
    return FlaxState(
        step=state.step, params=state.params, opt_state=state.opt_state, batch_stats=state.statistics
    )


def write_flax(root: Path, tree: Any, *, orbax: bool, step: int = STEP) -> Path:
    """flax/training/checkpoints.py `save_checkpoint`, by msgpack or by Orbax."""
    before = flax.config.flax_use_orbax_checkpointing
    flax.config.update("flax_use_orbax_checkpointing", orbax)
    try:
        return Path(checkpoints.save_checkpoint(root.absolute(), tree, step=step, keep=2))
    finally:
        flax.config.update("flax_use_orbax_checkpointing", before)


def write_flax_distributed(root: Path, tree: Any, distributed: str) -> Path:
    """`save_checkpoint_multiprocess` there: arrays of several processes lie beside the file.

    One process cannot have such an array, so the call's work is done by hand for `distributed`.
    """
    flat = traverse_util.flatten_dict(serialization.to_state_dict(tree), sep="/", keep_empty_nodes=True)
    path = root / f"checkpoint_{STEP}"
    folder = root / f"checkpoint_{STEP}_gda" / distributed
    manager = GlobalAsyncCheckpointManager()
    manager.serialize_with_paths([flat[distributed]], [str(folder)], on_commit_callback=lambda: None)
    manager.wait_until_finished()
    flat[distributed] = f"//GDAPlaceholder:{distributed}"
    path.write_bytes(serialization.to_bytes(traverse_util.unflatten_dict(flat, sep="/")))
    return path


@struct.dataclass
class ScenicState:
    """The fields of scenic/train_lib/train_utils.py `TrainState` that are saved."""

    opt_state: Any = None
    params: Any = None
    global_step: Any = 0
    model_state: Any = None
    rng: Any = None
    metadata: Any = None


def scenic_state(state: Trained) -> ScenicState:
    """A Scenic train state, gathered to the host as `save_checkpoint` does."""
    return as_numpy(
        ScenicState(
            opt_state=state.opt_state,
            params=state.params,
            global_step=state.step,
            model_state={"batch_stats": state.statistics},
            rng=jax.random.PRNGKey(7),
        )
    )


def early_scenic_tree(state: Trained, slots: Mapping[str, Any]) -> dict[str, Any]:
    """Scenic with `flax.optim`, and statistics without their collection's name (pretrain_utils.py)."""
    return {
        "optimizer": flax_optim_tree(state, slots),
        "global_step": np.int32(state.step),
        "model_state": state.statistics,
        "rng": np.asarray(jax.random.PRNGKey(7)),
    }


@struct.dataclass
class KauldronState:
    """The fields of kauldron/train/train_step.py `TrainState`."""

    step: Any
    params: Any
    collections: Any
    opt_state: Any


def write_kauldron(root: Path, state: Trained) -> Path:
    """checkpoint_state.py: the train state is the item `default`, written by `StandardSave`."""
    tree = KauldronState(
        step=jnp.asarray(state.step),
        params=state.params,
        collections={"batch_stats": state.statistics},
        opt_state=state.opt_state,
    )
    with ocp.CheckpointManager(root, item_handlers={"default": ocp.StandardCheckpointHandler()}) as manager:
        manager.save(STEP, args=ocp.args.Composite(default=ocp.args.StandardSave(tree)))
    return root


def big_vision_optimizer(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The chain of big_vision/optax.py `make`, with weight decay and one schedule."""

    def everything(tree: Any) -> Any:
        return jax.tree.map(lambda _: True, tree)

    def nothing(tree: Any) -> Any:
        return jax.tree.map(lambda _: False, tree)

    return optax.chain(
        optax.identity(),
        optax.masked(optimizer, everything),
        optax.scale(0.1),
        optax.add_decayed_weights(1e-3, everything),
        optax.masked(optax.scale_by_schedule(lambda count: 1.0 / (1.0 + count)), everything),
        optax.masked(optax.set_to_zero(), nothing),
        optax.scale(-1.0),
    )


def big_vision_adafactor() -> optax.GradientTransformation:
    """big_vision/optax.py `scale_by_adafactor`, for small matrices."""
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=4),
        optax.identity(),
        optax.ema(0.9, debias=False),
    )


def write_big_vision(root: Path, params: Any, opt_state: Any, **more: Any) -> Path:
    """utils.py `save_checkpoint_ts`: one array a directory, `~` between the keys of its path."""
    tree = big_vision_tree(params, opt_state, **more)
    names, leaves = zip(*_names_as_big_vision(tree), strict=True)
    folder = root / f"checkpoint.bv-{STEP:09d}"
    manager = GlobalAsyncCheckpointManager()
    paths = [str(folder / name.replace("/", "~")) for name in names]
    manager.serialize_with_paths(
        [jnp.asarray(leaf) for leaf in leaves], paths, on_commit_callback=lambda: None
    )
    manager.wait_until_finished()
    return folder


def big_vision_tree(params: Any, opt_state: Any, **more: Any) -> dict[str, Any]:
    """train.py: what is handed to the saver, for all of big_vision's time with optax."""
    return {"params": params, "opt": opt_state, "chrono": {"accum_train_time": np.float32(12.5)}, **more}


def write_big_vision_npz(
    root: Path, tree: Any, *, name: str = "checkpoint.npz", copies: Collection[int] = (), packed: bool = False
) -> Path:
    """utils.py `save_checkpoint`, until `save_checkpoint_ts`: one file, and copies of it at some steps."""
    content = io.BytesIO()
    save = np.savez_compressed if packed else np.savez
    # `jax.tree.map(np.asarray)` is done by the trainers; a bfloat16 array becomes raw bytes in `savez`.
    save(content, **{name: np.asarray(leaf) for name, leaf in _names_as_big_vision(tree)})
    root.mkdir(parents=True, exist_ok=True)
    path = root / name
    unfinished = Path(f"{path}-TEMPORARY")
    unfinished.write_bytes(content.getvalue())
    unfinished.replace(path)
    for step in copies:
        shutil.copy(path, f"{path}-{step:09d}")
    return path


def _names_as_big_vision(tree: Any) -> list[tuple[str, Any]]:
    """utils.py `_traverse_with_names`: a named tuple is a tuple, so its fields are numbers."""
    if isinstance(tree, Mapping):
        inner = [(key, tree[key]) for key in sorted(tree)]
    elif isinstance(tree, list | tuple):
        inner = [(str(number), value) for number, value in enumerate(tree)]
    else:
        return [("", tree)]
    return [
        (f"{key}/{name}".rstrip("/"), leaf)
        for key, value in inner
        for name, leaf in _names_as_big_vision(value)
    ]


def write_standard(path: Path, tree: Any) -> Path:
    """Gemma's gm/ckpts/_checkpoint.py `save_params`, and many others: `StandardCheckpointer`."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)
    return path


def write_items(root: Path, items: Mapping[str, Any]) -> Path:
    """What openpi does in training/checkpoints.py `save_state`: each item by its own PyTree handler."""
    handlers = {name: ocp.PyTreeCheckpointHandler() for name in items}
    with ocp.CheckpointManager(root, item_handlers=handlers) as manager:
        saves = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        manager.save(STEP, args=ocp.args.Composite(**saves))
    return root


def write_tunix(root: Path, items: Mapping[str, Any]) -> Path:
    """Tunix's sft/checkpoint_manager.py `save`, through Orbax's v1 interface."""
    from orbax.checkpoint import v1

    with v1.training.Checkpointer(root) as checkpointer:
        checkpointer.save_checkpointables(STEP, dict(items))
    return root


def flax_optim_slots(state: Trained) -> dict[str, Any]:
    """The slots of `flax.optim.Adam` or `flax.optim.Momentum`, from optax's state."""
    moments = state.opt_state[0]
    if isinstance(moments, optax.TraceState):
        return {"momentum": moments.trace}
    return {"grad_ema": moments.mu, "grad_sq_ema": moments.nu}


def gemma_tree(params: Any, form: str, kinds: int) -> Any:
    """gm/ckpts/_checkpoint.py: the model's own params as the released files have them."""
    if form == "nested":
        return params
    flat = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        path = (*path, "w") if path[-1] in ("linear", "gating_einsum") else path
        flat["/".join(("transformer", *path[:-1])), path[-1]] = leaf
    return traverse_util.unflatten_dict(flat if form == "flat" else _stack_gemma(flat, kinds))


def _stack_gemma(flat: Mapping[tuple[str, str], Any], kinds: int) -> dict[tuple[str, str], Any]:
    """gm/ckpts/_compat.py `stack_params`."""
    stacked: dict[tuple[str, str], Any] = {}
    slices: dict[tuple[str, str], dict[int, Any]] = {}
    for (key, name), leaf in flat.items():
        match = re.match(r"(.*?)layer_(\d+)(.*)", key)
        if match is None:
            stacked[key, name] = leaf
            continue
        prefix, number, suffix = match[1], int(match[2]), match[3]
        group = f"{prefix}stacked_layers/attention_type_{number % kinds}{suffix}"
        slices.setdefault((group, name), {})[number // kinds] = leaf
    for path, layers in slices.items():
        stacked[path] = np.stack([layer for _, layer in sorted(layers.items())])
    return stacked


def boxed(tree: Any) -> Any:
    """What Orbax makes of an `nnx.State`: a last key `value` to every leaf."""
    return jax.tree.map(lambda leaf: {"value": leaf}, tree)


def boxed_moments(opt_state: Any) -> Any:
    """An optax state over an `nnx.State`: moments are states, counts are arrays."""
    return tuple(
        type(part)(*(boxed(field) if isinstance(field, Mapping) else field for field in part))
        for part in opt_state
    )


# What big_vision's configurations call `optax_name`.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: big_vision_optimizer(optax.scale_by_adam(b2=0.95, eps=1e-4)),
    "adafactor": lambda: big_vision_optimizer(big_vision_adafactor()),
    "momentum": lambda: big_vision_optimizer(optax.trace(decay=0.9)),
}
