"""Kullback-Leibler divergence of two rows of logits and its gradient, each in one pass over the logits.

PyTorch's own operators make five float32 tensors of the logits' size on the way; these kernels read logits as they are
and write nothing but the gradient.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # passed on: `divergence` reports it, and a loader that scans for imports sees an optional one
    raise

_BLOCK = 4096
_WARPS = 8
# Below any logit that counts; a running maximum that starts at -inf would make the first step `inf - inf`.
LEAST = tl.constexpr(-1e30)


@triton.jit
def forward_kernel(
    student, teacher, kl, student_lse, teacher_lse, student_stride, teacher_stride, scale, V, BLOCK: tl.constexpr
):  # fmt: skip
    """`sum_v p_v (log p_v - log s_v)` of a row, and the log-normalisers of both sides, at inverse temperature `scale`.

    With `p = e^{t - m} / Z`: `KL = sum_v p_v (t_v - s_v) - (lse_t - lse_s)`, running maxima and sums throughout.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    column = tl.arange(0, BLOCK)
    top_s = LEAST + 0.0
    top_t = LEAST + 0.0
    # A lane keeps sums of its own, so that a step has no reduction but that of the maxima.
    sum_s = tl.zeros((BLOCK,), tl.float32)
    sum_t = tl.zeros((BLOCK,), tl.float32)
    gap = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + column < V
        s = tl.load(student + start + column, mask=inside, other=float("-inf")).to(tl.float32) * scale
        t = tl.load(teacher + start + column, mask=inside, other=float("-inf")).to(tl.float32) * scale
        above_s = tl.maximum(top_s, tl.max(s, 0))
        above_t = tl.maximum(top_t, tl.max(t, 0))
        decay = tl.exp(top_t - above_t)
        p = tl.exp(t - above_t)
        # What the teacher rules out costs nothing, whatever the student thinks of it.
        gap = gap * decay + p * tl.where(t > float("-inf"), t - s, 0.0)
        sum_t = sum_t * decay + p
        sum_s = sum_s * tl.exp(top_s - above_s) + tl.exp(s - above_s)
        top_s = above_s
        top_t = above_t
    mass_s, mass_t = tl.sum(sum_s, 0), tl.sum(sum_t, 0)
    # The maxima are subtracted first: the divergence is small beside either normaliser.
    tl.store(kl + row, tl.sum(gap, 0) / mass_t - ((top_t - top_s) + (tl.log(mass_t) - tl.log(mass_s))))
    tl.store(student_lse + row, top_s + tl.log(mass_s))
    tl.store(teacher_lse + row, top_t + tl.log(mass_t))


@triton.jit
def backward_kernel(
    student, teacher, student_lse, teacher_lse, weight, d_kl, d_student, student_stride, teacher_stride, d_stride,
    scale, V, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Gradient of the student's logits, `scale weight d_kl (s_v - p_v)`, a block of a row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < V
    s = tl.load(student + row * student_stride + column, mask=inside, other=float("-inf")).to(tl.float32) * scale
    t = tl.load(teacher + row * teacher_stride + column, mask=inside, other=float("-inf")).to(tl.float32) * scale
    difference = tl.exp(s - tl.load(student_lse + row)) - tl.exp(t - tl.load(teacher_lse + row))
    factor = scale * tl.load(d_kl)
    if WEIGHTED:
        factor *= tl.load(weight + row)
    grad = difference * factor
    tl.store(d_student + row * d_stride + column, grad.to(d_student.dtype.element_ty), mask=inside)


class FusedDivergence(torch.autograd.Function):
    """`sum KL(teacher || student)` of logits (N, V), differentiable in the student's; see `divergence`."""

    @staticmethod
    def forward(
        ctx, student: torch.Tensor, teacher: torch.Tensor, temperature: float, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        n, v = student.shape
        student, teacher = _rows(student), _rows(teacher)
        kl, student_lse, teacher_lse = student.new_empty(3, n, dtype=torch.float32)
        if n:
            forward_kernel[(n,)](
                student, teacher, kl, student_lse, teacher_lse, student.stride(0), teacher.stride(0), 1 / temperature,
                v, BLOCK=min(_BLOCK, triton.next_power_of_2(v)), num_warps=_WARPS,
            )  # fmt: skip
        ctx.save_for_backward(student, teacher, student_lse, teacher_lse, weight)
        ctx.temperature = temperature
        return kl.sum() if weight is None else (kl * weight).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_kl: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        student, teacher, student_lse, teacher_lse, weight = ctx.saved_tensors
        n, v = student.shape
        grad = torch.empty((n, v), dtype=student.dtype, device=student.device)
        block = min(_BLOCK, triton.next_power_of_2(v))
        if n:
            backward_kernel[(n, triton.cdiv(v, block))](
                student, teacher, student_lse, teacher_lse, weight, d_kl.contiguous(), grad, student.stride(0),
                teacher.stride(0), grad.stride(0), 1 / ctx.temperature, v, BLOCK=block, WEIGHTED=weight is not None,
                num_warps=_WARPS,
            )  # fmt: skip
        return grad, None, None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with unit stride along its last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()
