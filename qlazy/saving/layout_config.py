"""The layouts of saved folders, and what `config.json` says of the weights, to transformers, vLLM and gptqmodel. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from qlazy.errors import UsageError
from qlazy.formats import Codebook4, Format, Int4, Int8

Layout = Literal["compressed-tensors", "bitsandbytes", "gptq"]
"""Whose layout a folder has."""

LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_WEIGHTS = ("int4", "int8", "nf4", "fp4")


def require_layout(layout: str) -> Layout:
    """Check the name of a layout.

    Args:
        layout: What was asked for.
    Returns:
        The same.
    Raises:
        UsageError: there is none of that name.
    """
    for known in LAYOUTS:
        if layout == known:
            return known
    named = f" That is a format of weights: format={layout!r}." if layout in _WEIGHTS else ""
    raise UsageError(f"There is no layout {layout!r}.{named}", hint=f"Use {', '.join(LAYOUTS)}.")


def quantization_config(
    layout: str,
    packed: Mapping[str, Format],
    unpacked: Sequence[str],
    others: Sequence[str],
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What `config.json` says of a folder's weights, for transformers, compressed-tensors, vLLM and gptqmodel.

    Args:
        layout: Of the folder.
        packed: Format by name of layer.
        unpacked: Linear layers that are not packed.
        others: Those of `packed` that are no plain linear layers, such as embeddings.
        names: What transformers calls those of `packed` for which the files have another name: it looks for its own.
    Returns:
        The `quantization_config`.
    """
    counts: dict[Format, int] = {}
    for name, fmt in packed.items():
        counts[fmt] = counts.get(fmt, 0) + (name not in others)
    formats = sorted(counts, key=lambda fmt: -counts[fmt])
    most = formats[0] if formats else Int4()
    if layout == "bitsandbytes":
        return _bitsandbytes_config(most, unpacked)
    also = {name: {name: None, (names or {}).get(name, name): None} for name in packed}
    if layout == "gptq":
        return _gptq_config(most, {each: fmt for name, fmt in packed.items() for each in also[name]}, unpacked)
    groups = {}
    # Layers by name come first: there are readers that take the first group that matches, and some by class alone.
    for number, fmt in enumerate(reversed(formats)):
        is_most = fmt == most
        own = [name for name, packed_as in packed.items() if packed_as == fmt and (not is_most or name in others)]
        targets = [*(_target(each) for name in own for each in also[name]), *(["Linear"] if is_most else [])]
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": _scheme(fmt),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(unpacked),
        "kv_cache_scheme": None,
    }


def _target(name: str) -> str:
    """How a config group names one layer: by its path, or where that has no dots, which might be a class, by an expression."""
    return name if "." in name else rf"re:(.*\.)?{name}$"


def _scheme(fmt: Format) -> dict[str, Any]:
    assert isinstance(fmt, Int4 | Int8)
    channel = fmt.group_size == -1
    return {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": fmt.symmetric if isinstance(fmt, Int4) else True,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else fmt.group_size,
        "dynamic": False,
        "actorder": None,
    }


def _bitsandbytes_config(fmt: Format, unpacked: Sequence[str]) -> dict[str, Any]:
    said: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": isinstance(fmt, Codebook4),
        "load_in_8bit": not isinstance(fmt, Codebook4),
        "llm_int8_skip_modules": list(unpacked),
    }
    if isinstance(fmt, Codebook4):
        said |= {
            "bnb_4bit_quant_type": fmt.kind,
            "bnb_4bit_use_double_quant": fmt.double_quant,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }
    return said


def _gptq_config(fmt: Format, packed: Mapping[str, Format], unpacked: Sequence[str]) -> dict[str, Any]:
    symmetric = fmt.symmetric if isinstance(fmt, Int4) else True
    said = {
        "quant_method": "gptq",
        "bits": fmt.bits,
        "group_size": fmt.group_size,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": "lm_head" in packed,
        # The first version of the format stores zeros less one, which asymmetric zeros of 0 do not survive.
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "modules_to_not_convert": list(unpacked),
    }
    dynamic: dict[str, dict[str, Any]] = {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in unpacked}
    for name, own in packed.items():
        if own != fmt:
            rule = {"bits": own.bits, "group_size": own.group_size, "sym": getattr(own, "symmetric", True)}
            dynamic[f"+:^{name.replace('.', chr(92) + '.')}$"] = rule
    return said | ({"dynamic": dynamic} if dynamic else {})
