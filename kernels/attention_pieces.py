"""The pieces of attention over a pack by the kernels that PyTorch carries: cuDNN for long ones, flash for short ones.

Every call into PyTorch's private operators is a small function of its own, `[n, H, D]` tensors in and out; what they
expect beyond their signatures is said where it is done. `attention_plan` says which piece is long.
"""

from __future__ import annotations

import functools
import warnings
from typing import TypedDict

import torch
import torch.nn.functional as F

from tandem.kernels import attention_plan
from tandem.kernels.attention_blocked import Gradients, Scoring
from tandem.kernels.attention_plan import Cross, Run
from tandem.kernels.reference import ceil_div

# A log-sum-exp that makes every weight of its row e^(s − lse) = 0.
_NO_WEIGHT = 1e30
# What both kernels read at a time.
_ALIGNED_BYTES = 16


def takes(query: torch.Tensor, scoring: Scoring) -> bool:
    """Whether the kernels take these tensors; `torch.backends.cuda.enable_flash_sdp(False)` turns them off."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or scoring.softcap is not None:
        return False
    dim = query.shape[-1]
    # Flash attention's backward pass refuses widths between 192 and 224 on the smaller cards.
    if dim % 8 or dim > 256 or 192 < dim <= 224 or not torch.backends.cuda.flash_sdp_enabled():
        return False
    return _flash_on(query.device)


@functools.cache
def _flash_on(device: torch.device) -> bool:
    built = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    capable = torch.cuda.get_device_capability(device) >= (8, 0)
    if not (built and capable):
        why = "the card is older than Ampere" if built else "this PyTorch was built without flash attention"
        warnings.warn(f"attention runs as plain PyTorch, slower and in more memory: {why}", RuntimeWarning, 2)
    return built and capable


def cudnn_takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool) -> bool:
    """Whether cuDNN computes forward and backward of `[n, H, D]` tensors, and nobody switched it off."""
    # Wider heads have come to cuDNN lately, and not to every card: flash takes them.
    if query.shape[-1] > 128 or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    return _cudnn_can(
        query.shape[0], key.shape[0], query.shape[1], key.shape[1], query.shape[2], query.dtype, query.device, causal,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _cudnn_can(
    rows: int, keys: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device, causal: bool,
    deterministic: bool,
) -> bool:  # fmt: skip
    """PyTorch's own answer, which it takes long to give: hence by sizes, and once."""
    from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

    del deterministic  # it is asked for by PyTorch, and stands here as a part of the key
    q = torch.empty(1, heads, rows, dim, dtype=dtype, device=device)
    k = torch.empty(1, kv_heads, keys, dim, dtype=dtype, device=device)
    # PyTorch's type stub knows no constructor.
    return bool(can_use_cudnn_attention(SDPAParams(q, k, k, None, 0.0, causal, heads != kv_heads)))  # type: ignore[call-arg]


def cudnn_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One attention of `[n, Hq, D]` rows over `[m, Hkv, D]` keys: out `[n, Hq, D]`, lse `[Hq, n]`."""
    q, k, v = (_batched(_aligned(x)) for x in (query, key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return out[0].transpose(0, 1), lse.reshape(lse.shape[1], lse.shape[2])


def cudnn_backward(
    d_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    scale: float,
) -> Gradients:
    """dq, dk, dv. What its plans are found by says nothing of d_out, out and lse, so these are made contiguous."""
    q, k, v = (_batched(_aligned(x)) for x in (query, key, value))
    stats = lse.contiguous()[None]
    if _stats_dims(lse.device) == 4:
        stats = stats[..., None]
    unused = torch.empty((), dtype=torch.int64, device=query.device)  # the dropout's seed and offset
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        _batched(d_out.contiguous()), q, k, v, _batched(out.contiguous()), stats, unused, unused, None, None, None,
        query.shape[0], key.shape[0], 0.0, causal, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (x[0].transpose(0, 1) for x in grads)
    return dq, dk, dv


@functools.cache
def _stats_dims(device: torch.device) -> int:
    """Whether cuDNN's log-sum-exp is `[B, H, S]` or `[B, H, S, 1]`: releases of PyTorch differ."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True, 0.0, True, False)[1].dim()


def flash_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    row_offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    longest_rows: int,
    longest_keys: int,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Many attentions in one call, cut by the offsets: out `[n, Hq, D]`, lse `[Hq, n]`."""
    q, k, v = (_aligned(x) for x in (query, key, value))
    # With a longest row count of 1 PyTorch regroups the heads for decoding and leaves lse in that order.
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, row_offsets, key_offsets, max(longest_rows, 2), longest_keys, 0.0, causal, False,
        scale=scale, **_window(window),
    )  # fmt: skip
    return out, lse


def flash_backward(
    d_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    row_offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    longest_rows: int,
    longest_keys: int,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
) -> Gradients:
    """dq, dk, dv of `flash_forward`. It reads lse as if contiguous, whatever its strides."""
    q, k, v = (_aligned(x) for x in (query, key, value))
    rng_state = torch.empty(2, dtype=torch.uint64, device=query.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        d_out.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), row_offsets, key_offsets,
        max(longest_rows, 2), longest_keys, 0.0, causal, rng_state, rng_state[:0], scale=scale, **_window(window),
    )  # fmt: skip
    return dq, dk, dv


def _window(window: int | None) -> dict[str, int]:
    """A row sees itself and window − 1 tokens before it, none behind."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _batched(x: torch.Tensor) -> torch.Tensor:
    """`[n, H, D]` -> `[1, H, n, D]`, a view.

    Its batch stride, which addresses nothing, is one that nobody else has: PyTorch finds cuDNN's plans by the sizes and
    strides of query, key and value alone, so a plan made for other strides of out or d_out must not be taken for ours.
    """
    rows, heads, dim = x.shape
    row, head, last = x.stride()
    return x.as_strided((1, heads, rows, dim), (rows * max(row, dim) + 64, head, row, last))


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where the kernels' wide reads would be misaligned, which neither of them checks."""
    strides = (stride * x.element_size() for stride in x.stride()[:-1])
    return x if x.data_ptr() % _ALIGNED_BYTES == 0 and not any(s % _ALIGNED_BYTES for s in strides) else x.contiguous()


class _Cuts(TypedDict):
    """How a flash call is cut, beside its tensors."""

    row_offsets: torch.Tensor
    key_offsets: torch.Tensor
    longest_rows: int
    longest_keys: int
    causal: bool
    scale: float
    window: int | None


class CudaPieces:
    """`Pieces` by cuDNN where they are long and it takes them, else by flash attention."""

    def causal_forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, run: Run, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at = slice(run.start, run.stop)
        parts = query[at], key[at], value[at]
        if run.long and cudnn_takes(*parts, causal=True):
            q, k, v = (_reach(x, at) for x in (query, key, value))
            return _first(run.stop - run.start, *cudnn_forward(q, k, v, causal=True, scale=scoring.scale))
        return flash_forward(*parts, **_run_cuts(run, scoring))

    def causal_backward(
        self,
        d_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        run: Run,
        scoring: Scoring,
    ) -> Gradients:
        at = slice(run.start, run.stop)
        parts = query[at], key[at], value[at]
        if run.long and cudnn_takes(*parts, causal=True):
            d, q, k, v, o = (_reach(x, at) for x in (d_out, query, key, value, out))
            grads = cudnn_backward(d, q, k, v, o, _reach_lse(lse, at), causal=True, scale=scoring.scale)
            dq, dk, dv = (x[: run.stop - run.start] for x in grads)
            return dq, dk, dv
        return flash_backward(d_out[at], *parts, out[at], lse[:, at], **_run_cuts(run, scoring))

    def cross_forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cross: Cross, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = cross.rows
        k, v = key[cross.keys], value[cross.keys]
        if cross.long and isinstance(rows, slice) and cudnn_takes(query[rows], k, v, causal=False):
            found = cudnn_forward(_reach(query, rows), k, v, causal=False, scale=scoring.scale)
            return _first(rows.stop - rows.start, *found)
        return flash_forward(query[rows], k, v, **_cross_cuts(cross, scoring))

    def cross_backward(
        self,
        d_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        cross: Cross,
        scoring: Scoring,
    ) -> Gradients:
        rows = cross.rows
        k, v = key[cross.keys], value[cross.keys]
        if cross.long and isinstance(rows, slice) and cudnn_takes(query[rows], k, v, causal=False):
            d, q, o = (_reach(x, rows) for x in (d_out, query, out))
            grads = cudnn_backward(d, q, k, v, o, _reach_lse(lse, rows), causal=False, scale=scoring.scale)
            return grads[0][: rows.stop - rows.start], grads[1], grads[2]
        return flash_backward(d_out[rows], query[rows], k, v, out[rows], lse[:, rows], **_cross_cuts(cross, scoring))


def _run_cuts(run: Run, scoring: Scoring) -> _Cuts:
    narrow = scoring.window if scoring.window is not None and scoring.window < run.longest else None
    return _Cuts(
        row_offsets=run.offsets,
        key_offsets=run.offsets,
        longest_rows=run.longest,
        longest_keys=run.longest,
        causal=True,
        scale=scoring.scale,
        window=narrow,
    )


def _cross_cuts(cross: Cross, scoring: Scoring) -> _Cuts:
    return _Cuts(
        row_offsets=cross.row_offsets,
        key_offsets=cross.key_offsets,
        longest_rows=cross.longest_rows,
        longest_keys=cross.longest_keys,
        causal=False,
        scale=scoring.scale,
        window=None,
    )


def planned_rows(rows: int) -> int:
    """The length that cuDNN is asked to plan for: lengths that `attention_plan` has not cut are padded."""
    unit = attention_plan.PLAN_ROWS
    return rows if rows >= attention_plan.EXACT_LENGTH else ceil_div(rows, unit) * unit


def _reach(x: torch.Tensor, at: slice) -> torch.Tensor:
    """The rows `at` of a `[T, H, D]` tensor and as many behind them as the plan has: the pack's own, or zeros.

    These lie behind every real row, so a causal mask hides their keys; their queries' results are cut off, and in the
    backward pass `_reach_lse` takes all weight from them.
    """
    rows = at.stop - at.start
    planned = planned_rows(rows)
    if at.start + planned <= x.shape[0]:
        return x[at.start : at.start + planned]
    return F.pad(x[at], (0, 0, 0, 0, 0, planned - rows))


def _reach_lse(lse: torch.Tensor, at: slice) -> torch.Tensor:
    """`[H, planned rows]`: with this log-sum-exp the further rows add nothing to any gradient."""
    rows = at.stop - at.start
    return F.pad(lse[:, at], (0, planned_rows(rows) - rows), value=_NO_WEIGHT)


def _first(rows: int, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return out[:rows], lse[:, :rows]
