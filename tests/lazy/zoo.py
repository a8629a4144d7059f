"""Models of every family of several libraries, small enough to be built twice in a moment.

`families(library)` names them. `builders(library, family)` gives ways to construct each model of one: the first that works
eagerly is the one to compare.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tests.lazy.compare import Comparison, compare
from tests.lazy.torchvision_ops import declare

Build = Callable[[], nn.Module]

LIBRARIES = ("transformers", "timm", "diffusers", "torchvision")

_SMALL = re.compile(r"test|atto|femto|pico|nano|micro|mini|tiny|xx?s(_|\d|$)|small|_s(_|$)|_?18|_b?0|_100|_x_400|_075")
_LIKELY = 5
_UNETS: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16}
_DIFFUSERS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        **_UNETS,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    },
    "UNet2DConditionModel": {
        **_UNETS,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
    },
    "UNet1DModel": {"block_out_channels": (32, 32, 64), "extra_in_channels": 16, "sample_size": 64},
    "UNet3DConditionModel": {
        **_UNETS,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
    },
    "ControlNetModel": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
    },
    "AutoencoderKL": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "norm_num_groups": 8,
    },
    "AutoencoderTiny": {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)},
    "VQModel": {"block_out_channels": (32,), "norm_num_groups": 8},
    "DiTTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "sample_size": 8,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "num_embeds_ada_norm": 10,
    },
    "SD3Transformer2DModel": {
        "sample_size": 16,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 16,
    },
    "FluxTransformer2DModel": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 4, 8),
        "in_channels": 16,
    },
    "Transformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 16,
        "num_layers": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
    },
    "PriorTransformer": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": 16},
    "UNetMotionModel": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
        "up_block_types": ("CrossAttnUpBlockMotion", "UpBlockMotion"),
    },
}


def families(library: str) -> list[str]:
    """Names of a library's families of models.

    Args:
        library: One of `LIBRARIES`.

    Returns:
        For transformers the keys of `CONFIG_MAPPING`, for timm and torchvision modules, for diffusers classes.
    """
    declare()
    if library == "transformers":
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        return list(CONFIG_MAPPING_NAMES)
    if library == "timm":
        import timm

        return [module for module in timm.list_modules() if timm.list_models(module=module)]
    if library == "torchvision":
        return list(_torchvision())
    return list(_DIFFUSERS)


def builders(library: str, family: str) -> Iterator[tuple[str, Sequence[Build]]]:
    """The models of a family, each with the ways to construct it that should be tried in turn.

    Args:
        library: One of `LIBRARIES`.
        family: One of its `families`.

    Yields:
        A name and functions without arguments.
    """
    declare()
    if library == "transformers":
        from tests.lazy.shrink import FACTORS

        for name in head_classes(family):
            yield name, [functools.partial(_transformers, family, name, factor) for factor in FACTORS]
    elif library == "timm":
        import timm

        ways = {name: functools.partial(timm.create_model, name, pretrained=False) for name in timm.list_models(module=family)}
        yield _smallest(ways)
    elif library == "torchvision":
        yield _smallest(_torchvision()[family])
    else:
        import diffusers

        yield family, [functools.partial(getattr(diffusers, family), **_DIFFUSERS[family])]


def compare_first(ways: Sequence[Build], seed: int = 0) -> Comparison:
    """Compare by the first of several ways to construct a model that works eagerly; two that fail alike are enough."""
    reason = ""
    for build in ways:
        result = compare(build, seed)
        if result.status != "unbuildable" or result.reason == reason:
            break
        reason = result.reason
    return result


def head_classes(model_type: str) -> list[str]:
    """Names of the classes that the auto mappings have for a model type, base class first; else those that its module has."""
    from transformers.models.auto import modeling_auto

    found = []
    mappings = [name for name in dir(modeling_auto) if name.endswith("MAPPING_NAMES") and name != "CONFIG_MAPPING_NAMES"]
    for mapping in sorted(mappings, key=lambda name: name != "MODEL_MAPPING_NAMES"):
        names = getattr(modeling_auto, mapping).get(model_type, ())
        found += [names] if isinstance(names, str) else names
    return list(dict.fromkeys(found)) or _of_module(model_type)


def _of_module(model_type: str) -> list[str]:
    """Classes that take this type's config: parts of other models, mostly."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    return [
        name
        for name, cls in vars(_modeling(model_type)).items()
        if isinstance(cls, type) and vars(cls).get("config_class", getattr(cls, "config_class", None)) is config_class
        if issubclass(cls, nn.Module) and not name.endswith("PreTrainedModel")
    ]


def _modeling(model_type: str) -> ModuleType:
    from transformers import CONFIG_MAPPING

    try:
        return importlib.import_module(CONFIG_MAPPING[model_type].__module__.replace(".configuration_", ".modeling_"))
    except ModuleNotFoundError:
        return ModuleType(model_type)


def _transformers(model_type: str, class_name: str, factor: int) -> nn.Module:
    import transformers

    from tests.lazy.shrink import tiny_config

    cls = getattr(transformers, class_name, None) or getattr(_modeling(model_type), class_name)
    return cls(tiny_config(model_type, factor, cls.config_class))  # type: ignore[no-any-return]


@functools.cache
def _torchvision() -> dict[str, dict[str, Build]]:
    """By module: the models' names and how to construct them."""
    import torchvision

    found: dict[str, dict[str, Build]] = {}
    for name in torchvision.models.list_models():
        builder = torchvision.models.get_model_builder(name)
        family = builder.__module__.removeprefix("torchvision.models.")
        weights = {key: None for key in inspect.signature(builder).parameters if key in ("weights", "weights_backbone")}
        found.setdefault(family, {})[name] = functools.partial(builder, **weights)
    return found


def _smallest(ways: dict[str, Build]) -> tuple[str, Sequence[Build]]:
    """The model with the fewest parameters, of those whose names sound small; what cannot be built on meta counts as large."""
    sizes = {}
    likely = sorted(ways, key=lambda name: (_SMALL.search(name) is None, len(name)))[:_LIKELY]
    for name in likely:
        build = ways[name]
        try:
            with torch.device("meta"):
                sizes[name] = sum(parameter.numel() for parameter in build().parameters())
        except Exception:
            sizes[name] = 1 << 62
    name = min(sizes, key=lambda name: (sizes[name], len(name)))
    return name, [ways[name]]
