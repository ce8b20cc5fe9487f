"""The fused divergence against PyTorch in float64: value, gradient, ragged sizes, logits that are ruled out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from srf_retrofit.training.divergence import divergence
from srf_retrofit.training.triton_divergence import FusedDivergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def truth(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient in float64, as the definition has them."""
    s = student.double().detach().requires_grad_(True)
    log_s = functional.log_softmax(s / temperature, -1)
    log_t = functional.log_softmax(teacher.double() / temperature, -1)
    terms = torch.where(log_t > -torch.inf, log_t.exp() * (log_t - log_s), 0.0)
    value = terms.sum()
    return value.detach(), torch.autograd.grad(value, s)[0]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("n", "v"), [(1, 1), (3, 17), (2, 4096), (5, 5003), (2, 9000)])
def test_value_and_gradient(n: int, v: int, temperature: float) -> None:
    student = (4 * torch.randn(n, v)).to(DEVICE).requires_grad_(True)
    teacher = (student.detach().cpu() + torch.randn(n, v)).to(DEVICE)
    found = FusedDivergence.apply(student, teacher, temperature)
    (3 * found).backward()
    value, gradient = truth(student, teacher, temperature)
    assert abs(found.item() - value.item()) <= 1e-6 + 2e-6 * abs(value.item())
    assert (student.grad.double() - 3 * gradient).abs().max() <= 3e-6
    # The same as where there is no GPU.
    assert abs(divergence(student.detach().cpu(), teacher.cpu(), temperature) - value.cpu()) <= 1e-4


def test_half_precision_logits_and_rows_with_strides() -> None:
    whole = (5 * torch.randn(4, 2, 700)).to(DEVICE).bfloat16()
    student, teacher = whole[:, 0].detach().requires_grad_(True), whole[:, 1]
    FusedDivergence.apply(student, teacher, 1.0).backward()
    value, gradient = truth(student, teacher, 1.0)
    assert student.grad.dtype == torch.bfloat16
    # One unit in the last place: the interpreter cuts digits off where a GPU rounds.
    assert torch.allclose(student.grad.double(), gradient, atol=1e-9, rtol=2**-7)
    assert torch.allclose(FusedDivergence.apply(student, teacher, 1.0).double(), value, rtol=1e-6)


def test_a_small_divergence_of_large_logits_keeps_its_digits() -> None:
    teacher = (300 + 10 * torch.randn(2, 6000, dtype=torch.float64)).float().to(DEVICE)
    student = teacher + 1e-2 * torch.randn(2, 6000).to(DEVICE)
    value, _ = truth(student, teacher, 1.0)
    assert value < 1e-2
    assert abs(FusedDivergence.apply(student, teacher, 1.0).item() - value.item()) <= 5e-6


def test_what_the_teacher_rules_out_costs_nothing() -> None:
    student = torch.randn(2, 5000).to(DEVICE).requires_grad_(True)
    teacher = torch.randn(2, 5000).to(DEVICE)
    teacher[0, :4500] = -torch.inf
    teacher[1, 7] = -torch.inf
    found = FusedDivergence.apply(student, teacher, 1.0)
    found.backward()
    value, gradient = truth(student, teacher, 1.0)
    assert torch.allclose(found.double(), value, rtol=1e-5)
    assert (student.grad.double() - gradient).abs().max() <= 3e-6


def test_no_positions_and_values_that_are_not_finite() -> None:
    nothing = torch.zeros(0, 33, device=DEVICE, requires_grad=True)
    found = FusedDivergence.apply(nothing, nothing.detach(), 1.0)
    found.backward()
    assert found.item() == 0
    assert nothing.grad.shape == (0, 33)
    damaged = torch.randn(1, 50, device=DEVICE)
    damaged[0, 3] = torch.nan
    assert not torch.isfinite(FusedDivergence.apply(damaged, torch.randn(1, 50, device=DEVICE), 1.0))
