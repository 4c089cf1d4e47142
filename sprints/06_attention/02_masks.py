"""Masks: which positions a query may look at, and why True means one thing here and the opposite there.

Run:     uv run sprints/06_attention/02_masks.py      (7 s on two cores)
Proves:  1. causal, padding, both, window: asked pair by pair, in a line each and from the lab, the same mask
         2. seen through it, a loop, −∞, PyTorch and the lab agree, gradients too, and influence is the mask
         3. the same tensor in nn.MultiheadAttention gives the complement: True means hide there
         4. inverted masks see only the future, only padding; shapes are right, the loss goes below the floor
         5. is_causal puts the first query at the first key, where the rows that a cache needs are the last
         6. a row with nothing to look at: NaN in every gradient by hand, zeros and sound gradients in the lab
         7. there −1e9 looks at what is hidden: as unmasked in float64, evenly in float32, NaN in float16
Shapes:  B texts, H heads, T queries, S keys, D width of a head, V letters
Writes:  results/06_attention/02_masks.png
Note:    notes/02_masks.md
"""

import math
from collections.abc import Callable
from itertools import product

from lab.attention import attend, attention_weights, causal_mask, padding_mask
from lab.influence import draw as draw_matrix
from lab.influence import influence, rows
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES, WINDOW = ("causal", "padding", "both", "window"), 2
SHAPES = ((1, 1, 3, 3, 2), (2, 3, 5, 5, 4), (3, 2, 2, 7, 3), (2, 1, 4, 9, 1))  # B, H, T, S, D
V, PLACES, WIDTH, STEPS = 8, 6, 32, 150
SCORES = (1.2, -0.7, 0.3, 2.1)


def masks_by_pairs(T: int, S: int, lengths: Tensor) -> dict[str, Tensor]:
    """May query t look at place s of text b? {name: (B, T, S)}; the queries are the last places."""
    found = {name: torch.zeros(len(lengths), T, S, dtype=torch.bool) for name in NAMES}
    for b, t, s in product(range(len(lengths)), range(T), range(S)):
        place = S - T + t
        found["causal"][b, t, s] = s <= place
        found["padding"][b, t, s] = s < lengths[b]
        found["both"][b, t, s] = s <= place and s < lengths[b]
        found["window"][b, t, s] = place - WINDOW < s <= place
    return found


def masks(T: int, S: int, lengths: Tensor) -> dict[str, Tensor]:
    """The same, all pairs at once: True means look. {name: (B, T, S)}."""
    s = torch.arange(S, device=lengths.device)
    place = s[S - T :, None]  # (T, 1) beside (S,)
    causal, padding = s <= place, s < lengths[:, None, None]  # (T, S), (B, 1, S)
    window = causal & (s > place - WINDOW)
    return dict(zip(NAMES, torch.broadcast_tensors(causal, padding, causal & padding, window), strict=True))


def masks_from_lab(T: int, S: int, lengths: Tensor) -> dict[str, Tensor]:
    """The same, from the parts that later lessons use."""
    causal, padding = causal_mask(T, S, lengths.device), padding_mask(lengths, S)
    window = causal.triu(S - T - WINDOW + 1)
    return dict(zip(NAMES, torch.broadcast_tensors(causal, padding, causal & padding, window), strict=True))


def attention_by_loop(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """What a mask means: a hidden key is not there. q (B, H, T, D), k, v (B, H, S, D), mask (B, 1, T, S)."""
    output = []
    for b, h, t in product(*map(range, q.shape[:3])):
        seen = mask[b, 0, t].nonzero()[:, 0]  # the places that query t may look at
        weights = (k[b, h, seen] @ q[b, h, t] / math.sqrt(q.shape[-1])).softmax(0)
        output.append(weights @ v[b, h, seen])
    return torch.stack(output).view_as(q)  # (B·H·T, D) -> (B, H, T, D)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """How it is done: a hidden key has the score −∞ and so the weight exp(−∞) = 0. Shapes as above."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, S)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


WAYS = {  # each takes queries, keys, values and a mask whose True means look
    "a loop over what is there": attention_by_loop,
    "−∞ by hand": attention,
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
    "the lab's attend": attend,
    "the lab's weights": lambda q, k, v, mask: attention_weights(q, k, mask) @ v,
}


def one_head(way: Callable[..., Tensor], q: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """q (B, T, D) looks in x (B, S, D), which gives keys and values, through mask (B, T, S) -> (B, T, D)."""
    return way(q[:, None], x[:, None], x[:, None], mask[:, None])[:, 0]


def looks(way: Callable[..., Tensor], q: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Where one head really looks: the influence of x on its output, (B·T, B·S)."""
    return influence(lambda x: one_head(way, q, x, mask), x)


def looks_in_module(module: nn.MultiheadAttention, q: Tensor, x: Tensor, mask: Tensor, name: str) -> Tensor:
    """The same for PyTorch's module: mask (1, T, S) goes where the module wants a mask of that name."""
    given = {"key_padding_mask": mask[:, 0]} if name == "padding" else {"attn_mask": mask[0]}
    return influence(lambda x: module(q, x, x, need_weights=False, **given)[0], x)


def weights_by_number(scores: Tensor, mask: Tensor, fill: float) -> Tensor:
    """Weights where a very negative number is added to what the mask hides: (…, S), mask (…, S) -> (…, S)."""
    return torch.where(mask, scores, scores + fill).softmax(-1)


def by_number(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention with −1e9 for −∞. Shapes as above."""
    return weights_by_number(q @ k.mT / math.sqrt(q.shape[-1]), mask, -1e9) @ v


class Reader(nn.Module):
    """Letters and their places through one head: ids (B, T), mask (T, S) -> logits (B, T, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(V, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.project, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, V)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.letters(ids) + self.places.weight  # (B, T, WIDTH)
        q, k, v = self.project(x)[:, None].chunk(3, dim=-1)  # three times (B, 1, T, WIDTH)
        return self.output(attend(q, k, v, mask)[:, 0])


def train(mask: Tensor, lesson: Lesson) -> tuple[tuple[int, ...], float, float]:
    """Predict the next of random letters: shape of the logits, loss on unseen texts before and after."""
    torch.manual_seed(lesson.seed)
    model, draw = Reader().to(lesson.device), torch.Generator().manual_seed(lesson.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def loss(texts: int) -> Tensor:
        ids = torch.randint(V, (texts, PLACES + 1), generator=draw).to(lesson.device)
        return F.cross_entropy(model(ids[:, :-1], mask).flatten(0, 1), ids[:, 1:].flatten())

    before = loss(2_000).item()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(64).backward()
        optimizer.step()
    shape = model(torch.zeros(1, PLACES, dtype=torch.long, device=lesson.device), mask).shape
    return tuple(shape), before, loss(2_000).item()


def said(x: Tensor) -> str:
    """What a tensor holds, in a word."""
    if x.isnan().any():
        return "NaN" if x.isnan().all() else "some NaN"
    return "zeros" if (x == 0).all() else "finite"


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)
    draw, device = torch.Generator().manual_seed(lesson.seed), lesson.float64_device

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(device)

    lesson.heading("Four masks: in scaled_dot_product_attention | the same tensors in nn.MultiheadAttention")
    pairs, made, loop, others, seen, expected = [], [], [], [], [], []
    for B, H, T, S, D in SHAPES:
        lengths = torch.randint(1, S + 1, (B,), generator=draw).to(device)
        pairs += [[*masks_by_pairs(T, S, lengths).values()]] * 2
        made += [[*way(T, S, lengths).values()] for way in (masks, masks_from_lab)]
        q, k, v = (randn(B, H, places, D).requires_grad_() for places in (T, S, S))
        slope, padding = randn(B, H, T, D), padding_mask(lengths, S)[:, None]  # (B, 1, 1, S)
        for name, mask in masks(T, S, lengths).items():
            outputs = [way(q, k, v, mask[:, None]) for way in WAYS.values()]
            if name in ("causal", "both"):
                outputs.append(attend(q, k, v, padding if name == "both" else None, causal=True))
            first, *rest = ([y, *torch.autograd.grad(y, (q, k, v), slope)] for y in outputs)
            loop, others = [*loop, *[first] * len(rest)], [*others, *rest]
            seen += [looks(way, randn(B, T, D), randn(B, S, D), mask) for way in WAYS.values()]
            expected += [torch.block_diag(*mask.long()).cpu()] * len(WAYS)
    torchs, labs, T = WAYS["scaled_dot_product_attention"], WAYS["the lab's attend"], 5
    q, x, four = randn(1, T, 4), randn(1, T, 4), masks(T, T, torch.tensor([3], device=device))
    torch.manual_seed(lesson.seed)
    module = nn.MultiheadAttention(4, 1, batch_first=True).to(q)
    in_product = [looks(torchs, q, x, mask) for mask in four.values()]
    in_module = [looks_in_module(module, q, x, mask, name) for name, mask in four.items()]
    print("   ".join(f"{name:9}" for name in NAMES * 2).rstrip())
    for line in zip(*map(rows, in_product + in_module), strict=True):
        print("   ".join(line))
    lesson.proves_equal(1, made, pairs)
    lesson.proves_equal(2, [others, seen], [loop, expected])
    tensors = [mask[0].cpu() for mask in four.values()]
    complements = [[mask.long() for mask in tensors], [(~mask).long() for mask in tensors]]
    lesson.proves_equal(3, [in_product, in_module], complements)

    lesson.heading("An inverted causal mask, next-letter prediction on random letters")
    causal, floor = causal_mask(PLACES, device=lesson.device), math.log(V)
    right, wrong = train(causal, lesson), train(~causal, lesson)
    for name, (shape, before, after) in (("right", right), ("inverted", wrong)):
        print(f"{name:8}  logits {shape}   loss {before:.2f}, trained {after:.2f}   (ln {V} = {floor:.2f})")
    inverted = [looks(torchs, q, x, ~four[name]) for name in ("causal", "padding")]
    future, padding = torch.ones(T, T).triu(1).long(), (torch.arange(T) >= 3).long().expand(T, T)
    held = all(map(torch.equal, inverted, (future, padding))) and right[0] == wrong[0]
    lesson.proves(4, held and right[2] > floor - 0.01 and wrong[2] < floor / 2)

    lesson.heading("Two queries, five keys: is_causal | causal_mask(2, 5)")
    few = q[:, -2:]
    kernel = influence(lambda x: F.scaled_dot_product_attention(few, x, x, is_causal=True), x)
    cached = looks(labs, few, x, causal_mask(2, T, device)[None])
    for line in zip(rows(kernel), rows(cached), strict=True):
        print("   ".join(line))
    all_rows = F.scaled_dot_product_attention(q, x, x, is_causal=True)
    last_rows = attend(few[:, None], x[:, None], x[:, None], causal=True)[:, 0]
    ones = torch.ones(2, T).long()
    lesson.proves_equal(5, [kernel, cached, last_rows], [ones.tril(), ones.tril(T - 2), all_rows[:, -2:]])

    lesson.heading("Two places of padding before a text of three, under a causal mask")
    mask = (causal_mask(T, device=device) & (torch.arange(T, device=device) >= 2))[None]  # (1, T, T)
    hide = ~mask[0]
    ways = {name: lambda x, way=way: one_head(way, x, x, mask) for name, way in WAYS.items()}
    ways["nn.MultiheadAttention"] = lambda x: module(x, x, x, attn_mask=hide)[0]
    ways["the same, need_weights=False"] = lambda x: module(x, x, x, attn_mask=hide, need_weights=False)[0]
    results, told = [], []
    for name, way in ways.items():
        leaf = x.clone().requires_grad_()
        y = way(leaf)
        (slope,) = torch.autograd.grad(y[:, 2:].square().sum(), leaf)  # of a loss on the text alone
        results.append((y, slope))
        told.append((said(y[:, :2]), said(slope)))
        print(f"{name:29} rows of padding: {told[-1][0]:6} gradient of a loss on the text: {told[-1][1]}")
    nan, zeros = ("NaN", "NaN"), ("zeros", "finite")
    lesson.proves(6, told == [zeros, nan, zeros, zeros, zeros, nan, zeros])
    lesson.proves_equal(6, results[2:5], results[:1] * 3)

    lesson.heading("The weight of the last of four hidden keys: it should be 0")
    table, exact = [], []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        scores = torch.tensor(SCORES).to(device if dtype == torch.float64 else lesson.device, dtype)
        nothing, one = torch.zeros_like(scores, dtype=torch.bool), torch.arange(4, device=scores.device) < 1
        fills = {"−1e9": -1e9, "−1e4": -1e4, "least number": torch.finfo(dtype).min, "−∞": -torch.inf}
        table.append([weights_by_number(scores, nothing, fill)[-1].item() for fill in fills.values()])
        exact += [(weights_by_number(scores, one, fill) == one).cpu() for fill in fills.values()]
        shown = "   ".join(f"{name} {weight:.3f}" for name, weight in zip(fills, table[-1], strict=True))
        print(f"{str(dtype)[6:]:9} {shown}   (−1e9 is stored as {torch.tensor(-1e9).to(dtype).item():.10g})")
    open_, even, nan = torch.tensor(SCORES).softmax(-1)[-1].item(), 1 / 4, -1.0  # NaN would equal nothing
    wanted = [open_, open_, even, nan, even, open_, even, nan, even, even, even, nan, nan, even, even, nan]
    x, mask = x.float().to(lesson.device), mask.to(lesson.device)
    leak, sound = looks(by_number, x, x, mask), looks(labs, x, x, mask)
    print("query 0 looks at: with −1e9", rows(leak)[0], "  in the lab", rows(sound)[0])
    allowed = mask[0].long().cpu()
    ours = [torch.tensor(table).nan_to_num(nan).flatten(), torch.cat(exact).all(), leak, sound]
    theirs = [torch.tensor(wanted), True, torch.cat([torch.ones(2, T).long(), allowed[2:]]), allowed]
    lesson.proves_equal(7, ours, theirs, tolerance=1e-3)

    figure, axes = plt.subplots(2, 4, figsize=(6, 3.4), layout="constrained", sharex=True, sharey=True)
    for panel, matrix, name in zip(axes.flat, in_product + in_module, NAMES * 2, strict=True):
        draw_matrix(panel, matrix, name, inputs="key", outputs="query")
        panel.set(xticks=range(0, T, 2), yticks=range(0, T, 2))
        panel.label_outer()
    axes[0, 0].set_ylabel("True: look\nquery position")
    axes[1, 0].set_ylabel("True: hide\nquery position")
    title = "One tensor, two readings: scaled_dot_product_attention, nn.MultiheadAttention"
    figure.suptitle(title, size="small")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
