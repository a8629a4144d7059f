"""Build any nn.Module without memory, change it, and give it eager construction's values: python examples/lazy_module.py"""

from __future__ import annotations

import torch
from torch import nn

import qlazy
from qlazy.lazy import materialize_shard, release


class Model(nn.Module):
    """What building on meta loses: a computed buffer, a tied weight, a value that is read, a parameter of its own."""

    def __init__(self, width: int = 1024, layers: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20_000, width)
        self.register_buffer("frequencies", 1.0 / 10000.0 ** (torch.arange(0, 128, 2) / 128), persistent=False)
        self.rates = torch.linspace(0, 0.1, layers).tolist()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.scale = nn.Parameter(torch.randn(width) * 0.02)
        self.head = nn.Linear(width, 20_000, bias=False)
        self.head.weight = self.embedding.weight


def main() -> None:
    torch.manual_seed(0)
    with qlazy.lazy_build() as build:
        model = Model()
    print(build.report(model))

    # Layers can be replaced before anything has memory; what is made here is drawn after what was made before.
    with qlazy.lazy_build():
        model.layers[15] = nn.Identity()

    # One tensor; the 35 million numbers before it are not drawn.
    qlazy.materialize(model.layers[14].weight)
    # What the third of eight ranks owns of the embedding; the rest of it is not drawn either.
    rows = materialize_shard(model.embedding.weight, slice(2 * 2500, 3 * 2500))

    torch.manual_seed(0)
    eager = Model()
    assert torch.equal(model.layers[14].weight, eager.layers[14].weight)
    assert torch.equal(rows, eager.embedding.weight[2 * 2500 : 3 * 2500])
    print("layers.14.weight and a shard of the embedding: those of eager construction")

    release(model)
    qlazy.materialize(model, only="frequencies")
    assert torch.equal(model.frequencies, eager.frequencies) and model.layers[14].weight.is_meta
    assert model.head.weight is model.embedding.weight
    print("released; the buffer alone was made again")


if __name__ == "__main__":
    main()
