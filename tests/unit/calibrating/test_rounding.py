"""What the inputs of a layer say of its weights."""

from __future__ import annotations

import torch

from qlazy.calibrating.rounding import Seen, curvature_of, round_layer, why_less
from qlazy.formats import Int4
from qlazy.layers.linear import Int4Linear
from qlazy.quantizing.curvature import Curvature


def inputs(tokens: int = 96) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens // 2, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    return x, x + 0.1 * torch.randn(x.shape, generator=generator), torch.rand(2, tokens // 2, generator=generator)


def test_products_of_what_comes_in_and_of_what_has_changed():
    x, clean, weights = inputs()
    found = curvature_of(64, [Seen(x=x[i], clean=clean[i], weights=weights[i]) for i in range(2)])
    flat, changed, scale = x.view(-1, 64), (clean - x).view(-1, 64), weights.view(-1, 1)
    hessian, drift = (flat * scale).T @ (flat * scale) / 96, (changed * scale).T @ (flat * scale) / 96
    wanted = Curvature.from_hessian(hessian.clone(), drift=drift.clone())
    assert found is not None and found.correction is not None and wanted.correction is not None
    torch.testing.assert_close(found.hessian[0], wanted.hessian[0])
    torch.testing.assert_close(found.correction.view(64, 64), wanted.correction.view(64, 64), atol=1e-4, rtol=1e-3)


def test_no_drift_where_the_clean_inputs_are_others():
    x, clean, _ = inputs()
    found = curvature_of(64, [Seen(x=x[0], clean=clean[0]), Seen(x=x[1], clean=clean[1, :3])])
    assert found is not None and found.correction is None and found.factor is not None


def test_few_tokens_tell_their_mean_squares_alone():
    x, _, _ = inputs()
    found = curvature_of(64, [Seen(x=x[0, :15])])
    assert found is not None and found.factor is None
    torch.testing.assert_close(found.hessian, Curvature.from_diagonal(x[0, :15].square().mean(0)).hessian)
    assert why_less(64, found) == "few tokens for the columns: by the mean squares of the inputs alone"
    assert curvature_of(64, []) is None and why_less(64, None) == "no token came"


def test_columns_that_cannot_be_cut_tell_their_mean_squares_alone(monkeypatch):
    monkeypatch.setattr("qlazy.quantizing.curvature.LARGEST_BLOCK", 16)
    x, clean, _ = inputs()
    found = curvature_of(64, [Seen(x=x, clean=clean)])
    assert found is not None and found.factor is None
    torch.testing.assert_close(found.hessian, Curvature.from_diagonal(x.view(-1, 64).square().mean(0)).hessian)
    assert why_less(64, found).startswith("too many columns, and no multiple of 128")


def test_weights_move_towards_what_answers_as_before():
    x, _, _ = inputs(960)
    generator = torch.Generator().manual_seed(1)
    clean = x + x @ torch.randn(64, 64, generator=generator) / 40  # a change that can be told from x, so made up for
    weight = torch.randn(64, 64, generator=generator)
    wanted = clean.view(-1, 64) @ weight.T

    def error(seen: Seen) -> float:
        layer = Int4Linear(64, 64, format=Int4(group_size=32), dtype=torch.float32, bias=None)
        layer.allocate("cpu")
        made = round_layer(layer, weight, curvature_of(64, [seen]))
        assert torch.equal(made, layer.dequantize())
        return float((x.view(-1, 64) @ made.T - wanted).square().mean())

    assert error(Seen(x=x, clean=clean)) < 0.5 * error(Seen(x=x))
