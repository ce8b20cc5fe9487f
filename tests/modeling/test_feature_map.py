"""Features of every coupling with every geometry estimate the softmax kernel without bias."""

from __future__ import annotations

import functools

import pytest
import torch

from srf_retrofit.modeling.feature_map import FeatureMap, FoldedMap, fold_feature_map, log_features, round_weights
from srf_retrofit.modeling.random_features import draw_projection
from srf_retrofit.theory import log_variance, relative_mse

GEOMETRIES = ("identity", "shift", "shift_matrix", "shift_matrix_diagonal", "isotropic")
REPLICAS = {8: 4000, 80: 300}  # independent projections, drawn as so many heads


@functools.cache
def projections(name: str, num_features: int, head_dim: int) -> torch.Tensor:
    """`(REPLICAS, M, D)` float64; `seed_fault` has the norms of the seed, chi with one degree of freedom."""
    coupling = "orthogonal" if name == "seed_fault" else name
    w = draw_projection(
        num_features, head_dim, num_heads=REPLICAS[head_dim], projection=coupling, seed=11, dtype=torch.float64
    )
    if name == "seed_fault":
        normal = torch.randn(*w.shape[:2], 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        w = torch.nn.functional.normalize(w, dim=-1) * normal.abs()
    return w


def fields(geometry: str, head_dim: int) -> dict[str, torch.Tensor]:
    """A geometry of one head, neither symmetric nor close to the identity."""
    generator = torch.Generator().manual_seed(1)
    d = head_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, dtype=torch.float64, generator=generator)

    out: dict[str, torch.Tensor] = {}
    if geometry.startswith("shift"):
        out |= {"query_shift": 0.5 * normal(d) / d**0.5, "key_shift": 0.5 * normal(d) / d**0.5}
    if "matrix" in geometry:
        matrix = torch.eye(d, dtype=torch.float64) + 0.4 * normal(d, d) / d**0.5
        out |= {"preconditioner": matrix, "inverse_transpose": torch.linalg.inv(matrix).mT}
    if "diagonal" in geometry:
        # Both signs; the variance is finite below 1/8.
        out["proposal"] = 0.5 * (torch.rand(1, d, dtype=torch.float64, generator=generator) - 0.7) / d**0.5
    if geometry == "isotropic":
        out["proposal"] = torch.full((1, d), -0.4 / d**0.5, dtype=torch.float64)
    return out


def pair(head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unscaled query and key `(1, 1, 1, D)` whose scaled versions are short enough for a light tail."""
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 1, 1, 1, head_dim, dtype=torch.float64, generator=generator)
    return 0.6 * q / head_dim**0.25, (0.3 * q + 0.5 * k) / head_dim**0.25


def relative_estimates(
    name: str, num_features: int, head_dim: int, dtype: torch.dtype = torch.float64, **geometry: torch.Tensor
) -> torch.Tensor:
    """Estimates of `exp(scaling q.k)` over the truth, one for each projection; their mean should be one.

    `dtype`: of the inputs that the weights are for.
    """
    w = projections(name, num_features, head_dim)
    maps = FeatureMap(w, **geometry)
    scaling = head_dim**-0.5
    q, k = pair(head_dim)
    folded = FoldedMap(fold_feature_map(maps, "query"), fold_feature_map(maps, "key"))
    folded = round_weights(folded, dtype)
    a = log_features(q.expand(1, len(w), 1, -1), folded.query, scaling)
    b = log_features(k.expand(1, len(w), 1, -1), folded.key, scaling)
    return torch.logsumexp(a + b, -1).sub(scaling * (q * k).sum()).exp().flatten()


def z_score(samples: torch.Tensor) -> float:
    return float((samples.mean() - 1) / (samples.std() / len(samples) ** 0.5))


@pytest.mark.parametrize("head_dim", [8, 80])
@pytest.mark.parametrize("size", ["below", "equal", "above"])
@pytest.mark.parametrize("name", ["simplex", "orthogonal", "iid"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_unbiased(name: str, geometry: str, size: str, head_dim: int) -> None:
    num_features = {"below": head_dim // 2 + 1, "equal": head_dim, "above": head_dim + 3}[size]
    estimates = relative_estimates(name, num_features, head_dim, **fields(geometry, head_dim))
    assert abs(z_score(estimates)) < 5
    # The bound has force: a bias of a tenth would be seen.
    assert estimates.std() / len(estimates) ** 0.5 < 0.02


@pytest.mark.parametrize("head_dim", [8, 80])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_weights_rounded_to_bfloat16_estimate_the_same(geometry: str, head_dim: int) -> None:
    """Draw by draw, so that what rounding does stands out from what a draw does."""
    given = fields(geometry, head_dim)
    exact = relative_estimates("simplex", head_dim, head_dim, **given)
    rounded = relative_estimates("simplex", head_dim, head_dim, dtype=torch.bfloat16, **given)
    assert abs(z_score(rounded)) < 5
    difference = rounded - exact
    assert 0 < difference.std() < 0.02 * exact.std()
    assert abs(difference.mean()) < 5 * difference.std() / len(difference) ** 0.5 + 1e-5


def test_rounding_happens_once_and_for_bfloat16_alone() -> None:
    maps = FeatureMap(projections("simplex", 8, 8).float(), **{n: t.float() for n, t in fields("shift", 8).items()})
    maps.projection.requires_grad_()
    folded = FoldedMap(fold_feature_map(maps, "query"), fold_feature_map(maps, "key"))
    assert round_weights(folded, torch.float32) is folded
    assert round_weights(folded, torch.float16) is folded
    rounded = round_weights(folded, torch.bfloat16)
    assert round_weights(rounded, torch.bfloat16) is rounded
    for mine, exact in zip(rounded[:2], folded[:2], strict=True):
        assert torch.equal(mine.weight, exact.weight.bfloat16().float())
        assert mine[1:] == exact[1:]
        # Straight through.
        weight = torch.randn(mine.weight.shape)
        grads = (
            torch.autograd.grad((x.weight * weight).sum(), maps.projection, retain_graph=True) for x in (mine, exact)
        )
        assert torch.equal(*(g[0] for g in grads))


@pytest.mark.parametrize("head_dim", [8, 80])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_seed_fault_biased_norms_are_caught(geometry: str, head_dim: int) -> None:
    """The control: with the seed's norms (chi with one degree of freedom) the same test fails."""
    estimates = relative_estimates("seed_fault", head_dim, head_dim, **fields(geometry, head_dim))
    assert abs(z_score(estimates)) > 20


@pytest.mark.parametrize(
    "broken", ["query_shift", "key_shift", "preconditioner", "inverse_transpose"], ids=lambda name: f"without_{name}"
)
def test_half_a_geometry_is_caught(broken: str) -> None:
    """Another control: leaving one part of the geometry out on one side biases the estimate."""
    w = projections("simplex", 8, 8)
    q, k = pair(8)
    # Shifts along the other side's vector and a matrix away from one, so that every part carries weight.
    matrix = fields("shift_matrix", 8)["preconditioner"] + 0.5 * torch.eye(8, dtype=torch.float64)
    geometry = {"preconditioner": matrix, "inverse_transpose": torch.linalg.inv(matrix).mT}
    geometry |= {"query_shift": 8**-0.25 * k.flatten(0, 2), "key_shift": -(8**-0.25) * q.flatten(0, 2)}
    whole, part = FeatureMap(w, **geometry), FeatureMap(w, **(geometry | {broken: None}))
    side = "query" if broken in ("query_shift", "preconditioner") else "key"
    total = torch.zeros(())
    for x, name in ((q, "query"), (k, "key")):
        folded = fold_feature_map(part if name == side else whole, name)
        total = total + log_features(x.expand(1, len(w), 1, -1), folded, 8**-0.5)
    estimates = torch.logsumexp(total, -1).sub(8**-0.5 * (q * k).sum()).exp().flatten()
    assert abs(z_score(estimates)) > 5


def test_variance_is_that_of_the_theory() -> None:
    """The closed forms hold for the features as computed, and for the proposal with a single feature."""
    q, k = pair(8)
    u = ((q + k) * 8**-0.25).flatten()
    for num_features in (5, 8, 11):
        squares = (relative_estimates("simplex", num_features, 8) - 1).square()
        expected = relative_mse(float(u.square().sum()), 8, num_features)
        assert abs(squares.mean() - expected) < 5 * squares.std() / len(squares) ** 0.5
    proposal = fields("shift_matrix_diagonal", 8)["proposal"]
    squares = (relative_estimates("iid", 1, 8, proposal=proposal) - 1).square()
    expected = float(torch.tensor(log_variance(u.square().tolist(), proposal[0].tolist())).expm1())
    assert abs(squares.mean() - expected) < 5 * squares.std() / len(squares) ** 0.5


def reference(x: torch.Tensor, maps: FeatureMap, side: str, scaling: float) -> torch.Tensor:
    """The formula of the module's docstring, term by term, for `x (B, G, L, D)` and a full geometry."""
    assert maps.query_shift is not None
    assert maps.key_shift is not None
    x = x * scaling**0.5
    mine, matrix = (
        (maps.query_shift, maps.preconditioner) if side == "query" else (maps.key_shift, maps.inverse_transpose)
    )
    moved = torch.einsum("gde,bgle->bgld", matrix, x - mine.unsqueeze(-2))
    stretch = 1 - 4 * maps.proposal
    w = maps.projection
    out = torch.einsum("gmd,bgld->bglm", w * stretch.sqrt().unsqueeze(-2), moved)
    out = out + torch.einsum("gmd,gd->gm", w.square(), maps.proposal).unsqueeze(-2)
    out = out - moved.square().sum(-1, keepdim=True) / 2
    if side == "query":
        assert maps.log_weight is not None
        out = out + maps.log_weight.unsqueeze(-2)
        linear = torch.einsum("bgld,gd->bgl", x, maps.key_shift)
    else:
        linear = torch.einsum("bgld,gd->bgl", x - mine.unsqueeze(-2), maps.query_shift)
    constant = stretch.log().sum(-1) / 4 - torch.tensor(w.shape[1], dtype=w.dtype).log() / 2
    return out + linear.unsqueeze(-1) + constant[:, None, None]


def full_map(dtype: torch.dtype = torch.float64) -> FeatureMap:
    geometry = {name: torch.cat([t, t.flip(-1)]) for name, t in fields("shift_matrix_diagonal", 6).items()}
    geometry["inverse_transpose"] = torch.linalg.inv(geometry["preconditioner"]).mT
    geometry["log_weight"] = torch.linspace(-2, 0.5, 14, dtype=torch.float64).view(2, 7)
    return FeatureMap(draw_projection(7, 6, num_heads=2, seed=0, dtype=torch.float64), **geometry).to(dtype)


@pytest.mark.parametrize("side", ["query", "key"])
def test_fold_is_the_formula(side: str) -> None:
    maps = full_map()
    x = torch.randn(3, 2, 5, 6, dtype=torch.float64)
    found = log_features(x, fold_feature_map(maps, side), 0.3)
    torch.testing.assert_close(found, reference(x, maps, side, 0.3), rtol=1e-12, atol=1e-12)
    # Any number of dimensions between heads and the last one.
    wide = log_features(x.unsqueeze(2).expand(3, 2, 4, 5, 6), fold_feature_map(maps, side), 0.3)
    torch.testing.assert_close(wide[:, :, 3], found)
    single = log_features(x.float(), fold_feature_map(full_map(torch.float32), side), 0.3)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["query", "key"])
def test_absent_parts_are_the_identity(side: str) -> None:
    maps = full_map()
    zero, eye = torch.zeros_like(maps.query_shift), torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    x = torch.randn(1, 2, 4, 6, dtype=torch.float64)
    bare = log_features(x, fold_feature_map(FeatureMap(maps.projection), side), 0.3)
    written = FeatureMap(maps.projection, zero, zero, eye, eye, zero)
    torch.testing.assert_close(log_features(x, fold_feature_map(written, side), 0.3), bare, rtol=1e-14, atol=1e-14)


def test_differentiable_in_inputs_and_geometry() -> None:
    maps = full_map()
    x = torch.randn(1, 2, 2, 6, dtype=torch.float64, requires_grad=True)

    def both(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        sides = [log_features(x, fold_feature_map(FeatureMap(*tensors), side), 0.3) for side in ("query", "key")]
        return torch.cat(sides, -1)

    # All but the last part: foresight ranks keys, and features do not depend on it.
    assert torch.autograd.gradcheck(both, (x, *(t.requires_grad_() for t in maps[:-1])))
