"""The hand-written backward passes against what autograd makes of the formulas, in float64."""

from __future__ import annotations

import pytest
import torch

from srf_retrofit.modeling.feature_attention import attend_features
from srf_retrofit.modeling.feature_sums import LOG_ZERO
from srf_retrofit.modeling.softmax_parts import attend_parts


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def weigh_all_pairs(a, b, v, sums, mass, reference):
    """`attend_features` as a matrix of weights, (X, L, R, L) for all `L = N w` positions at once."""
    x, n, w, m = b.shape
    r = a.shape[2] // w
    a4, b3, v3 = a.view(x, n * w, r, m), b.view(x, n * w, m), v.view(x, n * w, -1)
    pairs = torch.einsum("xirm,xjm->xirj", a4.exp(), b3.exp())
    pairs = pairs * torch.ones(n * w, n * w, dtype=a.dtype).tril()[:, None]
    past = (a4 + reference[:, None, None]).exp()
    total = pairs.sum(-1) + torch.einsum("xirm,xm->xir", past, mass)
    o = torch.einsum("xirj,xjd->xird", pairs, v3) + torch.einsum("xirm,xmd->xird", past, sums)
    end = torch.maximum(reference, b3.detach().amax(1))
    added, kept = (b3 - end[:, None]).exp(), (reference - end).exp()
    return (
        (o / total[..., None]).reshape(x, n, w * r, -1),
        total.log().reshape(x, n, w * r, 1),
        torch.einsum("xjm,xjd->xmd", added, v3) + sums * kept[..., None],
        added.sum(1) + mass * kept,
        end,
    )


@pytest.mark.parametrize(
    "sizes", [(2, 1, 2, 1), (1, 2, 4, 2), (2, 2, 8, 1), (1, 2, 16, 3), (1, 3, 1, 2), (1, 2, 32, 1)]
)
def test_attention_through_features(sizes):
    x, n, w, r = sizes
    m, d = 5, 3
    tensors = (leaf(x, n, w * r, m), leaf(x, n, w, m), leaf(x, n, w, d), leaf(x, m, d), leaf(x, m))
    reference = torch.randn(x, m, dtype=torch.float64)

    def call(function):
        a, b, v, sums, mass = tensors
        return function(a, b, v, sums, 1 + mass.square(), reference)

    found = call(lambda a, b, v, *initial: attend_features(a, b, v, initial))
    expected = call(weigh_all_pairs)
    weights = [torch.randn_like(y) for y in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    grads, right = (
        torch.autograd.grad(sum((y * c).sum() for y, c in zip(ys, weights, strict=True)), tensors)
        for ys in (found, expected)
    )
    for one, other in zip(grads, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_queries_that_see_no_key_get_nothing_and_give_nothing():
    a, b, v, sums, mass = leaf(1, 1, 8, 3), leaf(1, 1, 8, 3), leaf(1, 1, 8, 2), leaf(1, 3, 2), leaf(1, 3)
    hidden = torch.arange(8).view(1, 1, 8, 1) < 5
    result = attend_features(
        a, b.masked_fill(hidden, float("-inf")), v, (0 * sums, 0 * mass, torch.full_like(mass, float("-inf")))
    )
    assert not result.output[:, :, :5].any()
    assert (result.log_mass[:, :, :5] < LOG_ZERO / 2).all()
    assert result.output[:, :, 5:].all()
    torch.testing.assert_close(result.mass, (b[0, 0, 5:] - result.reference).exp().sum(0, keepdim=True))
    grads = torch.autograd.grad(result.output.sum() + result.values.sum(), (a, b, v))
    for grad in grads:
        assert torch.isfinite(grad).all()
        assert not grad[:, :, :5].any()
        assert grad[:, :, 6:].any()


def test_weights_far_below_the_smallest_float_keep_their_ratios():
    # Keys that rise by e^150 each: whatever is seen first is all that counts until the next one.
    rise = 150.0 * torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 4)
    value = torch.arange(8.0).view(1, 1, 8, 1)
    initial = (torch.zeros(1, 4, 1), torch.zeros(1, 4), torch.full((1, 4), float("-inf")))
    query = torch.randn(1, 1, 8, 4)
    torch.testing.assert_close(attend_features(query, rise, value, initial).output, value, rtol=1e-6, atol=0)
    assert not attend_features(query, -rise, value, initial).output.any()


def test_softmax_over_several_tensors():
    logits, values = [leaf(2, 3, 4, n) for n in (1, 5, 2)], [leaf(2, 3, n, 6) for n in (1, 5, 2)]
    found = attend_parts(logits, values)
    expected = torch.cat(logits, -1).softmax(-1) @ torch.cat(values, -2)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    weight = torch.randn_like(found)
    grads, right = (torch.autograd.grad((y * weight).sum(), [*logits, *values]) for y in (found, expected))
    for one, other in zip(grads, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(attend_parts([x.clone() for x in logits], values), found, rtol=0, atol=0)
