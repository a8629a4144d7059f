"""The public names, frozen: adding one is a decision, losing one breaks somebody."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

import qlazy

PUBLIC = [
    "QlazyConfig",
    "QlazyError",
    "__version__",
    "lazy_build",
    "load_quantized",
    "materialize",
    "perplexity",
    "plan",
    "save_quantized",
]


def test_public_names_are_frozen():
    assert sorted(qlazy.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(qlazy))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_there_and_documented(name):
    value = getattr(qlazy, name)
    assert isinstance(value, str) or inspect.getdoc(value)


def test_plan_stays_the_function_when_its_module_is_imported():
    module = import_module("qlazy.plan")
    assert callable(qlazy.plan)
    assert inspect.isfunction(qlazy.plan)
    assert inspect.isfunction(module.make_plan)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'qlazy' has no attribute 'load_quantised'"):
        qlazy.load_quantised  # noqa: B018


# What a plan, `--help` and reading headers need. Torch alone takes longer to import than such a command may run.
TORCH_FREE = [
    "qlazy",
    "qlazy.api",
    "qlazy.bench",
    "qlazy.budget",
    "qlazy.cli",
    "qlazy.companions",
    "qlazy.configs",
    "qlazy.demand",
    "qlazy.durable",
    "qlazy.errors",
    "qlazy.fingerprint",
    "qlazy.folder",
    "qlazy.formats",
    "qlazy.kept",
    "qlazy.layout_config",
    "qlazy.memory",
    "qlazy.outfile",
    "qlazy.plan",
    "qlazy.plan_data",
    "qlazy.plan_devices",
    "qlazy.plan_entries",
    "qlazy.plot",
    "qlazy.recipe",
    "qlazy.report",
    "qlazy.save_api",
    "qlazy.saved",
    "qlazy.shards",
    "qlazy.sizes",
    "qlazy.source",
    "qlazy.source_gguf",
    "qlazy.source_hub",
    "qlazy.source_hub_client",
    "qlazy.source_index",
    "qlazy.source_quantized",
    "qlazy.source_safetensors",
    "qlazy.trace",
]


def test_torch_free_modules_import_neither_torch_nor_transformers():
    heavy = ("torch", "transformers", "huggingface_hub", "bitsandbytes", "triton", "gguf", "numpy")
    code = f"import sys, importlib\nfor name in {TORCH_FREE}:\n    importlib.import_module(name)\n"
    code += f"    found = [heavy for heavy in {heavy} if heavy in sys.modules]\n    assert not found, (name, found)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
