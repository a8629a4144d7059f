"""Numbers of tiny configs that must agree with each other, and inputs to call a model of any kind with.

`tests.lazy.shrink` makes each number of a config small by itself. That is enough to build nearly every model; to call it and to
read its config again, what depends on a number has to follow it: sections of rotary dimensions, heads of Mamba layers, names of
stages, layers that features are taken from.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HEAD = 16
"""Least size of a head whose dimensions are divided between time, height and width."""

NEEDED: dict[str, dict[str, Any]] = {
    "Blip2ForImageTextRetrieval": {"qformer_config.use_qformer_text_input": True},
    "ReformerForMaskedLM": {"is_decoder": False},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "esm": {"pad_token_id": 1, "mask_token_id": 4},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0},
    "led": {"attention_window": [16, 16]},
    "perceiver": {"d_latents": 64, "num_self_attends_per_block": 2, "num_latents": 16},
    "qwen3_omni_moe": {
        "talker_config.text_config.shared_expert_intermediate_size": 16,
        "talker_config.spatial_merge_size": 2,
    },
    "qwen2_5_omni": {"enable_audio_output": False},
    "reformer": {"axial_pos_embds": False},
    "shieldgemma2": {"yes_token_index": 4, "no_token_index": 5},
    "step3p7": {"text_config.sliding_window": 8},
    "xmod": {"default_language": "en_XX"},
}
"""By type or class, what a forward pass asks for and default configs do not say."""


def parts_of(config: Any) -> Iterator[Any]:
    """A config and those in it, outermost first.

    Yields:
        Each config once.
    """
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from parts_of(value)


def fit(config: Any, model_type: str, name: str) -> None:
    """Make numbers that depend on others agree with them.

    Args:
        config: A shrunk config, changed in place.
        model_type: Key of `CONFIG_MAPPING`.
        name: Class that is to be built.
    """
    for path, value in (NEEDED.get(model_type, {}) | NEEDED.get(name, {})).items():
        *parts, name = path.split(".")
        part = config
        for inner in parts:
            part = getattr(part, inner)
        setattr(part, name, value)
    for part in parts_of(config):
        for rule in (_heads, _rotary_sections, _mamba, _layers, _stages, _experts, _features, _images, _tokens):
            try:
                rule(part)
            except (AttributeError, ValueError, TypeError):
                continue  # a property without a setter, or a value that the config refuses: it stays as it is
    _features_of_vision(config)


def _heads(part: Any) -> None:
    values = vars(part)
    hidden, heads, swa = values.get("hidden_size"), values.get("num_attention_heads"), values.get("swa_head_dim")
    if isinstance(hidden, int) and isinstance(heads, int) and "head_dim" not in values and hidden % (4 * heads):
        part.num_attention_heads = max(count for count in range(1, heads + 1) if heads % count == 0 and not hidden % count)
        if hidden % (4 * part.num_attention_heads):
            part.num_attention_heads = 1
    if values.get("num_attention_heads_per_layer"):
        part.num_attention_heads_per_layer = [part.num_attention_heads] * part.num_hidden_layers
    if isinstance(swa, int) and values.get("qk_nope_head_dim") and values.get("qk_rope_head_dim"):
        part.swa_head_dim = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]


def _rotary_sections(part: Any) -> None:
    """Sections for time, height and width that sum to half of the rotary dimensions of a head."""
    values = vars(part)
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()) or "hidden_size" not in values:
        return
    if "mrope_section" not in rope and not _divides(type(part)):
        return
    if isinstance(values.get("head_dim"), int):
        part.head_dim = size = max(HEAD, values["head_dim"])
    else:
        part.num_attention_heads = min(part.num_attention_heads, max(1, part.hidden_size // HEAD))
        part.num_key_value_heads = math.gcd(part.num_attention_heads, part.num_key_value_heads or part.num_attention_heads)
        size = part.hidden_size // part.num_attention_heads
    half = int(size * (rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0)) // 2
    side = half * 3 // 8
    part.rope_parameters = {**rope, "mrope_section": [side, side, half - 2 * side]}


def _divides(config_class: type) -> bool:
    """Whether the code of a type divides rotary dimensions where its config does not say how."""
    code = Path(inspect.getfile(config_class).replace("configuration_", "modeling_"))
    return code.is_file() and '.get("mrope_section", [' in code.read_text(encoding="utf-8")


def _mamba(part: Any) -> None:
    """Heads that fill the inner width."""
    values = vars(part)
    if {"mamba_expand", "mamba_n_heads", "mamba_d_head"} <= set(values):
        part.mamba_n_heads = 4
        part.mamba_d_head = int(part.mamba_expand * part.hidden_size) // 4


def _layers(part: Any) -> None:
    """Kinds of layers: two of them, where the type has more than one; as many layers as lists of one value each have."""
    kinds = vars(part).get("layer_types")
    if kinds and len(set(kinds)) == 1 and len(kinds) == 2:
        others = [kind for kind in type(part)().layer_types if kind != kinds[0]]
        part.layer_types = [kinds[0], *others[:1]] if others else kinds
    if "sliding_attention" in (vars(part).get("layer_types") or ()) and vars(part).get("sliding_window", 0) is None:
        part.sliding_window = 8
    widths = vars(part).get("hidden_sizes")
    for key in ("num_hidden_layers", "num_encoder_blocks"):
        if isinstance(widths, list) and key in vars(part) and len(type(part)().hidden_sizes) == getattr(type(part)(), key):
            setattr(part, key, len(widths))


def _stages(part: Any) -> None:
    """Names of the stages that are left, and the last of them as output."""
    names, count = vars(part).get("stage_names"), vars(part).get("num_hidden_layers")
    if isinstance(names, list) and isinstance(count, int) and len(names) > count + 1:
        part.stage_names = names[: count + 1]
        part._out_features, part._out_indices = [part.stage_names[-1]], [count]


def _experts(part: Any) -> None:
    """One group of experts, two of them for a token, and pools of keys that an index of two can take."""
    if isinstance(vars(part).get("index_kpool"), int):
        part.index_kpool = min(part.index_kpool, part.index_topk)
    for key, value in {"n_group": 1, "num_group": 1, "topk_group": 1, "moe_k": 2}.items():
        if isinstance(vars(part).get(key), int):
            setattr(part, key, min(value, vars(part)[key]))


def _features(part: Any) -> None:
    """A smaller image and network, where nothing else depends on its size."""
    for key, value in list(vars(part).items()):
        if key.endswith("_coefficient") and isinstance(value, float) and value > 1:
            setattr(part, key, 1.0)
            if key == "width_coefficient":
                part.hidden_dim = int(part.hidden_dim / value)


def _images(part: Any) -> None:
    if "patch_size" not in vars(part) and isinstance(vars(part).get("image_size"), int):
        part.image_size = min(128, part.image_size)


def _tokens(part: Any) -> None:
    """Few tokens for an image, and a token that stands for them."""
    for key in ("num_query_tokens", "latent_query_num"):
        if isinstance(vars(part).get(key), int):
            setattr(part, key, min(8, vars(part)[key]))
    for key in ("image_token_index", "video_token_index"):
        if key in vars(part) and vars(part)[key] is None:
            setattr(part, key, 4)


def _features_of_vision(config: Any) -> None:
    """Layers of the vision model that features are taken from: of those that are left."""
    for part in parts_of(config):
        for key, value in list(vars(part).items()):
            if key in ("vision_feature_layer", "vision_feature_layers") and isinstance(value, list | tuple):
                setattr(part, key, [-1 - index for index in range(len(value))])


def inputs_of(model: Any) -> list[Callable[[], dict[str, Any]]]:
    """Ways to call a model, to be tried in turn: of text, then of pictures, sounds and both.

    Args:
        model: Anything with a config.
    Returns:
        Functions that make keyword arguments; where a config lacks what one reads, it raises.
    """
    import torch

    torch.manual_seed(1)
    ids = torch.randint(5, 60, (2, 12))
    config = model.config
    pictured = (part for part in parts_of(config) if getattr(part, "image_size", None))
    vision = getattr(config, "vision_config", None) or next(pictured, config)
    size = getattr(vision, "image_size", None) or 32
    size = size if isinstance(size, int) else size[0]
    channels = getattr(vision, "num_channels", 3) or 3
    pixels = torch.randn(2, channels, size, size)
    text = {"input_ids": ids}
    mels = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 80
    frames = 2 * (getattr(config, "max_source_positions", None) or 64)
    features = torch.randn(2, mels, frames)
    known = {"pixel_values": pixels, "pixel_values_videos": pixels[:, None].expand(-1, 4, -1, -1, -1), "input_ids": ids}
    known |= {"qformer_input_ids": ids, "decoder_input_ids": ids}
    names = inspect.signature(type(model).forward).parameters
    queries = getattr(config, "num_query_tokens", 0)
    ways: list[Callable[[], dict[str, Any]]] = [
        lambda: text,
        lambda: {**text, "use_cache": False},
        lambda: {**text, "decoder_input_ids": ids},
        lambda: {**text, "bbox": torch.zeros(2, 12, 4, dtype=torch.long)},
        lambda: {**text, "pixel_values": pixels},
        lambda: {"pixel_values": pixels},
        lambda: {"input_values": torch.randn(2, 4000)},
        lambda: {"input_features": features, "decoder_input_ids": ids},
        lambda: {"input_features": features.transpose(1, 2)},
        lambda: {"input_features": features.transpose(1, 2), "decoder_input_ids": ids},
        lambda: {"input_values": torch.randn(2, 4000), "decoder_input_ids": ids},
        lambda: {"input_ids": ids[:, :, None].expand(-1, -1, getattr(config, "num_codebooks", 4) or 4)},
        lambda: {"input_values": torch.randn(2, 64, 128)},
        lambda: {"pixel_values": pixels, "decoder_input_ids": ids},
        lambda: {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)},
        lambda: {key: known[key] for key in names if key in known},
        lambda: {key: known[key] for key, one in names.items() if key in known and (one.default is one.empty)},
        lambda: _with_image_tokens(ids, pixels, queries, names),
        lambda: _with_image_tokens(ids, pixels[:, None].expand(-1, 2, -1, -1, -1), 2 * queries, names),
        lambda: _attended(ids, pixels),
        lambda: _placed(ids, pixels, config.latent_query_num),
        lambda: _patches(ids, vision, names),
        lambda: _flattened(ids, vision),
        lambda: {**text, "bbox": torch.rand(2, 12, 4).sort(-1).values, "decoder_input_ids": ids},
        lambda: _robot(ids, pixels, config),
        lambda: {**text, "input_features": torch.randn(2, config.audio_config.num_mel_bins, 12 * config.audio_length_per_tok)},
        lambda: {"input_ids": ids[:, :, None].expand(-1, -1, config.num_codebooks + 1)},
    ]
    for key in ("feature_projection_input_dim", "input_dim", "num_mel_bins"):
        for part in parts_of(config):
            if isinstance(width := getattr(part, key, None), int):
                ways.append(lambda width=width: {"input_features": torch.randn(2, 40, width)})
                ways.append(lambda width=width: {"input_features": torch.randn(2, 40, width), "decoder_input_ids": ids})
                ways.append(lambda width=4 * width: {"input_features": torch.randn(2, 40, width)})  # of frames side by side
    return ways


def _with_image_tokens(ids: Any, pixels: Any, queries: int, names: Any) -> dict[str, Any]:
    """As many image tokens as the model makes of a picture, before the text."""
    import torch

    longer = torch.cat([torch.full((2, queries), 4), ids], 1)
    given = {"pixel_values": pixels, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
    return given | {"qformer_input_ids": ids, "decoder_input_ids": ids} if "qformer_input_ids" in names else given


def _attended(ids: Any, pixels: Any) -> dict[str, Any]:
    """A picture that each token looks at."""
    import torch

    mask = torch.ones(2, ids.shape[1], 1, dtype=torch.long)
    return {"input_ids": ids, "pixel_values": pixels[:, None], "image_attention_mask": mask, "use_cache": False}


def _placed(ids: Any, pixels: Any, queries: int) -> dict[str, Any]:
    """A mask of the tokens that a picture takes."""
    import torch

    place = (torch.arange(ids.shape[1] + queries) < queries).expand(2, -1)
    longer = torch.cat([torch.full((2, queries), 4), ids], 1)
    return {"pixel_values": pixels, "input_ids": longer, "image_embeds_position_mask": place}


def _patches(ids: Any, vision: Any, names: Any) -> dict[str, Any]:
    """Patches instead of a picture, with the shape that they have."""
    import torch

    given = {
        "pixel_values": torch.randn(2, 16, vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }
    return given | ({"input_ids": ids} if "input_ids" in names else {})


def _flattened(ids: Any, vision: Any) -> dict[str, Any]:
    """Patches that begin with their row and column."""
    import torch

    patches = torch.randn(2, 9, 2 + vision.patch_embed_hidden_size)
    patches[:, :, 0], patches[:, :, 1] = torch.arange(9) // 3 + 1, torch.arange(9) % 3 + 1
    return {"flattened_patches": patches, "decoder_input_ids": ids}


def _robot(ids: Any, pixels: Any, config: Any) -> dict[str, Any]:
    """A state of a robot, what it sees, and noise."""
    import torch

    return {
        "state": torch.randn(2, config.max_state_dim),
        "noise": torch.randn(2, config.chunk_size, config.max_action_dim),
        "timestep": torch.rand(2),
        "input_ids": ids,
        "pixel_values": pixels[:, None],
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        "attention_mask": torch.ones_like(ids),
    }
