"""The cost of attention: every pair of places is computed, but their scores need not be kept.

Run:     uv run sprints/06_attention/07_cost_of_attention.py      (8 s on two cores)
Proves:  1. whole, in blocks with an online softmax, by PyTorch's kernel: equal values and gradients
         2. a layer counts 8TC² + 4T²C operations: linear below T = 2C, where both parts are equal, then T²
         3. for the way back the naive form keeps T² weights a head; blocks and kernel D + 1 numbers a row
         4. the blocks hold one block of scores at a time, there and back, at any length; the naive form T²
         5. through a causal mask n(n + 1)/2 of n² blocks are computed, and nobody sees the future
         6. a cache of keys and values holds 2GD numbers for each token, in each layer
Shapes:  B texts, T places that look at S, C numbers each, H heads of D = C/H, G groups; blocks b × b
Writes:  results/06_attention/07_cost_of_attention.png
Note:    notes/07_cost_of_attention.md
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

from lab.attention import MultiHeadAttention, attend, causal_mask
from lab.influence import influence, rows
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

H, D, BLOCK = 2, 64, 128
C = H * D
LENGTHS = 128, 256, 512, 1024, 2048
SHAPES = (1, 1, 1, 1, 1), (2, 3, 7, 5, 4), (1, 2, 10, 10, 3), (3, 1, 4, 9, 6)  # B, H, T, S, D
MODELS = {  # layers, G, D, longest T, bytes in a number
    "GPT-2 small": (12, 12, 64, 1024, 4),
    "Llama 2 70B": (80, 8, 128, 4096, 2),
}


def naive(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """All scores at once: (B, H, T, D), (B, H, S, D) twice -> (B, H, T, D)."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if causal:
        scores = scores.masked_fill(~causal_mask(*scores.shape[-2:], scores.device), -torch.inf)
    return scores.softmax(-1) @ v


def kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """PyTorch's kernel for this device."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def blocks(T: int, S: int, b: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """The queries and keys of each block of scores. One wholly ahead of its queries is skipped."""
    for t, s in product(range(0, T, b), range(0, S, b)):
        if not (causal and s > t):
            yield slice(t, min(t + b, T)), slice(s, min(s + b, S))


def one_block(q: Tensor, k: Tensor, its: slice, keys: slice, causal: bool) -> Tensor:
    """Scores of some queries with some keys: (B, H, T, D), (B, H, S, D) -> (B, H, b, b)."""
    scores = q[..., its, :] @ k[..., keys, :].mT / math.sqrt(q.shape[-1])
    if causal:
        t, s = (torch.arange(part.start, part.stop, device=q.device) for part in (its, keys))
        scores = scores.masked_fill(s > t[:, None], -torch.inf)
    return scores


class InBlocks(torch.autograd.Function):
    """Attention that holds one block of scores at a time (Dao et al. 2022, algorithms 1 and 4)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, b: int, causal: bool) -> Tensor:
        """A softmax that is put right whenever a larger score turns up (Milakov and Gimelshein 2018)."""
        y, total = torch.zeros_like(q), torch.zeros_like(q[..., :1])  # sums of weighted values, of weights
        top = torch.full_like(total, -torch.inf)  # (B, H, T, 1): the largest score so far
        for its, keys in blocks(q.shape[-2], k.shape[-2], b, causal):
            scores, before = one_block(q, k, its, keys, causal), top[..., its, :].clone()
            top[..., its, :] = torch.maximum(before, scores.amax(-1, keepdim=True))
            weights = (scores - top[..., its, :]).exp()  # (B, H, b, b), none above 1
            shrink = (before - top[..., its, :]).exp()  # (B, H, b, 1): what was summed so far was too large
            total[..., its, :] = shrink * total[..., its, :] + weights.sum(-1, keepdim=True)
            y[..., its, :] = shrink * y[..., its, :] + weights @ v[..., keys, :]
        y /= total
        ctx.save_for_backward(q, k, v, y, top + total.log())  # beside the inputs, D + 1 numbers a row
        ctx.b, ctx.causal = b, causal
        return y

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor | None, ...]:
        """The weights of a block are computed again, from the scores and each row's log of all weights."""
        q, k, v, y, log_total = ctx.saved_tensors
        of_q, of_k, of_v = map(torch.zeros_like, (q, k, v))
        share = (slope * y).sum(-1, keepdim=True)  # (B, H, T, 1)
        for its, keys in blocks(q.shape[-2], k.shape[-2], ctx.b, ctx.causal):
            weights = (one_block(q, k, its, keys, ctx.causal) - log_total[..., its, :]).exp()  # (B, H, b, b)
            of_v[..., keys, :] += weights.mT @ slope[..., its, :]
            of_scores = weights * (slope[..., its, :] @ v[..., keys, :].mT - share[..., its, :])
            of_scores /= math.sqrt(q.shape[-1])
            of_q[..., its, :] += of_scores @ k[..., keys, :]
            of_k[..., keys, :] += of_scores.mT @ q[..., its, :]
        return of_q, of_k, of_v, None, None


def in_blocks(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, b: int = BLOCK) -> Tensor:
    return InBlocks.apply(q, k, v, b, causal)


FORMS = {"naive": naive, "in blocks": in_blocks, "kernel": kernel}


def graded(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """y and the gradients of its inputs, asked for with slopes that differ from place to place."""
    return [y, *torch.autograd.grad(y, inputs, y.detach())]


def operations(function: Callable, *inputs: Tensor, **options) -> int:
    with FlopCounterMode(display=False) as flops:
        function(*inputs, **options)
    return flops.get_total_flops()


def kept(function: Callable, inputs: list[Tensor]) -> int:
    """Bytes that wait for the backward pass, beside the inputs."""
    found = {}

    def note(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        found[memory.data_ptr()] = memory.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        function(*inputs)
    return sum(found[place] for place in found.keys() - {x.untyped_storage().data_ptr() for x in inputs})


class LargestScores(TorchDispatchMode):
    """Sees every tensor that is made; remembers the largest, but for those of D numbers a place."""

    numbers = 0

    def __torch_dispatch__(self, function, types, inputs=(), options=None):
        made = function(*inputs, **(options or {}))
        for part in made if isinstance(made, tuple | list) else [made]:
            if isinstance(part, Tensor) and part.shape[-1:] != (D,):
                self.numbers = max(self.numbers, part.numel())
        return made


def seconds(function: Callable, inputs: list[Tensor]) -> float:
    """Forward and backward, the better of two runs."""
    best = math.inf
    for _ in range(2):
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        y, *_ = graded(function(*inputs), inputs)
        y.flatten()[0].item()  # waits until the device is done
        best = min(best, time.perf_counter() - start)
    return best


def exponent(lengths: list[int], costs: list[float]) -> float:
    """The p of cost ~ Tᵖ: the slope of the line through the logarithms."""
    return np.polyfit(np.log(lengths), np.log(costs), 1)[0]


def compare(randn: Callable) -> tuple[list[Tensor], list[Tensor]]:
    """Every way, with and without causal mask, and its gradients; beside them those of the naive form."""
    ours, theirs = [], []
    for (B, H, T, S, D), dtype, causal in product(SHAPES, (torch.float64, torch.float32), (False, True)):
        inputs = [randn(B, H, places, D, dtype=dtype) for places in (T, *[T if causal else S] * 2)]
        ways = [partial(in_blocks, causal=causal, b=b) for b in (1, 3, BLOCK)]
        for way in (*ways, partial(kernel, causal=causal), partial(attend, causal=causal)):
            ours += graded(way(*inputs), inputs)
            theirs += graded(naive(*inputs, causal), inputs)
    return ours, theirs


def main(lesson: Lesson) -> None:
    generator = torch.Generator().manual_seed(lesson.seed)
    device = lesson.float64_device  # MPS has no float64, and no kernel that goes back without the weights

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    lesson.heading("Three ways to the same attention")
    lesson.proves_equal(1, *compare(randn))

    lesson.heading(f"Operations of a layer, {C} numbers a place")
    with torch.device("meta"):  # shapes without numbers: nothing is computed, everything is counted
        layer, lengths = MultiHeadAttention(C, H), [2**n for n in range(2, 18)]
        whole = [operations(layer, torch.empty(1, T, C)) for T in lengths]
        mixing = [operations(naive, *torch.empty(3, 1, H, T, D)) for T in lengths]
    for T, both, scores in zip(lengths, whole, mixing, strict=True):
        if T in (lengths[0], 2 * C, lengths[-1]):
            print(f"T {T:7,}   projections {both - scores:17,}   scores and means {scores:17,}")
    lesson.proves_equal(
        2, [whole, mixing], [[8 * T * C**2 + 4 * T**2 * C for T in lengths], [4 * T**2 * C for T in lengths]]
    )
    low, high = exponent(lengths[:3], whole[:3]), exponent(lengths[-3:], whole[-3:])
    equal = 2 * mixing[lengths.index(2 * C)] == whole[lengths.index(2 * C)]
    lesson.proves(2, low < 1.1 and high > 1.95 and equal, f"exponents {low:.2f} and {high:.2f}")

    lesson.heading(f"Bytes kept for the way back, {H} heads of {D}, float32")
    memory, held, times = ({name: [] for name in FORMS} for _ in range(3))
    for T in LENGTHS:
        inputs = [randn(1, H, T, D) for _ in "qkv"]
        for name, form in FORMS.items():
            memory[name].append(kept(form, inputs))
            with LargestScores() as watch:
                graded(form(*inputs), inputs)
            held[name].append(watch.numbers)
            times[name].append(seconds(form, inputs))
        if T in LENGTHS[::2]:
            print(f"T {T:5,}" + "".join(f"   {name} {memory[name][-1]:10,}" for name in FORMS))
    print("exponent" + "".join(f"  {name} {exponent(LENGTHS, memory[name]):10.3f}" for name in FORMS))
    by_row = [4 * H * T * (D + 1) for T in LENGTHS]
    lesson.proves_equal(3, [memory["naive"], memory["in blocks"]], [[4 * H * T**2 for T in LENGTHS], by_row])
    beside = max(abs(a - b) for a, b in zip(memory["kernel"], by_row, strict=True))
    lesson.proves(3, beside <= 64, f"kernel: {beside} bytes beside that")  # CUDA: what its dropout would need

    for name in ("naive", "in blocks"):
        print(f"scores held {name:10}" + "".join(f"{numbers:12,}" for numbers in held[name]))
    expected = [[H * BLOCK**2 for _ in LENGTHS], [H * T**2 for T in LENGTHS]]
    lesson.proves_equal(4, [held["in blocks"], held["naive"]], expected)

    lesson.heading("Through a causal mask")
    sides, computed = (1, 2, 5, 16), []
    for n in sides:
        inputs = [randn(1, 1, n * BLOCK, D) for _ in "qkv"]
        computed.append(operations(in_blocks, *inputs, causal=True) // (4 * BLOCK**2 * D))
    print("blocks computed:", ", ".join(f"{c} of {n**2}" for c, n in zip(computed, sides, strict=True)))
    x = randn(1, 5, 4, dtype=torch.float64).detach()
    looks = [influence(lambda x, b=b: in_blocks(x, x, x, causal=True, b=b), x) for b in (1, 2, 4)]
    print(*rows(looks[1]), sep="\n")
    expected = [n * (n + 1) // 2 for n in sides], [torch.ones(5, 5, dtype=torch.long).tril()] * 3
    lesson.proves_equal(5, [computed, looks], expected)

    lesson.heading("A cache of keys and values")
    numbers, T = [], 20
    for G in (2, 1):
        model = MultiHeadAttention(C, H, groups=G).to(device)
        model(randn(1, T, C), cache=lambda k, v: (numbers.append(k.numel() + v.numel()), (k, v))[1])
    lesson.proves_equal(6, numbers, [T * 2 * G * D for G in (2, 1)])
    for name, (layers, G, width, T, size) in MODELS.items():
        print(f"{layers * 2 * G * width * T * size / 1e9:8.3f} GB   {name}")

    lesson.heading(f"Time there and back, on {device.type}")
    for name in FORMS:
        print(f"{name:10}" + "".join(f"{1e3 * each:10.1f} ms" for each in times[name]))
    print("exponent", *(f"  {name} {exponent(LENGTHS, times[name]):.1f}" for name in FORMS))

    figure, (left, right) = plt.subplots(1, 2, figsize=(6.6, 3.4), layout="constrained")
    for axes, costs, unit in ((left, times, 1e-3), (right, memory, 1e6)):
        for name, style in zip(FORMS, ("o-", "s-", "x:"), strict=True):
            power = exponent(LENGTHS, costs[name])
            axes.loglog(LENGTHS, np.array(costs[name]) / unit, style, label=f"{name} $T^{{{power:.1f}}}$")
        axes.set_xscale("log", base=2)
        axes.legend(fontsize="small")
    left.set(xlabel="places T", ylabel="time there and back (ms)")
    right.set(xlabel="places T", ylabel="kept for the way back (MB)")
    figure.suptitle("Time grows like T² in any form, memory only if the weights are kept", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
