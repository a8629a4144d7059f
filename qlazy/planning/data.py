"""What a plan says: one record a tensor and one a device, in bytes, and the same as JSON. No torch here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from qlazy.formats import ITEMSIZE, Format, packed_nbytes
from qlazy.planning.budget import Budget
from qlazy.planning.recipe import Kind, Recipe


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor that a model holds, as the planner sees it."""

    name: str
    """Key in the checkpoint, or path in the model."""
    shape: tuple[int, ...]
    """Its shape; for `linear` and `head` (rows, columns) = (out_features, in_features)."""
    dtype: str
    """Dtype that it has in memory when it is not quantized."""
    kind: Kind
    """What it is to the recipe."""
    source_nbytes: int
    """Bytes that are read for it."""

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the weight, or of each of its experts; zeros where it is neither."""
        is_matrix = len(self.shape) == 2 or self.kind == "experts"
        return (self.shape[-2], self.shape[-1]) if is_matrix else (0, 0)

    def stored_bytes(self, fmt: Format | None, dtype: str) -> int:
        """Bytes that it takes.

        Args:
            fmt: Format of its matrices, or None.
            dtype: Dtype of scales.
        Returns:
            Bytes, scales and zeros included.
        """
        if fmt is None:
            return math.prod(self.shape) * ITEMSIZE.get(self.dtype, 1)
        return math.prod(self.shape[:-2]) * packed_nbytes(fmt, *self.matrix, dtype)


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """What becomes of one tensor."""

    name: str
    """Key in the checkpoint, or path in the model."""
    shape: tuple[int, ...]
    """Shape before quantization."""
    kind: Kind
    """What it is to the recipe."""
    format: Format | None
    """Low-bit format, or None where it keeps `dtype`."""
    dtype: str
    """Dtype in memory; of the scales where it is quantized."""
    reason: str
    """Why it is not quantized, or has another format than most; empty for a quantized layer like any other."""
    device: str
    """Where it lives."""
    nbytes: int
    """Bytes there, scales and zeros included."""
    source_nbytes: int
    """Bytes that are read for it."""


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """The bytes of one device."""

    device: str
    """`cpu` or `cuda:N`."""
    free_bytes: int
    """Free now, or what `max_memory` allows, whichever is less."""
    quantized_bytes: int
    """Packed weights with scales and zeros."""
    unquantized_bytes: int
    """Weights and buffers in the model's dtype."""
    kv_cache_bytes: int
    """Keys and values of the layers that live here, for `max_model_len` tokens."""
    activation_bytes: int
    """Largest transient of a forward pass over that many tokens."""
    staging_bytes: int
    """Transient buffers of the load."""
    runtime_bytes: int
    """Allocator slack, library scratch and, on a GPU, the CUDA context."""
    reserve_bytes: int
    """Kept free for others, as asked."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights and buffers."""
        return self.quantized_bytes + self.unquantized_bytes

    @property
    def total_bytes(self) -> int:
        """All that the model will take here; the reserve is not part of it."""
        transient = self.kv_cache_bytes + self.activation_bytes + self.staging_bytes + self.runtime_bytes
        return self.weight_bytes + transient

    @property
    def left_bytes(self) -> int:
        """Bytes that stay free beyond the reserve; negative where it does not fit."""
        return self.free_bytes - self.reserve_bytes - self.total_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every tensor becomes and where, with the bytes of every device."""

    model_id: str
    """What was asked for."""
    resolved: str
    """Hub id, folder or file that it stands for."""
    recipe: Recipe
    """What is quantized and how."""
    budget: Budget
    """The devices and their limits."""
    dtype: str
    """Dtype of everything that is not quantized."""
    tensors: tuple[TensorPlan, ...]
    """Every tensor, in the order of the source."""
    devices: tuple[DevicePlan, ...]
    """Every device that holds something, and the host."""
    exact: bool
    """True when made from the model itself, False when from the headers alone."""

    @property
    def fits(self) -> bool:
        """Whether every device has room."""
        return all(device.left_bytes >= 0 for device in self.devices)

    @property
    def meets_target(self) -> bool:
        """Whether it is as small as asked; a plan from names alone may not be where the model itself is."""
        target = self.recipe.target
        if target is None:
            return True
        if target.nbytes is not None:
            return self.weight_bytes <= target.nbytes
        assert target.bpw is not None
        return round(self.bits_per_weight(), 9) <= target.bpw  # what is exactly met stays so

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights and buffers on all devices."""
        return sum(device.weight_bytes for device in self.devices)

    @property
    def total_bytes(self) -> int:
        """Bytes on all devices, transients included."""
        return sum(device.total_bytes for device in self.devices)

    @property
    def source_bytes(self) -> int:
        """Bytes that a load reads."""
        return sum(tensor.source_nbytes for tensor in self.tensors)

    @property
    def device_map(self) -> dict[str, str]:
        """Device of every tensor, by name."""
        return {tensor.name: tensor.device for tensor in self.tensors}

    def bits_per_weight(self) -> float:
        """Bits per quantized weight, scales and zeros included; 0 where nothing is quantized."""
        chosen = [tensor for tensor in self.tensors if tensor.format is not None]
        return 8 * sum(t.nbytes for t in chosen) / max(1, sum(math.prod(t.shape) for t in chosen))


def to_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain data: bytes are ints, `schema` is the version of this layout.

    Args:
        plan: Any plan.
    Returns:
        A JSON-ready dict. For a target `format` is None, as layers have several, and `target` has one of two figures.
    """
    target = plan.recipe.target
    return {
        "schema": 1,
        "model_id": plan.model_id,
        "resolved": plan.resolved,
        "format": plan.recipe.format.name if target is None else None,
        "target": None if target is None else {"weight_bytes": target.nbytes, "bits_per_weight": target.bpw},
        "dtype": plan.dtype,
        "max_model_len": plan.budget.max_model_len,
        "exact": plan.exact,
        "fits": plan.fits,
        "source_bytes": plan.source_bytes,
        "weight_bytes": plan.weight_bytes,
        "total_bytes": plan.total_bytes,
        "bits_per_weight": round(plan.bits_per_weight(), 4),
        "devices": [
            dataclasses.asdict(d) | {"weight_bytes": d.weight_bytes, "total_bytes": d.total_bytes, "left_bytes": d.left_bytes}
            for d in plan.devices
        ],
        "tensors": [
            {
                "name": t.name,
                "shape": list(t.shape),
                "format": t.format.name if t.format else None,
                "dtype": t.dtype,
                "reason": t.reason,
                "device": t.device,
                "nbytes": t.nbytes,
                "source_nbytes": t.source_nbytes,
            }
            for t in plan.tensors
        ],
    }
