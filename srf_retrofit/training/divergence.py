"""The divergence of a student's next-token distribution from its teacher's, fused on a GPU.

Shapes: `N` positions, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional

try:
    from .triton_divergence import FusedDivergence

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`sum_n KL(softmax(teacher_n / T) || softmax(student_n / T))` (1503.02531, section 2, without its factor `T^2`).

    On a CUDA device one Triton kernel takes the sum and another the gradient, and no tensor of the logits' size is made
    beside the gradient; elsewhere PyTorch's operators do the same.

    Parameters
    ----------
    student : (N, V), floating
        Differentiable. The softmax is taken in at least float32, the gradient has this dtype.
    teacher : (N, V), floating
        No gradient flows into it.
    temperature : float
        `T > 0`.

    Returns
    -------
    () float32 (float64 for float64 logits)
        In nats.
    """
    if _fused(student, teacher):
        return FusedDivergence.apply(student, teacher.detach(), temperature)
    target = log_softmax(teacher.detach(), temperature)
    return functional.kl_div(log_softmax(student, temperature), target, reduction="sum", log_target=True)


def log_softmax(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Of logits (N, V) over `temperature`, in at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def _fused(student: torch.Tensor, teacher: torch.Tensor) -> bool:
    served = (torch.float32, torch.float16, torch.bfloat16)
    return HAS_TRITON and student.is_cuda and student.dtype in served and teacher.dtype in served
