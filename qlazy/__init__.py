"""Load a language model straight into low-bit weights, planned to the byte and never held in 16 bits.

    import qlazy

    model = qlazy.load_quantized("llama-8b", bits=4)
    print(model.qlazy_report)

Importing this package imports neither torch nor transformers: each public name is looked up when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlazy.api import load_quantized, plan
    from qlazy.calibrating.calibration import Calibration
    from qlazy.errors import QlazyError
    from qlazy.hf_config import QlazyConfig
    from qlazy.lazy import lazy_build, materialize
    from qlazy.measuring.quality import perplexity
    from qlazy.save_api import save_quantized

__version__ = "0.1.0"

__all__ = [
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

_HOMES = {
    "Calibration": "qlazy.calibrating.calibration",
    "QlazyConfig": "qlazy.hf",  # not hf_config, as this one registers the quantizer as well
    "QlazyError": "qlazy.errors",
    "lazy_build": "qlazy.lazy",
    "load_quantized": "qlazy.api",
    "materialize": "qlazy.lazy",
    "perplexity": "qlazy.measuring.quality",
    "plan": "qlazy.api",
    "save_quantized": "qlazy.save_api",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
