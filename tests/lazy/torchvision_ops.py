"""Declare operators of torchvision's extension, so that its Python part imports where the extension does not load.

The extension is compiled against one build of PyTorch. Beside another its operators are missing, and importing torchvision
fails where it registers shapes for two of them. Building models calls none.
"""

from __future__ import annotations

import torch

_SCHEMAS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def declare() -> None:
    """Declare those that do not exist yet."""
    for name, schema in _SCHEMAS.items():
        if not torch._C._jit_get_schemas_for_operator(name):
            torch.library.define(name, schema)
