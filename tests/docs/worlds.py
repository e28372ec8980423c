"""What lies on disk, and which names are known, before a page begins."""

import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from orbax_nnx_handler import plan_restore, restore
from tests.cases import load_case
from tests.gallery import models
from tests.gallery.models import Size, linen_decoder, save, train_state
from tests.layouts import language, writers

World = dict[str, Any]


def nothing(_: pathlib.Path) -> World:
    """A page that makes everything itself."""
    return {}


def empty_directory(directory: pathlib.Path) -> World:
    """A page that needs a place to write to."""
    return {"path": directory / "run"}


def decoder(directory: pathlib.Path) -> World:
    """A Linen decoder's train state at step 1200, and the NNX program for it."""
    optimizer = optax.adamw(1e-3)
    path = directory / "run"
    tree = train_state(linen_decoder(Size(layers=4)), optimizer)
    with ocp.CheckpointManager(path, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        manager.save(1200, args=ocp.args.PyTreeSave(tree))

    def make_model() -> nnx.Module:
        return models.Decoder(Size(layers=4), nnx.Rngs(0))

    def make_train_state() -> nnx.Module:
        return models.Training(make_model(), optimizer)

    programs = {"make_model": make_model, "make_train_state": make_train_state, "optimizer": optimizer}
    return {"path": path, "nnx": nnx, **programs}


class _Tiny(nnx.Module):
    """A model whose plan fits on the first page of the README."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, 16, rngs=rngs)
        self.layers = nnx.List(nnx.Linear(16, 16, use_bias=False, rngs=rngs) for _ in range(4))
        self.head = nnx.Linear(16, 256, use_bias=False, rngs=rngs)


def tiny(directory: pathlib.Path) -> World:
    """A Linen program's train state, its layers stacked, and an NNX program with layers one by one."""
    optimizer = optax.sgd(1e-3, momentum=0.9)
    params = {
        "embed": {"embedding": np.zeros((256, 16), np.float32)},
        "layers": {"kernel": np.zeros((16, 4, 16), np.float32)},
        "head": {"kernel": np.zeros((16, 256), np.float32)},
    }
    path = directory / "run"
    with ocp.CheckpointManager(path, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        manager.save(1200, args=ocp.args.PyTreeSave(train_state(params, optimizer)))

    def make_train_state() -> nnx.Module:
        return models.Training(_Tiny(nnx.Rngs(0)), optimizer)

    return {"path": path, "make_train_state": make_train_state, "nnx": nnx}


def migration(directory: pathlib.Path) -> World:
    """What MaxText, openpi and a plain Linen loop left behind."""
    case = load_case("llama2_scanned_to_unscanned")
    shutil.copytree(case.step_path, directory / "maxtext" / "3")
    params = linen_decoder()
    save(directory / "openpi" / "params", {"params": _boxed(params)})
    plain = decoder(directory)
    return plain | {
        "maxtext_root": directory / "maxtext",
        "maxtext_target": case.target,
        "openpi_params": directory / "openpi" / "params",
        "make_openpi_model": lambda: models.Decoder(Size(), nnx.Rngs(0)),
        "linen_params": linen_decoder(Size(layers=4)),
    }


def gemma(directory: pathlib.Path) -> World:
    """Two layers as Gemma 2's released files hold them, and a model with Tunix's names."""
    stored: dict[str, dict[str, Any]] = {
        "transformer/embedder": {"input_embedding": np.ones((12, 8), np.float32)},
        "transformer/final_norm": {"scale": np.ones(8, np.float32)},
    }
    wanted: dict[tuple[str | int, ...], tuple[int, ...]] = {
        ("embedder", "input_embedding"): (12, 8),
        ("final_norm", "scale"): (8,),
    }
    attention = {"q_einsum": (4, 8, 6), "kv_einsum": (2, 2, 8, 6), "attn_vec_einsum": (4, 6, 8)}
    norms = {"pre_attention_norm": "pre_attention_norm", "post_attention_norm": "post_attn_norm"}
    norms |= {"pre_ffw_norm": "pre_ffw_norm", "post_ffw_norm": "post_ffw_norm"}
    for layer in range(2):
        for name, shape in attention.items():
            stored[f"transformer/layer_{layer}/attn/{name}"] = {"w": np.ones(shape, np.float32)}
            wanted["layers", layer, "attn", name, "w"] = shape
        for name, shape in {"gating_einsum": (2, 8, 10), "linear": (10, 8)}.items():
            stored[f"transformer/layer_{layer}/mlp/{name}"] = {"w": np.ones(shape, np.float32)}
        for name, shape in {"gate_proj": (8, 10), "up_proj": (8, 10), "down_proj": (10, 8)}.items():
            wanted["layers", layer, "mlp", name, "kernel"] = shape
        for name, here in norms.items():
            stored[f"transformer/layer_{layer}/{name}"] = {"scale": np.ones(8, np.float32)}
            wanted["layers", layer, here, "scale"] = (8,)
    path = writers.write_standard(directory / "gemma2-2b", stored)
    state = nnx.from_flat_state(
        [(name, nnx.Param(jax.ShapeDtypeStruct(shape, np.float32))) for name, shape in wanted.items()]
    )
    return {"path": path, "model": state}


def _boxed(tree: Any) -> Any:
    return {key: _boxed(part) for key, part in tree.items()} if isinstance(tree, dict) else {"value": tree}


def policies(directory: pathlib.Path) -> World:
    """A pretrained decoder, and a program that puts a new classifier on top of it."""
    world = decoder(directory)

    class Tagger(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            for name, part in vars(models.Decoder(Size(layers=4), rngs)).items():
                if not name.startswith("_"):
                    setattr(self, name, part)
            self.classifier = nnx.Linear(16, 5, rngs=rngs)

    return world | {"make_tagger": lambda: Tagger(nnx.Rngs(0)), "classifier": directory / "classifier"}


def rules(directory: pathlib.Path) -> World:
    """A Linen program with names and shapes of its own."""
    chance = np.random.default_rng(0)

    def values(*shape: int) -> np.ndarray[Any, Any]:
        return chance.normal(size=shape).astype(np.float32)

    tree = {
        "Dense_0": {"kernel": values(8, 16), "bias": values(16)},
        "attention": {"qkv": {"kernel": values(16, 48)}},
        "head": {"kernel": values(10, 16)},
        "probe": {"kernel": values(3, 3)},
    }
    save(directory / "run" / "1200" / "default", {"params": tree})
    return {"path": directory / "run", "nnx": nnx}


def layouts(directory: pathlib.Path) -> World:
    """A train state, Gemma's weights in two forms, a step of openpi's with averages, and an archive."""
    world = decoder(directory)
    params = models.zeros(
        jax.eval_shape(lambda: language.LinenGemma().init(jax.random.key(0), language.TOKENS))
    )
    forms = {
        form: writers.write_standard(
            directory / form, writers.gemma_tree(params["params"], form, language.KINDS)
        )
        for form in ("nested", "stacked")
    }
    weights = nnx.to_pure_dict(nnx.state(world["make_model"]()))
    moments = writers.boxed_moments(world["optimizer"].init(weights))
    items = {
        "params": {"params": writers.boxed(weights)},
        "train_state": {"step": np.int32(3), "opt_state": moments},
    }
    towers = {"img": linen_decoder(Size(layers=4)), "t": np.zeros(1, np.float32)}
    writers.write_big_vision_npz(directory / "vit", {"params": towers})
    return world | {
        "plan_restore": plan_restore,
        "restore": restore,
        "vit": nnx.eval_shape(world["make_model"]),
        "target": nnx.eval_shape(world["make_train_state"]),
        **forms,
        "gemma": nnx.eval_shape(language.NnxGemma),
        "root": writers.write_items(directory / "openpi", items),
        **{part: getattr(nnx.eval_shape(world["make_train_state"]), part) for part in ("model", "optimizer")},
    }
