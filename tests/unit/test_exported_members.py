"""The public names, frozen: adding one is a decision, losing one breaks somebody."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys

import pytest

import qlazy

PUBLIC = [
    "Calibration",
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


def test_no_module_hides_a_public_name():
    """Importing `qlazy.NAME` binds the module to that attribute of the package."""
    assert {module.name for module in pkgutil.iter_modules(qlazy.__path__)}.isdisjoint(PUBLIC)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'qlazy' has no attribute 'load_quantised'"):
        qlazy.load_quantised  # noqa: B018


# What a plan, `--help` and reading headers need. Torch alone takes longer to import than such a command may run.
TORCH_FREE = [
    "qlazy",
    "qlazy.api",
    "qlazy.bench",
    "qlazy.cli",
    "qlazy.configs",
    "qlazy.errors",
    "qlazy.formats",
    "qlazy.memory",
    "qlazy.outfile",
    "qlazy.planning.budget",
    "qlazy.planning.data",
    "qlazy.planning.demand",
    "qlazy.planning.devices",
    "qlazy.planning.entries",
    "qlazy.planning.kept",
    "qlazy.planning.plan",
    "qlazy.planning.recipe",
    "qlazy.plot",
    "qlazy.report",
    "qlazy.save_api",
    "qlazy.saving.companions",
    "qlazy.saving.durable",
    "qlazy.saving.fingerprint",
    "qlazy.saving.folder",
    "qlazy.saving.layout_config",
    "qlazy.saving.saved",
    "qlazy.saving.shards",
    "qlazy.sizes",
    "qlazy.sources.gguf",
    "qlazy.sources.gguf_config",
    "qlazy.sources.gguf_parts",
    "qlazy.sources.hub",
    "qlazy.sources.hub_client",
    "qlazy.sources.hub_errors",
    "qlazy.sources.index",
    "qlazy.sources.quantized",
    "qlazy.sources.safetensors",
    "qlazy.sources.source",
    "qlazy.trace",
]


def test_torch_free_modules_import_neither_torch_nor_transformers():
    heavy = ("torch", "transformers", "huggingface_hub", "bitsandbytes", "triton", "gguf", "numpy")
    code = f"import sys, importlib\nfor name in {TORCH_FREE}:\n    importlib.import_module(name)\n"
    code += f"    found = [heavy for heavy in {heavy} if heavy in sys.modules]\n    assert not found, (name, found)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
