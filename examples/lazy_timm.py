"""Build a vision model of timm without memory, and load weights that lack its head: python examples/lazy_timm.py

Needs `pip install timm`.
"""

from __future__ import annotations

import timm
import torch

import qlazy
from qlazy.lazy import load_weights


def main(name: str = "vit_tiny_patch16_224") -> None:
    torch.manual_seed(0)
    eager = timm.create_model(name, num_classes=10)
    stored = {key: tensor for key, tensor in eager.state_dict().items() if not key.startswith("head.")}

    torch.manual_seed(0)
    with qlazy.lazy_build() as build:
        model = timm.create_model(name, num_classes=10)
    report = build.report(model)
    lazy = [tensor for tensor in report.tensors if tensor.state == "lazy"]
    print(f"{len(lazy)} of {len(report.tensors)} tensors without memory, {sum(t.nbytes for t in lazy) / 2**20:.0f} MiB")

    # What is stored is never drawn; the new head gets what building the model under this seed gives it, not just any values.
    loaded = load_weights(model, stored, strict=False)
    print(f"{len(loaded.loaded)} loaded; drawn: {', '.join(loaded.initialized)}")
    assert torch.equal(model.head.weight, eager.head.weight)
    image = torch.rand(1, *model.default_cfg["input_size"])
    with torch.inference_mode():
        assert torch.equal(model.eval()(image), eager.eval()(image))
    print("The same output as of the model that was built eagerly")


if __name__ == "__main__":
    main()
