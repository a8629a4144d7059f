"""Shared by all tests: no more threads than a small machine has, and a reason for every skipped GPU test."""

from __future__ import annotations

import os

import pytest

# Before torch is imported anywhere, and passed on to subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Threads without work sleep: spinning, they take the processors that another worker of the suite needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton warns that the default changes with 3.10; without fusion a kernel rounds as torch does, step by step.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if "gpu" in item.keywords]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        # Tests of kernels name the device that they use: with TRITON_INTERPRET=1 the interpreter runs them on the CPU.
        for item in (item for item in gpu_items if getattr(item.module, "DEVICE", "cuda") == "cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; run `make test-gpu` on a machine that has one"))
