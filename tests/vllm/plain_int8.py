"""A plugin of vLLM: int8 weights multiplied plainly, as vLLM has no kernel for them on a CPU. Imported by vLLM's Python."""

from __future__ import annotations

import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.platforms.interface import PlatformEnum
from vllm.scalar_type import scalar_types


class PlainInt8(MPLinearKernel):
    """Takes the tensors as vLLM has read, merged and cut them, and multiplies by what they say."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        return c.weight_type == scalar_types.uint8b128, "it is for int8 alone"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packed, scale, _ = self._get_weight_params(layer)
        codes = packed.data.contiguous().view(torch.uint8).float() - 128
        scales = scale.data.float().repeat_interleave(codes.shape[1] // scale.shape[1], 1)
        layer.plain_weight = (codes * scales).to(self.config.act_type)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.plain_weight, bias)


def register() -> None:
    """Offer it after vLLM's own."""
    linear._POSSIBLE_KERNELS[PlatformEnum.CPU].append(PlainInt8)
