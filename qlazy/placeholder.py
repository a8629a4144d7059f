"""Build the model that a source describes, with no storage for its parameters."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights, no_tie_weights

from qlazy.errors import UnsupportedModel
from qlazy.lazy import LazyReport, lazy_build, materialize, release
from qlazy.lazy.scan import places
from qlazy.sources.gguf import read_gguf_header
from qlazy.sources.gguf_config import mixture_config, scaled_config
from qlazy.sources.gguf_head import write_head
from qlazy.sources.gguf_parts import part_names
from qlazy.sources.gguf_rope import with_stored_scaling
from qlazy.sources.source import Source

logger = logging.getLogger(__name__)


def build_placeholder(
    source: Source, dtype: torch.dtype, *, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the class named in `config.architectures` without storage for its parameters.

    Weights are not initialised and not tied yet; buffers hold their real values.

    Args:
        source: An opened local source.
        dtype: Dtype of parameters.
        attn_implementation: As in transformers; None takes its choice.
        trust_remote_code: Whether Python code from the model's folder may be run.
    Returns:
        The model, in evaluation mode.
    Raises:
        UnsupportedModel: transformers has no such architecture or cannot build it from this config, or the model needs code
            of its own and that is not allowed.

    Memory: buffers, and a few KiB for each module.
    """
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    with no_init_weights(), no_tie_weights():
        model, report = construct(source, dtype, **options)
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters() if parameter.is_meta}
    materialize(model, only=lambda name, tensor: tensor.untyped_storage()._cdata not in parameters)
    # What a buffer draws depends on what all weights before it draw; and it may be made from weights, not initialized here.
    buffers = {place.name: place.tensor for place in places([model]) if not place.tensor.is_meta}
    drawn = [t.name for t in report.tensors if (t.random or t.unwritten) and t.name in buffers]
    for name, value in eager_values(source, dtype, drawn, **options):
        buffers[name].copy_(value)
    _keep_in_float32(model, dtype)
    model.eval()
    return model


def eager_values(
    source: Source,
    dtype: torch.dtype,
    names: Iterable[str],
    *,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """What building the model eagerly now, with no checkpoint, would give some of its tensors.

    Args:
        source: An opened local source.
        dtype: Dtype of parameters.
        names: Which tensors; the model is built only if there are any.
        attn_implementation: As in transformers; None takes its choice.
        trust_remote_code: Whether Python code from the model's folder may be run.
    Yields:
        Name and values. The default generator is left as it was.

    Memory: one tensor, and what is needed to make it.
    """
    wanted = list(names)
    if not wanted:
        return
    model, _ = construct(source, dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code)
    held = {place.name: place.tensor for place in places([model])}
    for name in wanted:
        yield name, materialize(held[name]).detach()
        release(held[name])


def construct(
    source: Source, dtype: torch.dtype, *, attn_implementation: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, LazyReport]:
    """The model as its class builds it, without memory, and what was recorded. The default generator is left as it was.

    Args:
        source: An opened local source.
        dtype: Dtype of parameters.
        attn_implementation: As in transformers; None takes its choice.
        trust_remote_code: Whether Python code from the model's folder may be run.
    Returns:
        The model, and the report of the build.
    Raises:
        UnsupportedModel: transformers has no such architecture or cannot build it from this config.

    Memory: about 1 KiB for each operation.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    cls = _model_class(source, config, trust_remote_code)
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    config.name_or_path = source.resolved
    try:
        with torch.random.fork_rng(devices=[]), lazy_build() as build, torch.device("cpu"):
            model: PreTrainedModel = cls._from_config(config, dtype=dtype, **options)
            # Where recording ends does not matter, as the generator goes back; a state that is known saves working it out.
            torch.default_generator.manual_seed(0)
    except Exception as error:  # a model class as well
        raise UnsupportedModel(
            f"{source.model_id}: transformers {transformers.__version__} cannot build {cls.__name__} from its config: "
            f"{_reason(error)}",
            hint="Look at config.json and at the options that were given.",
        ) from error
    return model, build.report(model)


def load_config(source: Source, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The transformers config of a source.

    Args:
        source: An opened local source.
        trust_remote_code: Whether Python code from the model's folder may be run.
    Returns:
        The config.
    Raises:
        UnsupportedModel: transformers does not know the model type, or refuses the config.
        CorruptCheckpoint: a GGUF file's scaling of positions is no list of numbers.
    """
    assert source.folder is not None, "weights cannot be loaded from a source that was opened for its headers only"
    said = with_stored_scaling(source.config, source.tensors) if source.gguf_file else {}
    try:
        if source.gguf_file:
            told = mixture_config(said)
            if told is None:
                told = scaled_config(_their_config(source), said)
            config = CONFIG_MAPPING[told["model_type"]].from_dict(told)
        else:
            config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config class may fail in any way over values it does not expect
        kind = source.config.get("model_type")
        raise UnsupportedModel(
            f"{source.model_id}: transformers {transformers.__version__} cannot read the config of model type "
            f"{kind!r}: {_reason(error)}",
            hint="Update transformers, or pass trust_remote_code=True if the model brings code that you trust.",
        ) from error
    assert isinstance(config, PretrainedConfig)
    return config


def _their_config(source: Source) -> dict[str, Any]:
    """What transformers makes of the metadata of a GGUF file."""
    assert source.folder is not None and source.gguf_file is not None
    first = part_names(source.gguf_file)[0]
    with tempfile.TemporaryDirectory(prefix="qlazy-") as folder:
        metadata = read_gguf_header(source.folder / first).metadata
        write_head(Path(folder, first), metadata, source.tensors, vocab_size=source.config.get("vocab_size"))
        theirs, _ = PretrainedConfig.get_config_dict(folder, gguf_file=first)
    return dict(theirs)


def _model_class(source: Source, config: PretrainedConfig, trust_remote_code: bool) -> type[PreTrainedModel]:
    names = list(config.architectures or [])
    for name in names:
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls
    if trust_remote_code and names and getattr(config, "auto_map", None):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        reference = next(
            (ref for ref in config.auto_map.values() if isinstance(ref, str) and ref.endswith(f".{names[0]}")), None
        )
        if reference is not None:
            found: type[PreTrainedModel] = get_class_from_dynamic_module(reference, str(source.folder))
            return found
    if not names:
        for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
            if type(config) in mapping:
                guessed: Any = mapping[type(config)]
                return cast("type[PreTrainedModel]", guessed)
    wanted = ", ".join(names) or f"model type {config.model_type!r}"
    raise UnsupportedModel(
        f"{source.model_id}: transformers {transformers.__version__} has no architecture {wanted}.",
        hint="Update transformers, or pass trust_remote_code=True if the model brings code that you trust.",
    )


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters that the model class keeps in float32 that dtype, by transformers' own rule."""
    patterns = list(model._get_dtype_plan(dtype))
    for name, parameter in list(model.named_parameters()):
        if any(f".{pattern}." in f".{name}." for pattern in patterns):
            owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            kept = torch.nn.Parameter(torch.empty_like(parameter, dtype=torch.float32), requires_grad=parameter.requires_grad)
            setattr(owner, leaf, kept)


def _reason(error: Exception) -> str:
    """What an error of a library says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
