"""Which parameters hold the matrices of many experts, and how they lie there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The matrices of one parameter: y_N = W_NK x_K for each of them."""

    experts: int
    """How many; 0 = the parameter is one matrix."""
    rows: int
    """N, out_features of each."""
    columns: int
    """K, in_features of each."""
    transposed: bool = False
    """Whether the parameter holds each as (K, N)."""

    @property
    def count(self) -> int:
        """Number of matrices, 1 for a parameter that is one."""
        return max(1, self.experts)

    @property
    def held_rows(self) -> int:
        """Rows of each as the parameter holds it."""
        return self.columns if self.transposed else self.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, N, K), whichever way the parameter holds them; (N, K) of one matrix."""
        return (self.experts, self.rows, self.columns) if self.experts else (self.rows, self.columns)


_TRANSPOSED = {("Llama4TextExperts", "gate_up_proj"), ("Llama4TextExperts", "down_proj"), ("DbrxExpertGLU", "w2")}
"""Parameters that hold (K, N), of classes that do not say so themselves."""


def stack_of(module: nn.Module, leaf: str) -> Stack | None:
    """The matrices of a parameter, where it is one of fused experts.

    transformers' `use_experts_implementation` says by `is_transposed` how they lie. Where nothing says it, (N, K) is taken; if
    that is wrong all is still right, as `QuantWeight` multiplies from either side, but not as fast.

    Args:
        module: What holds it; a class of experts has that word in its name.
        leaf: The parameter's name there.
    Returns:
        The stack; None for every other parameter.
    """
    parameter = module._parameters.get(leaf)
    name = type(module).__name__
    if parameter is None or "Expert" not in name or not parameter.is_floating_point():
        return None
    transposed = bool(getattr(module, "is_transposed", False)) or (name, leaf) in _TRANSPOSED
    if parameter.dim() == 3:
        experts, rows, columns = parameter.shape
    elif name == "DbrxExpertGLU" and parameter.dim() == 2:
        experts = int(module.moe_num_experts)  # type: ignore[arg-type]
        rows, columns = parameter.shape[0] // experts, parameter.shape[1]
    else:
        return None
    if transposed:
        rows, columns = columns, rows
    return Stack(experts=experts, rows=rows, columns=columns, transposed=transposed)
