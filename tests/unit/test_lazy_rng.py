import pytest
import torch

from qlazy.lazy import draw_model as draws
from qlazy.lazy import lazy_build, materialize
from qlazy.lazy.draw import Draw, draw_of
from qlazy.lazy.draw_model import after, generate, random_access
from qlazy.lazy.rng import Position, run_exactly

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def generator_at(seed, words=0, normals=0):
    generator = torch.Generator().manual_seed(seed)
    torch.empty(words).uniform_(generator=generator)
    torch.empty(normals).normal_(generator=generator)
    return generator


def same(left, right):
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def test_position_holds_what_the_generator_had():
    generator = generator_at(0, 5, 1)
    state = generator.get_state()
    position = Position.of(generator)
    torch.empty(10).uniform_(generator=generator)
    assert torch.equal(position.state(), state)


def test_cached_normal_across_ops():
    # 3 normals leave one over, uniforms pass it by, the next normal takes it, 16 in a block leave it alone.
    generator = generator_at(4, 3)
    position = Position.of(generator)
    for kind, numel in [
        ("normal", 3),
        ("uniform", 700),
        ("normal", 32),
        ("normal", 2),
        ("normal", 1),
        ("normal", 5),
        ("uniform", 1),
    ]:
        draw = Draw(kind=kind, dtype=torch.float32, numel=numel)
        values = draw.fill(torch.empty(numel), generator)
        assert same(generate(position, draw), values)
        position = after(position, draw)
        assert torch.equal(position.state(), generator.get_state())


def test_cached_normal_that_was_there_before():
    generator = generator_at(4, 3, 1)
    position = Position.of(generator)
    uniform, normal = (Draw(kind=kind, dtype=torch.float32, numel=1) for kind in ("uniform", "normal"))
    there = after(position, uniform)
    uniform.fill(torch.empty(1), generator)
    assert torch.equal(there.state(), generator.get_state())
    assert same(generate(there, normal), normal.fill(torch.empty(1), generator))
    assert torch.equal(after(there, normal).state(), generator.get_state())


def test_far_away_positions_need_no_drawing():
    position = Position.of(generator_at(1))
    huge = Draw(kind="normal", dtype=torch.float32, numel=8192 * 28672 * 80)
    for _ in range(4):
        position = after(position, huge)
    tail = generate(position, huge, huge.numel - 40, huge.numel)
    assert tail.numel() == 40 and tail.std() > 0.5
    assert same(tail[3:20], generate(position, huge, huge.numel - 37, huge.numel - 20))


def test_run_exactly():
    generator = generator_at(8, 2, 1)
    position = Position.of(generator)
    value, there = run_exactly(position, lambda scratch: torch.randperm(20, generator=scratch))
    assert torch.equal(value, torch.randperm(20, generator=generator))
    assert torch.equal(there.state(), generator.get_state())


aten = torch.ops.aten
META = {"device": "meta"}


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "expected"),
    [
        (aten.uniform_.default, (torch.empty(3, 5, **META), -1.0), {}, ("uniform", 15, (-1.0, 1.0))),
        (aten.normal_.default, (torch.empty(20, **META), 0.5, 2.0), {}, ("normal", 20, (0.5, 2.0))),
        (aten.random_.default, (torch.empty(3, **META),), {}, ("random", 3, ())),
        (aten.random_.to, (torch.empty(3, **META), 9), {}, ("random", 3, (9,))),
        (getattr(aten.random_, "from"), (torch.empty(3, **META), 2, 9), {}, ("random", 3, (2, 9))),
        (aten.bernoulli_.float, (torch.empty(3, **META), 0.25), {}, ("bernoulli", 3, (0.25,))),
        (aten.exponential_.default, (torch.empty(3, **META),), {}, ("exponential", 3, (1.0,))),
        (aten.cauchy_.default, (torch.empty(3, **META),), {"sigma": 3.0}, ("cauchy", 3, (0.0, 3.0))),
        (aten.geometric_.default, (torch.empty(3, **META), 0.25), {}, ("geometric", 3, (0.25,))),
        (aten.log_normal_.default, (torch.empty(3, **META),), {}, ("log_normal", 3, (1.0, 2.0))),
        (aten.rand.default, ([2, 3],), META, ("uniform", 6, (0.0, 1.0))),
        (aten.randn.default, ([2, 3],), {**META, "dtype": torch.float64}, ("normal", 6, (0.0, 1.0))),
        (aten.randint.default, (9, [4]), META, ("random", 4, (0, 9))),
        (aten.randint.low, (3, 9, [4]), META, ("random", 4, (3, 9))),
        (aten.rand_like.default, (torch.empty(3, **META),), {}, ("uniform", 3, (0.0, 1.0))),
        (aten.randn_like.default, (torch.empty(3, **META),), {}, ("normal", 3, (0.0, 1.0))),
        (aten.randint_like.default, (torch.empty(3, **META), 8), {}, ("random", 3, (0, 8))),
        (aten.randint_like.low_dtype, (torch.empty(3, **META), 2, 8), {}, ("random", 3, (2, 8))),
        (aten.normal.float_float, (1.0, 2.0, [5]), META, ("normal", 5, (1.0, 2.0))),
    ],
)  # fmt: skip
def test_draw_of_aten_calls(func, args, kwargs, expected):
    result = func(*args, **kwargs)
    draw = draw_of(func, args, kwargs, result)
    assert (draw.kind, draw.numel, draw.params) == expected and draw.dtype == result.dtype
    if not random_access(draw):
        # PyTorch hands these to a library that draws in its own way, on some processors.
        assert draw.kind in ("bernoulli", "exponential")
        return
    # The same call for real draws what the model says.
    real = [torch.empty_like(a, device="cpu") if isinstance(a, torch.Tensor) else a for a in args]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        position = Position.of(torch.default_generator)
        values = func(*real, **({**kwargs, "device": "cpu"} if "device" in kwargs else kwargs))
        assert same(generate(position, draw), values.flatten())
        assert torch.equal(after(position, draw).state(), torch.default_generator.get_state())


def test_explicit_generators_are_the_same_ops():
    generator = torch.Generator()
    for func, args in [
        (aten.rand.generator, ([3],)),
        (aten.randint.low_generator, (2, 8, [3])),
        (aten.randn.generator, ([3],)),
    ]:
        draw = draw_of(func, args, {"generator": generator}, func(*args, generator=generator))
        assert draw.numel == 3


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.randperm.default, (8,)),
        (aten.poisson.default, (torch.ones(3),)),
        (aten.bernoulli.default, (torch.full((3,), 0.5),)),
        (aten.normal.Tensor_Tensor, (torch.zeros(3), torch.ones(3))),
        (aten.add.Tensor, (torch.ones(3), torch.ones(3))),
    ],
)
def test_no_draw_of_other_ops(func, args):
    assert draw_of(func, args, {}, func(*args)) is None


def test_complex_normals_have_no_model():
    draw = aten.randn.default([3], dtype=torch.complex64)
    assert draw_of(aten.randn.default, ([3],), {"dtype": torch.complex64}, draw) is None


def test_an_op_that_fits_no_model_is_left_to_run_exactly(monkeypatch):
    def fill(draw, out, generator):
        # Another way of drawing, as another version of PyTorch might have it: one word more for every seventh value.
        torch.empty(out.numel() // 7).uniform_(generator=generator)
        return out.uniform_(generator=generator)

    monkeypatch.setattr(Draw, "fill", fill)
    draws._probe.cache_clear()
    try:
        draw = Draw(kind="uniform", dtype=torch.float32, numel=30)
        assert after(Position.of(generator_at(0)), draw) is None and not random_access(draw)
    finally:
        draws._probe.cache_clear()


def test_a_dtype_that_an_op_refuses_has_no_model():
    assert after(Position.of(generator_at(0)), Draw(kind="normal", dtype=torch.int64, numel=4)) is None


@pytest.mark.parametrize("dtype", FLOATS)
def test_not_contiguous(dtype):
    generator = generator_at(6, 1)
    position = Position.of(generator)
    draw = Draw(kind="normal", dtype=dtype, numel=40, contiguous=False)
    torch.empty(40, 2, dtype=dtype)[:, 1].normal_(generator=generator)
    assert torch.equal(after(position, draw).state(), generator.get_state())
    assert not random_access(draw)


def test_going_on_from_a_part_needs_no_jump(monkeypatch):
    position = Position.of(generator_at(0))
    draw = Draw(kind="normal", dtype=torch.float32, numel=16 * 100_000)
    generate(position, draw)
    advanced = []
    monkeypatch.setattr("qlazy.lazy.rng.advance", lambda state, words: advanced.append(words) or state.clone())
    after(position, draw).state()
    assert advanced == [0]


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_long_draws_take_several_threads(monkeypatch, threads, dtype):
    monkeypatch.setattr(draws, "LONG", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    started = []
    into = draws.generate_into

    def noted(out, position, draw, start):
        started.append(start)
        return into(out, position, draw, start)

    monkeypatch.setattr(draws, "generate_into", noted)

    def build():
        module = torch.nn.Module()
        # A pair is left over before the second, and the others begin in the middle of a block of the stream.
        module.tensors = [
            torch.empty(33, 31, dtype=dtype).normal_(),
            torch.empty(3, dtype=dtype).normal_(),
            torch.empty(1001, dtype=dtype).uniform_(-1, 1),
            torch.empty(40, 50, dtype=dtype).normal_(0, 0.02),
            torch.empty(40, 50, dtype=dtype).t().normal_(),
            torch.empty(1000, dtype=dtype).cauchy_(),
        ]
        return module

    torch.manual_seed(5)
    eager = build()
    torch.manual_seed(5)
    lazy = materialize(lazy_build(build))
    assert all(torch.equal(one, other) for one, other in zip(eager.tensors, lazy.tensors, strict=True))
    assert len(started) == 4 * threads and started.count(0) == 4
