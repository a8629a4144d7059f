"""The experts of a layer, multiplied from their packed weights: transformers' experts implementation `qlazy`.

    qlazy::experts_int4, qlazy::experts_int8, qlazy::experts_codebook4
        y_TN: rows of x_TK, sorted by expert, times W_ENK[e].T, where `counts_E` rows belong to each expert

Only experts that a token goes to are touched. On a CPU each is a product of its slice of the storage; on a GPU int4 and
int8 have one launch for all. Activation, limits, biases and norms are those of the model's own module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qlazy import gpu
from qlazy.formats import Codebook4, Int4
from qlazy.layers.quant_weight import QuantWeight
from qlazy.products import ops
from qlazy.products.native_product import Weight

_library = torch.library.Library("qlazy", "FRAGMENT")
_library.define("experts_int4(Tensor x, Tensor counts, Tensor packed, Tensor scale, Tensor? zero) -> Tensor")
_library.define("experts_int8(Tensor x, Tensor counts, Tensor packed, Tensor scale) -> Tensor")
_library.define(
    "experts_codebook4(Tensor x, Tensor counts, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
    "int out_features, str kind) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # it reads the counts on the host
)


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Forward of an experts module, as `use_experts_implementation` calls it.

    Args:
        module: A module of fused experts.
        hidden_states: (M, K).
        top_k_index: (M, k), the experts of each token.
        top_k_weights: (M, k), their weights.
        *args: What else the module's own forward takes.
        **kwargs: The same.
    Returns:
        (M, K).

    Memory: activations of the chosen pairs of token and expert.
    """
    experts: Any = module
    up, down = experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj
    if not isinstance(up, QuantWeight) and not isinstance(down, QuantWeight):
        made: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, top_k_index, top_k_weights, *args, **kwargs)
        return made
    taken = top_k_index.shape[-1]
    ids, order = torch.sort(top_k_index.reshape(-1))
    count = up.shape[0]
    # Expert parallelism gives pairs that are another rank's the number of experts; they come last and stay zero.
    counts = torch.zeros(count + 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add(0, ids.clamp(max=count), torch.ones_like(ids))[:count]
    own = ids.clamp(max=count - 1)
    x = hidden_states[order // taken]
    y = grouped_linear(x, counts, up, experts.is_transposed)
    if experts.has_bias:
        y = y + (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias)[own]
    y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
    y = grouped_linear(y, counts, down, experts.is_transposed)
    if experts.has_bias:
        y = y + experts.down_proj_bias[own]
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    weights = top_k_weights.reshape(-1)[order].masked_fill(ids >= count, 0.0)
    y = y * weights.unsqueeze(1)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    return y[back].view(*top_k_index.shape, y.shape[-1]).sum(1).to(hidden_states.dtype)


EXPERTS_IMPLEMENTATION = "qlazy"
"""The name under which transformers finds it."""

ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


def grouped_linear(x: Tensor, counts: Tensor, weight: QuantWeight | Tensor, is_transposed: bool = False) -> Tensor:
    """Rows of x times the weight of their expert.

    Args:
        x: (T, K), sorted by expert; rows beyond those of all experts become zeros.
        counts: int64 (E,), rows of each expert.
        weight: Packed, or as the module has it.
        is_transposed: Whether a weight that is not packed is (E, K, N).
    Returns:
        (T, N) in the dtype of `x`.

    Memory: the result.
    """
    if not isinstance(weight, QuantWeight):
        parts = x.split([*counts.tolist(), x.shape[0] - int(counts.sum())])
        products = [linear(part, w.t() if is_transposed else w) for part, w in zip(parts[:-1], weight.unbind(), strict=True)]
        return torch.cat([*products, parts[-1].new_zeros(parts[-1].shape[0], products[0].shape[1])])
    if torch.is_grad_enabled() and x.requires_grad:
        made: Tensor = _Grouped.apply(x, counts, weight)  # type: ignore[no-untyped-call]
        return made
    return _product(x, counts, weight)


def _product(x: Tensor, counts: Tensor, weight: QuantWeight) -> Tensor:
    held: Any = weight._buffers
    y: Tensor
    if isinstance(weight.format, Codebook4):
        names = ("absmax_packed", "nested_absmax", "nested_offset") if weight.format.double_quant else ("absmax", "", "")
        stored = (held["weight_packed"], *(held.get(name) for name in names))
        y = torch.ops.qlazy.experts_codebook4(x, counts, *stored, weight.stack.rows, weight.format.kind)
    elif isinstance(weight.format, Int4):
        y = torch.ops.qlazy.experts_int4(x, counts, held["weight_packed"], held["weight_scale"], held.get("weight_zero_point"))
    else:
        y = torch.ops.qlazy.experts_int8(x, counts, held["weight_packed"], held["weight_scale"])
    return y


def _at_once(x: Tensor, counts: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor | None:
    """The product in one launch, where there is a kernel for it."""
    if not gpu.has_kernels(x):
        return None
    from qlazy.products import triton_products

    return triton_products.grouped(x, counts, packed, scale, zero)


def _each(x: Tensor, counts: Tensor, rows: int, stored: tuple[Tensor | None, ...], of: Callable[..., Weight]) -> Tensor:
    y = x.new_zeros(x.shape[0], rows)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            weight = of(*(None if tensor is None else tensor[expert] for tensor in stored))
            y[start : start + count] = ops.product(x[start : start + count], weight, None)
            start += count
    return y


def _experts_int4(x: Tensor, counts: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    made = _at_once(x, counts, packed, scale, zero)
    if made is not None:
        return made
    columns = x.shape[-1]
    stored = packed, scale, zero
    return _each(x, counts, packed.shape[1], stored, lambda p, s, z: ops.int4_weight(p, s, z, columns))


def _experts_int8(x: Tensor, counts: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    made = _at_once(x, counts, packed, scale)
    return _each(x, counts, packed.shape[1], (packed, scale), ops.int8_weight) if made is None else made


def _experts_codebook4(
    x: Tensor,
    counts: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    kind: str,
) -> Tensor:
    shape = out_features, x.shape[-1]
    stored = packed, absmax, nested_absmax, nested_offset

    def of(packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Weight:
        return ops.codebook4_weight(packed, absmax, nested_absmax, nested_offset, shape, kind)

    return _each(x, counts, out_features, stored, of)


for _device in ("CPU", "CUDA"):
    _library.impl("experts_int4", _experts_int4, _device)
    _library.impl("experts_int8", _experts_int8, _device)
    _library.impl("experts_codebook4", _experts_codebook4, _device)


@torch.library.register_fake("qlazy::experts_int4")
def _(x, counts, packed, scale, zero):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], packed.shape[1])


@torch.library.register_fake("qlazy::experts_int8")
def _(x, counts, packed, scale):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], packed.shape[1])


@torch.library.register_fake("qlazy::experts_codebook4")
def _(x, counts, packed, absmax, nested_absmax, nested_offset, out_features, kind):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], out_features)


class _Grouped(torch.autograd.Function):
    """The product with a gradient for x, so that adapters train through frozen experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Tensor, weight: QuantWeight) -> Tensor:
        ctx.counts, ctx.weight = counts, weight
        return _product(x, counts, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        back = grad.new_zeros(grad.shape[0], ctx.weight.stack.columns)
        start = 0
        for expert, count in enumerate(ctx.counts.tolist()):
            if count:
                back[start : start + count] = ctx.weight.layer(expert).product_backward(grad[start : start + count])
                start += count
        return back, None, None
