"""Plain PyTorch twins of the Triton kernels, and the rule that picks one of the two.

A twin is the path of a CPU and of float64 tensors, and the oracle of its kernel: same arguments, same order of casts,
same buffers written. Arithmetic runs in float32, or in float64 where the tensors are float64.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from typing import Literal

import torch

Impl = Literal["triton", "torch"]

# The sixteen levels of the NormalFloat-4 data type (QLoRA, Dettmers et al. 2023, appendix E), as float32 values.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Packed bytes that are unpacked at a time, so that the temporaries stay small beside the weight itself.
_NF4_CHUNK = 1 << 20


def picks_triton(tensor: torch.Tensor, impl: Impl | None = None) -> bool:
    """Whether the Triton kernel runs: as `impl` says, else for CUDA tensors of 16 or 32 bits where Triton is installed.

    Raises:
        ValueError: `impl` is unknown, or asks for Triton with float64, which only the twins compute in.
    """
    if impl == "torch":
        return False
    if impl == "triton":
        if tensor.dtype == torch.float64:
            raise ValueError("the Triton kernels compute in float32; float64 tensors need impl='torch'")
        return True
    if impl is not None:
        raise ValueError(f"impl={impl!r} is none of 'triton', 'torch' and None")
    if not tensor.is_cuda or tensor.dtype == torch.float64:
        return False
    return _triton_on_cuda()


@functools.cache
def _triton_on_cuda() -> bool:
    """Asked for CUDA tensors only; says so once if the slow path is all there is."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        warnings.warn("triton is not installed: the kernels run as plain PyTorch, slower and in more memory. "
                      "Fix: pip install triton", RuntimeWarning, stacklevel=2)  # fmt: skip
    return found


def rows(tensor: torch.Tensor, *, written: bool = False) -> torch.Tensor:
    """`[..., d]` as `[N, d]` with unit stride along d; a view where one exists.

    Raises:
        ValueError: there is no such view and `written` forbids the copy, because writes to it would be lost.
    """
    if tensor.dim() == 2 and tensor.stride(1) == 1:
        return tensor
    width = tensor.shape[-1]
    count = tensor.numel() // width if width else 0
    if tensor.stride(-1) == 1:
        try:
            return tensor.view(count, width)
        except RuntimeError:  # leading dimensions that no single stride walks
            pass
    if written:
        raise ValueError(f"a buffer of shape {tuple(tensor.shape)} and strides {tensor.stride()} has no row view")
    return tensor.reshape(count, width).contiguous()


def ceil_div(count: int, size: int) -> int:
    """Blocks of `size` that hold `count`. Triton's own takes microseconds on the host, at every launch."""
    return -(-count // size)


def power_of_2_from(count: int) -> int:
    """The least power of two that is no less than `count`, which is positive."""
    return 1 << (count - 1).bit_length()


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In the precision of the arithmetic: float32, float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def wide_product(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The matrix product in float32 at least, of two matrices of one type."""
    if x.dtype in (torch.bfloat16, torch.float16):
        if x.is_cuda:
            return torch.mm(x, y, out_dtype=torch.float32, out=out)
        x, y = x.float(), y.float()
    return torch.mm(x, y, out=out)


def normed(h: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """RMSNorm over the last dimension. offset 0: x̂ is cast, then scaled (Llama). Else scaled, then cast (Gemma)."""
    value = wide(h)
    unit = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if offset == 0.0:
        return (wide(unit.to(h.dtype)) * wide(weight)).to(h.dtype)
    return (unit * (offset + wide(weight))).to(h.dtype)


def normed_grad(dy: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """dx of `normed`, in the precision of the arithmetic: with g = dy·(w + offset), dx = r·(g − x̂·mean(g·x̂))."""
    value = wide(h)
    rstd = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    unit = value * rstd
    scaled = wide(dy) * (wide(weight) + offset)
    return rstd * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, half: int, *, inverse: bool) -> torch.Tensor:
    """`[T, H, D]`, unrounded: entries i and i + half of a head are one plane, those from 2·half on stay."""
    value = wide(x)
    first, second, rest = value[..., :half], value[..., half : 2 * half], value[..., 2 * half :]
    c = cos[:, None, :half].to(value.dtype)
    s = sin[:, None, :half].to(value.dtype)
    if inverse:
        s = -s
    return torch.cat((first * c - second * s, second * c + first * s, rest), dim=-1)


def activation(gate: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """act(gate) and its slope. tanh-GELU is x·σ(2z), z = √(2/π)·(x + 0.044715·x³), which loses nothing to 1 + tanh."""
    if kind == "swiglu":
        sigma = torch.sigmoid(gate)
        return gate * sigma, sigma * (1 + gate * (1 - sigma))
    factor = 2 * math.sqrt(2 / math.pi)
    square = gate * gate
    argument = factor * gate * (1 + 0.044715 * square)
    sigma = torch.sigmoid(argument)
    inner = factor * (1 + 3 * 0.044715 * square)
    # σ(−z) rather than 1 − σ(z): the steep argument would magnify the cancellation.
    return gate * sigma, sigma + gate * sigma * torch.sigmoid(-argument) * inner


def glu_into(out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str) -> None:
    """out = act(gate)·up; the activation is rounded to the tensors' type first, as two separate modules would."""
    act = activation(wide(gate), kind)[0].to(gate.dtype)
    out.copy_(wide(act) * wide(up))


def glu_backward_into(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str, *, recompute_h: bool) -> None:
    """gate, up become their gradients; dh becomes h if `recompute_h`."""
    act, slope = activation(wide(gate), kind)
    grad, value = wide(dh), wide(up)
    dgate, dup = grad * value * slope, grad * act
    if recompute_h:
        dh.copy_(wide(act.to(gate.dtype)) * value)
    gate.copy_(dgate)
    up.copy_(dup)


def nested_absmax(
    absmax: torch.Tensor, absmax2: torch.Tensor, code2: torch.Tensor, offset: torch.Tensor, blocksize2: int
) -> torch.Tensor:
    """`[blocks]` float32 scales from their 8-bit form: code2[absmax]·absmax2[block // blocksize2] + offset."""
    scale = absmax2.repeat_interleave(blocksize2)[: absmax.numel()]
    return code2[absmax.long()] * scale + offset


def nf4_into(out: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, blocksize: int) -> None:
    """`out` `[n]` from `packed` `[ceil(n / 2)]` bytes, high nibble first, and one float32 scale per block."""
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=packed.device)
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1)
    bytes_per_block = blocksize // 2
    step = max(_NF4_CHUNK // bytes_per_block, 1) * bytes_per_block
    for start in range(0, packed.numel(), step):
        piece = packed[start : start + step]
        first = start // bytes_per_block
        scale = absmax[first : first + math.ceil(piece.numel() / bytes_per_block)]
        scale = scale.repeat_interleave(bytes_per_block)[: piece.numel(), None]
        values = (pairs[piece.int()] * scale).view(-1)
        target = out[2 * start : 2 * start + values.numel()]
        target.copy_(values[: target.numel()])


def tempered(
    raw: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    vocab: int,
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """`[N, ≥ vocab]` products of hidden states and head -> `[N, vocab]` logits z, and dz/draw: a number if uncapped."""
    z = wide(raw[:, :vocab])
    if bias is not None:
        z = z + wide(bias[:vocab])
    if scale != 1.0:
        z = z * scale
    slope: torch.Tensor | float = scale / temperature
    if softcap is not None:
        bent = torch.tanh(z / softcap)
        z, slope = softcap * bent, (1 - bent.square()) * slope
    return (z if temperature == 1.0 else z / temperature), slope


def token_scores(
    z: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """log-prob of the target, log-sum-exp, entropy and mean of every row of logits.

    A logit of −inf has probability 0 and adds nothing to the entropy. A row of nothing else is no distribution: its
    log-prob and log-sum-exp are −inf, its entropy 0.
    """
    # Both sums relative to the largest logit: at logits of 10⁴ lse − E[z] would lose all but the first digits.
    top = z.amax(-1, keepdim=True)
    shifted = z - top.masked_fill_(top == -torch.inf, 0.0)
    weight = shifted.exp()
    total = weight.sum(-1)
    log_total = total.log()
    spread = shifted.masked_fill_(weight == 0, 0.0).mul_(weight).sum(-1) / total
    entropy = (log_total - spread).masked_fill_(total == 0, 0.0)
    at_target = z.gather(-1, targets[:, None])[:, 0]
    log_probs = (at_target - top[:, 0] - log_total).masked_fill_(at_target == -torch.inf, -torch.inf)
    return log_probs, top[:, 0] + log_total, entropy, z.mean(-1)


def token_scores_grad(
    z: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    grad_log_probs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    grad_mean: torch.Tensor | None,
) -> torch.Tensor:
    """dz = g·(1_y − p) − g_H·p·(log p + H) + g_lse·p + g_mean/V; None: nobody differentiated that output."""
    log_p = z - lse.masked_fill(lse == -torch.inf, 0.0)[:, None]
    p = log_p.exp()
    factor = torch.zeros_like(lse)[:, None]
    if grad_log_probs is not None:
        factor = factor - grad_log_probs[:, None]
    if grad_lse is not None:
        factor = factor + grad_lse[:, None]
    if grad_entropy is not None:
        surprise = log_p.masked_fill_(p == 0, 0.0).add_(entropy[:, None])
        factor = factor - grad_entropy[:, None] * surprise
    dz = p.mul_(factor)
    if grad_log_probs is not None:
        dz.scatter_add_(-1, targets[:, None], grad_log_probs[:, None])
    if grad_mean is not None:
        dz += grad_mean[:, None] / z.shape[-1]
    return dz
