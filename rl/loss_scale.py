"""Backward passes in float16, whose gradients are scaled into its range.

A token's share of a loss is 10⁻⁵ or less, and float16 ends at 6·10⁻⁸: unscaled, most gradients of hidden states would
be 0. As in mixed-precision training (arXiv 1710.03740 §3.2) the loss is multiplied by a scale and the adapter's
gradients, which are float32, are divided by it. The scale is chosen anew for every pack from the gradients at its
log-probs, which are known before the pass, so that there is none to be found by failing. It is a power of two: scaling
rounds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

# The largest gradient of a log-prob in the pass, times the scale. A hidden state's is a few times as large at most, by
# the rows of the head, and may grow a thousandfold on its way down; probabilities below 4·10⁻⁹ are lost.
_LARGEST = 16.0
# Exponents of the scale: float32 gradients of an earlier pack stay exact when they are multiplied by it.
_MOST = 40


def backward(
    roots: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    parameters: Iterable[torch.nn.Parameter],
    dtype: torch.dtype,
) -> None:
    """Add to the parameters' `.grad` as `torch.autograd.backward` does.

    Args:
        roots: tensors of the pass with the loss's gradients by them, in float32 or float64; None: it has none.
        parameters: everything that has a gradient in the pass, in float32; looked at in float16 alone.
        dtype: that hidden states have.

    Raises:
        ValueError: there are no parameters, so that what is scaled could not be scaled back.
    """
    known = [(output, grad.to(output.dtype)) for output, grad in roots if grad is not None]
    if not known:
        return
    outputs, grads = [output for output, _ in known], [grad for _, grad in known]
    if dtype != torch.float16:
        torch.autograd.backward(outputs, grads)
        return
    learning = list(parameters)
    if not learning:
        raise ValueError("there are no parameters that learn")
    # It stays on the device: reading it would wait for the forward pass.
    scale = _scale(grads)
    _multiply(learning, scale)
    torch.autograd.backward(outputs, [grad * scale.to(grad.dtype) for grad in grads])
    _multiply(learning, 1 / scale)


def _scale(grads: list[torch.Tensor]) -> torch.Tensor:
    """float32, without a dimension. Where there is no gradient but 0, or one that is not finite, 1."""
    sizes = [grad.detach().abs().max().float() for grad in grads if grad.numel()]
    if not sizes:
        return torch.ones((), device=grads[0].device)
    exponent = torch.log2(_LARGEST / torch.stack(sizes).max()).floor()
    return torch.where(exponent.isfinite(), exponent.clamp(-_MOST, _MOST), 0.0).exp2()


def _multiply(parameters: list[torch.nn.Parameter], factor: torch.Tensor) -> None:
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, factor)
