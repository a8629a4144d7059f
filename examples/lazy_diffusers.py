"""Build a diffusion transformer without memory, and materialize it in parts: python examples/lazy_diffusers.py

Needs `pip install diffusers`.
"""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel

import qlazy

SMALL = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
SMALL |= {"pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)}


def main() -> None:
    # FLUX.1: 12 billion parameters, which take 48 GB when they are built eagerly.
    flux = qlazy.lazy_build(FluxTransformer2DModel, guidance_embeds=True)
    print(f"FLUX.1: {sum(p.numel() for p in flux.parameters()) / 1e9:.1f} B parameters, built without memory")
    last = qlazy.materialize(flux.single_transformer_blocks[-1].norm.linear)
    print(f"of its last block {last.weight.nbytes / 2**20:.0f} MiB are materialized")

    torch.manual_seed(0)
    eager = FluxTransformer2DModel(**SMALL)
    torch.manual_seed(0)
    with qlazy.lazy_build():
        model = FluxTransformer2DModel(**SMALL)
    # The blocks in the order in which they run, e.g. each straight to its device; then what is left.
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        qlazy.materialize(block, dtype=torch.bfloat16)
    qlazy.materialize(model, dtype=torch.bfloat16)
    for (name, one), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert torch.equal(one, other.to(torch.bfloat16)), name
    print("A small one, made block by block in bfloat16: eager construction's values")


if __name__ == "__main__":
    main()
