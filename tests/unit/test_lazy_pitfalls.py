"""What has gone wrong in other systems that build lazily or on meta, one test each: here it is as in eager construction.

Each test's docstring says what happened elsewhere.
"""

from __future__ import annotations

import gc
import itertools
import random
import weakref

import pytest
import torch
from torch import Tensor, nn

from qlazy.errors import IncompleteCheckpoint, UsageError
from qlazy.lazy import edits, lazy_build, load_weights, log, materialize, materialize_shard, release
from qlazy.memory import Meter
from tests.lazy.compare import compare


def assert_equal(build, seed: int = 0) -> None:
    result = compare(build, seed)
    assert (result.status, result.differences, result.reason) == ("equal", [], "")
    assert result.tensors


def build_both(build, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    eager = build()
    torch.manual_seed(seed)
    return eager, lazy_build(build)


class Rotary(nn.Module):
    def __init__(self, scaled: bool = True) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8), persistent=False)
        self.original = self.inv_freq
        self.register_buffer("embed_scale", torch.tensor(8.0**0.5), persistent=False)
        self.register_buffer("freqs_cis", torch.polar(torch.ones(3, 4), torch.outer(torch.arange(3.0), self.inv_freq)))


def test_01_buffers_that_are_not_saved():
    """They came back as uninitialised memory, in silence."""
    assert_equal(Rotary)
    module = lazy_build(Rotary)
    load_weights(module, {"freqs_cis": torch.zeros(3, 4, dtype=torch.complex64)})
    assert torch.equal(module.inv_freq, Rotary().inv_freq) and module.original is module.inv_freq
    assert not module.freqs_cis.any()


def test_02_buffers_whose_value_means_something():
    """Gemma's embed_scale was made anew from its name, and wrong."""
    module = materialize(lazy_build(Rotary), only="embed_scale")
    assert module.embed_scale.item() == torch.tensor(8.0**0.5).item() and module.inv_freq.is_meta


def test_03_values_read_in_a_constructor():
    """`.item()`, `.tolist()`, `int()` and `.numpy()` crashed."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            drop = torch.linspace(0, 0.3, 4)
            self.rates = [rate.item() for rate in drop]
            self.again = drop.tolist()
            self.width = int(torch.tensor(3)) + sum(range(torch.tensor(2)))
            self.array = drop.numpy() * 2
            self.text = f"{drop[1]:.3f} {torch.tensor(7)}"
            self.drawn = float(torch.rand(1))
            self.any = bool((drop > 0.2).any()) and torch.equal(drop, drop.clone())
            self.kept = drop[drop > 0.15]
            self.places = torch.nonzero(drop > 0.15)
            self.linear = nn.Linear(self.width, len(self.kept))

    assert_equal(Reader)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(5, 4)
        self.encoder = nn.ModuleDict({"tokens": nn.Embedding(5, 4)})
        self.encoder["tokens"].weight = self.shared.weight
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = nn.Parameter(self.shared.weight.data)  # another parameter on the same memory
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.held = [self.shared.weight]


def test_04_ties_declared_or_not():
    """They were lost, or told by pointers, which are all 0 on meta."""
    eager, lazy = build_both(Tied)
    before = lazy.shared.weight
    assert lazy.encoder["tokens"].weight is before and lazy.head.weight is not before
    materialize(lazy)
    assert lazy.shared.weight is before and lazy.encoder["tokens"].weight is before and lazy.held[0] is before
    assert lazy.head.weight.data_ptr() == before.data_ptr() and torch.equal(before, eager.shared.weight)
    assert lazy.one.weight.data_ptr() != lazy.other.weight.data_ptr()
    loaded = lazy_build(Tied)
    load_weights(loaded, {"shared.weight": torch.ones(5, 4)}, strict=False)
    assert loaded.head.weight.data_ptr() == loaded.shared.weight.data_ptr() and bool((loaded.head.weight == 1).all())


@pytest.mark.filterwarnings("ignore:`?torch.nn.utils.weight_norm:FutureWarning")
def test_05_weight_norm_and_parametrizations():
    """Some failed on meta; setting a weight after it was parametrized did nothing; names changed."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.old = nn.utils.weight_norm(nn.Conv1d(4, 4, 3), name="weight", dim=2)
            self.new = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3), name="weight", dim=2)
            nn.init.normal_(self.new.weight)
            self.orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(4, 3))
            self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
            self.old_spectral = nn.utils.spectral_norm(nn.Linear(4, 3))
            self.removed = nn.utils.remove_weight_norm(nn.utils.weight_norm(nn.Linear(3, 2)))

    assert_equal(Normed)
    eager, lazy = build_both(Normed)
    assert list(eager.state_dict()) == list(lazy.state_dict())
    materialize(lazy)
    inputs = torch.randn(2, 4, 8)
    assert torch.equal(eager.old(inputs), lazy.old(inputs)) and torch.equal(eager.new(inputs), lazy.new(inputs))


def test_06_what_reset_parameters_would_not_do():
    """Meta and `reset_parameters` gives other values, or NaN, where a class has none, or a wrong one."""

    class Resets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4,), 2.0))
            self.attention = nn.MultiheadAttention(4, 2)
            self.norm = nn.LayerNorm(4)
            nn.init.constant_(self.norm.weight, 0.5)

        def reset_parameters(self) -> None:
            raise AssertionError("nobody asked for other values")

    assert_equal(Resets)


@pytest.mark.filterwarnings("ignore:mean is more than 2 std:UserWarning")
def test_07_initialisers_that_do_nothing_on_meta():
    """trunc_normal_, dirac_, orthogonal_ and sparse_ return at once for meta tensors, so that nothing was recorded."""

    class Initialised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.init.trunc_normal_(torch.empty(40, 5), std=0.02)
            self.wide = nn.init.trunc_normal_(torch.empty(40, 5), std=2.0, a=-1, b=1)
            self.tail = nn.init.trunc_normal_(torch.empty(40, 5), std=0.5, a=3, b=4)
            self.dirac = nn.init.dirac_(torch.empty(4, 4, 3))
            self.orthogonal = nn.init.orthogonal_(torch.empty(6, 4))
            self.flat = nn.init.orthogonal_(torch.empty(4, 6), gain=2.0)
            self.sparse = nn.init.sparse_(torch.empty(6, 4), 0.3)
            self.low = nn.Parameter(nn.init.trunc_normal_(torch.empty(33, dtype=torch.bfloat16)))

    assert_equal(Initialised)


def layers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(5 + i, 6 + i) for i in range(4)), nn.BatchNorm1d(9), nn.LSTM(3, 2))


def test_08_values_that_depend_on_the_order():
    """The same seed gave other values on another layout; random operations on meta did not move the generator."""
    torch.manual_seed(5)
    eager = dict(layers().state_dict())
    after = torch.rand(3)
    for seed in range(4):
        torch.manual_seed(5)
        lazy = lazy_build(layers)
        assert torch.equal(torch.rand(3), after)
        names = list(eager)
        random.Random(seed).shuffle(names)
        for name in names:
            materialize(lazy, only=lambda found, tensor, name=name: found == name)
            assert torch.equal(lazy.state_dict()[name], eager[name]), name
            torch.rand(1)  # what happens in between does not matter


def test_09_peak_memory():
    """Originals were referenced until the end, so that the peak was that of everything."""
    slice_bytes = 16 << 20

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in range(8):
                whole = torch.randn(4 << 20)
                self.register_buffer(f"part{i}", whole[: 1 << 20].clone() * 2)

    lazy = lazy_build(Stacked)
    result_bytes = 8 * (4 << 20)
    with Meter(interval_s=0.001) as meter:
        materialize(lazy)
    # The slice: what was drawn, its clone, the product.
    assert meter.peak_bytes <= result_bytes + slice_bytes + 2 * (4 << 20) + (8 << 20)


def test_10_any_order_of_arrival():
    """Parts that came out of order were buffered until their layer was complete."""
    eager, _ = build_both(layers)
    stored = {name: tensor + 1 for name, tensor in eager.state_dict().items()}
    for order in itertools.islice(itertools.permutations(stored), 3):
        lazy = lazy_build(layers)
        load_weights(lazy, {name: stored[name] for name in order})
        assert all(torch.equal(tensor, stored[name]) for name, tensor in lazy.state_dict().items())


def test_11_missing_weights():
    """Checks for missing weights were off where models were quantized; the values were garbage."""
    eager, lazy = build_both(layers)
    stored = {name: tensor + 1 for name, tensor in eager.state_dict().items() if name not in ("1.weight", "4.running_mean")}
    with pytest.raises(IncompleteCheckpoint, match=r"2 of .*1\.weight, 4\.running_mean"):
        load_weights(lazy, stored)
    found = load_weights(lazy, stored, strict=False)
    assert found.initialized == ("1.weight", "4.running_mean")
    for name, tensor in lazy.state_dict().items():
        assert torch.equal(tensor, stored.get(name, eager.state_dict()[name])), name


def test_12_parameters_of_a_class_of_their_own():
    """bitsandbytes' parameters lost their shape, their bias or their state on meta."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def build() -> nn.Module:
        return nn.Sequential(bitsandbytes.nn.Linear4bit(64, 8, quant_type="nf4"), bitsandbytes.nn.Linear8bitLt(8, 4))

    assert_equal(build)
    eager, lazy = build_both(build)
    assert type(lazy[0].weight) is type(eager[0].weight) and lazy[0].weight.shape == (8, 64)
    materialize(lazy)
    assert type(lazy[0].weight) is type(eager[0].weight) and lazy[0].weight.quant_type == "nf4"
    assert type(lazy[1].weight) is type(eager[1].weight) and torch.equal(lazy[1].bias, eager[1].bias)


@pytest.mark.parametrize("name", ["Falcon", "Llama", "GPT2", "OPT"])
def test_13_models_that_failed_elsewhere(name: str):
    """Falcon, Llama's constructor, GPT-2 and OPT failed or ran out of memory."""
    import transformers

    tiny = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {
        "OPT": {"word_embed_proj_dim": 32, "ffn_dim": 32, "max_position_embeddings": 16},
        "Llama": {"intermediate_size": 32},
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**tiny, **ids, **more.get(name, {}))
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    assert_equal(lambda: getattr(transformers, f"{name}{suffix}")(config))


def test_13_a_loss_that_is_an_empty_tensor():
    """Baichuan's plain tensor attribute stayed lazy."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = torch.tensor([])
            self.more = {"a": [torch.ones(2), (torch.zeros(1), {3: torch.arange(2)})]}
            self.modules_in_a_list = [nn.Linear(2, 2)]

    assert_equal(Loss)
    lazy = materialize(lazy_build(Loss))
    assert not lazy.loss.is_meta and not lazy.more["a"][1][1][3].is_meta and not lazy.modules_in_a_list[0].weight.is_meta


def test_14_shapes_of_old_constructors():
    """`torch.Tensor([63])` gave 63 uninitialised elements."""

    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.list, self.sizes = torch.Tensor([63]), torch.Tensor(2, 3).zero_()
            self.ints = torch.IntTensor([1, 2])
            self.new = self.list.new_tensor([1, 2]), self.list.new([5]), self.list.new(2, 2).fill_(1), self.list.new_zeros(3)
            self.parameter = nn.Parameter(torch.FloatTensor(4).uniform_())

    assert_equal(Old)
    assert lazy_build(Old).list.shape == (1,)


def test_15_old_references():
    """They kept pointing at the fake tensor; dtype and device that were asked for afterwards were lost."""
    eager, lazy = build_both(lambda: nn.Linear(6, 4))
    weight, row = lazy.weight, lazy.weight.data[1]
    optimizer = torch.optim.SGD(lazy.parameters(), lr=0.1)
    materialize(lazy, dtype=torch.bfloat16)
    assert weight is lazy.weight and weight.dtype == torch.bfloat16 and torch.equal(weight, eager.weight.to(torch.bfloat16))
    assert optimizer.param_groups[0]["params"][0] is weight
    again = lazy_build(lambda: nn.Linear(6, 4))
    row = again.weight.data[1]
    materialize(again)
    assert torch.equal(materialize(row), again.weight[1])
    row.zero_()  # the view lies on the same memory
    assert not again.weight[1].any()


@pytest.mark.filterwarnings("ignore:`?torch.nn.utils.weight_norm:FutureWarning")
def test_16_what_cannot_be_swapped():
    """Tensors with weak references, and those that an autograd graph holds, refused."""
    eager, lazy = build_both(lambda: nn.Linear(3, 2))
    watcher = weakref.ref(lazy.weight)
    other = nn.Module()
    other.tied = lazy.weight
    holder = nn.ModuleList([lazy, other])
    materialize(holder)
    assert watcher() is None or watcher().is_meta
    assert torch.equal(lazy.weight, eager.weight) and other.tied is lazy.weight and type(lazy.weight) is nn.Parameter

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.utils.weight_norm(nn.Linear(3, 3))
            self.scaled = self.norm(torch.ones(1, 3)) * 2

    eager, lazy = build_both(Graph)
    materialize(lazy)
    assert torch.equal(lazy.scaled, eager.scaled) and torch.equal(lazy.norm.weight_v, eager.norm.weight_v)
    lazy.norm(torch.ones(1, 3)).sum().backward()
    assert lazy.norm.weight_g.grad is not None


def test_17_operations_that_meta_does_not_know():
    """One unknown operation made everything be built for real."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.solved = torch.unique(torch.arange(6) % 4)
            self.counts = torch.bincount(self.solved)
            self.norm = nn.LayerNorm(4)
            self.norm.weight.data.fill_(2.0)
            self.sparse = torch.eye(3).to_sparse()

    assert_equal(Odd)
    with lazy_build() as build:
        odd = Odd()
    assert odd.linear.weight.is_meta and odd.solved.is_meta and odd.norm.weight.is_meta
    assert any("unique" in entry.reason for entry in build.report(odd).concretised)


EDITS = {
    "half": lambda module: module.half(),
    "in place": lambda module: nn.init.zeros_(module.weight),
    "replaced": lambda module: setattr(module, "weight", nn.Parameter(torch.empty(2, 2, device="meta"))),
    "attribute": lambda module: setattr(module, "table", module.bias * 2),
    "no_grad": lambda module: torch.no_grad()(module.weight.mul_)(2),
    "data": lambda module: module.weight.data.zero_(),
    "part of data": lambda module: module.weight.data.view(-1)[1:].fill_(7),
    "data of a view": lambda module: module.weight.detach()[0].data.fill_(3),
    "several of data": lambda module: [module.weight.data[i % 2].fill_(i) for i in range(5)],
    "other data": lambda module: setattr(module.weight, "data", module.weight.data * 2),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_18_edits_that_no_recorder_saw(edit):
    """They were lost in silence."""
    module = lazy_build(lambda: nn.Linear(2, 2))
    edit(module)
    with pytest.raises(UsageError, match=r"weight|table") as caught:
        materialize(module)
    assert "lazy_build" in caught.value.hint


def test_18_edits_read_by_a_recorder():
    module = lazy_build(lambda: nn.Linear(2, 2))
    nn.init.zeros_(module.weight)
    with pytest.raises(UsageError, match="after"), lazy_build():
        module.weight * 2
    with pytest.raises(UsageError, match="after"), lazy_build():
        nn.init.ones_(module.weight)
    table = torch.empty(2, device="meta")
    with pytest.raises(UsageError, match="no values"), lazy_build():
        module.bias.data.copy_(table)
    with lazy_build():
        module.table = table * 2
    with pytest.raises(UsageError, match="table"):
        materialize(module, only="table")
    materialize(module, only="bias")


def test_18_edits_through_data_that_is_kept():
    def edit(module: nn.Linear) -> None:
        data = module.weight.data
        for value in range(4):
            data[value % 2].fill_(value)
        module.weight[1].detach().add_(5)
        module.weight.data.mul_(2)

    eager, lazy = build_both(lambda: nn.Linear(2, 2))
    edit(eager)
    with lazy_build():
        edit(lazy)
    assert torch.equal(materialize(lazy).weight, eager.weight)
    lazy = lazy_build(lambda: nn.Linear(2, 2))
    data = lazy.weight.data
    with lazy_build():
        data[0].fill_(1)
    data.fill_(2)
    with pytest.raises(UsageError, match="weight"):
        materialize(lazy)


def test_18_edits_of_what_no_module_holds():
    with lazy_build():
        alone, moved, untouched = torch.zeros(3), torch.zeros(3), torch.zeros(3)
        alone.add_(1)
        moved.data = torch.ones(3)
        moved.mul_(2)
    alone.data.fill_(5)
    with pytest.raises(UsageError, match=r"\[3\] was written to after"):
        materialize(alone)
    assert torch.equal(materialize(moved), torch.full((3,), 2.0)) and not materialize(untouched).any()


def test_18_edits_are_told_by_name():
    module = lazy_build(lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    weight = module[1].weight
    weight.data.zero_()
    for use in (materialize, materialize_shard, lambda tensor: lazy_build(torch.add, tensor, 1)):
        with pytest.raises(UsageError, match=r"^1\.weight \[2, 2\] was written to after"):
            use(weight)
    materialize(module[0])
    with pytest.raises(UsageError, match=r"1\.weight"):
        materialize(module)


def test_18_edits_after_a_release():
    module = release(materialize(lazy_build(lambda: nn.Linear(2, 2))))
    module.bias.data.zero_()
    materialize(module.weight)
    with pytest.raises(UsageError, match="bias"):
        materialize(module)


def test_18_data_of_real_tensors_counts_for_itself(monkeypatch):
    """As it always does; and once nothing is lazy, torch is as it was."""
    waiting: weakref.WeakSet[log.Record] = weakref.WeakSet()
    monkeypatch.setattr(log, "pending", waiting)
    monkeypatch.setattr(edits, "pending", waiting)
    module = lazy_build(lambda: nn.Linear(2, 2))
    kept, real = module.weight.data, nn.Linear(2, 2).weight
    assert type(kept) is Tensor and not kept.requires_grad and kept.is_meta and "data" in vars(Tensor)
    before = real._version
    real.data.zero_()
    assert real._version == before and not real.any()
    before = materialize(module).weight._version
    module.weight.data.zero_()
    assert module.weight._version == before and not module.weight.any()
    del module, kept
    gc.collect()
    assert torch.equal(real.data, real) and "data" not in vars(Tensor)


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_18_edits_in_a_build_that_is_entered_again(edit):
    def build() -> nn.Module:
        return nn.Linear(2, 2)

    eager, lazy = build_both(build)

    def edit_it(module: nn.Module) -> Tensor:
        edit(module) if edit is not EDITS["replaced"] else setattr(module, "weight", nn.Parameter(torch.full((2, 2), 3.0)))
        return module.weight

    edit_it(eager)
    with lazy_build():
        edit_it(lazy)
    materialize(lazy)
    for name, tensor in eager.state_dict().items():
        assert torch.equal(lazy.state_dict()[name], tensor) and lazy.state_dict()[name].dtype == tensor.dtype
