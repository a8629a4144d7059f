"""The comparison itself: each thing it claims to see, it sees."""

import pytest
import torch
from torch import nn

from tests.lazy import compare as module
from tests.lazy.compare import compare


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 20), nn.Linear(20, 3)
        self.two.bias = self.one.bias
        self.register_buffer("steps", torch.arange(4.0), persistent=False)
        self.plain = torch.randn(5)
        self.kept = [torch.ones(2), {"x": torch.zeros(3)}]
        self.rate = torch.linspace(0, 1, 3)[1].item()


def test_equal():
    result = compare(Model)
    assert (result.status, result.differences, result.undetermined) == ("equal", [], [])
    assert result.tensors == 8 and result.elements == 60 + 20 + 60 + 20 + 4 + 5 + 2 + 3


def _set(path, value):
    def change(model):
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value(model))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.one.weight.data[7].neg_(), "one.weight: 3 of 60 elements"),
        (lambda m: m.steps.add_(0.0).mul_(-1.0), "steps: 4 of 4 elements"),
        (lambda m: m.plain.fill_(float("nan")), "plain: 5 of 5 elements"),
        (lambda m: m.kept[1]["x"].fill_(1), ".kept[1]['x']: 3 of 3 elements"),
        (_set("rate", lambda m: 0.25), ".rate: 0.25, not 0.5"),
        (lambda m: m.one.weight.requires_grad_(False), "one.weight: requires_grad False, not True"),
        (_set("two.bias", lambda m: nn.Parameter(m.one.bias.detach().clone())), "tensors: not the same objects"),
        (_set("two.bias", lambda m: nn.Parameter(m.one.bias.detach())), "tensors: not the same objects"),
        (_set("two.weight", lambda m: nn.Parameter(m.two.weight.detach().t().contiguous().t())), "two.weight: strides"),
        (_set("plain", lambda m: m.plain.double()), "plain: dtype torch.float64, not torch.float32"),
        (_set("plain", lambda m: nn.Parameter(m.plain)), "plain: "),
        (lambda m: m.kept.append(torch.ones(1)), ".kept[2]: only there when lazy"),
        (_set("two", lambda m: nn.Identity()), "two.weight: only there when eager"),
        (lambda m: torch.rand(1), "generator of torch: another state"),
        (lambda m: m.one.to("meta"), "one.weight: device meta, not cpu"),
    ],
)
def test_unequal(monkeypatch, change, said):
    eager, built = module.materialize, []

    def materialize(model):
        eager(model)
        built.append(model)
        change(model)

    monkeypatch.setattr(module, "materialize", materialize)
    if "generator" in said:
        # States are compared as they are when construction ends.
        monkeypatch.setattr(module, "lazy_build", lambda real=module.lazy_build: Drawing(real()))
    result = compare(Model)
    assert built and result.status == "unequal" and any(said in difference for difference in result.differences), result


class Drawing:
    """A lazy build after which the generator has drawn once more."""

    def __init__(self, inner):
        self.inner = inner

    def __enter__(self):
        return self.inner.__enter__()

    def __exit__(self, *details):
        self.inner.__exit__(*details)
        torch.rand(1)


def test_what_eager_construction_leaves_open_is_not_compared():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = nn.Parameter(torch.ones(4))
            self.loose = nn.Parameter(torch.empty(6))
            with torch.no_grad():
                self.loose[:3] = 1.0

    result = compare(Loose)
    assert result.status == "equal" and result.undetermined == [".loose"], result


def test_what_only_lazy_building_leaves_open_is_unequal(monkeypatch):
    monkeypatch.setattr(module, "materialize", lambda model: model.to_empty(device="cpu"))
    result = compare(lambda: nn.Linear(64, 64))
    assert result.status == "unequal" and any("weight: 4096 of 4096 elements" in line for line in result.differences), result


def test_unbuildable():
    def build():
        raise ValueError("no such thing")

    result = compare(build)
    assert (result.status, result.reason) == ("unbuildable", "ValueError: no such thing")


def test_lazy_failure_is_unequal(monkeypatch):
    monkeypatch.setattr(module, "materialize", lambda model: 1 / 0)
    result = compare(Model)
    assert result.status == "unequal" and result.reason.startswith("ZeroDivisionError")
