"""Sums in chunks: value and gradients are those of the whole, whichever way the gradients are found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from srf_retrofit.training.chunks import sum_in_chunks


class Counting(nn.Module):
    """`sum w (W x)^3` with an adapter that takes no part, and how often it was computed."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, dtype=dtype))
        self.frozen = nn.Parameter(torch.randn(3, dtype=dtype), requires_grad=False)
        self.idle = nn.Parameter(torch.randn(2, dtype=dtype))
        self.calls = 0

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return (w * ((x @ self.weight.T + self.frozen) ** 3).sum(-1)).sum()


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 50])
@pytest.mark.parametrize("together", [False, True])
def test_value_and_gradients_are_those_of_the_whole(chunk_size: int, together: bool) -> None:
    torch.manual_seed(0)
    loss = Counting()
    x, w = torch.randn(11, 5, dtype=torch.float64, requires_grad=True), torch.rand(11, dtype=torch.float64)
    whole = loss(x, w)
    expected = torch.autograd.grad(7 * whole, (x, loss.weight))
    loss.calls = 0

    total = sum_in_chunks(loss, (x, w), chunk_size, loss.parameters() if together else None)
    torch.testing.assert_close(total, whole)
    (7 * total).backward()
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(loss.weight.grad, expected[1])
    assert loss.frozen.grad is None
    assert loss.idle.grad is None
    chunks = -(-11 // chunk_size)
    assert loss.calls == (chunks if together or chunks == 1 else 2 * chunks)


def test_a_parameter_that_is_also_used_before_gets_both_gradients() -> None:
    loss = Counting()
    w = torch.rand(6, dtype=torch.float64)

    def objective(together: bool) -> torch.Tensor:
        x = loss.weight.repeat(2, 1) * 0.5  # as a head tied to the embedding
        return sum_in_chunks(loss, (x, w), 4, loss.parameters() if together else None)

    expected, *found = [torch.autograd.grad(objective(way), loss.weight)[0] for way in (False, True)]
    torch.testing.assert_close(found[0], expected)


def test_parameters_that_share_a_gradient_do_not_share_its_sum() -> None:
    a, b = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)

    def loss(part: torch.Tensor) -> torch.Tensor:
        return part.sum() * (a + b).sum()  # one tensor, of stride 0, for both

    expected = torch.autograd.grad(loss(x), (a, b, x))
    for found, right in zip(
        torch.autograd.grad(sum_in_chunks(loss, (x,), 2, [a, b]), (a, b, x)), expected, strict=True
    ):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize(("given", "trained"), [(False, True), (True, False), (False, False)])
def test_nothing_is_differentiated_that_wants_no_gradient(given: bool, trained: bool) -> None:
    loss = Counting().requires_grad_(trained)
    x, w = torch.randn(6, 5, dtype=torch.float64, requires_grad=given), torch.rand(6, dtype=torch.float64)
    total = sum_in_chunks(loss, (x, w), 4, loss.parameters())
    assert total.requires_grad == (given or trained)
    if total.requires_grad:
        total.backward()
    assert (x.grad is not None) == given
    assert (loss.weight.grad is not None) == trained


def test_gradients_of_bfloat16_chunks_add_up_in_float32() -> None:
    torch.manual_seed(0)
    loss = Counting(torch.bfloat16)
    x, w = torch.randn(512, 5).bfloat16(), torch.rand(512).bfloat16()
    sum_in_chunks(loss, (x, w), 1, loss.parameters()).backward()
    wide = Counting(torch.float64)
    with torch.no_grad():
        wide.weight.copy_(loss.weight), wide.frozen.copy_(loss.frozen)
    wide(x.double(), w.double()).backward()
    error = (loss.weight.grad.double() - wide.weight.grad).norm() / wide.weight.grad.norm()
    # 512 additions in bfloat16 would lose 5%.
    assert loss.weight.grad.dtype == torch.bfloat16
    assert error < 8e-3


def test_under_autocast_gradients_are_found_as_without_chunks() -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 33)
    x = torch.randn(24, 16, requires_grad=True)

    def gradients(chunk_size: int, together: bool) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            total = sum_in_chunks(
                lambda part: head(part).float().logsumexp(-1).sum(), (x,), chunk_size,
                head.parameters() if together else None,
            )  # fmt: skip
        return torch.autograd.grad(total, (x, head.weight, head.bias))

    for found, expected in zip(gradients(7, True), gradients(24, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_without_gradients_nothing_is_kept() -> None:
    loss = Counting()
    with torch.no_grad():
        total = sum_in_chunks(loss, (torch.randn(6, 5).double(), torch.rand(6).double()), 2, loss.parameters())
    assert not total.requires_grad
    assert loss.calls == 3
