"""Match a GGUF file with a model: llama.cpp's names, and what its converter did to the values, by transformers' tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform

from qlazy.errors import UnsupportedModel
from qlazy.layers.quant_linear import ROW_BLOCK
from qlazy.matching.fill import Fill, straight_fill
from qlazy.matching.gguf_experts import expert_fills
from qlazy.sources.gguf_config import CONVERTED
from qlazy.sources.source import Source, TensorInfo


def gguf_mapping(model: PreTrainedModel, source: Source) -> list[WeightTransform] | None:
    """The renames and converters of an architecture for which transformers has them instead of its older tables.

    Args:
        model: A placeholder.
        source: An opened GGUF file.
    Returns:
        As `get_model_conversion_mapping` for other checkpoints; None for an architecture that `match_gguf` is for.
    """
    arch = source.config.get("model_type")
    if arch not in CONVERTED:
        return None
    from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS

    mapping: list[WeightTransform] = GGUF_ARCHS[arch](model.config)
    return mapping


def match_gguf(model: PreTrainedModel, source: Source, state: dict[str, Tensor]) -> tuple[list[Fill], list[str]]:
    """Find the place of every tensor of a GGUF file.

    Args:
        model: A placeholder.
        source: An opened GGUF file.
        state: The model's tensors by name.
    Returns:
        The fills, and the names of tensors that have no place.
    Raises:
        UnsupportedModel: an architecture whose names are not known, or whose experts are not.
        CorruptCheckpoint: experts of other shapes than the model's.
    """
    import numpy as np
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    arch = str(source.config.get("model_type"))
    processor: Any = TENSOR_PROCESSORS.get(arch, TensorProcessor)(config=model.config.to_dict())  # type: ignore[no-untyped-call]
    fills = expert_fills(model, source, state)
    taken = {info.name for fill in fills for info in fill.sources}
    filled = {target for fill in fills for target in fill.targets}
    names = _gguf_names(model, processor, arch, [name for name in state if name not in filled])
    leftover = []
    for key, info in source.tensors.items():
        if key in taken:
            continue
        target = names.get(key)
        known = target is not None and target in state
        if len(info.shape) > 2 and known:
            raise UnsupportedModel(
                f"{info.path.name}: {key!r} has {len(info.shape)} dimensions; such tensors in GGUF files are not read.",
                hint="Use the model's safetensors files.",
            )
        if target is None or not known:
            leftover.append(key)
            continue

        def convert(tensors: list[Tensor], key: str = key, target: str = target) -> dict[str, Tensor]:
            made = processor.process(
                tensors[0].float().numpy(), key, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
            )
            return {target: torch.from_numpy(np.ascontiguousarray(made.weights)).view(state[target].shape)}

        order = _row_order(processor, key, info) if len(info.shape) == 2 else None
        if order is None:
            fills.append(Fill(sources=(info,), targets=(target,), convert=convert))
            continue
        straight = straight_fill(model, target, info, state[target])
        if not torch.equal(order, torch.arange(len(order))):
            straight = dataclasses.replace(straight, row_order=order, row_block=math.lcm(ROW_BLOCK, _closed_block(order)))
        fills.append(straight)
    return fills, leftover


def _gguf_names(model: PreTrainedModel, processor: Any, arch: str, wanted: Sequence[str]) -> dict[str, str]:
    """The model's name of every tensor that llama.cpp names, in one pass over those that are wanted.

    Where that leaves a name out, transformers' own walk over all submodules, which takes seconds for a deep model.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    known = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    names: dict[str, str] = {}
    if arch in known:
        table = get_tensor_name_map(known[arch], model.config.get_text_config().num_hidden_layers)
        for name in wanted:
            path, _, leaf = name.rpartition(".")
            gguf_name = table.get_name(path) if leaf in ("weight", "bias") else table.get_name(name)
            if gguf_name is not None:
                names[f"{gguf_name}.{leaf}" if leaf in ("weight", "bias") else gguf_name] = name
                # A parameter that is no layer's weight (gpt-oss's sinks) is called one all the same in some files.
                names.setdefault(f"{gguf_name}.weight", name)
    if not {*wanted} <= {*names.values()}:
        try:
            walked: dict[str, str] = get_gguf_hf_weights_map(model, processor)
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"The installed gguf package does not know the tensor names of model type {arch!r}.",
                hint="Update gguf, or use the model's safetensors files.",
            ) from error
        names = walked | names
    return names


def _row_order(processor: Any, key: str, info: TensorInfo) -> Tensor | None:
    """Where a processor moves each row, told by giving it row numbers; None where it does more than move rows."""
    import numpy as np

    rows = info.shape[0]
    numbers = np.arange(rows, dtype=np.float64)[:, None]
    try:
        made = processor.process(numbers.copy(), key, tensor_key_mapping=None, parsed_parameters={"tensors": {}})
    except Exception:
        return None
    if made.weights.shape != numbers.shape or made.name != key:
        return None
    came_from = torch.from_numpy(np.ascontiguousarray(made.weights))[:, 0].long()
    if not torch.equal(came_from.sort().values, torch.arange(rows)):
        return None
    return torch.argsort(came_from)


def _closed_block(order: Tensor) -> int:
    """The least number of rows in which a row order stays within equal blocks."""
    rows = len(order)
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    return next(size for size in sizes if torch.equal(order // size, torch.arange(rows) // size))
