"""The fused divergence against PyTorch in float64: value, gradient, ragged sizes, logits ruled out; in chunks."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from srf_retrofit.training.divergence import chunked_losses, divergence
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


@pytest.mark.parametrize("chunk_size", [1, 7, 20, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_chunked_losses_are_the_plain_ones(chunk_size: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    n, e, vocab = 20, 6, 31
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight = draw(n, e).requires_grad_(), draw(vocab, e).requires_grad_()
    teacher_hidden, teacher_weight = draw(n, 9), draw(vocab, 9)
    labels = torch.randint(vocab, (n,), generator=generator)

    logits, target = hidden @ weight.T, (teacher_hidden @ teacher_weight.T / temperature).softmax(-1)
    kl = (target * (target.log() - (logits / temperature).log_softmax(-1))).sum()
    ce = functional.cross_entropy(logits, labels, reduction="sum")
    expected = torch.autograd.grad(2 * kl + 3 * ce, (hidden, weight))

    sums = chunked_losses(
        hidden,
        teacher_hidden,
        labels,
        lambda x: x @ weight.T,
        lambda x: x @ teacher_weight.T,
        temperature=temperature,
        cross_entropy=True,
        chunk_size=chunk_size,
    )
    torch.testing.assert_close(sums, torch.stack([kl, ce]))
    gradients = torch.autograd.grad(2 * sums[0] + 3 * sums[1], (hidden, weight))
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("chunk_size", [7, 100])
def test_chunked_divergence_finds_its_gradients_on_the_way(chunk_size: int) -> None:
    torch.manual_seed(0)
    hidden, known = torch.randn(20, 6, dtype=torch.float64, requires_grad=True), torch.randn(20, 6, dtype=torch.float64)
    head, weight = torch.nn.Linear(6, 31, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    nothing = torch.zeros(20).long()

    def sums(**how: Any) -> torch.Tensor:
        return chunked_losses(hidden, known, nothing, head, head, temperature=2.0, weight=weight, **how)

    expected = sums()
    found = sums(chunk_size=chunk_size, parameters=head.parameters())
    torch.testing.assert_close(found, expected)
    wanted = (hidden, *head.parameters())
    for got, want in zip(
        torch.autograd.grad(3 * found[0], wanted), torch.autograd.grad(3 * expected[0], wanted), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("together", [False, True])
def test_no_more_than_a_chunk_of_logits_exists(together: bool) -> None:
    n, e, vocab, chunk = 64, 4, 1000, 16
    hidden, weight = torch.randn(n, e, requires_grad=True), torch.randn(vocab, e, requires_grad=True)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

    held: weakref.WeakSet[Held] = weakref.WeakSet()

    class Held:
        """What a graph keeps for its backward pass, for as long as it does."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            held.add(self)

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda h: h.tensor):
            head = lambda x: x @ weight.T  # noqa: E731
            sums = chunked_losses(
                hidden, hidden.detach(), torch.zeros(n).long(), head, head, chunk_size=chunk,
                parameters=[weight] if together else None,
            )  # fmt: skip
        kept = [h.tensor.numel() for h in held]
        sums[0].backward()
    assert largest.numel == chunk * vocab
    # Gradients that were found on the way leave nothing to keep but themselves.
    assert kept or together
    assert max(kept, default=0) < chunk * vocab
