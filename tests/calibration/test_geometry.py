"""Geometry in closed form: optimal where it says so, exact in what it leaves alone, and fitted to the right tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from srf_retrofit import SRFConfig, retrofit
from srf_retrofit.calibration import (
    GEOMETRIES,
    LayerMoments,
    Moments,
    balance,
    calibrate,
    fit_geometry,
    second_moments,
)
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.modeling.feature_map import FeatureMap, fold_feature_map, log_features
from srf_retrofit.modeling.random_features import draw_projection
from srf_retrofit.testing import tiny_llama
from srf_retrofit.theory import log_variance

SCALING = 16**-0.5
CONFIG = SRFConfig(num_features=16, window=8, sinks=2, retained=0)


def anisotropic(num_heads: int, count: int, dim: int, seed: int) -> torch.Tensor:
    """Vectors (G, N, D) off the origin, with eigenvalues over two decades in random directions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_heads, count, dim, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(num_heads, dim, dim, generator=generator, dtype=torch.float64))[0]
    mean = torch.randn(num_heads, 1, dim, generator=generator, dtype=torch.float64)
    return x * torch.logspace(-1, 0.5, dim, dtype=torch.float64) @ basis + mean


def moments_of(q: torch.Tensor, k: torch.Tensor) -> LayerMoments:
    out = LayerMoments(Moments(q.shape[0], q.shape[2]), Moments(k.shape[0], k.shape[2]))
    out.query.update(q)
    out.key.update(k)
    return out


@pytest.fixture
def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    return anisotropic(2, 600, 16, 1), anisotropic(2, 500, 16, 2)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def retrofitted(config: SRFConfig = CONFIG):
    torch.manual_seed(0)
    return retrofit(tiny_llama(), config)


def buffers(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if ".attn_fn." in name}


def essence(model) -> dict[str, torch.Tensor]:
    """What the moments determine: the preconditioner only up to the signs of its rows, which rounding may flip."""
    out = {name: value for name, value in buffers(model).items() if name.endswith("shift")}
    for layer in srf_attentions(model):
        features = layer.attn_fn
        out[f"{features.layer}.metric"] = features.preconditioner.mT @ features.preconditioner
        out[f"{features.layer}.inverse_metric"] = features.inverse_transpose.mT @ features.inverse_transpose
    return out


def assert_same_geometry(model, other) -> None:
    expected = essence(other)
    for name, value in essence(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# -- moments and closed forms --------------------------------------------------------------------------------


def test_streamed_moments_are_those_of_the_whole(vectors) -> None:
    x = vectors[0] + 1000  # a mean far above the spread
    streamed = Moments(2, 16)
    for part in x.split([1, 0, 99, 500], dim=1):
        streamed.update(part)
    assert streamed.count == 600
    torch.testing.assert_close(streamed.mean, x.mean(1))
    expected = torch.stack([torch.cov(head.T, correction=0) for head in x])
    torch.testing.assert_close(streamed.covariance, expected, rtol=1e-6, atol=1e-6)


def test_balance_equalises_and_diagonalises(vectors) -> None:
    sq, sk = (Moments.covariance.fget(side) for side in moments_of(*vectors))  # type: ignore[attr-defined]
    matrix, inverse = balance(sq, sk)
    eye = torch.eye(16, dtype=torch.float64).expand(2, 16, 16)
    torch.testing.assert_close(matrix.mT @ inverse, eye, rtol=0, atol=1e-10)
    moved_q, moved_k = matrix @ sq @ matrix.mT, inverse @ sk @ inverse.mT
    torch.testing.assert_close(moved_q, moved_k, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(moved_q, torch.diag_embed(moved_q.diagonal(dim1=-2, dim2=-1)), rtol=0, atol=1e-8)


def test_no_other_matrix_does_better(vectors) -> None:
    """`tr(M Sq M') + tr(M^-T Sk M^-1)` rises under every small change of M."""
    sq, sk = (side.covariance for side in moments_of(*vectors))
    matrix, _ = balance(sq, sk)

    def objective(m: torch.Tensor) -> torch.Tensor:
        inverse = torch.linalg.inv(m)
        return (m @ sq @ m.mT).diagonal(dim1=-2, dim2=-1).sum(-1) + (inverse.mT @ sk @ inverse).diagonal(
            dim1=-2, dim2=-1
        ).sum(-1)

    best = objective(matrix)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(100):
            assert (objective(matrix + size * torch.randn_like(matrix)) > best).all()


def test_every_level_lowers_the_predicted_variance(vectors) -> None:
    """And by much: these queries and keys have means and directions to be rid of."""
    moments = moments_of(*vectors)
    values = []
    for geometry in GEOMETRIES:
        fitted = fit_geometry(moments, scaling=SCALING, geometry=geometry)
        lambdas = second_moments(moments, fitted, SCALING)
        pairs = zip(lambdas.tolist(), fitted.proposal.tolist(), strict=True)
        values.append(torch.tensor([log_variance(x, a) for x, a in pairs]))
    for worse, better in pairwise(values):
        assert (better < 0.9 * worse).all()


def test_predicted_moments_are_those_of_the_vectors(vectors) -> None:
    """`second_moments` against all pairs of moved queries and keys, at every level."""
    moments = moments_of(*vectors)
    for geometry in GEOMETRIES:
        fitted = fit_geometry(moments, scaling=SCALING, geometry=geometry)
        sides = [
            (x * SCALING**0.5 - shift.double().unsqueeze(1)) @ matrix.double().mT
            for x, shift, matrix in zip(
                vectors,
                (fitted.query_shift, fitted.key_shift),
                (fitted.preconditioner, fitted.inverse_transpose),
                strict=True,
            )
        ]
        pairs = sides[0].unsqueeze(2) + sides[1].unsqueeze(1)
        torch.testing.assert_close(
            second_moments(moments, fitted, SCALING), pairs.square().mean((1, 2)), rtol=1e-8, atol=1e-10
        )


def test_fitted_geometry_lowers_the_error_of_the_kernel(vectors) -> None:
    """Not only predicted: the median error of the logarithm of the estimates falls with shift and matrix."""
    q, k = (x[None, :, :64] for x in vectors)
    w = draw_projection(64, 16, num_heads=2, seed=0, dtype=torch.float64)
    truth = SCALING * q @ k.mT
    errors = {}
    for geometry in GEOMETRIES:
        fitted = fit_geometry(moments_of(*vectors), scaling=SCALING, geometry=geometry)
        maps = FeatureMap(w, *(t.double() for t in fitted))
        a = log_features(q, fold_feature_map(maps, "query"), SCALING)
        b = log_features(k, fold_feature_map(maps, "key"), SCALING)
        estimate = torch.logsumexp(a.unsqueeze(-2) + b.unsqueeze(-3), -1)
        errors[geometry] = (estimate - truth).abs().median()
    assert errors["shift"] < errors["identity"]
    assert errors["preconditioner"] < 0.7 * errors["shift"]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_levels_leave_later_parts_alone(vectors, geometry: str) -> None:
    fitted = fit_geometry(moments_of(*vectors), scaling=SCALING, geometry=geometry)
    level = GEOMETRIES.index(geometry)
    eye = torch.eye(16).expand(2, 16, 16)
    assert fitted.query_shift.any() == (level >= 1)
    assert torch.equal(fitted.preconditioner, eye) == torch.equal(fitted.inverse_transpose, eye) == (level < 2)
    assert fitted.proposal.any() == (level >= 3)
    assert (fitted.proposal <= 0).all()
    assert {t.dtype for t in fitted} == {torch.float32}


def test_degenerate_statistics_stay_well_conditioned() -> None:
    """Vectors in a plane, constant ones and zeros: finite, and the two halves still inverse to each other."""
    plane = anisotropic(1, 100, 16, 3)
    plane[..., 2:] = 0
    constant, zero, other = torch.full_like(plane, 2.0), torch.zeros_like(plane), anisotropic(1, 100, 16, 4)
    for q, k in ((plane, plane), (plane, other), (constant, plane), (zero, other), (zero, zero)):
        fitted = fit_geometry(moments_of(q, k), scaling=SCALING, geometry="proposal")
        assert all(t.isfinite().all() for t in fitted)
        product = fitted.preconditioner.double().mT @ fitted.inverse_transpose.double()
        torch.testing.assert_close(product, torch.eye(16, dtype=torch.float64).unsqueeze(0), rtol=0, atol=1e-4)


def test_bad_moments(vectors) -> None:
    with pytest.raises(ValueError, match="geometry must be one of identity, shift"):
        fit_geometry(moments_of(*vectors), scaling=SCALING, geometry="affine")
    with pytest.raises(ValueError, match="no query was observed"):
        fit_geometry(LayerMoments(Moments(2, 16), Moments(2, 16)), scaling=SCALING)
    spoiled = vectors[1].clone()
    spoiled[0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="key statistics are not finite"):
        fit_geometry(moments_of(vectors[0], spoiled), scaling=SCALING)


# -- the walk over the model --------------------------------------------------------------------------------


def test_calibrate_fits_what_the_layers_see() -> None:
    """The buffers are those of moments taken by hand from the softmax model: group pooled, sinks left out."""
    model, ids = retrofitted(), tokens(2, 60)
    seen = []
    for layer in srf_attentions(model):
        layer.observer = lambda q, k, mask: seen.append((q.double(), k.double()))
        layer.exact = True
    with torch.no_grad():
        model(ids)
    for layer in srf_attentions(model):
        layer.observer, layer.exact = None, False
    report = calibrate(model, ids, geometry="proposal")
    assert report.tokens == 2 * (60 - CONFIG.sinks)
    for layer, (q, k) in zip(srf_attentions(model), seen, strict=True):
        q, k = q[:, :, CONFIG.sinks :], k[:, :, CONFIG.sinks :]
        q = torch.stack([q[:, 2 * g : 2 * g + 2].reshape(-1, 16) for g in range(2)])
        moments = moments_of(q, k.transpose(0, 1).reshape(2, -1, 16))
        expected = fit_geometry(moments, scaling=layer.scaling, geometry="proposal")
        for name in ("query_shift", "key_shift", "proposal"):
            torch.testing.assert_close(getattr(layer.attn_fn, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
        for name in ("preconditioner", "inverse_transpose"):
            found, wanted = getattr(layer.attn_fn, name), getattr(expected, name)
            torch.testing.assert_close(found.mT @ found, wanted.mT @ wanted, rtol=1e-4, atol=1e-4)


def test_padding_leaves_no_trace() -> None:
    ids = tokens(2, 60)
    plain, padded = retrofitted(), retrofitted()
    calibrate(plain, [ids[0], ids[1, :50]])
    rows = torch.zeros(2, 65, dtype=torch.int64)
    mask = torch.zeros(2, 65, dtype=torch.int64)
    rows[0, 5:], mask[0, 5:] = ids[0], 1  # on the left
    rows[1, :50], mask[1, :50] = ids[1, :50], 1  # on the right
    report = calibrate(padded, {"input_ids": rows, "attention_mask": mask})
    assert report.tokens == 60 + 50 - 2 * CONFIG.sinks
    for name, value in buffers(plain).items():
        torch.testing.assert_close(
            buffers(padded)[name], value, rtol=2e-3, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_batches_of_every_form_agree() -> None:
    ids = tokens(3, 40)
    models = []
    for batches in (ids, [ids[:1], ids[1:]], {"input_ids": ids}, ({"input_ids": row} for row in ids), [ids, ids[:0]]):
        model = retrofitted()
        calibrate(model, batches)
        models.append(model)
    for other in models[1:]:
        assert_same_geometry(other, models[0])


def test_result_does_not_depend_on_the_geometry_before() -> None:
    model, ids = retrofitted(), tokens(2, 60)
    calibrate(model, ids)
    first = buffers(model)
    calibrate(model, ids)
    assert all(torch.equal(value, first[name]) for name, value in buffers(model).items())


def test_identity_takes_a_calibration_back() -> None:
    model, ids = retrofitted(), tokens(2, 60)
    before = buffers(model)
    for geometry in ("proposal", "identity"):
        calibrate(model, ids, geometry=geometry)
        assert all(torch.equal(v, before[n]) for n, v in buffers(model).items()) == (geometry == "identity")


def test_only_retrofitted_layers_and_only_geometry_change() -> None:
    torch.manual_seed(0)
    model = retrofit(tiny_llama(num_hidden_layers=3), CONFIG, layers=[1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = calibrate(model, tokens(2, 60))
    assert list(report.after) == [1]
    changed = {
        name.rsplit(".", 1)[1] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"query_shift", "key_shift", "preconditioner", "inverse_transpose"}
    assert "1 layers" in str(report)
    assert all(after < before for after, before in zip(report.after[1], report.before[1], strict=True))


def test_no_row_after_max_tokens() -> None:
    read = []

    def rows():
        for row in tokens(10, 40):
            read.append(row)
            yield row

    report = calibrate(retrofitted(), rows(), max_tokens=100)
    assert len(read) == 3
    assert report.tokens == 3 * (40 - CONFIG.sinks)
    assert calibrate(retrofitted(), tokens(10, 40), max_tokens=100).tokens == report.tokens
    assert calibrate(retrofitted(), tokens(10, 40), max_tokens=None).tokens == 10 * (40 - CONFIG.sinks)


def observer(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Stands for somebody else's observer."""


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails: bool) -> None:
    """Modes (also mixed ones), exactness, observers and gradients, after success and after an error midway."""
    model = retrofitted().train()
    model.model.layers[1].eval()
    layers = srf_attentions(model)
    layers[0].observer, layers[1].exact = observer, True
    modes = [module.training for module in model.modules()]

    def rows():
        yield tokens(2, 60)
        if fails:
            raise RuntimeError("the reader broke")

    before = buffers(model)
    if fails:
        with pytest.raises(RuntimeError, match="the reader broke"):
            calibrate(model, rows())
        assert all(torch.equal(value, before[name]) for name, value in buffers(model).items())
    else:
        calibrate(model, rows())
    assert [module.training for module in model.modules()] == modes
    assert [layer.observer for layer in layers] == [observer, None]
    assert [layer.exact for layer in layers] == [False, True]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_too_little_data_says_how_much() -> None:
    model = retrofitted()
    before = buffers(model)
    with pytest.raises(ValueError, match=r"given 61 key tokens .* needs at least 64"):
        calibrate(model, tokens(1, 63))
    assert all(torch.equal(value, before[name]) for name, value in buffers(model).items())
    assert calibrate(model, tokens(1, 66)).tokens == 64
    with pytest.raises(ValueError, match="given 0 key tokens"):
        calibrate(model, [])


def test_weights_that_are_not_finite_name_the_layer() -> None:
    model = retrofitted()
    before = buffers(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 1: key statistics are not finite"):
        calibrate(model, tokens(2, 60))
    assert all(torch.equal(value, before[name]) for name, value in buffers(model).items())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ("some text", "tokenise first"),
        (7, "got int: tokenise first"),
        (torch.zeros(2, 8), "integer token ids of shape"),
        ([[1, 2, 3]], "got list"),
        ({"labels": torch.zeros(2, 8, dtype=torch.int64)}, "got NoneType"),
        ({"input_ids": torch.ones(2, 8, dtype=torch.int64), "attention_mask": torch.ones(2, 9)}, "differ in shape"),
    ],
)
def test_what_is_no_batch(batches, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(retrofitted(), batches)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="no retrofitted layer to calibrate: call retrofit"):
        calibrate(tiny_llama(), tokens(2, 60))
    with pytest.raises(ValueError, match="geometry must be one of"):
        calibrate(retrofitted(), tokens(2, 60), geometry="best")
    with pytest.raises(ValueError, match="max_tokens must be a positive integer or None, got 0"):
        calibrate(retrofitted(), tokens(2, 60), max_tokens=0)
