"""The key-value cache: what a model has read once it need not read again to write the next token.

Run:     uv run sprints/10_generation/02_key_value_cache.py      (5 s on two cores)
Proves:  1. attention at the last token needs one query, by loop over all keys: the last row of the whole
         2. logits with a cache equal those without, in one prefill, token by token and in uneven pieces: with
            the obvious cache in values and gradients, with the lab's in values
         3. read in pieces, each place is influenced by itself and what came before, as without a cache; with
            is_causal=True on T queries and S > T keys, by the first keys in place of the last
         4. four typical mistakes leave every shape as it was, and change the logits by over a tenth
         5. the next token costs 2N + 4LCS operations for N weights in products, without a cache 2NS + 4LCS²
         6. the cache of S tokens takes 2·L·C·S numbers a text, to the byte, and half the batch takes half
         7. prompts of different lengths, each with a stop of its own: every row of a batch writes what it
            would write alone and without a cache, past a full context too, and reads no token twice
Shapes:  B texts, T new tokens, S tokens in all, C width, H heads of width D = C / H, L blocks, V tokens
Writes:  results/10_generation/02_key_value_cache.png
Note:    notes/02_key_value_cache.md
"""

import copy
import math
import time
from collections.abc import Callable
from functools import partial

from lab.attention import MultiHeadAttention, attend, causal_mask
from lab.generation import Cache, cache_for, generate, greedy
from lab.gpt import GPT, SIZES, initialise
from lab.influence import influence, rows
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SMALL = {"V": 31, "T": 24, "C": 16, "H": 4, "L": 2}
GPT2 = {"V": 50_257, "T": 1_024} | SIZES["gpt2"]
TIMES = 7


def last_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mean of the values that one query sees, key by key: (D,), (S, D), (S, D) -> (D,)."""
    powers = [math.exp(sum((q * key).tolist()) / math.sqrt(len(q))) for key in k]
    return sum(power / sum(powers) * value for power, value in zip(powers, v, strict=True))


class Growing:
    """The obvious cache: new keys and values are put behind the old ones, all of it copied each time."""

    def __init__(self, L: int) -> None:
        self.length = 0  # the model counts the tokens that it has read
        self.kept: list[tuple[Tensor, ...] | None] = [None] * L
        self.blocks = [partial(self.keep, block) for block in range(L)]

    def keep(self, block: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Keys and values (B, H, T, D) of new tokens -> those of all so far, (B, H, S, D)."""
        if old := self.kept[block]:
            new = tuple(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
        self.kept[block] = new
        return new

    def select(self, rows: list[int]) -> None:
        """Keep these rows of the batch only."""
        self.kept = [(k[rows], v[rows]) for k, v in self.kept]


def read(model: nn.Module, ids: Tensor, cache: Growing | Cache, pieces: list[int] | int) -> Tensor:
    """Piece by piece: (B, S) -> logits (B, S, V)."""
    return torch.cat([model(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)


def through(model: GPT, x: Tensor, pieces: int) -> Tensor:
    """What comes out of the blocks, piece by piece: (B, S, C) -> (B, S, C)."""
    cache, out = Growing(len(model.blocks)), []
    for piece in x.split(pieces, dim=1):
        for block, keep in zip(model.blocks, cache.blocks, strict=True):
            piece = block(piece, causal=True, cache=keep)
        out.append(piece)
    return torch.cat(out, dim=1)


# ── Four mistakes ─────────────────────────────────────────────────────────────────────────────────────────


class FromZero(Growing):
    """Every piece is given the places from 0 on."""

    length = property(lambda self: 0, lambda self, tokens: None)


class WrongCorner(MultiHeadAttention):
    """is_causal=True lets the first query see the first key, which is right only where T = S."""

    def forward(self, x: Tensor, mask: None, *, causal: bool, cache: Callable) -> Tensor:
        q, k, v = self.heads(self.query(x)), *cache(self.heads(self.key(x)), self.heads(self.value(x)))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, H, T, D)
        return self.output(mixed.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)


class KeepsDropped(Growing):
    """Rows of the batch are dropped, but the cache keeps the first ones, whichever went on."""

    def select(self, rows: list[int]) -> None:
        super().select(list(range(len(rows))))


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────────────


def alone(model: GPT, prompt: list[int], most: int, end: int) -> list[int]:
    """One text without a cache: for each token all of its context is read again."""
    ids, start, room = list(prompt), 0, model.settings["T"]
    while len(ids) < len(prompt) + most and (len(ids) == len(prompt) or ids[-1] != end):
        while len(ids) - start > room:  # the context is full: begin it anew, with its last half
            start += room // 2 + 1
        context = torch.tensor([ids[start:]], device=model.tokens.weight.device)  # (1, S)
        ids.append(model(context)[0, -1].argmax().item())
    return ids[len(prompt) :]


def operations(model: GPT, S: int, cached: bool) -> int:
    """Counted for the token after S - 1 others, on the meta device, where nothing is computed."""
    ids, cache = torch.zeros(1, S, dtype=torch.long, device="meta"), cache_for(model)
    if cached:
        model(ids[:, 1:], cache)
    with FlopCounterMode(display=False) as counter:
        model(ids[:, :1] if cached else ids, cache)
    return counter.get_total_flops()


def milliseconds(work: Callable[[], Tensor]) -> float:
    """The middle one of TIMES runs."""
    times = []
    for _ in range(TIMES):
        start = time.perf_counter()
        work().sum().item()  # waits for an accelerator
        times.append(1_000 * (time.perf_counter() - start))
    return sorted(times)[TIMES // 2]


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    draw = torch.Generator().manual_seed(lesson.seed)
    exact = {"dtype": torch.float64, "device": lesson.float64_device}
    torch.manual_seed(lesson.seed)
    model = GPT(**SMALL)
    initialise(model, std=0.5)  # large weights, so that what differs differs visibly
    model, L = model.to(**exact), SMALL["L"]

    def some(*shape: int) -> Tensor:
        return torch.randint(SMALL["V"], shape, generator=draw).to(lesson.float64_device)

    lesson.heading("One query is enough: the logits are the same")
    ours, whole = [], []
    for B, H, S, D in ((1, 1, 1, 2), (2, 3, 7, 4), (1, 2, 20, 8)):
        q, k, v = torch.randn(3, B, H, S, D, generator=draw, dtype=torch.float64).to(**exact)
        every = zip(*(part.flatten(0, 1) for part in (q, k, v)), strict=True)  # each head: (S, D) three times
        by_hand = torch.stack([last_by_hand(one[-1], keys, values) for one, keys, values in every])
        ours += [by_hand, attend(q[:, :, -1:], k, v, causal=True)[:, :, 0]]  # (B·H, D), (B, H, D)
        row = attend(q, k, v, causal=True)[:, :, -1]
        whole += [row.flatten(0, 1), row]
    lesson.proves_equal(1, ours, whole)

    plain, grown, kept = [], [], []
    for B, pieces in ((2, [13]), (3, [1] * 9), (2, [5, 1, 1, 8, 3]), (1, [1, 23])):
        ids, S = some(B, sum(pieces)), sum(pieces)
        slope = torch.randn(B, S, SMALL["V"], generator=draw, dtype=torch.float64).to(**exact)
        logits = [model(ids), read(model, ids, Growing(L), pieces)]
        for found, y in zip((plain, grown), logits, strict=True):
            found += [y, *torch.autograd.grad(y, list(model.parameters()), slope)]
        with torch.inference_mode():
            kept.append(read(model, ids, cache_for(model), pieces))
        last = "  ".join(f"{y[0, -1, 0]:+.6f}" for y in (*logits, kept[-1]))
        if len(pieces) > 1:
            print(f"{B} of {S:2} tokens, pieces of {','.join(map(str, pieces)):17}  {last}")
    every = len(list(model.parameters())) + 1
    lesson.proves_equal(2, [*grown, *kept], [*plain, *plain[::every]])
    model.requires_grad_(False)

    lesson.heading("Influence through two blocks: 6 tokens")
    x = torch.randn(1, 6, SMALL["C"], generator=draw, dtype=torch.float64).to(**exact)
    wrong = copy.deepcopy(model)
    for block in wrong.blocks:
        block.attention.sublayer.__class__ = WrongCorner
    found = {
        "at once": influence(lambda x: through(model, x, 6), x),
        "one by one": influence(lambda x: through(model, x, 1), x),
        "in threes": influence(lambda x: through(model, x, 3), x),
        "with is_causal": influence(lambda x: through(wrong, x, 3), x),
    }
    print("     ".join(f"{name:14}" for name in found).rstrip())
    for lines in zip(*map(rows, found.values()), strict=True):
        print("        ".join(lines))
    t = torch.arange(6)
    sees = (t <= t[:, None] % 3) | (t == t[:, None])  # (T, S): the first keys, and itself by the residual
    twice = (sees.int() @ sees.int() > 0).long()  # through two blocks
    lesson.proves_equal(3, [*found.values()], [causal_mask(6).long()] * 3 + [twice])

    lesson.heading("Four typical mistakes: how far off the logits are")
    ids, stay, used = some(3, 16), [2, 0], Growing(L)
    right = model(ids)  # (B, S, V)
    read(model, some(3, 8), used, 8)  # another text

    def dropped(cache: Growing | Cache) -> Tensor:
        """After 8 tokens row 1 ends; the others read on: (2, 8, V)."""
        model(ids[:, :8], cache)
        cache.select(stay)
        return read(model, ids[stay, 8:], cache, 1)

    cases = {
        "places from 0 again": (read(model, ids, FromZero(L), 4), right),
        "the wrong corner": (read(wrong, ids, Growing(L), 4), right),
        "a cache used twice": (read(model, ids, used, 4), right),
        "keys of a dropped row": (dropped(KeepsDropped(L)), right[stay, 8:]),
        "rows rightly dropped": (dropped(Growing(L)), right[stay, 8:]),
        "the same by the lab": (dropped(cache_for(model)), right[stay, 8:]),
    }
    off = [((y - wanted).norm() / wanted.norm()).item() for y, wanted in cases.values()]
    for name, distance in zip(cases, off, strict=True):
        print(f"{name:22} {distance:8.1%}")
    alike = all(y.shape == wanted.shape for y, wanted in cases.values())
    lesson.proves(4, alike and min(off[:4]) > 0.1 and max(off[4:]) < 1e-10)

    lesson.heading("The next token: operations of GPT-2, and time of 4 blocks of width 128")
    counted, formulas = [], []
    for sizes, places in ((SMALL, (1, 2, 24)), (GPT2, (1, 4, 16, 64, 256, 1_024))):
        V, C, blocks = (sizes[name] for name in "VCL")
        N, curve = 12 * blocks * C**2 + V * C, {}
        with torch.device("meta"):
            counting = GPT(**sizes)
        for S in places:
            cached, again = (operations(counting, S, which) for which in (True, False))
            counted, formulas = [*counted, cached, again], [*formulas, 2 * N + 4 * blocks * C * S]
            formulas.append(2 * N * S + 4 * blocks * C * S**2)
            curve[S] = cached, again
    print("token  1024   with a cache {:11,}   without {:15,}".format(*curve[1_024]))
    ids = some(1, 256).to(lesson.device)
    torch.manual_seed(lesson.seed)
    larger = GPT(V=65, T=256, C=128, H=4, L=4).to(lesson.device).eval()
    for S in (64, 256):
        with torch.inference_mode():
            larger(ids[:, : S - TIMES], cache := cache_for(larger))
            fast = milliseconds(lambda cache=cache: larger(ids[:, cache.length : cache.length + 1], cache))
            slow = milliseconds(lambda S=S: larger(ids[:, :S]))
        print(f"token {S:5}   with a cache {fast:8.2f} ms   without {slow:12.2f} ms")
    lesson.proves_equal(5, counted, formulas)

    lesson.heading("Bytes of the cache")
    taken, formulas = [], []
    for dtype, B, S in ((torch.float32, 4, 5), (torch.bfloat16, 2, 24)):
        typed, growing, room = copy.deepcopy(model).to(lesson.device, dtype), Growing(L), cache_for(model)
        with torch.inference_mode():
            for cache in (growing, room):
                typed(some(B, S).to(lesson.device), cache)
        for texts in (B, B // 2):
            both = growing.kept, [(block.keys, block.values) for block in room.blocks]
            taken += [sum(part.nbytes for pair in kept for part in pair) for kept in both]
            formulas += [2 * L * SMALL["C"] * places * texts * dtype.itemsize for places in (S, SMALL["T"])]
            for cache in (growing, room):
                cache.select(torch.arange(B // 2, device=lesson.device))
        print(f"{B} texts of {S:2} tokens in {dtype}: grown {taken[-4]:,}, room for 24 {taken[-3]:,}")
    lesson.proves_equal(6, taken, formulas)

    lesson.heading("A batch: prompts of different lengths, each with its own stop")
    prompts, reads = [some(length).tolist() for length in (3, 9, 1, 5, 5, 30)], []
    end = alone(model, prompts[0], 9, -1)[-1]
    ours, slow = [], []
    for texts, most, stop in ((prompts[:5], 12, end), (prompts, 12, end), (prompts, 50, -1)):
        hook = model.tokens.register_forward_hook(lambda module, given, out: reads.append(given[0].numel()))
        ours += generate(model, texts, greedy, most, stop)
        hook.remove()
        slow += [alone(model, prompt, most, stop) for prompt in texts]
        if len(texts) == 5:  # all of it within one context
            print(f"written {[*map(len, ours)]} tokens, {sum(reads)} read")
            ours.append(sum(reads))
            slow.append(sum(len(part) for part in (*texts, *slow)) - len(texts))
    lesson.proves_equal(7, ours, slow)

    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained")
    for which, name in enumerate(("with a cache", "without")):
        left.loglog(curve.keys(), [pair[which] for pair in curve.values()], "o-")
        left.text(60, (1.2e8, 4e10)[which], name, color=f"C{which}", ha="center")
    left.set(xlabel="tokens", ylabel="operations for the last of them", title="GPT-2", ylim=(5e7, 1e12))
    for name, sizes in SIZES.items():
        megabytes = [2 * sizes["L"] * sizes["C"] * S * 2 / 1e6 for S in (0, 1_024)]
        right.plot((0, 1_024), megabytes)
        right.text(1_050, megabytes[-1], name, va="center", fontsize="small")
    right.set(xlabel="tokens", ylabel="MB for one text, in 16 bits", title="the cache", xlim=(0, 1_700))
    figure.suptitle("With a cache each token costs about the same, for memory that grows", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
