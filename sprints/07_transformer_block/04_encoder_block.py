"""An encoder block: every position looks around in its sequence, then works by itself on what it found.

Run:     uv run sprints/07_transformer_block/04_encoder_block.py      (6 s on two cores)
Proves:  1. the block written out equals nn.TransformerEncoderLayer, in both norm orders and with every mask,
            in values and in the gradients of its input and of every weight
         2. lab.transformer.EncoderBlock equals both, and L of them equal nn.TransformerEncoder
         3. PyTorch's fast path for eval mode gives the same at every position that is no padding
         4. a position reads what its mask shows, and itself; no text of a batch reads another
         5. L blocks with a window of W reach back L·(W − 1) places, and not one more
         6. without a mask, a permuted sequence gives the permuted output; a causal mask breaks that
         7. a block has 12C² + 13C parameters, and a text of T positions costs 24TC² + 4T²C operations
Shapes:  B texts, T positions, C numbers each, H heads of width D = C/H, L blocks
Writes:  results/07_transformer_block/04_encoder_block.png
Note:    notes/04_encoder_block.md
"""

import math
import warnings
from collections.abc import Callable
from copy import deepcopy
from itertools import product

from lab.attention import MultiHeadAttention, causal_mask, padding_mask
from lab.influence import draw, influence, rows
from lab.lesson import Lesson, run
from lab.transformer import EncoderBlock, FeedForward, PostNorm, PreNorm

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Weights = dict[str, Tensor]  # under the names that nn.TransformerEncoderLayer gives them
SHAPES = ((1, 1, 2, 1, 3), (3, 5, 12, 3, 7), (2, 7, 8, 4, 32))  # B, T, C, H, hidden numbers
MASKS = {"no mask": (False, False), "causal": (True, False), "padding": (False, True), "both": (True, True)}
WINDOW, LONG = 3, 10


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    """(B, T, inputs) -> (B, T, outputs)."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    """Mean 0 and variance 1 at each position, then a scale and a shift: (B, T, C) -> (B, T, C)."""
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / spread * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(x: Tensor, w: Weights, H: int, mask: Tensor) -> Tensor:
    """Positions exchange: (B, T, C), mask (B, T, T), True means look -> (B, T, C)."""
    qkv = x @ w["self_attn.in_proj_weight"].T + w["self_attn.in_proj_bias"]  # (B, T, 3C)
    q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))  # (B, H, T, D)
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, T)
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)
    return linear(mixed, w, "self_attn.out_proj")


def feed_forward(x: Tensor, w: Weights, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Each position alone: (B, T, C) -> (B, T, hidden) -> (B, T, C)."""
    return linear(activation(linear(x, w, "linear1")), w, "linear2")


def post_norm(x: Tensor, w: Weights, H: int, mask: Tensor, activation=F.relu) -> Tensor:
    """The block of Vaswani et al. 2017: the sums are normalised. (B, T, C) -> (B, T, C)."""
    x = norm(x + attention(x, w, H, mask), w, "norm1")
    return norm(x + feed_forward(x, w, activation), w, "norm2")


def pre_norm(x: Tensor, w: Weights, H: int, mask: Tensor, activation=F.relu) -> Tensor:
    """The block of GPT-2: what is added is computed from a normalised copy. (B, T, C) -> (B, T, C)."""
    x = x + attention(norm(x, w, "norm1"), w, H, mask)
    return x + feed_forward(norm(x, w, "norm2"), w, activation)


def looks(causal: bool, padded: bool, lengths: Tensor, T: int) -> Tensor:
    """Who may look at whom, for the block written out: True means look, (B, T, T)."""
    t = torch.arange(T, device=lengths.device)
    back, real = t[:, None] >= t, t < lengths[:, None, None]  # (T, T), (B, 1, T)
    return (back | (not causal)) & (real | (not padded))


def hides(causal: bool, padded: bool, lengths: Tensor, T: int) -> tuple[Tensor | None, Tensor | None]:
    """The same for PyTorch's block, which takes two masks: True means hide, (T, T) and (B, T)."""
    later, padding = ~causal_mask(T, device=lengths.device), ~padding_mask(lengths, T)[:, 0]
    return later if causal else None, padding if padded else None


def options(causal: bool, padded: bool, lengths: Tensor, T: int) -> dict:
    """The same for the lab's block: True means look, (B, 1, T)."""
    return {"causal": causal, "mask": padding_mask(lengths, T) if padded else None}


def lab_block(theirs: nn.TransformerEncoderLayer) -> EncoderBlock:
    """The lab's block with a copy of the weights of PyTorch's."""
    (hidden, C), H = theirs.linear1.weight.shape, theirs.self_attn.num_heads
    residual = PreNorm if theirs.norm_first else PostNorm
    work = FeedForward(C, hidden, nn.ReLU if theirs.activation is F.relu else nn.GELU)
    parts = (residual(part, nn.LayerNorm(C)) for part in (MultiHeadAttention(C, H), work))
    return EncoderBlock(*parts).to(theirs.linear1.weight).copy(theirs)


def through(blocks: list[EncoderBlock], x: Tensor, **options) -> Tensor:
    """One block after the other: (B, T, C) -> (B, T, C)."""
    for block in blocks:
        x = block(x, **options)
    return x


def with_gradients(y: Tensor, inputs: list[Tensor], slope: Tensor) -> list[Tensor]:
    """An output, and how slope · output changes with each of the inputs."""
    return [y, *torch.autograd.grad(y, inputs, slope, materialize_grads=True)]


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    generator = torch.Generator().manual_seed(lesson.seed)
    exact = {"dtype": torch.float64, "device": lesson.float64_device}
    ordinary = {"dtype": torch.float32, "device": lesson.device}

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(**exact)

    def torch_block(C: int, H: int, hidden: int, L: int = 0, **kind) -> nn.Module:
        """PyTorch's block, or L of them; even the norms' weights random, so that none passes for another."""
        block = nn.TransformerEncoderLayer(C, H, hidden, batch_first=True, **kind)
        if L:
            block = nn.TransformerEncoder(block, L, enable_nested_tensor=not kind["norm_first"])
        with torch.no_grad():
            for name, weight in block.named_parameters():
                weight.copy_(randn(*weight.shape) / 2 + ("norm" in name and "weight" in name))
        return block

    lesson.heading("By hand: (1, 3) and (5, 1), a causal mask, all scores 0, all other matrices I")
    plain = {  # of the queries, keys and values in one matrix (3C, C), the last are left as they are
        name: torch.eye(*w.shape).flip(0, 1) if w.ndim == 2 else torch.full(w.shape, 1.0 * ("weight" in name))
        for name, w in nn.TransformerEncoderLayer(2, 1, 2).named_parameters()
    }
    for block in (post_norm, pre_norm):
        y = block(torch.tensor([[[1.0, 3.0], [5.0, 1.0]]]), plain, 1, causal_mask(2)[None])
        print(f"{block.__name__:9} ", "  ".join(f"({a:+.2f}, {b:+.2f})" for a, b in y[0].tolist()))

    lesson.heading("Written out, PyTorch's and the lab's")
    hand, theirs, ours, renamed = [], [], [], []
    for (B, T, C, H, hidden), activation, block in product(SHAPES, (F.relu, F.gelu), (post_norm, pre_norm)):
        kind = {"dropout": 0.0, "activation": activation, "norm_first": block is pre_norm}
        layer = torch_block(C, H, hidden, **kind, **exact)
        w, lab = dict(layer.named_parameters()), lab_block(layer)
        lengths = torch.arange(B, device=lesson.float64_device) % T + 1  # 1, 2, …
        for mask in MASKS.values():
            x, slope = randn(B, T, C).requires_grad_(), randn(B, T, C)
            y = block(x, w, H, looks(*mask, lengths, T), activation)
            y, dx, *dw = with_gradients(y, [x, *w.values()], slope)
            hand += [y, dx, *dw]
            theirs += with_gradients(layer(x, *hides(*mask, lengths, T)), [x, *w.values()], slope)
            ours += with_gradients(lab(x, **options(*mask, lengths, T)), [x, *lab.parameters()], slope)
            gradients = deepcopy(layer)  # a block whose weights are the gradients, to be copied like weights
            for weight, gradient in zip(gradients.parameters(), dw, strict=True):
                weight.data = gradient
            renamed += [y, dx, *lab_block(gradients).parameters()]
    lesson.proves_equal(1, hand, theirs)
    B, T, C, H, L = 3, 6, 8, 4, 3
    lengths = torch.tensor([6, 2, 4])
    for norm_first, mask in product((False, True), MASKS.values()):
        stack = torch_block(C, H, 4 * C, L, dropout=0.0, norm_first=norm_first, **exact)
        x, slope, on = randn(B, T, C).requires_grad_(), randn(B, T, C), lengths.to(lesson.float64_device)
        y = through([lab_block(layer) for layer in stack.layers], x, **options(*mask, on, T))
        ours += with_gradients(y, [x], slope)
        renamed += with_gradients(stack(x, *hides(*mask, on, T)), [x], slope)
    lesson.proves_equal(2, ours, renamed)

    lesson.heading("PyTorch in eval mode and without gradients: one fused operation per block")
    on, x = lengths.to(lesson.device), randn(B, T, C).to(**ordinary)
    real = padding_mask(on, T)[:, 0]  # (B, T)
    for activation, tolerance in ((F.relu, 1e-4), (F.gelu, 1e-2)):  # its GELU on CUDA is tanh's form
        ours, theirs = [], []
        for norm_first, mask in product((True, False), MASKS.values()):
            kind = {"dropout": 0.1, "activation": activation, "norm_first": norm_first}
            stack = torch_block(C, H, 4 * C, L, **kind, **ordinary).eval()
            blocks = [lab_block(layer) for layer in stack.layers]
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it turns padded texts into nested tensors, "a prototype"
                theirs += [stack.layers[0](x, *hides(*mask, on, T)), stack(x, *hides(*mask, on, T))]
                ours += [blocks[0](x, **options(*mask, on, T)), through(blocks, x, **options(*mask, on, T))]
            if mask == MASKS["padding"]:
                largest = [y[-1][~real].abs().max().item() for y in (theirs, ours)]
        lesson.proves_equal(3, [y[real] for y in ours], [y[real] for y in theirs], tolerance)
    print("largest number at padding after {} blocks: PyTorch {:.2f}, the lab {:.2f}".format(L, *largest))

    lesson.heading("Influence: two texts of 4 positions, of which 4 and 2 are real")
    B, T, C, H = 2, 4, 8, 2
    lengths, x = torch.tensor([4, 2], device=lesson.float64_device), randn(B, T, C)
    stack = torch_block(C, H, 4 * C, 4, dropout=0.0, norm_first=True, **exact)
    blocks, itself = [lab_block(layer) for layer in stack.layers], torch.eye(T, dtype=torch.bool)
    found, expected = {}, []
    for name, mask in MASKS.items():
        found[name] = influence(lambda x, mask=mask: blocks[0](x, **options(*mask, lengths, T)), x)
        expected.append(torch.block_diag(*(looks(*mask, lengths, T).cpu() | itself).long()))
    print("    ".join(f"{name:15}" for name in MASKS).rstrip())
    print("\n".join("    ".join(lines) for lines in zip(*map(rows, found.values()), strict=True)))
    lesson.proves_equal(4, list(found.values()), expected)

    lesson.heading(f"Influence through L blocks, each with a window of {WINDOW}")
    back = torch.arange(LONG)[:, None] - torch.arange(LONG)  # (T, T): how far s lies before t
    window, x, bands = ((back >= 0) & (back < WINDOW)).to(lesson.float64_device), randn(1, LONG, C), []
    for L in range(1, 5):
        reach = influence(lambda x, L=L: through(blocks[:L], x, mask=window), x)
        found[f"window, L = {L}"] = reach
        bands.append(((back >= 0) & (back <= L * (WINDOW - 1))).long())
        print(f"L = {L}   the last of {LONG} positions reads {rows(reach)[-1]}")
    lesson.proves_equal(5, list(found.values())[-4:], bands)

    lesson.heading("Order")
    order, x, off = [2, 0, 3, 1], randn(B, T, C), []
    for causal in (False, True):
        y, shuffled = (through(blocks, text, causal=causal) for text in (x, x[:, order]))
        off.append((shuffled - y[:, order]).norm().item() / y.norm().item())
    print("shuffled input, distance from the shuffled output: {:.3f}, with a causal mask {:.3f}".format(*off))
    lesson.proves(6, off[0] < 1e-10 and off[1] > 0.01)

    lesson.heading("Size and cost, hidden 4C")
    counted, formulas = [], []
    for B, T, C, H in ((3, 5, 6, 3), (2, 48, 8, 4)):
        layer, x = torch_block(C, H, 4 * C, dropout=0.0, **exact), randn(B, T, C)
        w, mask = dict(layer.named_parameters()), causal_mask(T, device=x.device)[None]
        parameters = sum(weight.numel() for weight in lab_block(layer).parameters())
        with FlopCounterMode(display=False) as counter:
            post_norm(x, w, H, mask)
        counted += [parameters, counter.get_total_flops()]
        formulas += [12 * C**2 + 13 * C, B * (24 * T * C**2 + 4 * T**2 * C)]
        scores = 4 * T**2 * C / (24 * T * C**2 + 4 * T**2 * C)
        cost = f"{counted[-1] // B:7,} operations, {scores:.0%} of them for T²"
        print(f"C {C}: {counted[-2]} parameters   T {T:2}: {cost}")
    lesson.proves_equal(7, counted, formulas)

    figure, panels = plt.subplots(2, 4, figsize=(6, 3.4), layout="constrained")
    for axes, (name, matrix) in zip(panels.flat, found.items(), strict=True):
        draw(axes, matrix, name)
        axes.set(xlabel="", ylabel="", xticks=[], yticks=[])
    figure.supxlabel("input position", size="medium")
    figure.supylabel("output position", size="medium")
    figure.suptitle("A block reads what its mask shows (above), L blocks L times as far", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
