"""How far a student's predictions are from a teacher's: the soft term of distillation.

Source: KD-LoRA: A Hybrid Approach to Efficient Fine-Tuning with LoRA and Knowledge Distillation (after Distilling the Knowledge in a
Neural Network). The teacher is the target: KL(teacher || student), times the square of the temperature.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def soft_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean over rows of T^2 KL(softmax(teacher / T) || softmax(student / T)), float32; ``student``, ``teacher`` [rows, classes]."""
    return temperature**2 * F.kl_div(F.log_softmax(student.float() / temperature, dim=-1), F.log_softmax(teacher.float() / temperature, dim=-1),
                                     reduction="batchmean", log_target=True)


class _ChunkedSoft(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, other, other_weight, temperature, chunk):
        # Both products of a chunk are made, turned into the gradient and forgotten, so that no logits outlive it.
        grad_hidden, cast = torch.empty_like(hidden), weight.to(hidden.dtype)
        other, other_cast = other.to(hidden.dtype), other_weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = hidden.shape[0]
        for at in range(0, rows, chunk):
            mine = F.log_softmax((hidden[at: at + chunk] @ cast.t()).float().div_(temperature), dim=-1)
            target = F.log_softmax((other[at: at + chunk] @ other_cast.t()).float().div_(temperature), dim=-1)
            probability = target.exp()
            total += (probability * target.sub_(mine)).sum()
            grad = mine.exp_().sub_(probability).mul_(temperature / rows).to(hidden.dtype)
            torch.mm(grad, cast, out=grad_hidden[at: at + chunk])
            del mine, target, probability, grad
        ctx.grad = grad_hidden
        return total * (temperature**2 / rows)

    @staticmethod
    def backward(ctx, outer):
        grad, ctx.grad = ctx.grad, None
        return grad.mul_(outer.to(grad.dtype)), None, None, None, None, None


def chunked_soft_loss(hidden, weight, other, other_weight, temperature: float, *, chunk: int = 2048) -> torch.Tensor:
    """``soft_loss`` of language models from their last hidden states, without ever holding all logits.

    Args:
        hidden, other: [tokens, width] of the student and of the teacher; gradients flow to ``hidden`` only.
        weight, other_weight: [vocabulary, width] of their frozen heads.
        chunk: rows of logits held at a time.
    """
    return _ChunkedSoft.apply(hidden, weight, other, other_weight, float(temperature), chunk)
