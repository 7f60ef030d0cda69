"""What `benchmarks/kernel_speed.py` measures: for every kernel its inputs, its floor, and the systems that compute it.

A system is a function of the inputs that prepares a call (an autograd graph, say) and returns it; only the call is
timed, and it returns the results. All systems of a case get the same inputs and may write over them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from tandem.kernels import glu, linear_logprob, lora_linear, nf4, reference, rms_norm, rope

Tensors = tuple[torch.Tensor, ...]
System = Callable[..., Callable[[], Tensors]]
SYSTEMS = ("tandem", "torch", "torch.compile", "liger", "bitsandbytes", "cudnn", "flash", "flex", "rows")
EPS, BF16 = 1e-6, torch.bfloat16


class Sizes(NamedTuple):
    """rows: tokens of a pack. lengths: of one causal sequence. segment, prompt, completion, group: of the packs."""

    model: str
    rows: int
    hidden: int
    ffn: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    rank: int
    lengths: tuple[int, ...]
    segment: int
    prompt: int
    completion: int
    group: int


QWEN3_8B = Sizes("qwen3-8b sizes", 8192, 4096, 12288, 151936, 32, 8, 128, 32, (8192, 32768), 256, 2048, 768, 8)
SMALL = Sizes("tiny sizes", 48, 64, 128, 97, 4, 2, 16, 4, (48,), 16, 24, 6, 4)


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        shape: in words. length: tokens. device: of the inputs.
        bound: what the floor counts. amount: bytes or operations. formula: how `amount` comes about.
        inputs: fresh tensors from a generator. systems: by name; torch is what the others are compared with.
    """

    shape: str
    length: int
    device: torch.device
    bound: Literal["bytes", "operations"]
    amount: float
    formula: str
    inputs: Callable[[torch.Generator], tuple[Any, ...]]
    systems: dict[str, System]


def random(generator: torch.Generator, *shape: int, size: float = 1.0, grad: bool = False) -> torch.Tensor:
    values = torch.randn(shape, generator=generator, device=generator.device, dtype=BF16)
    return (values.mul_(size) if size != 1.0 else values).requires_grad_(grad)


def randoms(*shapes: tuple[int, ...]) -> Callable[[torch.Generator], Tensors]:
    return lambda generator: tuple(random(generator, *shape) for shape in shapes)


def calls(function: Callable[..., Any]) -> System:
    """A system that has nothing to prepare."""

    def system(*inputs: Any) -> Callable[[], Tensors]:
        def call() -> Tensors:
            result = function(*inputs)
            return result if isinstance(result, tuple) else (result,)

        return call

    return system


def lazily_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile(function), asked for when it is first called: already the asking imports the compiler."""
    compiler = functools.cache(lambda: torch.compile(function, dynamic=False))
    return lambda *inputs: compiler()(*inputs)


def compiled(function: Callable[..., Any]) -> System:
    return calls(lazily_compiled(function))


def gradient(forward: Callable[..., Any], wanted: int) -> System:
    """The backward pass alone: the first input is the gradient of the result, the next `wanted` are differentiated."""

    def system(d_out: torch.Tensor, *inputs: Any) -> Callable[[], Tensors]:
        leaves = [one.requires_grad_() for one in inputs[:wanted]]
        out = forward(*inputs)
        return lambda: torch.autograd.grad(out, leaves, d_out)

    return system


# --- elementwise ------------------------------------------------------------------------------------------------------


def rms_norm_forward(sizes: Sizes, device: torch.device) -> list[Case]:
    def liger(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False, None)

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return reference.normed(x, weight, EPS, 0.0)

    n, d = sizes.rows, sizes.hidden
    systems = {
        "tandem": calls(lambda x, weight: rms_norm.rms_norm(x, weight, EPS)[0]),
        "torch": calls(plain),
        "torch.compile": compiled(plain),
        "liger": calls(liger),
    }
    inputs = randoms((n, d), (d,))
    return [Case(f"{n} × {d}", n, device, "bytes", 4 * n * d, "4·n·d: read x, write y", inputs, systems)]


def rms_norm_backward(sizes: Sizes, device: torch.device) -> list[Case]:
    def liger(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False, None)

    def plain(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return reference.normed_grad(dy, x, weight, EPS, 0.0).to(x.dtype)

    n, d = sizes.rows, sizes.hidden
    systems = {
        "tandem": calls(lambda dy, x, weight: rms_norm.rms_norm_backward(dy, x, weight, EPS)),
        "torch": calls(plain),
        "torch.compile": compiled(plain),
        "liger": gradient(liger, 1),
    }
    inputs = randoms((n, d), (n, d), (d,))
    return [Case(f"{n} × {d}", n, device, "bytes", 6 * n * d, "6·n·d: read dy and x, write dx", inputs, systems)]


def qk_norm_rope_forward(sizes: Sizes, device: torch.device) -> list[Case]:
    def tandem(q, k, wq, wk, cos, sin) -> Tensors:
        return rope.qk_norm_rope(q, wq, EPS, cos, sin), rope.qk_norm_rope(k, wk, EPS, cos, sin)

    def plain(q, k, wq, wk, cos, sin) -> Tensors:
        half = cos.shape[1]
        return tuple(
            reference.rotated(reference.normed(x, w, EPS, 0.0), cos, sin, half, inverse=False).to(x.dtype)
            for x, w in ((q, wq), (k, wk))
        )

    systems = {"tandem": calls(tandem), "torch": calls(plain), "torch.compile": compiled(plain)}
    return _qk_norm_rope(sizes, device, 4, "read and write q and k", systems | {"liger": calls(_liger_norm_rope)})


def qk_norm_rope_backward(sizes: Sizes, device: torch.device) -> list[Case]:
    def tandem(dq, dk, q, k, wq, wk, cos, sin) -> Tensors:
        return tuple(rope.qk_norm_rope_backward(dy, x, w, EPS, cos, sin) for dy, x, w in ((dq, q, wq), (dk, k, wk)))

    def plain(dq, dk, q, k, wq, wk, cos, sin) -> Tensors:
        half = cos.shape[1]
        return tuple(
            reference.normed_grad(reference.rotated(dy, cos, sin, half, inverse=True), x, w, EPS, 0.0).to(x.dtype)
            for dy, x, w in ((dq, q, wq), (dk, k, wk))
        )

    def liger(dq, dk, q, k, *rest) -> Callable[[], Tensors]:
        leaves = (q.requires_grad_(), k.requires_grad_())
        out = _liger_norm_rope(q, k, *rest)
        return lambda: torch.autograd.grad(out, leaves, (dq, dk))

    systems = {"tandem": calls(tandem), "torch": calls(plain), "torch.compile": compiled(plain), "liger": liger}
    return _qk_norm_rope(sizes, device, 6, "read dq, dk, q and k, write dq and dk", systems)


def _liger_norm_rope(q, k, wq, wk, cos, sin) -> Tensors:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k = (LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False, None) for x, w in ((q, wq), (k, wk)))
    twice = [torch.cat((table, table), dim=-1)[None] for table in (cos, sin)]
    q, k = LigerRopeFunction.apply(q[None].transpose(1, 2), k[None].transpose(1, 2), *twice)
    return q.transpose(1, 2)[0], k.transpose(1, 2)[0]


def _qk_norm_rope(sizes: Sizes, device, passes: int, what: str, systems: dict[str, System]) -> list[Case]:
    n, heads, dim = sizes.rows, (sizes.heads, sizes.kv_heads), sizes.head_dim

    def inputs(g: torch.Generator) -> tuple[Any, ...]:
        tensors = [random(g, n, h, dim) for h in (heads if passes == 4 else heads * 2)]
        frequencies = 1e6 ** (-torch.arange(0, dim, 2, device=device) / dim)
        return *tensors, random(g, dim), random(g, dim), *rope.rope_tables(torch.arange(n, device=device), frequencies)

    amount = passes * n * sum(heads) * dim + 4 * n * dim
    formula = f"{passes}·n·heads·dim + 4·n·dim: {what}, read both tables"
    return [Case(f"{n} × ({heads[0]} + {heads[1]}) × {dim}", n, device, "bytes", amount, formula, inputs, systems)]


def swiglu_forward(sizes: Sizes, device: torch.device) -> list[Case]:
    def plain(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up

    systems = {
        "tandem": calls(functools.partial(glu.glu, kind="swiglu")),
        "torch": calls(plain),
        "torch.compile": compiled(plain),
        "liger": calls(_liger_swiglu),
    }
    n, f = sizes.rows, sizes.ffn
    inputs = randoms((n, f), (n, f))
    return [Case(f"{n} × {f}", n, device, "bytes", 6 * n * f, "6·n·f: read gate and up, write h", inputs, systems)]


def swiglu_backward(sizes: Sizes, device: torch.device) -> list[Case]:
    """Without and with h computed again, which only Tandem's layer asks for in the same pass."""

    def tandem(dh, gate, up, *, recompute_h: bool) -> Tensors:
        glu.glu_backward_(dh, gate, up, "swiglu", recompute_h=recompute_h)
        return (gate, up, dh) if recompute_h else (gate, up)

    def plain(dh, gate, up, *, recompute_h: bool) -> Tensors:
        act, slope = reference.activation(gate.float(), "swiglu")
        grads = (dh * up * slope).to(BF16), (dh * act).to(BF16)
        return (*grads, (act.to(BF16) * up)) if recompute_h else grads

    n, f = sizes.rows, sizes.ffn
    inputs = randoms((n, f), (n, f), (n, f))
    found = []
    for recompute_h in (False, True):
        ours, theirs = (functools.partial(one, recompute_h=recompute_h) for one in (tandem, plain))
        systems = {"tandem": calls(ours), "torch": calls(theirs), "torch.compile": compiled(theirs)}
        if not recompute_h:
            systems["liger"] = gradient(_liger_swiglu, 2)
        amount, more = (12, ", write h") if recompute_h else (10, "")
        formula = f"{amount}·n·f: read dh, gate and up, write dgate and dup{more}"
        shape = f"{n} × {f}" + (" with h" if recompute_h else "")
        found.append(Case(shape, n, device, "bytes", amount * n * f, formula, inputs, systems))
    return found


def _liger_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


# --- weights and matrix products --------------------------------------------------------------------------------------


def nf4_dequantize(sizes: Sizes, device: torch.device) -> list[Case]:
    shape, size, outer = (sizes.ffn, sizes.hidden), 64, 256
    count = shape[0] * shape[1]
    blocks = count // size

    def inputs(g: torch.Generator) -> tuple[Any, ...]:
        packed = torch.randint(256, (count // 2, 1), generator=g, device=device, dtype=torch.uint8)
        absmax = torch.randint(256, (blocks,), generator=g, device=device, dtype=torch.uint8)
        absmax2 = torch.rand(-(-blocks // outer), generator=g, device=device) * 0.02
        code2 = torch.linspace(-1, 1, 256, device=device)
        return packed, nf4.NestedAbsmax(absmax, absmax2, code2, torch.full((), 0.05, device=device), outer)

    def scales(nested: nf4.NestedAbsmax) -> torch.Tensor:
        return reference.nested_absmax(nested.absmax, nested.absmax2, nested.code2, nested.offset, nested.blocksize2)

    def plain(packed: torch.Tensor, nested: nf4.NestedAbsmax) -> torch.Tensor:
        out = torch.empty(count, dtype=BF16, device=device)
        reference.nf4_into(out, packed.view(-1), scales(nested), size)
        return out.view(shape)

    levels = torch.tensor(reference.NF4_LEVELS, device=device)

    # The plain twin goes through the weight in pieces, to save memory; a compiler wants it whole.
    @lazily_compiled
    def whole(packed: torch.Tensor, absmax, absmax2, code2, offset) -> torch.Tensor:
        scale = reference.nested_absmax(absmax, absmax2, code2, offset, outer)
        values = levels[torch.cat((packed >> 4, packed & 15), dim=1).int()]
        return (values.view(-1, size) * scale[:, None]).to(BF16).view(shape)

    def bitsandbytes(packed: torch.Tensor, nested: nf4.NestedAbsmax) -> Callable[[], Tensors]:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        inner = QuantState(absmax=nested.absmax2, blocksize=outer, code=nested.code2, dtype=torch.float32)
        state = QuantState(
            absmax=nested.absmax, shape=torch.Size(shape), code=levels, blocksize=size, quant_type="nf4", dtype=BF16,
            offset=nested.offset, state2=inner,
        )  # fmt: skip
        return lambda: (dequantize_4bit(packed, state),)

    systems: dict[str, System] = {
        "tandem": calls(lambda packed, nested: nf4.dequantize_nf4(packed, nested, shape, size)),
        "torch": calls(plain),
        "torch.compile": calls(lambda packed, n: whole(packed, n.absmax, n.absmax2, n.code2, n.offset)),
        "bitsandbytes": bitsandbytes,
    }
    amount = count * (2 + 1 / 2 + 1 / size + 4 / (size * outer))
    formula = "2.516 per weight: read 4 bits and its shares of the scales, write 2 bytes"
    return [Case(f"{shape[0]} × {shape[1]}", shape[0], device, "bytes", amount, formula, inputs, systems)]


def lora_linear_both(sizes: Sizes, device: torch.device) -> list[Case]:
    """gate and up projection with LoRA, forward and backward; inputs lie in their wider buffers, as in the layer."""
    n, d, f, r = sizes.rows, sizes.hidden, sizes.ffn, sizes.rank

    def inputs(g: torch.Generator) -> tuple[Any, ...]:
        adapters = [random(g, *shape, size=0.02) for shape in ((r, d), (f, r), (r, d), (f, r))]
        return random(g, n, d), random(g, n, 2 * f), random(g, 2 * f, d, size=0.02), *adapters

    def tandem(x, dy, weight, *adapters) -> Callable[[], Tensors]:
        branches = [
            lora_linear.Branch(a, b, start, 1.0)
            for a, b, start in zip(adapters[::2], adapters[1::2], (0, f), strict=True)
        ]
        layer = lora_linear.LoraLinear(2 * f, d, branches, dtype=BF16, device=device)
        layer.weight.copy_(weight)
        xs, dys = layer.inputs(n), layer.gradients(n)
        xs[:, :d].copy_(x)
        dys[:, : 2 * f].copy_(dy)

        def call() -> Tensors:
            layer.complete_inputs(xs)
            y = layer.forward(xs)
            layer.complete_gradients(dys)
            dx = layer.backward(dys)
            grads = layer.adapter_gradients(layer.adapter_sums(dys, xs))
            return y, dx, *(one for pair in grads for one in pair)

        return call

    def forward(x, weight, a1, b1, a2, b2) -> torch.Tensor:
        return x @ weight.t() + torch.cat(((x @ a1.t()) @ b1.t(), (x @ a2.t()) @ b2.t()), dim=-1)

    def autograd(function: Callable[..., torch.Tensor]) -> System:
        def system(x, dy, weight, *adapters) -> Callable[[], Tensors]:
            leaves = [one.requires_grad_() for one in (x, *adapters)]

            def call() -> Tensors:
                y = function(leaves[0], weight, *leaves[1:])
                return y, *torch.autograd.grad(y, leaves, dy)

            return call

        return system

    systems: dict[str, System] = {
        "tandem": tandem,
        "torch": autograd(forward),
        "torch.compile": autograd(lazily_compiled(forward)),
    }
    amount = 8 * n * d * f + 2 * 6 * n * r * (d + f)
    formula = "8·n·d·f + 12·n·r·(d + f): y and dx of two projections, and LoRA's six products for each"
    return [Case(f"{n} × {d} -> 2 × {f}", n, device, "operations", amount, formula, inputs, systems)]


def linear_logprob_both(sizes: Sizes, device: torch.device) -> list[Case]:
    """Log-probabilities and their gradient; the loss is their negative sum, which cross-entropy computes as well."""
    n, d, v = sizes.rows, sizes.hidden, sizes.vocabulary

    def inputs(g: torch.Generator) -> tuple[Any, ...]:
        targets = torch.randint(v, (n,), generator=g, device=device)
        return random(g, n, d, grad=True), random(g, v, d, size=0.02), targets

    def loss_and_grad(loss: Callable[..., torch.Tensor]) -> System:
        def system(hidden, weight, targets) -> Callable[[], Tensors]:
            def call() -> Tensors:
                value = loss(hidden, weight, targets)
                return value, *torch.autograd.grad(value, hidden)

            return call

        return system

    def tandem(hidden, weight, targets) -> torch.Tensor:
        options = linear_logprob.HeadOptions(chunk_size=512)
        return -linear_logprob.linear_logprob(hidden, weight, targets, options=options).log_probs.sum()

    def plain(hidden, weight, targets) -> torch.Tensor:
        return F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")

    def liger(hidden, weight, targets) -> torch.Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        out = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")
        return out[0] if isinstance(out, tuple) else out

    systems = {
        "tandem": loss_and_grad(tandem),
        "torch": loss_and_grad(plain),
        "torch.compile": loss_and_grad(lazily_compiled(plain)),
        "liger": loss_and_grad(liger),
    }
    formula = "4·n·d·v: logits and dH; a method that does not know the gradient yet computes the logits twice"
    return [Case(f"{n} × {d} × {v}", n, device, "operations", 4 * n * d * v, formula, inputs, systems)]


CASES: dict[str, Callable[[Sizes, torch.device], list[Case]]] = {
    "rms_norm": rms_norm_forward,
    "rms_norm_backward": rms_norm_backward,
    "qk_norm_rope": qk_norm_rope_forward,
    "qk_norm_rope_backward": qk_norm_rope_backward,
    "swiglu": swiglu_forward,
    "swiglu_backward": swiglu_backward,
    "nf4_dequantize": nf4_dequantize,
    "lora_linear": lora_linear_both,
    "linear_logprob": linear_logprob_both,
}
