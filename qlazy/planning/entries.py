"""What a model will hold, told from a source's headers and config alone. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from qlazy.errors import CorruptCheckpoint, UnsupportedModel, UsageError
from qlazy.formats import ITEMSIZE
from qlazy.planning.budget import Budget
from qlazy.planning.data import Entry
from qlazy.planning.demand import buffers, layer_count, text_config
from qlazy.planning.experts import expert_count, is_flat_stack, stack_experts
from qlazy.planning.recipe import guess_kind
from qlazy.sources.gguf_config import MIXTURES, require_known_experts
from qlazy.sources.packed import PackedTensor, read_whole_at_once
from qlazy.sources.quantized import METHODS, quant_method, quantization
from qlazy.sources.source import Source, TensorInfo

_MODEL_DTYPES = ("float32", "float16", "bfloat16")
_ROW_BLOCK = 64
"""Rows that a low-bit layer takes together, see `qlazy/layers/quant_linear.py`, which needs torch."""
_CONV1D = re.compile(r"\.(c_attn|q_attn|c_proj|c_fc)\.weight$")
_CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_UNTIED = re.compile(
    r"(codegen|dbrx|exaone4|glm4?|glm4_moe|gpt_neox|gpt_oss|gptj|granite|granitemoe|jamba|bamba|idefics3|internlm3|smolvlm"
    r"|llama|llava|llava_next|minimax_m2|ministral|mistral|mixtral|nemotron|olmo[23]?|olmoe|persimmon|phi3?|phimoe|stablelm"
    r"|deepseek_v[23]|qwen[23](_moe)?|qwen3_next|qwen(2|2_5|3)_vl|seed_oss)"
)
"""Model types whose config class leaves head and embedding untied where config.json does not say."""
_TIED = ("t5", "mt5", "umt5", "longt5", "udop", "pop2piano", "csm", "hunyuan_vl", "paddleocr_vl", "shieldgemma2")
"""Model types whose config class ties them whatever config.json says."""
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "bool")


def resolve_dtype(source: Source, dtype: str, budget: Budget) -> str:
    """The dtype of everything that is not quantized, on the devices of a load.

    Args:
        source: An opened source.
        dtype: `auto` or a torch dtype name.
        budget: The devices: a CPU has no fast float16, so that `auto` takes bfloat16 there.
    Returns:
        `float32`, `float16` or `bfloat16`.
    Raises:
        UsageError: any other name.
    """
    own = own_dtype(source, dtype)
    return "bfloat16" if dtype == "auto" and own == "float16" and budget.devices == ("cpu",) else own


def own_dtype(source: Source, dtype: str) -> str:
    """The dtype of everything that is not quantized, whatever it will run on: for what is written, or kept as it is stored.

    Args:
        source: An opened source.
        dtype: `auto` or a torch dtype name.
    Returns:
        `float32`, `float16` or `bfloat16`; for `auto` what the config says, or most of what is stored is in.
    Raises:
        UsageError: any other name.
    """
    if dtype == "auto":
        named = [c.get(key) for c in (source.config, text_config(source.config)) for key in ("dtype", "torch_dtype")]
        known = [name for name in (str(n).removeprefix("torch.") for n in named) if name in _MODEL_DTYPES]
        return known[0] if known else _stored_dtype(source)
    if dtype not in _MODEL_DTYPES:
        raise UsageError(f"There is no model dtype {dtype!r}.", hint="Use --dtype auto, bfloat16, float16 or float32.")
    return dtype


def entries(source: Source, dtype: str) -> list[Entry]:
    """The tensors of a source as a model will hold them, as far as their names tell.

    Args:
        source: An opened source.
        dtype: Dtype of everything that is not quantized.
    Returns:
        One entry a tensor, in file order, and one for each buffer that the model computes.
    Raises:
        UnsupportedModel: the weights are quantized already.
        CorruptCheckpoint: config.json names more layers than there are tensors.
    """
    require_unquantized(source)
    require_plausible(source)
    model_type, family = _model_type(source), str(text_config(source.config).get("model_type"))
    tied = ties_head(source.config)
    found = []
    for t in sorted(source.tensors.values(), key=lambda t: (str(t.path), t.offset, t.name)):
        kind = guess_kind(t.name, t.shape, family)
        if kind == "head" and tied:
            kind = "tied"
        if t.name.endswith(".out_proj.weight") and t.name.replace(".out_proj.weight", ".in_proj_weight") in source.tensors:
            kind = "other"  # torch's MultiheadAttention multiplies by this weight itself; it cannot be swapped
        # What is packed was turned before.
        turned = kind == "linear" and _is_conv1d(t.name, model_type) and not isinstance(t, PackedTensor)
        found.append(
            Entry(
                name=t.name,
                shape=t.shape[::-1] if turned else t.shape,
                dtype=t.dtype if t.dtype in _INTEGERS else dtype,
                kind=kind,
                source_nbytes=t.nbytes,
            )
        )
    found = stack_experts(found, source.config)
    shapes = {t.name: t.shape for t in source.tensors.values()}
    for name, (length, buffer_dtype) in buffers(source.config, shapes).items():
        if name not in shapes:
            found.append(Entry(name=name, shape=(length,), dtype=buffer_dtype, kind="other", source_nbytes=0))
    return found


def ties_head(config: Mapping[str, Any]) -> bool:
    """Whether a model's output head is tied to its embedding, as far as the config tells; in doubt it is, and takes more bytes.

    A tied head that is stored all the same counts as tied: what its values are, headers do not tell.

    Args:
        config: A config.json.
    Returns:
        What `tie_word_embeddings` says, the text model's True included, else what the model type's config class takes.
    """
    if text_config(config).get("tie_word_embeddings") is True or config.get("model_type") in _TIED:
        return True
    said = config.get("tie_word_embeddings")
    return said if isinstance(said, bool) else not _UNTIED.fullmatch(str(config.get("model_type")))


def conversion_bytes(source: Source) -> int:
    """Host memory for tensors that are read and converted as a whole: stored bytes and result of the largest group.

    Args:
        source: An opened source.
    Returns:
        Bytes: GPT-2's layers are turned, and experts of some families, one at a time.
    """
    model_type = _model_type(source)
    whole = [_held_bytes(t) for t in source.tensors.values() if _is_conv1d(t.name, model_type)]
    whole.append(-(-read_whole_at_once(source.tensors.values())[1] // 2))
    for t in source.tensors.values():
        if source.kind == "gguf" and ".ssm_out." in t.name:
            whole.append(math.prod(t.shape) * ITEMSIZE["float32"])  # Qwen3.5's columns are put in another order
        if guess_kind(t.name, t.shape) != "experts":
            continue
        if source.kind == "gguf":
            whole.append(_expert_bytes(t, source.config))
        elif len(t.shape) == 3 or is_flat_stack(t.name, source.config):
            # One expert: where it is stored the other way round it is turned.
            whole.append(_held_bytes(t) // max(1, t.shape[0] if len(t.shape) == 3 else expert_count(source.config)))
        elif t.shape[0] % _ROW_BLOCK:
            whole.append(2 * _held_bytes(t))  # gate and up of one expert, where one does not end on a block
    return 2 * max(whole, default=0)


def _held_bytes(t: TensorInfo) -> int:
    """Bytes of a tensor that is read as a whole; of a weight in low bits its stored bytes, and its values."""
    return t.nbytes + math.prod(t.shape) * ITEMSIZE.get(t.dtype, 4) if isinstance(t, PackedTensor) else t.nbytes


def _expert_bytes(t: TensorInfo, config: Mapping[str, Any]) -> int:
    """Bytes of one expert of a stack in a GGUF file where it is decoded as a whole; of a gate with those of its up."""
    if len(t.shape) != 3:
        return 0
    experts, rows, columns = t.shape
    mixture = MIXTURES.get(str(config.get("model_type")))
    if experts == 0 or not ((mixture is not None and mixture.turned) or ("down" not in t.name and rows % _ROW_BLOCK)):
        return 0
    return (1 if "down" in t.name else 2) * max(t.nbytes // experts, rows * columns * ITEMSIZE["float32"])


def require_unquantized(source: Source) -> None:
    """Refuse a checkpoint that is quantized in a way that is not read, and a GGUF file with experts of which that is so.

    Args:
        source: An opened source.
    Raises:
        UnsupportedModel: with the name of the method, or of the first tensor of such experts or in eight-bit floats.
    """
    hint = "Name the original model in 16 bits."
    said = quantization(source.config)
    if said is not None and (method := quant_method(said)) not in METHODS:
        raise UnsupportedModel(
            f"{source.model_id} is quantized already, with {method} in its config.json; what is read is {', '.join(METHODS)}, "
            "GGUF, and weights in 16 or 32 bits.",
            hint=hint,
        )
    if source.kind == "gguf":
        require_known_experts(str(source.config.get("model_type")), source.tensors.values())
        return
    for t in source.tensors.values():
        if t.dtype.startswith("float8"):
            raise UnsupportedModel(
                f"{source.model_id} is quantized already: {t.path.name} holds {t.name!r} in {t.dtype}, and its config.json "
                "does not say how.",
                hint=hint,
            )


def require_plausible(source: Source) -> None:
    """Refuse a config that would build a model far larger than the files hold, which takes forever.

    Args:
        source: An opened source.
    Raises:
        CorruptCheckpoint: with the number of layers and of tensors.
    """
    layers = layer_count(text_config(source.config))
    if layers > len(source.tensors):
        raise CorruptCheckpoint(
            f"{source.model_id}: its config names {layers:,} layers, but its files hold "
            f"{len(source.tensors):,} tensors in all.",
            hint="config.json and the weights belong to different models; download both again.",
        )


def _model_type(source: Source) -> str:
    """The config's model type; none for GGUF, whose files have their own names and order."""
    return str(text_config(source.config).get("model_type")) if source.kind == "safetensors" else ""


def _stored_dtype(source: Source) -> str:
    """The dtype that most bytes of a checkpoint are in; bfloat16 where that is none that a model can have."""
    total: dict[str, int] = {}
    for t in source.tensors.values():
        if len(t.shape) > 1:
            total[t.dtype] = total.get(t.dtype, 0) + t.nbytes
    most = max(sorted(total), key=lambda name: total[name], default="bfloat16")
    return most if most in _MODEL_DTYPES else "bfloat16"


def _is_conv1d(name: str, model_type: str) -> bool:
    """Whether a weight is stored as (columns, rows), as GPT-2's layers have it."""
    return model_type in _CONV1D_TYPES and _CONV1D.search(name) is not None
