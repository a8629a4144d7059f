"""The kernels without a GPU: Triton's interpreter runs them on the CPU."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import SimpleNamespace

import pytest

from qlazy import gpu, native, products, quantizing


@pytest.fixture(scope="session")
def kernels():
    """Every module of the package, imported a second time so that Triton interprets it here and in no other test."""
    triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    import numpy
    import qlazy_kernels

    if triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip(f"the interpreter of Triton 3.6 fails with numpy {numpy.__version__}; it needs one below 2.4")
    # The interpreter asks for Gluon at the first launch, and that looks for the functions that are replaced below.
    pytest.importorskip("triton.experimental.gluon.language")

    def ours() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == "qlazy_kernels"]

    with pytest.MonkeyPatch.context() as patch:
        with pytest.MonkeyPatch.context() as during_import:
            during_import.setenv("TRITON_INTERPRET", "1")
            # `tl.sum` and its like are kernels as well; where Triton was imported before, they wait to be compiled.
            for library in (triton.language, triton.language.standard):
                for name, value in list(vars(library).items()):
                    if isinstance(value, triton.runtime.JITFunction):
                        patch.setattr(library, name, _interpreted(triton, value))
            compiled = {name: sys.modules.pop(name) for name in ours()}
            names = [module.name for module in pkgutil.iter_modules(qlazy_kernels.__path__)]
            modules = {name: importlib.import_module(f"qlazy_kernels.{name}") for name in names}
            for name in ours():
                del sys.modules[name]
            sys.modules.update(compiled)
        yield SimpleNamespace(**modules)


_seen: dict[int, object] = {}


def _interpreted(triton, function):
    """One interpreted twin of each, as the interpreter knows a sum by the identity of its function."""
    return _seen.setdefault(id(function), triton.jit(function.fn))


@pytest.fixture
def dispatch(kernels, monkeypatch):
    """qlazy's own choice of kernels and quantizers, with tensors on the CPU in the place of a GPU's."""
    for name, module in vars(kernels).items():
        monkeypatch.setitem(sys.modules, f"qlazy_kernels.{name}", module)
    made = {}
    for package, name in ((products, "triton_products"), (quantizing, "triton_quantize")):
        full = f"{package.__name__}.{name}"
        monkeypatch.delitem(sys.modules, full, raising=False)
        monkeypatch.setattr(package, name, None, raising=False)
        made[name] = importlib.import_module(full)
        monkeypatch.setitem(sys.modules, full, made[name])
        monkeypatch.setattr(package, name, made[name])
    monkeypatch.setattr(made["triton_products"], "_has_bitsandbytes", lambda: False)
    monkeypatch.setattr(gpu, "DEVICES", {"cpu"})
    monkeypatch.setattr(native, "library", lambda: None)
    return SimpleNamespace(**made)
