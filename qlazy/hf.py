"""qlazy as a transformers quantizer: `from_pretrained(..., quantization_config=qlazy.QlazyConfig(bits=4))`.

transformers then reads and places the weights, one after the other, and qlazy's layers quantize them. `qlazy.load_quantized`
gives the same layers with its own bounded and overlapped pipeline.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlazy.errors import CorruptCheckpoint, IncompleteCheckpoint, UnsupportedModel, UsageError
from qlazy.hf_config import QlazyConfig
from qlazy.layers.quant_linear import NonFiniteError, QuantLinear, require_finite
from qlazy.model_entries import entries_of
from qlazy.planning.data import Entry
from qlazy.planning.recipe import Recipe
from qlazy.saving.save_model import model_config, model_layout, model_tensors
from qlazy.swap import is_replaced, quant_layer


@register_quantizer("qlazy")
class QlazyQuantizer(HfQuantizer):
    """Swaps layers before transformers loads, and quantizes each weight as it comes."""

    requires_calibration = False

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._not_finite: list[str] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what no version of this has written.

        Args:
            *args: Unused.
            **kwargs: Unused.
        Raises:
            UnsupportedModel: a folder that was saved in this quantizer's own layout.
        """
        if self.pre_quantized:
            raise UnsupportedModel(
                "This folder says quant_method 'qlazy'; saved models say compressed-tensors or bitsandbytes.",
                hint="Save the model again with model.save_pretrained or qlazy save.",
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        assert isinstance(self.quantization_config, QlazyConfig)
        recipe = self.quantization_config.recipe()
        if recipe.embedding is not None:
            raise UsageError(
                f"embedding_bits is {recipe.embedding.bits}, but from_pretrained leaves embeddings in 16 bits.",
                hint="Use qlazy.load_quantized, or leave embedding_bits out.",
            )
        everything = dict.fromkeys(model.state_dict(), 0)
        left: list[Entry] = []
        for entry in entries_of(model, everything):
            rows, columns = entry.shape[-2:] if len(entry.shape) == 2 or entry.kind == "experts" else (0, 0)
            fmt, _ = recipe.format_for(entry.kind, entry.name, rows, columns)
            if fmt is None:
                continue
            if not is_replaced(model, entry):
                left.append(entry)
                continue
            path = entry.name.removesuffix(".weight")
            layer: Any = model.get_submodule(path)
            swapped = quant_layer(layer, fmt, getattr(torch, entry.dtype))
            # transformers looks for the weight by its key; this stands in for it until `_Quantize` has filled the layer.
            swapped._parameters["weight"] = nn.Parameter(torch.empty_like(layer.weight, device="meta"), requires_grad=False)
            model.set_submodule(path, swapped)
        _tell_left(left)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        layers = ((path, layer) for path, layer in model.named_modules() if isinstance(layer, QuantLinear))
        empty = [path for path, layer in layers if "weight" in layer._parameters]
        if empty and not self._not_finite:
            raise IncompleteCheckpoint(
                f"{len(empty)} weights of {type(model).__name__} are in none of its files, {empty[0] + '.weight'!r} is one.",
                hint="Download the model again.",
            )
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not parameter.is_meta:
                with self.naming(name):
                    require_finite(parameter.detach())
        if self._not_finite:
            raise CorruptCheckpoint(
                f"Tensor {self._not_finite[0]!r} holds a NaN or an infinity.", hint="The file is damaged; download it again."
            )
        return model

    @contextlib.contextmanager
    def naming(self, tensor: str) -> Iterator[None]:
        """Keep the name of a tensor that is not finite; it is raised after the load.

        transformers turns an error in a conversion into a log entry and a `RuntimeError` that does not say what is wrong.

        Args:
            tensor: Its name.
        Yields:
            Nothing.
        """
        try:
            yield
        except NonFiniteError:
            self._not_finite.append(tensor)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a checkpoint tensor is the weight of a swapped layer.

        Args:
            model: The model.
            param_name: The tensor's name in it.
            **kwargs: Unused.
        Returns:
            True where it is.
        """
        path, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(path), QuantLinear)

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that transformers applies to such a tensor.

        Returns:
            A new operation.
        """
        return _Quantize(self)

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` may write this model.

        Returns:
            True: what it writes is compressed-tensors' layout, or bitsandbytes' for its codebooks.
        """
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes. `qlazy.save_quantized` writes the same, whole or not at all and with a manifest.

        Args:
            model: The model.
        Returns:
            Tensors by name, and nothing more for the files' headers.

        Memory: as `model_tensors`.
        """
        layout = model_layout(model)
        assert isinstance(self.quantization_config, QlazyConfig)
        self.quantization_config.describe(model_config(layout, model))
        return model_tensors(layout, model), {}

    @property
    def is_compileable(self) -> bool:
        """True: products are opaque to a compiler, so that `generate` may compile its steps and capture them."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the weights are frozen, but gradients pass through the layers to adapters below them."""
        return True


def _tell_left(left: list[Entry]) -> None:
    """Say what the recipe packs and this way of loading does not: an error where it is experts, nearly all of a model."""
    experts = [entry.name for entry in left if entry.kind == "experts"]
    names = experts or [entry.name for entry in left]
    said = f"from_pretrained leaves {len(names)} weights in 16 bits that the recipe packs, {(names or [''])[0]!r} is one."
    if experts:
        raise UsageError(said, hint="Use qlazy.load_quantized, or name them in modules_to_not_convert.")
    if names:
        warnings.warn(f"{said} Use qlazy.load_quantized, or name them in modules_to_not_convert.", stacklevel=2)


class _Quantize(ConversionOps):
    """Fills a layer with the weight that transformers read for it."""

    def __init__(self, quantizer: QlazyQuantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        model: PreTrainedModel | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Quantize; nothing is left for transformers to set."""
        assert model is not None
        for name, values in input_dict.items():
            weight: Tensor = values[0] if isinstance(values, list) else values
            path = name.removesuffix(".weight")
            layer = model.get_submodule(path)
            assert isinstance(layer, QuantLinear)
            stand_in = layer._parameters["weight"]
            assert stand_in is not None
            if weight.shape != stand_in.shape:
                raise CorruptCheckpoint(
                    f"Tensor {name!r} has shape {list(weight.shape)}, but the model has {list(stand_in.shape)}."
                )
            layer.allocate(weight.device)
            with self.quantizer.naming(name):
                layer.fill(weight)
            del layer._parameters["weight"]
            filled: Any = layer
            filled._is_hf_initialized = True
            if missing_keys is not None:
                missing_keys -= {name, *(f"{path}.{key}" for key in layer.storage)}
        return {}


def attach_quantizer(model: PreTrainedModel, recipe: Recipe) -> None:
    """Mark a loaded model as quantized, the way transformers marks its own: `save_pretrained` then writes the packed weights.

    Args:
        model: A model with swapped layers.
        recipe: What they were made by.
    """
    config = QlazyConfig.of_recipe(recipe)
    marked: Any = model
    marked.hf_quantizer = QlazyQuantizer(config, pre_quantized=False)
    marked.is_quantized = True
    marked.quantization_method = config.quant_method
    marked.config.quantization_config = config
