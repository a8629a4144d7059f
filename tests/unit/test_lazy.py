"""Lazy building: parameters without storage, buffers and everything else as eager building has them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlazy.lazy import lazy_build, materialize

ROOT = Path(__file__).resolve().parents[2]


class Rotary(nn.Module):
    """Buffers of both kinds, a plain tensor attribute, and values that the constructor reads."""

    def __init__(self) -> None:
        super().__init__()
        inverse = 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)
        self.register_buffer("inv_freq", inverse, persistent=False)
        self.register_buffer("steps", torch.linspace(0, 1, 5))
        self.plain = torch.arange(3) * 2
        self.highest = inverse.max().item()
        self.rates = torch.linspace(0, 0.1, 4).tolist()
        self.table = torch.eye(3).numpy().sum()
        self.first = int(self.steps[1] * 4)


class Block(nn.Module):
    """Parameters made in every usual way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv2d(3, 2, 2, bias=False)
        self.embedding = nn.Embedding(5, 4, padding_idx=0)
        self.attention = nn.MultiheadAttention(4, 2)
        self.batch_norm = nn.BatchNorm1d(4)
        self.lstm = nn.LSTM(4, 3)
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_parameter("absent", None)
        self.rotary = Rotary()
        self.list = nn.ParameterList([torch.zeros(2), torch.ones(3)])


class Tied(nn.Module):
    """One parameter under two names, and one module in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.block = nn.Linear(4, 4)
        self.again = self.block


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def test_parameters_have_no_storage_and_keep_all_else():
    eager = Block()
    with lazy_build():
        lazy = Block()
    wanted, made = dict(eager.named_parameters()), dict(lazy.named_parameters())
    assert list(made) == list(wanted)
    for name, parameter in made.items():
        assert type(parameter) is nn.Parameter and parameter.is_meta, name
        facts = [(p.shape, p.dtype, p.requires_grad, p.stride()) for p in (parameter, wanted[name])]
        assert facts[0] == facts[1], name
    assert lazy.absent is None


def test_values_are_those_of_eager_construction():
    torch.manual_seed(0)
    eager = Block()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with lazy_build():
        lazy = Block()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(tensor.is_meta for tensor in tensors(lazy).values())
    assert materialize(lazy) is lazy
    wanted, made = tensors(eager), tensors(lazy)
    assert list(made) == list(wanted)
    for name, tensor in made.items():
        assert (
            type(tensor) is type(wanted[name]) and tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name])
        ), name
    assert lazy.rotary._non_persistent_buffers_set == {"inv_freq"}
    assert torch.equal(lazy.rotary.plain, eager.rotary.plain)
    facts = [(r.highest, r.rates, r.table, r.first) for r in (lazy.rotary, eager.rotary)]
    assert facts[0] == facts[1]


def test_ties_keep_identity():
    with lazy_build():
        tied = Tied()
    assert tied.head.weight is tied.embedding.weight and tied.again is tied.block
    assert len(list(tied.parameters())) == len(list(Tied().parameters()))


def test_a_parameter_made_before_is_left_with_its_owner():
    shared = nn.Parameter(torch.arange(4.0))
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    with lazy_build():
        first.shared = shared
        second.shared = shared
    assert first.shared is shared and second.shared is shared
    assert torch.equal(shared, torch.arange(4.0))


def test_what_is_on_meta_already_stays_the_same_object():
    parameter = nn.Parameter(torch.empty(3, device="meta"))
    with lazy_build():
        module = nn.Module()
        module.weight = parameter
    assert module.weight is parameter


def test_nests():
    with lazy_build():
        with lazy_build():
            inner = nn.Linear(2, 2)
        after = nn.Linear(2, 2)
    outside = nn.Linear(2, 2)
    assert inner.weight.is_meta and after.weight.is_meta and not outside.weight.is_meta


def test_a_tie_across_nested_builds_keeps_identity():
    with lazy_build():
        weight = nn.Parameter(torch.zeros(2, 2))
        outer = nn.Linear(2, 2, bias=False)
        outer.weight = weight
        with lazy_build():
            inner = nn.Linear(2, 2, bias=False)
            inner.weight = weight
    assert inner.weight is outer.weight


def test_other_threads_build_eagerly():
    made: dict[str, nn.Linear] = {}
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait()
        made["other"] = nn.Linear(2, 2)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with lazy_build():
        inside.set()
        done.wait()
        made["here"] = nn.Linear(2, 2)
    thread.join()
    assert not made["other"].weight.is_meta and made["here"].weight.is_meta


def test_two_threads_build_lazily_at_once():
    made: list[Tied] = []
    together = threading.Barrier(2)

    def build() -> None:
        with lazy_build():
            together.wait()
            made.append(Tied())
            together.wait()

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(parameter.is_meta for tied in made for parameter in tied.parameters())
    assert made[0].head.weight is not made[1].head.weight


def test_an_error_in_a_constructor_leaves_eager_building_behind():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            raise LookupError("on purpose")

    with pytest.raises(LookupError, match="on purpose"), lazy_build():
        Broken()
    module = nn.Linear(2, 2)
    assert not module.weight.is_meta
    module.register_parameter("more", nn.Parameter(torch.ones(1)))
    assert torch.equal(module.more, torch.ones(1))
    with pytest.raises(TypeError):
        module.register_parameter("wrong", torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        module.register_parameter("a.b", None)


GROWTH = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights, no_tie_weights
from qlazy.lazy import lazy_build
from qlazy.memory import Meter

def build(**options):
    with no_init_weights(), no_tie_weights(), lazy_build():
        return LlamaForCausalLM._from_config(LlamaConfig(**options), dtype=torch.bfloat16)

build(num_hidden_layers=1, hidden_size=64, intermediate_size=64, num_attention_heads=2, vocab_size=100)
with Meter(interval_s=0.002) as meter:
    model = build(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000)
assert sum(p.numel() for p in model.parameters()) > 6_700_000_000
assert all(p.is_meta for p in model.parameters())
print(meter.peak_bytes)
"""


def test_seven_billion_parameters_take_less_than_8_mib():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", GROWTH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 << 20
