"""Values, ties and generators are those of eager construction, whatever a constructor does; and the ways to ask for them."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import json
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from qlazy.errors import UsageError
from qlazy.lazy import Build, lazy_build, load_weights, materialize, materialize_shard, release
from qlazy.lazy.journal import Journal
from qlazy.lazy.log import Op, record_of
from qlazy.lazy.replay import execute
from tests.lazy.compare import compare

CONSTRUCTORS: dict[str, Callable[[nn.Module], None]] = {}


def constructor(fill: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    CONSTRUCTORS[fill.__name__] = fill
    return fill


@constructor
def views_and_writes_to_them(m: nn.Module) -> None:
    w = torch.zeros(4, 5)
    w[1].normal_()
    w[:, 2].fill_(3)
    w.view(-1)[::3].uniform_()
    m.w, m.row, m.held = nn.Parameter(w), w[2], [w[0], {"t": w.t()}]
    v = w.clone()
    v[0, 0] = -v[0, 0]
    v[[1, 2]] += 1
    m.v = v
    x = torch.arange(6.0)
    x[x > 2] = 0
    m.x, m.chosen = x, x[x > 0.5]
    y = torch.cat([x, w[0]]).half()
    m.y, m.small = y, y.clone().resize_(2)
    m.expanded = torch.rand(1, 3).expand(4, 3)


@constructor
def data_of_parameters(m: nn.Module) -> None:
    m.a = nn.Linear(4, 4)
    m.a.weight.data = nn.init.trunc_normal_(m.a.weight.data.to(torch.float32)).to(torch.float16)
    m.b = nn.Linear(3, 2)
    m.b.weight.data = m.b.weight.data * 2
    m.b.weight.data = m.b.weight.data.t()
    m.c, m.d = nn.Linear(2, 2).half(), nn.Linear(2, 2).double().to("cpu")
    m.b.weight.note, m.b.weight.extra = "kept", torch.ones(2)


@constructor
def copies(m: nn.Module) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    m.encoder = nn.TransformerEncoder(layer, 2)
    t = torch.randn(6)
    m.tensors = copy.deepcopy([t, t[2:], t])
    m.twice = copy.deepcopy(nn.Sequential(layer, layer))
    m.shallow = copy.copy(t)


@constructor
def generators(m: nn.Module) -> None:
    one, two = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)
    m.a, m.b = torch.randn(3, generator=one), torch.empty(30).normal_(generator=two)
    m.c, m.d = torch.randperm(10, generator=one), torch.randint(0, 5, (7,), generator=one)
    m.e, m.f = torch.rand(3), torch.multinomial(torch.ones(10), 5, generator=two)
    m.left = one.get_state()[:0], float(torch.rand(1, generator=one)), float(torch.rand(1, generator=two))


@constructor
def seeds_and_states(m: nn.Module) -> None:
    m.a = torch.randn(3)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        m.b = torch.randn(4)
    m.c = torch.randn(5)
    state = torch.get_rng_state()
    m.d = torch.rand(3)
    torch.set_rng_state(state)
    m.e = torch.rand(3)
    torch.manual_seed(7)
    m.f = torch.rand(3)


@constructor
def everything_random(m: nn.Module) -> None:
    m.a, m.b, m.c = torch.randperm(11), torch.multinomial(torch.rand(10), 5), torch.poisson(torch.rand(4) * 5)
    m.d, m.e = torch.bernoulli(torch.rand(5)), torch.dropout(torch.ones(20), 0.5, True)
    m.f = nn.functional.dropout2d(torch.ones(2, 3, 4, 4))
    m.g, m.h = torch.normal(torch.zeros(3), torch.ones(3)), torch.distributions.Gamma(1.0, 1.0).sample((3,))
    m.i, m.j = torch.rand_like(m.c), torch.randint_like(m.c, 5)
    m.k, m.l = torch.empty(5).exponential_(), torch.empty(5).geometric_(0.3)
    m.m, m.n = torch.empty(4).cauchy_(), torch.empty(4).log_normal_()
    m.o, m.p = torch.empty(5, dtype=torch.int64).random_(), torch.native_dropout(torch.ones(10), 0.5, True)
    m.q, m.r = torch.rand(3, dtype=torch.float64), torch.randn(100, dtype=torch.bfloat16)
    m.s, m.t = torch.randn(3, dtype=torch.complex64), torch.empty(8, 6).t().normal_()
    m.u, m.v = torch.empty(20, 20)[::2, ::3].uniform_(), nn.functional.gumbel_softmax(torch.ones(4))


@constructor
def arrays(m: nn.Module) -> None:
    a = torch.zeros(4)
    array = a.numpy()
    array[1] = 5
    m.a = a * 2
    array[2] = 7
    m.b = a
    a[3] = 9
    m.sum = float(array.sum())
    outside = np.ones(3)
    shared = torch.from_numpy(outside)
    outside[0] = 4
    m.weight = nn.Parameter(torch.empty(3))
    m.weight.data.copy_(shared)
    outside[1] = 9
    m.shared, m.more = shared, nn.Parameter(torch.from_numpy(outside * 2))
    m.register_buffer("from_shared", shared + 1)


@constructor
def addresses(m: nn.Module) -> None:
    """What compiled code of others reads and writes."""
    a = torch.zeros(4)
    part = a[1:]
    ctypes.memmove(part.data_ptr(), (ctypes.c_float * 2)(7, 8), 8)
    m.a, m.b, m.read = a, a * 2, (a.tolist(), part.tolist(), float(a.numpy().sum()), a[2].item())
    a[0] = 3
    m.w = nn.Linear(2, 2)
    ctypes.memmove(m.w.weight.data_ptr(), (ctypes.c_float * 2)(7, 8), 8)
    m.w.weight.data.mul_(2)
    m.copied = copy.deepcopy(a)


REAL = nn.Linear(2, 2)


@constructor
def stored_values(m: nn.Module) -> None:
    """A constructor that loads pretrained weights."""
    file, values = io.BytesIO(), {"a": REAL.weight.detach(), "c": torch.arange(3)}
    torch.save({"a": REAL.weight.detach(), "b": REAL.bias.detach().bfloat16(), "c": REAL}, file)
    file.seek(0)
    m.loaded = torch.load(file, weights_only=False)
    m.tensors = safetensors.torch.load(safetensors.torch.save({"a": REAL.weight.detach()}))
    m.layer, m.other = nn.Linear(2, 2), nn.Linear(2, 2)
    m.layer.load_state_dict(REAL.state_dict())
    m.other.weight.data = m.loaded["a"]
    m.other.weight.data.mul_(2)
    m.copied, m.kept = copy.deepcopy(REAL), copy.deepcopy(values["a"])
    m.kept.data = values["c"] * 2
    m.empty = torch.empty(0)
    m.storage = REAL.weight.untyped_storage().clone().tolist()


@constructor
def default_dtypes(m: nn.Module) -> None:
    torch.set_default_dtype(torch.float64)
    m.a, m.b, m.c, m.d = torch.empty(3).fill_(1), torch.arange(3) * 2.5, torch.tensor([1.0]), torch.randn(3)
    torch.set_default_dtype(torch.float32)
    m.e, m.f = torch.ones(2), torch.linspace(0, 1, 3)


@constructor
def values_of_values(m: nn.Module) -> None:
    t = torch.arange(4.0)
    m.a, m.b = torch.tensor([t[0], t[1]]), torch.as_tensor([t[0], 5])
    m.c, m.d, m.e = torch.full((2,), t[2]), torch.arange(t[3]), np.array([t[1], t[2]])
    m.f, m.g = t[np.array([0, 1])], t[[True, False, True, False]]
    m.h, m.i, m.j = t[None, [0, 2]], t[int(t[2]) :], np.float64(3) * t
    steps = torch.zeros(50)
    for i in range(50):
        steps[i] = i * 2.5
        if steps[i].item() > 100:
            steps[i] = 0
    m.steps = steps


@constructor
def forward_and_backward(m: nn.Module) -> None:
    m.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    m.width = m.body(torch.randn(1, 3, 8, 8)).shape[1]
    m.head = nn.Linear(m.width, 2)
    m.shape_of_eval = m.body.eval()(torch.zeros(1, 3, 6, 6)).shape[1] + int(m.body(torch.ones(1, 3, 6, 6)).sum() * 0)
    m.dynamic = nn.LazyLinear(3)
    m.dynamic(torch.ones(1, 4))
    m.trained = nn.Linear(2, 2)
    m.trained(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(m.trained.parameters(), lr=0.1, momentum=0.9).step()


@constructor
def other_modes(m: nn.Module) -> None:
    with torch.inference_mode():
        a = torch.randn(4)
        m.a, m.b, m.c = a.reshape(2, 2), a.reshape(2, 2).t().reshape(-1), a.to(torch.float16)
    with torch.device("cpu"):
        m.d = nn.Linear(2, 2)
    m.e = torch.vmap(lambda x: x * 2)(torch.arange(3.0))
    m.f = torch.func.grad(lambda x: (x**2).sum())(torch.ones(3))


@constructor
def complex_numbers(m: nn.Module) -> None:
    m.a = torch.polar(torch.ones(3), torch.arange(3.0))
    m.b, m.c = m.a.conj().resolve_conj(), m.a.conj().imag.resolve_neg()
    m.d, m.e = torch.view_as_real(m.a), torch.fft.rfft(torch.randn(10))


@constructor
def meant_for_meta(m: nn.Module) -> None:
    m.a = torch.empty(3, device="meta")
    m.b, m.c, m.d = m.a + 1, nn.Linear(2, 2, device="meta"), nn.Linear(2, 2)
    with torch.device("meta"):
        m.e = torch.ones(2)


def module_of(fill: Callable[[nn.Module], None]) -> nn.Module:
    module = nn.Module()
    fill(module)
    return module


@pytest.mark.parametrize("fill", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_equal_to_eager_construction(fill: Callable[[nn.Module], None]):
    for seed in (0, 1):
        result = compare(lambda: module_of(fill), seed)
        assert (result.status, result.differences, result.reason) == ("equal", [], "")


def test_explicit_generators_stand_where_eager_construction_leaves_them():
    def draw(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(37, generator=generator)

    eager, lazy = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    wanted, made = draw(eager), lazy_build(draw, lazy)
    assert torch.equal(eager.get_state(), lazy.get_state())
    assert torch.equal(materialize(made), wanted)
    assert torch.equal(draw(eager), draw(lazy))


def test_what_constructors_see():
    with lazy_build():
        weight = nn.Linear(2, 3).weight
        assert weight.device == torch.device("cpu") and not weight.is_meta and weight.is_cpu and not weight.is_cuda
        assert torch.ones(1, device=weight.device).device == weight.device and weight.get_device() == -1
        assert "tensor([0, 1])" in f"{torch.arange(2)}" and repr(torch.ones(1)) == "tensor([1.])"
        assert 3 in torch.tensor([1, 3])
    assert weight.is_meta and type(weight) is nn.Parameter


def test_default_device_is_shown_and_values_are_the_cpu_generators():
    with lazy_build(default_device="cuda:1"):
        lazy = nn.Linear(2, 3)
        assert lazy.weight.device == torch.device("cuda:1") and lazy.weight.is_cuda and lazy.weight.get_device() == 1
        assert (lazy.weight * 2).device == torch.device("cuda:1") and lazy.weight.cpu().device == torch.device("cpu")
        bias = lazy.bias.data
        assert bias.to("cuda:1") is bias and bias.cuda(1) is bias and bias.to("cuda:1", torch.float16).device == bias.device
        assert torch.ones(2, device="cpu").cuda().device == torch.device("cuda:0")
    torch.manual_seed(0)
    eager = nn.Linear(2, 3)
    torch.manual_seed(0)
    with lazy_build(default_device="cuda:1"):
        lazy = nn.Linear(2, 3)
    assert torch.equal(materialize(lazy, device="cpu").weight, eager.weight)
    with pytest.raises(UsageError, match="meta"):
        lazy_build(default_device="meta")


def test_dtype_is_the_default_dtype_inside():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        eager = nn.Linear(2, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    with lazy_build(dtype=torch.float64):
        lazy = nn.Linear(2, 3)
    assert torch.get_default_dtype() is torch.float32
    assert torch.equal(materialize(lazy).weight, eager.weight)


def test_function_form_passes_everything_on():
    module = lazy_build(nn.Linear, 2, out_features=3, bias=False, dtype=torch.float64, device="cpu")
    assert module.weight.is_meta and module.weight.dtype == torch.float64 and module.bias is None


def test_two_builds_at_once_and_one_entered_twice():
    build = lazy_build()
    torch.manual_seed(0)
    with build:
        first = nn.Linear(2, 2)
        with build, lazy_build() as inner:
            second = nn.Linear(2, 2)
    with build:
        third = nn.Linear(2, 2)
    torch.manual_seed(0)
    eager = [nn.Linear(2, 2) for _ in range(3)]
    for made, wanted in zip((third, first, second), (eager[2], eager[0], eager[1]), strict=True):
        assert torch.equal(materialize(made).weight, wanted.weight)
    assert inner.report().ops * 4 == build.report().ops  # counted once for each time that it is open around something


def test_threads_record_for_themselves():
    made: dict[int, nn.Module] = {}
    together = threading.Barrier(3)

    def build(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with lazy_build():
            together.wait()
            for _ in range(20):
                made[seed] = nn.ParameterList([torch.randn(4, generator=generator), torch.arange(3.0) + seed])
            together.wait()
        materialize(made[seed])

    threads = [threading.Thread(target=build, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    together.wait()
    assert not torch.ones(2).is_meta
    together.wait()
    for thread in threads:
        thread.join()
    for seed, found in made.items():
        generator = torch.Generator().manual_seed(seed)
        wanted = [torch.randn(4, generator=generator) for _ in range(20)][-1]
        assert torch.equal(found[0], wanted) and torch.equal(found[1], torch.arange(3.0) + seed)


def test_only_chooses_by_pattern_or_function():
    lazy = lazy_build(nn.TransformerEncoderLayer, 8, 2)
    materialize(lazy, only=r"^linear\d\.weight$")
    real = {name for name, tensor in lazy.named_parameters() if not tensor.is_meta}
    assert real == {"linear1.weight", "linear2.weight"}
    materialize(lazy, only=lambda name, tensor: tensor.dim() == 1)
    assert {name for name, tensor in lazy.named_parameters() if tensor.is_meta} == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
    }


def test_materializing_inside_a_build():
    torch.manual_seed(0)
    with lazy_build():
        module = nn.Linear(2, 2)
        view = module.weight.data[0]
        materialize(module)
        module.weight.data.mul_(2)
        view.add_(1)  # still on meta, and on the same memory
        after = nn.Linear(2, 2)
    torch.manual_seed(0)
    eager, eager_after = nn.Linear(2, 2), nn.Linear(2, 2)
    eager.weight.data.mul_(2)[0].add_(1)
    assert torch.equal(module.weight, eager.weight) and torch.equal(materialize(after).weight, eager_after.weight)


def test_release_and_again():
    torch.manual_seed(0)
    module = lazy_build(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    weight = module[0].weight
    before = {name: tensor.clone() for name, tensor in materialize(module).state_dict().items()}
    assert release(module) is module and module[0].weight is weight and weight.is_meta
    assert all(torch.equal(tensor, before[name]) for name, tensor in materialize(module).state_dict().items())
    with torch.no_grad():
        module[0].weight.add_(1)
    with pytest.raises(UsageError, match=r"0\.weight .*written to"):
        release(module)
    release(module, only="bias")
    assert module[0].bias.is_meta and not weight.is_meta
    real = nn.Linear(2, 2)
    assert not release(real).weight.is_meta


def test_what_was_recorded_goes_with_the_tensors():
    module = lazy_build(nn.Linear, 3, 2)
    record = record_of(module.weight)
    assert record is not None
    watcher = weakref.ref(record.version.op.__class__) and weakref.ref(module.weight.untyped_storage())
    del record
    materialize(module)
    gc.collect()
    assert watcher() is None


def test_gradients_and_frozen_parameters():
    def build() -> nn.Module:
        module = nn.Linear(2, 2)
        module.bias.requires_grad_(False)
        return module

    lazy = materialize(lazy_build(build))
    assert lazy.weight.requires_grad and lazy.weight.is_leaf and not lazy.bias.requires_grad
    lazy(torch.ones(1, 2)).sum().backward()
    assert lazy.weight.grad is not None
    with torch.inference_mode():
        made = materialize(lazy_build(build))
    made(torch.ones(1, 2)).sum().backward()


def test_hooks_on_parameters_stay():
    def build() -> nn.Module:
        module = nn.Linear(2, 2, bias=False)
        module.weight.register_hook(lambda gradient: gradient * 0 + 7)
        return module

    lazy = materialize(lazy_build(build))
    lazy(torch.ones(1, 2)).sum().backward()
    assert bool((lazy.weight.grad == 7).all())


def test_report():
    with lazy_build() as build:
        module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
        module.first = module[0].weight[0, 0].item()
        module.register_buffer("shared", torch.from_numpy(np.ones(3)))
        module.meant = torch.empty(2, device="meta")
    module.edited = torch.empty(5, device="meta")
    report = build.report(module)
    assert {tensor.name: tensor.state for tensor in report.tensors} == {
        "0.weight": "lazy",
        "0.bias": "lazy",
        "1.weight": "lazy",
        "1.bias": "lazy",
        "shared": "real",
        "meant": "meta",
        "edited": "edited",
    }
    (asked,) = report.concretised
    assert (asked.reason, asked.times, asked.nbytes) == ("aten._local_scalar_dense.default", 1, 4 * 3 * 4)
    parsed = json.loads(report.to_json())
    (weight,) = (tensor for tensor in parsed["tensors"] if tensor["name"] == "0.weight")
    assert parsed["ops"] == report.ops and weight["ops"] == 1 and weight["nbytes"] == 48
    text = str(report)
    assert "edited [5]" in text and "4 tensors, 108 bytes: lazy" in text and "_local_scalar_dense" in text
    assert isinstance(build, Build)


def test_load_weights_takes_values_and_keeps_identity():
    def build() -> nn.Module:
        module = nn.Module()
        module.a = nn.Linear(3, 2)
        module.b = nn.Linear(3, 2, bias=False)
        module.b.weight = module.a.weight
        module.whole = nn.Parameter(torch.randn(4, 3))
        module.part = module.whole.data[1:]
        return module

    torch.manual_seed(0)
    eager = build()
    torch.manual_seed(0)
    lazy = lazy_build(build)
    weight = lazy.a.weight
    stored = {"b.weight": torch.full((2, 3), 5.0), "whole": torch.full((4, 3), 6.0), "more": torch.ones(1)}
    found = load_weights(lazy, stored, strict=False)
    assert (found.loaded, found.initialized, found.unexpected) == (("whole", "b.weight"), ("a.bias",), ("more",))
    assert lazy.a.weight is weight and lazy.b.weight is weight and bool((weight == 5).all())
    assert torch.equal(lazy.a.bias, eager.a.bias) and bool((lazy.part == 6).all())
    assert lazy.part.data_ptr() == lazy.whole[1:].data_ptr()
    with pytest.raises(ValueError, match=r"a\.bias is stored as \[3\]"):
        load_weights(lazy_build(build), {"a.bias": torch.ones(3)}, strict=False)
    with pytest.raises(ValueError, match="more"):
        load_weights(lazy_build(build), {**eager.state_dict(), "more": torch.ones(1)})


def test_scripted_functions_and_modules():
    def build() -> nn.Module:
        module = nn.Module()
        module.scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
        return module

    with pytest.warns(DeprecationWarning):
        torch.manual_seed(0)
        eager = build()
        torch.manual_seed(0)
        lazy = materialize(lazy_build(build))
    assert torch.equal(lazy.scripted(torch.ones(1, 3)), eager.scripted(torch.ones(1, 3)))


def test_adapters_around_a_real_layer_keep_their_init():
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.lora_a, self.lora_b = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
            nn.init.zeros_(self.lora_b.weight)

    base = nn.Linear(4, 3)
    kept = base.weight.clone()
    torch.manual_seed(0)
    eager = Adapted(base)
    torch.manual_seed(0)
    lazy = lazy_build(Adapted, base)
    assert lazy.base is base and lazy.lora_a.weight.is_meta and not base.weight.is_meta
    materialize(lazy)
    assert torch.equal(lazy.lora_a.weight, eager.lora_a.weight) and not lazy.lora_b.weight.any()
    assert lazy.lora_a.weight.any() and torch.equal(base.weight, kept)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda m: lazy_build(m), "Pass the class"),
        (lambda m: materialize([m]), "module or a tensor, not list"),
        (lambda m: release({"a": m}), "module or a tensor, not dict"),
        (lambda m: materialize(m, device="meta"), "meta device"),
        (lambda m: materialize(m, dtype=torch.int8), "floating-point"),
        (lambda m: materialize(m, only="("), "not a regular expression"),
        (lambda m: materialize_shard(m.weight, 0), "slices"),
        (lambda m: materialize_shard(m.weight, slice(1), flat=slice(1)), "and flat="),
        (lambda m: materialize_shard(m.bias, slice(1), slice(1)), "1 dimensions cannot be cut by 2 slices"),
        (lambda m: Build(default_device="meta"), "cannot be meta"),
    ],
)
def test_what_cannot_be_meant(ask: Callable[[nn.Module], object], said: str):
    module = lazy_build(nn.Linear, 2, 2)
    with pytest.raises(UsageError) as caught:
        ask(module)
    assert said in f"{caught.value} {caught.value.hint}"
    assert all(parameter.is_meta for parameter in module.parameters())
    materialize(module, only="nothing of this name")
    assert module.weight.is_meta


def test_generators_are_settled_though_what_was_written_to_arrays_cannot_be_taken_over(monkeypatch):
    torch.manual_seed(5)
    torch.rand(7)
    wanted = torch.get_rng_state()
    torch.manual_seed(5)

    def fail(journal: Journal, touched: object = None) -> None:
        if touched is None:
            raise RuntimeError("no longer there")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="no longer there"), lazy_build():
        torch.rand(7)
        patched.setattr(Journal, "take_over", fail)
    assert torch.equal(torch.get_rng_state(), wanted)
    eager = torch.rand(3)
    torch.set_rng_state(wanted)
    with lazy_build():
        drawn = torch.rand(3)
    assert torch.equal(materialize(drawn), eager)


def test_the_default_dtype_is_that_of_one_thread_at_a_time():
    """One replays under float64 until the other waits; had the other begun, it would put float64 back at its end."""
    kept = torch.get_default_dtype()
    inside, go, ended = threading.Event(), threading.Event(), threading.Event()

    def first() -> torch.Tensor:
        inside.set()
        go.wait(60)
        return torch.empty(())

    second_began = threading.Event()

    def second() -> torch.Tensor:
        second_began.set()
        ended.wait(60)
        return torch.empty(())

    slow, other = Op(first), Op(second)
    slow.default_dtype = torch.float64
    one, two = (threading.Thread(target=execute, args=(op, {})) for op in (slow, other))
    try:
        one.start()
        inside.wait(60)
        two.start()
        began_within = second_began.wait(0.2)
        go.set()
        one.join()
        ended.set()
        two.join()
        assert not began_within and torch.get_default_dtype() == kept
    finally:
        torch.set_default_dtype(kept)
