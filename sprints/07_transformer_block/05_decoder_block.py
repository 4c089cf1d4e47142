"""A decoder block: look back at what is written, look at the source, then work on it position by position.

Run:     uv run sprints/07_transformer_block/05_decoder_block.py      (5 s on two cores)
Proves:  1. the block written out equals nn.TransformerDecoderLayer, in both norm orders and with every mask,
            in values and in the gradients of both inputs and of every weight
         2. lab.transformer.DecoderBlock equals both, and L of them equal nn.TransformerDecoder
         3. a target position reads the target up to itself and the whole source but for its padding
         4. each of four masks, inverted, keeps every shape and shows in one of the two influence matrices
         5. what is appended later changes no output, so one position at a time, with caches, equals one pass
         6. a block has 16C² + 19C parameters; caches have keys computed for T target, S source positions
         7. one pass over what was written scores it as while writing, unless its mask shows what comes later
Shapes:  B texts, T target and S source positions, C numbers each, H heads, D = C/H, L blocks, V tokens
Writes:  results/07_transformer_block/05_decoder_block.png
Note:    notes/05_decoder_block.md
"""

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import product

from lab.attention import MultiHeadAttention, causal_mask, padding_mask
from lab.influence import draw, influence, rows
from lab.lesson import Lesson, run
from lab.positions import sinusoids
from lab.transformer import DecoderBlock, FeedForward, PostNorm, PreNorm

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = dict[str, Tensor]  # under the names that nn.TransformerDecoderLayer gives them
SHAPES = ((1, 1, 1, 2, 1, 3), (3, 4, 5, 12, 3, 7), (2, 7, 3, 8, 4, 32))  # B, T, S, C, H, hidden numbers
LONG, V = 8, 12


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    """(B, T, inputs) -> (B, T, outputs)."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    """Mean 0 and variance 1 at each position, then a scale and a shift: (B, T, C) -> (B, T, C)."""
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def attention(x: Tensor, source: Tensor, w: Weights, name: str, H: int, mask: Tensor) -> Tensor:
    """x (B, T, C) looks at source (B, S, C), mask (B, T, S), True means look -> (B, T, C)."""
    (wq, wk, wv), (bq, bk, bv) = w[f"{name}.in_proj_weight"].chunk(3), w[f"{name}.in_proj_bias"].chunk(3)
    projected = x @ wq.T + bq, source @ wk.T + bk, source @ wv.T + bv  # (B, T, C), (B, S, C) twice
    q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in projected)  # (B, H, T or S, D)
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, S)
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)
    return linear(mixed, w, f"{name}.out_proj")


def feed_forward(x: Tensor, w: Weights, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Each position alone: (B, T, C) -> (B, T, hidden) -> (B, T, C)."""
    return linear(activation(linear(x, w, "linear1")), w, "linear2")


def post_norm(x: Tensor, source: Tensor, w: Weights, H: int, masks, activation=F.relu) -> Tensor:
    """The block of Vaswani et al. 2017: x (B, T, C), source (B, S, C) -> (B, T, C)."""
    target_mask, source_mask = masks  # (B, T, T), (B, T, S)
    x = norm(x + attention(x, x, w, "self_attn", H, target_mask), w, "norm1")
    x = norm(x + attention(x, source, w, "multihead_attn", H, source_mask), w, "norm2")
    return norm(x + feed_forward(x, w, activation), w, "norm3")


def pre_norm(x: Tensor, source: Tensor, w: Weights, H: int, masks, activation=F.relu) -> Tensor:
    """The same with the norm in front of each part; the source is normalised nowhere in here."""
    target_mask, source_mask = masks  # (B, T, T), (B, T, S)
    y = norm(x, w, "norm1")
    x = x + attention(y, y, w, "self_attn", H, target_mask)
    x = x + attention(norm(x, w, "norm2"), source, w, "multihead_attn", H, source_mask)
    return x + feed_forward(norm(x, w, "norm3"), w, activation)


def looks(T: int, S: int, lengths: Tensor, target_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Who may look at whom, for the block written out: True means look, (B, T, T) and (B, T, S)."""
    t, s = (torch.arange(size, device=lengths.device) for size in (T, S))
    target = (t[:, None] >= t) & (t < target_lengths[:, None, None])  # (T, T), (B, 1, T) -> (B, T, T)
    return target, (s < lengths[:, None, None]).expand(-1, T, -1)


def conventions(T: int, S: int, lengths: Tensor, target_lengths: Tensor) -> tuple[tuple, dict]:
    """The same for PyTorch's block, where True means hide, and for the lab's, where True means look."""
    back, target = causal_mask(T, device=lengths.device), padding_mask(target_lengths, T)  # (T, T), (B, 1, T)
    source = padding_mask(lengths, S)  # (B, 1, S)
    return (~back, None, ~target[:, 0], ~source[:, 0]), {"mask": target, "source_mask": source}


def lab_block(theirs: nn.TransformerDecoderLayer) -> DecoderBlock:
    """The lab's block with a copy of the weights of PyTorch's."""
    (hidden, C), H = theirs.linear1.weight.shape, theirs.self_attn.num_heads
    residual = PreNorm if theirs.norm_first else PostNorm
    work = FeedForward(C, hidden, nn.ReLU if theirs.activation is F.relu else nn.GELU)
    parts = MultiHeadAttention(C, H), MultiHeadAttention(C, H), work
    block = DecoderBlock(*(residual(part, nn.LayerNorm(C)) for part in parts))
    return block.to(theirs.linear1.weight).copy(theirs)


def through(blocks: list[DecoderBlock], x: Tensor, *source, **masks) -> Tensor:
    """One block after the other: (B, T, C) -> (B, T, C). The source is the same for all."""
    for block in blocks:
        x = block(x, *source, **masks)
    return x


def with_gradients(y: Tensor, inputs: list[Tensor], slope: Tensor) -> list[Tensor]:
    """An output, and how slope · output changes with each of the inputs."""
    return [y, *torch.autograd.grad(y, inputs, slope, materialize_grads=True)]


class Cache:
    """Keeps the keys and values of earlier calls in front of those of this one."""

    kept: tuple[Tensor, ...] = ()

    def __call__(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of new positions (B, H, new, D) -> those of all positions so far."""
        pairs = zip(self.kept, new, strict=True) if self.kept else zip(new)
        self.kept = tuple(torch.cat(pair, dim=2) for pair in pairs)
        return self.kept


def step(block: DecoderBlock, caches: tuple, x: Tensor, source: Tensor, source_mask: Tensor) -> Tensor:
    """Only the new positions: (B, new, C) -> (B, new, C). What the caches know of the source is not given."""
    own, of_source = caches
    x = block.attention(x, causal=True, cache=own)
    x = block.cross_attention(x, source_mask, source=source, cache=of_source)
    return block.feed_forward(x)


def beside(*matrices: Tensor) -> str:
    """Influence matrices of T rows each, side by side."""
    return "\n".join("    ".join(line) for line in zip(*map(rows, matrices), strict=True))


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    generator, device = torch.Generator().manual_seed(lesson.seed), lesson.float64_device

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.float64).requires_grad_()

    def torch_block(C: int, H: int, hidden: int, L: int = 0, **kind) -> nn.Module:
        """PyTorch's block, or L of them; even the norms' weights random, so that none passes for another."""
        block = nn.TransformerDecoderLayer(C, H, hidden, dropout=0.0, batch_first=True, **kind).to(randn(1))
        block = nn.TransformerDecoder(block, L) if L else block
        with torch.no_grad():
            for name, weight in block.named_parameters():
                weight.copy_(randn(*weight.shape) / 2 + ("norm" in name and "weight" in name))
        return block

    lesson.heading("By hand: targets (1, 3) and (5, 1); source (4, 0), (0, 2) and padding (9, 9)")
    plain = {  # of the queries, keys and values in one matrix (3C, C), the last are left as they are
        name: torch.eye(*w.shape).flip(0, 1) if w.ndim == 2 else torch.full(w.shape, 1.0 * ("weight" in name))
        for name, w in nn.TransformerDecoderLayer(2, 1, 2).named_parameters()
    }
    x, source = torch.tensor([[[1.0, 3.0], [5.0, 1.0]]]), torch.tensor([[[4.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    back, real = looks(2, 3, torch.tensor([2]), torch.tensor([2]))
    for name, mask in (("pre_norm", real), ("source mask inverted", ~real)):
        y = pre_norm(x, source, plain, 1, (back, mask))
        print(f"{name:22}", "  ".join(f"({a:+.2f}, {b:+.2f})" for a, b in y[0].tolist()))

    lesson.heading("Written out, PyTorch's and the lab's")
    hand, theirs, ours, renamed = [], [], [], []
    for shape, activation, block in product(SHAPES, (F.relu, F.gelu), (post_norm, pre_norm)):
        B, T, S, C, H, hidden = shape
        layer = torch_block(C, H, hidden, activation=activation, norm_first=block is pre_norm)
        w, lab = dict(layer.named_parameters()), lab_block(layer)
        for padded, target_padded in product((False, True), repeat=2):
            shorter = torch.arange(1, B + 1, device=device)  # the first text is 1 long, and so on
            lengths = shorter if padded else 0 * shorter + S
            given = T, S, lengths, shorter if target_padded else 0 * shorter + T
            hides, masks = conventions(*given)
            x, source, slope = randn(B, T, C), randn(B, S, C), randn(B, T, C)
            y = block(x, source, w, H, looks(*given), activation)
            y, dx, ds, *dw = with_gradients(y, [x, source, *w.values()], slope)
            hand += [y, dx, ds, *dw]
            theirs += with_gradients(layer(x, source, *hides), [x, source, *w.values()], slope)
            y = lab(x, source, **masks) if padded or target_padded else lab(x, source)
            ours += with_gradients(y, [x, source, *lab.parameters()], slope)
            gradients = deepcopy(layer)  # a block whose weights are the gradients, to be copied like weights
            for weight, gradient in zip(gradients.parameters(), dw, strict=True):
                weight.data = gradient
            renamed += [y, dx, ds, *lab_block(gradients).parameters()]
    lesson.proves_equal(1, hand, theirs)
    B, T, S, C, H = 2, 4, 5, 8, 2
    lengths, target_lengths = (torch.tensor(sizes, device=device) for sizes in ([5, 3], [4, 2]))
    given = T, S, lengths, target_lengths
    hides, masks = conventions(*given)
    for norm_first in (True, False):
        stack = torch_block(C, H, 4 * C, 2, norm_first=norm_first)
        blocks = [lab_block(layer) for layer in stack.layers]
        x, source, slope = randn(B, T, C), randn(B, S, C), randn(B, T, C)
        ours += with_gradients(through(blocks, x, source, **masks), [x, source], slope)
        renamed += with_gradients(stack(x, source, *hides), [x, source], slope)
    lesson.proves_equal(2, ours, renamed)

    lesson.heading("Influence: of the source 5 and 3 of 5 are real; of the target 4 and 2 of 4")
    block, layer, x, source = blocks[0], stack.layers[0], randn(B, T, C), randn(B, S, C)
    target, reads = influence(partial(block, source_mask=masks["source_mask"]), x, source)
    target_padded, reads_too = influence(partial(block, **masks), x, source)
    print(f"{'source':19}    {'target':15}    target, its padding masked")
    print(beside(reads, target, target_padded))
    lower, (own, of_source) = torch.ones(T, T).tril().long(), (mask.cpu().long() for mask in looks(*given))
    own = own | torch.eye(T, dtype=torch.long)  # padding, too, reads itself: through the residual connections
    own, of_source, lowers = (torch.block_diag(*parts) for parts in (own, of_source, (lower, lower)))
    lesson.proves_equal(3, [target_padded, target, reads, reads_too], [own, lowers, of_source, of_source])

    lesson.heading("Inverted masks, second text: its target matrix, its source matrix")
    x, source, real, back = x[1:], source[1:], padding_mask(lengths[1:], S), causal_mask(T, device=device)
    first = (torch.arange(S) < 3).long().expand(T, S)
    kinds = {
        "right": (back, real, lower, first),
        "target mask inverted": (~back, real, lower.T, first),
        "source mask inverted": (back, ~real, lower, 1 - first),
    }
    seen, found, expected = {}, [], []
    for name, (mask, source_mask, *matrices) in kinds.items():
        for version in (
            partial(block, mask=mask, source_mask=source_mask, causal=False),
            partial(layer, tgt_mask=~mask, memory_key_padding_mask=~source_mask[:, 0]),
        ):
            seen[name] = influence(version, x, source)
            found, expected = [*found, *seen[name]], [*expected, *matrices]
            found, expected = [*found, list(version(x, source).shape)], [*expected, list(x.shape)]
    print("    ".join(f"{name:20}" for name in seen))
    print(beside(*(matrix for pair in seen.values() for matrix in pair)))
    lesson.proves_equal(4, found, expected)

    lesson.heading("One position at a time")
    x, source, real, ends = randn(B, T, C), randn(B, S, C), masks["source_mask"], range(1, T + 1)
    y = through(blocks, x, source, real)
    counts: list[list[int]] = [[], []]  # for how many positions keys are computed, call by call
    for count, part in zip(counts, (blocks[0].attention, blocks[0].cross_attention), strict=True):
        part.sublayer.key.register_forward_hook(lambda _, given, keys, its=count: its.append(keys.shape[1]))
    again = [through(blocks, x[:, :t], source, real) for t in ends]
    computed = [sum(count) for count in counts]
    for sizes in ([2, T - 2], [1] * T):  # how many positions are new in each step
        caches, unseen, pieces = [(Cache(), Cache()) for _ in blocks], source, []
        for new in x.split(sizes, dim=1):
            for block, its in zip(blocks, caches, strict=True):
                new = step(block, its, new, unseen, real)
            pieces, unseen = [*pieces, new], source[:, :0]
        again.append(torch.cat(pieces, dim=1))
    computed += [sum(count[-T:]) for count in counts]  # in the last T steps
    lesson.proves_equal(5, again, [*(y[:, :t] for t in ends), y, y])
    print(
        f"keys for target and source positions: {computed[:2]} for every prefix anew, {computed[2:]} cached"
    )
    sizes = {C: sum(w.numel() for w in lab_block(torch_block(C, 1, 4 * C)).parameters()) for C in (3, 8, 20)}
    print("   ".join(f"C {C}: {size:,} parameters" for C, size in sizes.items()))
    formulas = [16 * C**2 + 19 * C for C in sizes]
    lesson.proves_equal(6, [*computed, *sizes.values()], [T * (T + 1) // 2, T * S, T, S, *formulas])

    lesson.heading(f"Writing {LONG} tokens of {V}, each the likeliest, then scoring them all in one pass")
    source, real = randn(8, S, C), padding_mask(torch.arange(8, device=device) % S + 1, S)
    table, positions, back = randn(V, C), sinusoids(LONG, C).to(x), causal_mask(LONG, device=device)
    off = {}
    for name, mask in {"causal": back, "no mask": torch.ones_like(back), "inverted": ~back}.items():

        def scores(ids: Tensor, mask: Tensor = mask) -> Tensor:
            t = ids.shape[1]  # (B, t) -> (B, t, V)
            return (
                through(blocks, table[ids] + positions[:t], source, real, mask[:t, :t], causal=False)
                @ table.T
            )

        ids, said = torch.zeros(len(source), 1, dtype=torch.long, device=device), []
        for _ in range(LONG):
            said.append(scores(ids)[:, -1])  # (B, V)
            ids = torch.cat([ids, said[-1].argmax(-1, keepdim=True)], dim=1)
        one_pass = scores(ids[:, :-1])  # (B, LONG, V)
        off[name] = (one_pass - torch.stack(said, dim=1)).abs().max().item()
        same = (one_pass.argmax(-1) == ids[:, 1:]).double().mean()
        print(f"{name:9} scores differ by up to {off[name]:6.3f}, the likeliest is the same in {same:4.0%}")
    lesson.proves(7, off["causal"] < 1e-10 and min(off["no mask"], off["inverted"]) > 0.1)

    figure, panels = plt.subplots(2, 3, figsize=(6, 3.4), layout="constrained")
    for column, (name, pair) in zip(panels.T, seen.items(), strict=True):
        for axes, matrix, inputs in zip(column, pair, ("target", "source"), strict=True):
            draw(axes, matrix, name if inputs == "target" else "", inputs)
            axes.set(ylabel="output position" if name == "right" else "", xticks=range(matrix.shape[1]))
    figure.suptitle("Every shape stays as it was; only the influence shows a mask inverted", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
