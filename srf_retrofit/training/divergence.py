"""The divergence of a student's next-token distribution from its teacher's: in chunks, and fused on a GPU.

With a vocabulary of 49,152 the logits of 4,096 tokens are 0.8 GB in float32, and a Kullback-Leibler divergence needs
several tensors of that size. Here logits are made for a chunk of positions at a time, and stay in their own precision.

Shapes: `N` positions that predict something, `E` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.nn import functional

from .chunks import sum_in_chunks

try:
    from .triton_divergence import FusedDivergence

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

DEFAULT_CHUNK = 1024

Head = Callable[[torch.Tensor], torch.Tensor]


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """`sum_n w_n KL(softmax(teacher_n / T) || softmax(student_n / T))` (1503.02531, section 2, without its `T^2`).

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
    weight : (N,) float32, optional
        Of each position; 1 by default.

    Returns
    -------
    () float32 (float64 for float64 logits)
        In nats.
    """
    if _fused(student, teacher):
        return FusedDivergence.apply(student, teacher.detach(), temperature, weight)
    target, found = log_softmax(teacher.detach(), temperature), log_softmax(student, temperature)
    if weight is None:
        return functional.kl_div(found, target, reduction="sum", log_target=True)
    return (functional.kl_div(found, target, reduction="none", log_target=True).sum(-1) * weight).sum()


def chunked_losses(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    labels: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    *,
    temperature: float = 1.0,
    cross_entropy: bool = False,
    chunk_size: int = DEFAULT_CHUNK,
    weight: torch.Tensor | None = None,
    parameters: Iterable[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Sums over positions of `KL(teacher || student)` and, on request, of the cross-entropy with the labels.

    `KL = sum_v p_v log(p_v / s_v)`, with `p` and `s` the softmax of teacher and student logits over `temperature`
    (1503.02531, section 2, without its factor `temperature**2`). The cross-entropy is taken at temperature 1. At most
    `chunk_size x V` logits of each model exist at any time, in the backward as well: with more than one chunk they are
    computed again there, unless `parameters` are given.

    Parameters
    ----------
    student_hidden : (N, E)
        Differentiable.
    teacher_hidden : (N, E')
        No gradient flows into it.
    labels : (N,) int64
        The token after each position; read only for the cross-entropy, which leaves out -100.
    student_head, teacher_head : callable
        Hidden states (n, E) to logits (n, V), any floating dtype; the softmax is taken in at least float32.
    temperature : float
    cross_entropy : bool
    chunk_size : int
        Positions per chunk.
    weight : (N,) float32, optional
        Of each position's divergence; 1 by default.
    parameters : iterable of tensor, optional
        Of the student's head. Where they are given and there is no cross-entropy, gradients are taken along with the
        divergence and nothing is computed twice; see `sum_in_chunks`.

    Returns
    -------
    (2,) float32 (float64 for float64 logits)
        In nats; the second entry is 0 unless `cross_entropy`.
    """

    def losses(
        student_part: torch.Tensor,
        teacher_part: torch.Tensor,
        labels_part: torch.Tensor,
        weight_part: torch.Tensor | None = None,
    ) -> torch.Tensor:
        with torch.no_grad():
            teacher = teacher_head(teacher_part)
        logits = student_head(student_part)
        kl = divergence(logits, teacher, temperature, weight_part)
        if not cross_entropy:
            return kl
        return torch.stack([kl, functional.nll_loss(log_softmax(logits), labels_part, reduction="sum")])

    given = (student_hidden, teacher_hidden, labels, *(() if weight is None else (weight,)))
    sums = sum_in_chunks(losses, given, chunk_size, None if cross_entropy else parameters)
    return sums if cross_entropy else torch.stack([sums, torch.zeros_like(sums)])


def log_softmax(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Of logits (N, V) over `temperature`, in at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def _fused(student: torch.Tensor, teacher: torch.Tensor) -> bool:
    served = (torch.float32, torch.float16, torch.bfloat16)
    return HAS_TRITON and student.is_cuda and student.dtype in served and teacher.dtype in served
