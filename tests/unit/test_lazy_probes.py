"""The nine things that constructors do and that loading through the meta device gets wrong: here all are as in eager building.

Each model is built under a seed, saved (where it says so, without one key), and loaded into a lazily built one under that seed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from qlazy.errors import IncompleteCheckpoint
from qlazy.lazy import lazy_build, load_weights
from tests.lazy.compare import compare


class Config(PretrainedConfig):
    model_type = "probe"


class Probe(PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.linear = nn.Linear(4, 4)
        self.item()
        self.post_init()

    def item(self) -> None:
        raise NotImplementedError


class Buffer(Probe):
    def item(self) -> None:
        self.register_buffer("table", 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8), persistent=False)


class Attribute(Probe):
    def item(self) -> None:
        self.table = torch.linspace(0, 1, 5) * 3


class Item(Probe):
    def item(self) -> None:
        self.rates = [x.item() for x in torch.linspace(0, 0.3, 4)]


class ToList(Probe):
    def item(self) -> None:
        self.steps = torch.arange(4).tolist()


class Int(Probe):
    def item(self) -> None:
        self.width = int(torch.tensor(3))
        self.extra = nn.Linear(self.width, 2)


class Numpy(Probe):
    def item(self) -> None:
        self.total = float(torch.ones(3).numpy().sum())


class Drawn(Probe):
    missing = "scale"

    def item(self) -> None:
        self.scale = nn.Parameter(torch.randn(4) * 0.02)


class Constant(Probe):
    missing = "scale"

    def item(self) -> None:
        self.scale = nn.Parameter(torch.ones(4) * 3)


class Head(Probe):
    missing = "head.weight"

    def item(self) -> None:
        self.head = nn.Linear(4, 3)


PROBES = [Buffer, Attribute, Item, ToList, Int, Numpy, Drawn, Constant, Head]


@pytest.mark.parametrize("probe", PROBES)
def test_built_as_in_eager_construction(probe: type[Probe]):
    result = compare(lambda: probe(Config()))
    assert (result.status, result.differences, result.reason) == ("equal", [], "")


@pytest.mark.parametrize("probe", PROBES)
def test_loaded_equals_eager_construction(probe: type[Probe], tmp_path: Path):
    torch.manual_seed(0)
    eager = probe(Config())
    missing = getattr(probe, "missing", None)
    # Other values than construction gives, so that what was not read shows.
    stored = {name: tensor + 1 for name, tensor in eager.state_dict().items() if name != missing}
    save_file(stored, tmp_path / "model.safetensors")
    torch.manual_seed(0)
    model = lazy_build(probe, Config())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        found = load_weights(model, {name: opened.get_tensor(name) for name in opened.keys()}, strict=False)  # noqa: SIM118
    assert found.initialized == (() if missing is None else (missing,)) and found.unexpected == ()
    eager.load_state_dict(stored, strict=False)
    wanted, made = _tensors(eager), _tensors(model)
    assert wanted.keys() == made.keys()
    for name, tensor in made.items():
        assert type(tensor) is type(wanted[name]) and torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("probe", [Drawn, Constant, Head])
def test_a_missing_key_is_an_error_that_names_it(probe: type[Probe]):
    stored = probe(Config()).state_dict()
    del stored[probe.missing]  # type: ignore[attr-defined]
    model = lazy_build(probe, Config())
    with pytest.raises(IncompleteCheckpoint, match=probe.missing):  # type: ignore[attr-defined]
        load_weights(model, stored)
    assert all(parameter.is_meta for parameter in model.parameters())


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    return found | {name: value for name, value in vars(model).items() if isinstance(value, torch.Tensor)}
