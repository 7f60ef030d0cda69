"""Attention among the cases of `benchmarks/kernel_speed.py`: long sequences, packs of short ones, shared prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from kernel_cases import Case, Sizes, System, Tensors, random

from tandem.kernels import pack_layout, packed_attention


def packed_attention_both(sizes: Sizes, device: torch.device) -> list[Case]:
    """Forward and backward of one causal sequence, of a pack of short ones, and of completions that share a prompt."""
    Family = pack_layout.Family
    step, prompt, stop = sizes.segment, sizes.prompt, sizes.prompt + sizes.group * sizes.completion
    short = [Family((a, a + step)) for a in range(0, sizes.rows, step)]
    children = tuple((a, a + sizes.completion) for a in range(prompt, stop, sizes.completion))
    shared = [Family((0, prompt), children)]
    cases = [_attention(sizes, device, f"{length} causal", [Family((0, length))]) for length in sizes.lengths]
    cases.append(_attention(sizes, device, f"{len(short)} × {step}", short))
    cases.append(_attention(sizes, device, f"{prompt} + {sizes.group} × {sizes.completion} shared", shared))
    return cases


def _attention(sizes: Sizes, device, shape: str, families: list[pack_layout.Family]) -> Case:
    heads, kv_heads, dim = sizes.heads, sizes.kv_heads, sizes.head_dim
    tokens, scale = families[-1].end, sizes.head_dim**-0.5
    repeat = heads // kv_heads

    def inputs(g: torch.Generator) -> tuple[Any, ...]:
        return tuple(random(g, tokens, h, dim) for h in (heads, heads, kv_heads, kv_heads))

    def system(attention: Callable[..., torch.Tensor]) -> System:
        """`attention` takes `[heads, T, dim]`; inputs lie `[T, heads, dim]` in memory, as projections leave them."""

        def prepare(d_out, *qkv) -> Callable[[], Tensors]:
            leaves = [one.requires_grad_() for one in qkv]

            def call() -> Tensors:
                out = attention(*(one.transpose(0, 1) for one in leaves)).transpose(0, 1)
                return out, *torch.autograd.grad(out, leaves, d_out)

            return call

        return prepare

    layout = pack_layout.PackLayout(families)
    systems = {"tandem": system(functools.partial(packed_attention.packed_attention, layout=layout, scale=scale))}
    if len(families) == 1 and not families[0].children:
        systems["torch"] = system(_causal(scale, None))
        systems |= {name: system(_causal(scale, name)) for name in ("cudnn", "flash")}
    else:
        systems |= {"torch": system(_masked(families, scale, repeat)), "flex": system(_flex(families, scale))}
        if families[0].children:
            systems["rows"] = _rows(families[0], scale)
    pairs = sum(_pairs(family) for family in families)
    formula = "14·pairs·heads·dim, pairs of tokens that see each other: two products forward, five backward"
    return Case(shape, tokens, device, "operations", 14 * pairs * heads * dim, formula, inputs, systems)


def _pairs(family: pack_layout.Family) -> int:
    root = family.root[1] - family.root[0]
    return root * (root + 1) // 2 + sum((b - a) * (b - a + 1) // 2 + (b - a) * root for a, b in family.children)


def _causal(scale: float, backend: str | None) -> Callable[..., torch.Tensor]:
    """PyTorch's own attention: by the backend that it chooses, or one by name."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    named = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}

    def attention(q, k, v) -> torch.Tensor:
        with nullcontext() if backend is None else sdpa_kernel(named[backend]):
            out = F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True
            )
        return out[0]

    return attention


class _Owners(NamedTuple):
    """`[T]` each: the family of a token, its segment, and whether that is a root."""

    family: torch.Tensor
    segment: torch.Tensor
    root: torch.Tensor

    def sees(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Whether token i sees token j: an earlier one of its own segment, or one of its root."""
        own = (self.segment[i] == self.segment[j]) | self.root[j]
        return (self.family[i] == self.family[j]) & (j <= i) & own


def _owners(families: list[pack_layout.Family], device: torch.device) -> _Owners:
    rows = []
    for number, family in enumerate(families):
        for a, b in (family.root, *family.children):
            rows += [(number, a, a == family.root[0])] * (b - a)
    columns = [torch.tensor(one, device=device) for one in zip(*rows, strict=True)]
    return _Owners(*columns)


def _masked(families: list[pack_layout.Family], scale: float, repeat: int) -> Callable[..., torch.Tensor]:
    """PyTorch's attention with a dense mask over the pack, keys and values repeated as Hugging Face does."""

    @functools.cache
    def mask(device: torch.device) -> torch.Tensor:
        index = torch.arange(families[-1].end, device=device)
        return _owners(families, device).sees(index[:, None], index[None, :])

    def attention(q, k, v) -> torch.Tensor:
        k, v = (one.repeat_interleave(repeat, 0) for one in (k, v))
        return F.scaled_dot_product_attention(q[None], k[None], v[None], mask(q.device), scale=scale)[0]

    return attention


def _flex(families: list[pack_layout.Family], scale: float) -> Callable[..., torch.Tensor]:
    """PyTorch's FlexAttention, compiled, with the pack's mask in blocks."""

    @functools.cache
    def parts(device: torch.device) -> tuple[Any, Callable[..., Any]]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        owners, tokens = _owners(families, device), families[-1].end
        mask = create_block_mask(lambda b, h, i, j: owners.sees(i, j), None, None, tokens, tokens, device=device)
        return mask, torch.compile(flex_attention, dynamic=False)

    def attention(q, k, v) -> torch.Tensor:
        mask, flex = parts(q.device)
        return flex(q[None], k[None], v[None], block_mask=mask, scale=scale, enable_gqa=True)[0]

    return attention


def _rows(family: pack_layout.Family, scale: float) -> System:
    """What a trainer without shared prompts does: a row for every completion, each with the prompt of its own."""
    (start, stop), children = family.root, family.children
    assert len({b - a for a, b in children}) == 1, "completions of one length need no padding"

    def prepare(d_out, *qkv) -> Callable[[], Tensors]:
        index = torch.tensor([[*range(start, stop), *range(a, b)] for a, b in children], device=d_out.device)
        d_rows, *leaves = (one[index].requires_grad_(one is not d_out) for one in (d_out, *qkv))

        def call() -> Tensors:
            q, k, v = (one.transpose(1, 2) for one in leaves)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            torch.autograd.grad(out.transpose(1, 2), leaves, d_rows)
            # Other results than the pack's: the prompt's come once for every row.
            return ()

        return call

    return prepare
