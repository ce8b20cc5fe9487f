"""Projections: coupling, marginals, addresses of draws; and the closed forms of their error."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srf_retrofit.modeling.random_features import draw_projection, haar_rotations, simplex_vertices, stream_seed
from srf_retrofit.theory import hypergeometric_1f1, log_variance, optimal_stretch, pair_moment, relative_mse

COUPLINGS = ("simplex", "orthogonal", "iid")


def draw(num_features: int, head_dim: int, projection: str = "simplex", num_heads: int = 1, **address) -> torch.Tensor:
    return draw_projection(
        num_features,
        head_dim,
        num_heads=num_heads,
        projection=projection,
        seed=address.pop("seed", 0),
        dtype=torch.float64,
        **address,
    )


@pytest.mark.parametrize("head_dim", [1, 2, 3, 8, 64, 80, 96, 112])
@pytest.mark.parametrize("projection", ["simplex", "orthogonal"])
def test_angles_inside_blocks(head_dim: int, projection: str) -> None:
    """Blocks below, at and above the head dimension, the last one ragged, have exact Gram matrices."""
    for num_features in {1, max(1, head_dim - 1), head_dim, 2 * head_dim, 2 * head_dim + max(1, head_dim // 2)}:
        w = draw(num_features, head_dim, projection, num_heads=2)
        for block in torch.nn.functional.normalize(w, dim=-1).split(head_dim, dim=1):
            rows = block.shape[1]
            cosine = -1 / (rows - 1) if projection == "simplex" and rows > 1 else 0.0
            expected = torch.full((rows, rows), cosine, dtype=torch.float64).fill_diagonal_(1.0).expand(2, -1, -1)
            torch.testing.assert_close(block @ block.mT, expected, rtol=0, atol=1e-13)


def test_simplex_vertices_are_those_of_the_paper() -> None:
    root = math.sqrt(3)
    a, b = math.sqrt(1.5) - (root + 1) / 2**1.5, -(root + 1) / 2**1.5
    expected = torch.tensor([[a, b, 0], [b, a, 0], [0.5**0.5, 0.5**0.5, 0]], dtype=torch.float64)
    torch.testing.assert_close(simplex_vertices(3), expected, rtol=0, atol=1e-15)


def ks_distance(samples: torch.Tensor, cdf: torch.Tensor) -> float:
    """Kolmogorov-Smirnov statistic times the square root of the sample size, for `cdf` at the sorted samples."""
    n = samples.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum(cdf - steps[:-1], steps[1:] - cdf).max()) * n**0.5


def chi_cdf(norms: torch.Tensor, degrees: int) -> torch.Tensor:
    return torch.special.gammainc(torch.tensor(degrees / 2, dtype=torch.float64), norms.sort().values.square() / 2)


@pytest.mark.parametrize("projection", COUPLINGS)
@pytest.mark.parametrize(("num_features", "head_dim"), [(5, 8), (8, 8), (19, 8), (3, 1), (80, 80)])
def test_rows_are_standard_normal(projection: str, num_features: int, head_dim: int) -> None:
    """Norms are chi_D, coordinates normal; 2.23 is the 1e-4 quantile of the Kolmogorov distribution."""
    w = draw(num_features, head_dim, projection, num_heads=400)
    row = w[:, num_features - 1]  # one row a head: rows of a block are dependent
    assert ks_distance(row[:, 0], torch.special.ndtr(row[:, 0].sort().values)) < 2.23
    norms = w.norm(dim=-1).flatten()  # norms are independent, also inside a block
    assert ks_distance(norms, chi_cdf(norms, head_dim)) < 2.23


def test_seed_fault_norms_have_head_dim_degrees_of_freedom() -> None:
    """The seed took the norms from a chi distribution with one degree of freedom, which biases the kernel."""
    norms = draw(64, 64, num_heads=10).norm(dim=-1).flatten()
    assert abs(norms.square().mean().item() / 64 - 1) < 0.05
    assert ks_distance(norms, chi_cdf(norms, 1)) > 20


def test_rotations_are_haar() -> None:
    """Every entry of a Haar matrix has mean zero, and the trace variance one; without the sign fix neither holds."""
    q = haar_rotations(20000, dim=4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(q @ q.mT, torch.eye(4, dtype=torch.float64).expand_as(q), rtol=0, atol=1e-13)
    traces = q.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert abs(traces.mean()) < 5 / 20000**0.5
    assert abs(traces.var() - 1) < 0.05


def test_streams_of_one_run_never_coincide() -> None:
    addresses = [(step, layer) for step in range(2000) for layer in range(40)]
    addresses += [((1 << 20) - 1 - i, (1 << 12) - 1 - j) for i in range(100) for j in range(100)]
    assert len({stream_seed(7, *address) for address in addresses}) == len(addresses)


def test_streams_of_neighbouring_addresses_are_unrelated() -> None:
    """Swapped, shifted and very large addresses all give matrices of their own."""
    triples = [
        (0, 0, 0),
        (1, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
        (1, 1, 0),
        (1, 0, 1),
        (0, 1, 1),
        (2**32, 0, 0),
        (2**70, 0, 0),
    ]
    triples += [(0, 2**20, 0), (0, 2**32, 0), (0, 0, 2**12), (2**64 - 1, 0, 0)]
    draws = torch.stack([draw(8, 8, "iid", seed=a, step=b, layer=c).flatten() for a, b, c in triples])
    correlation = torch.corrcoef(draws).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / 8  # five standard deviations at 64 entries
    assert all(0 <= stream_seed(*t) < 2**32 for t in triples)


def test_same_address_same_draw_whatever_the_global_state() -> None:
    expected = draw_projection(9, 8, num_heads=2, seed=3, step=5, layer=7)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            again = draw_projection(9, 8, num_heads=2, seed=3, step=5, layer=7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.device.type == "cpu"
    assert again.dtype == torch.float32
    assert torch.equal(again, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_number_of_threads_changes_nothing() -> None:
    """Neither the draw, to the last bit, nor is the number itself changed."""
    threads, draws = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            draws.append(draw(96, 80, num_heads=2))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_heads_are_drawn_independently() -> None:
    w = draw(64, 64, num_heads=3)
    overlap = torch.corrcoef(w.flatten(1)).fill_diagonal_(0)
    assert overlap.abs().max() < 5 / 64


@settings(max_examples=40, deadline=None)
@given(
    num_features=st.integers(1, 70),
    head_dim=st.integers(1, 33),
    num_heads=st.integers(1, 3),
    projection=st.sampled_from(COUPLINGS),
    seed=st.integers(0, 2**64),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_shape(num_features, head_dim, num_heads, projection, seed, dtype) -> None:
    w = draw_projection(num_features, head_dim, num_heads=num_heads, projection=projection, seed=seed, dtype=dtype)
    assert w.shape == (num_heads, num_features, head_dim)
    assert w.dtype == dtype
    assert w.isfinite().all()
    assert (w.norm(dim=-1) > 0).all()
    if num_features > 1:
        assert not torch.equal(w[:, 0], w[:, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_features": -1}, "num_features must be an integer >= 0, got -1"),
        ({"head_dim": -1}, "head_dim must be an integer >= 1, got -1"),
        ({"num_heads": 2.0}, "num_heads must be an integer >= 1, got 2.0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"step": True}, "step must be an integer >= 0, got True"),
        ({"projection": "hadamard"}, "projection must be one of simplex, orthogonal, iid, got 'hadamard'"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"num_features": 4, "head_dim": 4, "num_heads": 1, "seed": 0} | change
    with pytest.raises(ValueError) as error:
        draw_projection(arguments.pop("num_features"), arguments.pop("head_dim"), **arguments)
    assert str(error.value) == message


# -- closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "orthogonal", "simplex"), [(64, 0.7311, 0.1705), (8, 0.8283, 0.3733)])
def test_closed_form_targets(head_dim: int, orthogonal: float, simplex: float) -> None:
    """At |q + k|^2 = 1, relative to independent rows."""
    iid = relative_mse(1.0, head_dim, head_dim, "iid")
    assert relative_mse(1.0, head_dim, head_dim, "orthogonal") / iid == pytest.approx(orthogonal, abs=5e-5)
    assert relative_mse(1.0, head_dim, head_dim, "simplex") / iid == pytest.approx(simplex, abs=5e-5)


@pytest.mark.parametrize(
    ("v2", "ratio", "digits"),
    [(0.25, 0.031, 3), (1, 0.233, 3), (2, 0.60, 2), (3, 0.83, 2), (4, 0.93, 2), (6, 0.989, 3), (9, 0.999, 3)],
)
def test_simplex_gains_only_while_the_sum_is_short(v2: float, ratio: float, digits: int) -> None:
    found = relative_mse(v2, 64, 64, "simplex") / relative_mse(v2, 64, 64, "orthogonal")
    assert found == pytest.approx(ratio, abs=0.5001 * 10**-digits)


@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("v2", [0.3, 1.0, 4.0])
def test_pair_moment_is_the_series_of_the_paper(head_dim: int, v2: float) -> None:
    """2301.13856 writes rho as a double series, in which the sum over p alternates."""
    d, c, lgamma = head_dim, 1 / (head_dim - 1), math.lgamma
    total = 0.0
    for k in range(80):
        outer = k * math.log(v2) + lgamma(d / 2) - k * math.log(4) - lgamma(k + 1) - lgamma(k + d / 2)
        outer += k * math.log(2) + lgamma(d + k) - lgamma(d)
        inner = math.fsum(
            math.comb(k, p)
            * (-c) ** p
            * math.exp(lgamma((d + p) / 2) + lgamma((d + 1) / 2) - lgamma((d + p + 1) / 2) - lgamma(d / 2))
            for p in range(k + 1)
        )
        total += math.exp(outer) * inner
    assert pair_moment(v2, d, -c) == pytest.approx(total, rel=1e-10)


def test_hypergeometric_function() -> None:
    """Two cases with elementary values, and a = 2b against Kummer's transformation."""
    assert hypergeometric_1f1(2.5, 2.5, 3.0) == pytest.approx(math.exp(3))
    assert hypergeometric_1f1(1.0, 2.0, 40.0) == pytest.approx(math.expm1(40) / 40)
    # 1F1(8; 4; x) = e^x 1F1(-4; 4; -x), a polynomial
    x = 1.7
    polynomial = sum(math.comb(4, k) * x**k / math.prod(range(4, 4 + k)) for k in range(5))
    assert hypergeometric_1f1(8, 4, x) == pytest.approx(math.exp(x) * polynomial)


@pytest.mark.parametrize("projection", COUPLINGS)
@pytest.mark.parametrize("num_features", [1, 5, 8, 19])
def test_closed_form_against_monte_carlo(projection: str, num_features: int) -> None:
    """Variance of the estimate at |u|^2 = .4 and D = 8, where its tail is light enough to sample."""
    d, v2, n = 8, 0.4, 20000
    u = torch.full((d,), (v2 / d) ** 0.5, dtype=torch.float64)
    squares = ((draw(num_features, d, projection, num_heads=n) @ u - v2 / 2).exp().mean(-1) - 1).square()
    z = (squares.mean() - relative_mse(v2, d, num_features, projection)) / (squares.std() / n**0.5)
    assert abs(z) < 5


def test_blocks_add_their_variances() -> None:
    one = relative_mse(0.7, 16, 16)
    assert relative_mse(0.7, 16, 48) == pytest.approx(one / 3)
    ragged = (32**2 * relative_mse(0.7, 16, 32) + 5**2 * relative_mse(0.7, 16, 5)) / 37**2
    assert relative_mse(0.7, 16, 37) == pytest.approx(ragged)


def test_optimal_stretch_minimises_the_variance() -> None:
    for moment in (0.0, 0.01, 0.5, 3.0, 40.0):
        best = optimal_stretch(moment)
        values = [log_variance([moment], [(1 - t) / 8]) for t in (best * 0.99, best, best * 1.01)]
        assert values[1] <= min(values[0], values[2])
    assert optimal_stretch(0.0) == 1.0
    assert log_variance([0.3, 0.4]) == pytest.approx(log_variance([0.3, 0.4], [0.0, 0.0]))


def test_theory_refuses_what_has_no_value() -> None:
    with pytest.raises(ValueError, match="v2 >= 0"):
        relative_mse(-1.0, 8, 8)
    with pytest.raises(ValueError, match="'hadamard'"):
        relative_mse(1.0, 8, 8, "hadamard")
    with pytest.raises(ValueError, match="below 1/8"):
        log_variance([1.0], [0.125])
