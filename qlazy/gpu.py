"""Whether the Triton kernels run where a tensor is. Asked at every product; Triton is imported for a GPU and never before."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DEVICES = {"cuda"}
"""Types of device that they run on; tests add `cpu`, where Triton's interpreter runs them."""

LEAST_CAPABILITY = (8, 0)
"""Ampere: older GPUs have no bfloat16, and the kernels were never compiled for them."""


def has_kernels(tensor: Tensor) -> bool:
    """Whether the Triton kernels run where a tensor is; otherwise plain PyTorch does the same.

    Args:
        tensor: On any device.

    Returns:
        False on a CPU, without Triton or the C compiler that it needs, with `QLAZY_TRITON=0`, on an AMD GPU, and before Ampere.
    """
    device = tensor.device
    return device.type in DEVICES and installed() and (device.type != "cuda" or _capable(device))


@functools.cache
def installed() -> bool:
    """Whether there is a Triton, and nobody has turned it off.

    Returns:
        True where both packages can be imported.
    """
    wanted = os.environ.get("QLAZY_TRITON", "1") != "0"
    return wanted and all(importlib.util.find_spec(name) is not None for name in ("triton", "qlazy_kernels"))


@functools.cache
def on_device(constant: Tensor, device: torch.device) -> Tensor:
    """A small table on a device, copied once: a copy from the host waits for the device, and cannot be captured in a graph.

    Args:
        constant: On the host, never changed, and itself held for good.
        device: Where.

    Returns:
        The copy.

    Memory: the table, on each device that asked for it.
    """
    return constant.to(device)


@functools.cache
def _capable(device: torch.device) -> bool:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return False
    try:
        from triton.runtime import driver

        driver.active.get_current_device()  # the first use compiles its C, with a compiler and Python.h
    except Exception as error:  # whatever a compiler, a linker or an import has to say
        logger.warning("no Triton kernels on %s, plain PyTorch is slower: %s", device, error)
        return False
    return True
