"""Rotary positions, query-key norm, ALiBi, no positions: what each is worth, and past the trained length.

Run:     uv run sprints/11_modern_transformer/03_rotary_and_query_key_norm.py
         (40 s on two cores; 13 s with --steps 10)
Proves:  1. pairs turned as complex numbers, and slope times distance taken from each score, equal the lab's
            Rotary and Alibi, values and gradients
         2. with either, who looks where is the same wherever a text begins; with learned places it is not
         3. query-key norm by hand equals the lab's; no score gets past √D, however large the weights, before
            or after turning; bare scores grow with their square
         4. each kind is causal, and with a cache gives the logits of one pass, read in parts or one by one
         5. without positions and without a mask a model cannot tell any order; with the causal mask one block
            cannot tell in which order what it looks back at came, and two blocks can
         6. rotary with query-key norm loses less than learned places on five seeds of five, 0.3 nats a
            character less on average
         7. past the trained length, up to four times it, rotary loses over 0.15 nats a character more than if
            it began anew, on five seeds of five; ALiBi less than 0.1
Shapes:  B texts, H heads of width D, T places, C numbers at each; V tokens
Writes:  results/11_modern_transformer/03_rotary_and_query_key_norm.png,
         results/11_modern_transformer/03_rotary_and_query_key_norm.json
Note:    notes/03_rotary_and_query_key_norm.md
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from lab.attention import MultiHeadAttention, attend, attention_weights, causal_mask
from lab.generation import cache_for
from lab.influence import influence
from lab.lesson import Lesson, run
from lab.modern import Alibi, Decoder, QueryKeyNorm, Rotary, initialise
from lab.stream import losses
from lab.transformer import EncoderBlock, FeedForward, PreNorm
from lab.trials import SEEDS, SETTINGS, Recipe, Trial, characters, table, trial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

SHAPES = ((1, 1, 1, 2), (2, 4, 9, 6), (3, 2, 20, 32))  # B, H, T, D
FAR, BIN, SOME = 256, 32, 24  # four times the trained length; places of a point; documents for it
GELU = partial(nn.GELU, approximate="tanh")
KINDS: dict[str, Callable[[int, int, int], nn.Module | None]] = {  # D, H, T -> what attention prepares with
    "rotary, query-key norm": lambda D, H, T: QueryKeyNorm(Rotary(D, T)),
    "rotary": lambda D, H, T: Rotary(D, T),
    "ALiBi": lambda D, H, T: Alibi(H),
    "no positions": lambda D, H, T: None,
}


# ── By hand ───────────────────────────────────────────────────────────────────────────────────────────────


def turned(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Numbers i and i + D / 2 are one complex number, which the place turns: (B, H, T, D) -> the same."""
    T, D = x.shape[-2:]
    pairs = torch.arange(D // 2, dtype=torch.float64)
    angles = torch.arange(T)[:, None] * base ** (-2 * pairs / D)  # (T, D / 2)
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)  # as exact as the lab's tables
    numbers = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turns.to(x.device)  # (B, H, T, D / 2)
    return torch.cat([numbers.real, numbers.imag], dim=-1)


def rotary_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, T, D) three times -> (B, H, T, D)."""
    return attention_weights(turned(q), turned(k), causal_mask(q.shape[-2], device=q.device)) @ v


def alibi_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each head takes its slope times the distance from its scores: (B, H, T, D) three times -> the same."""
    H, T, D = q.shape[1:]
    rows = []
    for h in range(H):
        for t in range(T):
            distance = t - torch.arange(t + 1, device=q.device)
            scores = (k[:, h, : t + 1] @ q[:, h, t, :, None])[..., 0] / D**0.5  # (B, t + 1)
            weights = (scores - 2 ** (-8 * (h + 1) / H) * distance).softmax(-1)
            rows.append((weights[:, None] @ v[:, h, : t + 1])[:, 0])  # (B, 1, t + 1) @ (B, t + 1, D)
    return torch.stack(rows, dim=1).unflatten(1, (H, T))  # (B, H·T, D) -> (B, H, T, D)


def by_lab(prepare: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(*prepare(q, k, 0), v, causal=True)


def with_gradients(function: Callable[..., Tensor], above: Tensor, *inputs: Tensor) -> list[Tensor]:
    """What it gives, and what comes back to each input from `above`."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, above)]


def unit(x: Tensor) -> Tensor:
    """Each vector, of length √D: (…, D) -> (…, D)."""
    return x * x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)


# ── Models ────────────────────────────────────────────────────────────────────────────────────────────────


def build(V: int, T: int, kind: str, C: int = 64, H: int = 2, L: int = 2) -> Decoder:
    """GPT-2's blocks, with another kind of positions inside attention, and no vectors for places."""
    blocks = []
    for _ in range(L):
        attention = MultiHeadAttention(C, H, prepare=KINDS[kind](C // H, H, T))
        work = FeedForward(C, 4 * C, GELU)
        blocks.append(EncoderBlock(PreNorm(attention, nn.LayerNorm(C)), PreNorm(work, nn.LayerNorm(C))))
    model = Decoder(V, T, C, blocks, nn.LayerNorm(C))
    initialise(model, std=0.1)
    return model


def in_parts(model: Decoder, ids: Tensor, parts: list[int]) -> Tensor:
    """Logits (B, T, V), read with a cache, so many tokens at a time."""
    cache = cache_for(model)
    return torch.cat([model(part, cache) for part in ids.split(parts, dim=1)], dim=1)


def reads(model: Decoder, ids: Tensor, causal: bool) -> Tensor:
    """The model's logits, with the mask or without it: (B, T) -> (B, T, V)."""
    x = model.tokens(ids)  # (B, T, C)
    for block in model.blocks:
        x = block(x, causal=causal)
    return F.linear(model.norm(x), model.tokens.weight)


def past(model: Decoder, kind: str, documents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What each token of the documents loses in windows of FAR, and of the trained length: (N,) both.

    Tables of turns are made longer; no kind has weights that depend on the place.
    """
    longer = build(model.settings["V"], FAR, kind).to(model.tokens.weight.device).eval()
    longer.load_state_dict(model.state_dict())
    return losses(longer, documents, FAR), losses(model, documents, model.settings["T"])


def by_place(nats: Tensor, places: Tensor) -> Tensor:
    """The mean of each BIN places: (N,), (N,) -> (places / BIN,)."""
    bins = places // BIN
    return torch.stack([nats[bins == number].mean() for number in range(int(bins.max()) + 1)])


# ── Claims ────────────────────────────────────────────────────────────────────────────────────────────────


def positions(lesson: Lesson, randn: Callable[..., Tensor]) -> None:
    """Claims 1 and 2."""
    device = lesson.float64_device
    lesson.heading("By hand and by the lab")
    turns = "  ".join(f"{angle:.3f}°" for angle in Rotary(8, 2).sin[1].asin().rad2deg().tolist())
    print("a place turns the pairs of D = 8 by", turns)
    print("a step back costs H = 2 heads", *Alibi(2).slopes.flatten().tolist())
    ours, labs = [], []
    for B, H, T, D in SHAPES:
        q, k, v, above = randn(4, B, H, T, D)
        for by_hand, prepare in ((rotary_by_hand, Rotary(D, T)), (alibi_by_hand, Alibi(H))):
            ours += with_gradients(by_hand, above, q, k, v)
            labs += with_gradients(partial(by_lab, prepare.to(device)), above, q, k, v)
    lesson.proves_equal(1, labs, ours)

    lesson.heading("Where a text begins")
    B, H, T, D = 2, 2, 20, 32
    starts, mask = (0, 1, 30, 200), causal_mask(T, device=device)
    q, k, places = randn(B, H, T, D), randn(B, H, T, D), randn(FAR, D)
    found = {
        "rotary": [attention_weights(*Rotary(D, FAR).to(device)(q, k, s), mask) for s in starts],
        "ALiBi": [attention_weights(*Alibi(H).to(device)(q, k, s), mask) for s in starts],
        "learned places": [
            attention_weights(q + places[s : s + T], k + places[s : s + T], mask) for s in starts
        ],
    }
    moves = {}
    for name, (first, *others) in found.items():
        moves[name] = [(other - first).abs().max().item() for other in others]
        row = "  ".join(f"{move:.6f}" for move in moves[name])
        print(f"{name:15} begun at 1, 30, 200 a weight changes by up to  {row}")
    held = max(moves["rotary"] + moves["ALiBi"]) < 1e-5 and min(moves["learned places"]) > 0.1
    lesson.proves(2, held)


def norm(lesson: Lesson, randn: Callable[..., Tensor]) -> None:
    """Claim 3."""
    lesson.heading("How large a score can get")
    B, T, D = 3, 15, 32
    x, W = randn(B, 1, T, 64), randn(2, D, 64)  # one head
    normed, then = QueryKeyNorm(), QueryKeyNorm(Rotary(D, T)).to(lesson.float64_device)
    ours, labs, tops = [], [], []
    for size in (0.1, 1.0, 100.0):
        q, k = (x @ weight.mT * size for weight in W)  # (B, 1, T, D)
        labs += normed(q, k, 0)
        ours += [unit(q), unit(k)]
        pairs = {"bare": (q, k), "normed": normed(q, k, 0), "turned": then(q, k, 0), "alike": normed(q, q, 0)}
        tops.append([(a @ b.mT).abs().max().item() / D**0.5 for a, b in pairs.values()])
        print(
            f"weights × {size:5}   "
            + "   ".join(f"{n} {top:,.3f}" for n, top in zip(pairs, tops[-1], strict=True))
        )
    lesson.proves_equal(3, labs, ours)
    bare, *bounded = zip(*tops, strict=True)
    held = max(map(max, bounded)) < D**0.5 + 1e-5 and bare[2] > 0.9 * 1e6 * bare[0]
    lesson.proves(3, held, f"√D = {D**0.5:.3f}")


def models(lesson: Lesson, draw: torch.Generator) -> None:
    """Claims 4 and 5."""
    lesson.heading("As models: causality, a cache, and order")
    device, V, T = lesson.float64_device, 11, 13
    ids = torch.randint(V, (2, T), generator=draw).to(device)
    ours, theirs = [], []
    for kind in KINDS:
        torch.manual_seed(lesson.seed)
        model = build(V, T, kind, C=12, H=2).to(device, torch.float64)
        with torch.no_grad():
            theirs += [model(ids)] * 3
            ours += [in_parts(model, ids, parts) for parts in ([1] * T, [5, 1, 1, 6], [T - 1, 1])]
        theirs.append(causal_mask(T).long())
        ours.append(influence(model, ids[:1]))
    lesson.proves_equal(4, ours, theirs)

    order = torch.randperm(T - 1, generator=draw).to(device)
    mixed = torch.cat([ids[:, order], ids[:, -1:]], dim=1)  # all but the last change places
    moves = []
    for L in (1, 2):
        torch.manual_seed(lesson.seed)
        model = build(V, T, "no positions", C=12, H=2, L=L).to(device, torch.float64)
        for masked in (False, True):
            before, after = (reads(model, one, masked)[:, -1] for one in (ids, mixed))  # (B, V)
            moves.append((after - before).abs().max().item())
            name = f"{L} block{'s' * (L > 1)}, {'the causal' if masked else 'no'} mask"
            print(f"{name:26} in another order the last logits move by {moves[-1]:.6f}")
    lesson.proves(5, max(moves[:3]) < 1e-10 and moves[3] > 1e-3)


def picture(found: dict[str, list[Trial]], curves: dict[str, Tensor]) -> Figure:
    """What each kind loses, a dot for each seed; what it costs to read on instead of beginning anew."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained")
    for row, (kind, results) in enumerate(found.items()):
        left.plot([result.nats for result in results], [row] * len(results), "o", alpha=0.7)
        if kind in curves:
            right.plot(BIN / 2 + BIN * torch.arange(FAR // BIN), curves[kind], "o-", color=f"C{row}")
    left.set_yticks(range(len(found)), [kind.replace(", ", ",\n") for kind in found])
    left.set(xlabel="nats per held-out character", ylim=(len(found) - 0.5, -0.5))
    right.axvline(64, color="0.4", linestyle="--")
    right.set(xlabel="place in the window", ylabel="nats that reading on costs")
    figure.suptitle("Rotary is ahead up to the trained length; past it, it pays", size="medium")
    return figure


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # for so small a model threads would only wait for each other
    draw = torch.Generator().manual_seed(lesson.seed)
    if lesson.data != "stories":
        lesson.needs = "the stories"

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(lesson.float64_device)

    positions(lesson, randn)
    norm(lesson, randn)
    models(lesson, draw)

    lesson.heading("Measured: the same characters to learn from, the same seeds")
    text, settings = characters(lesson.data, lesson.seed), replace(SETTINGS, steps=lesson.steps)
    learned, best, *others = ("learned places", *KINDS)
    recipes = {learned: Recipe(learned, settings=settings)}
    recipes |= {kind: Recipe(kind, partial(build, kind=kind), settings) for kind in KINDS}
    runs = [(kind, seed) for kind in (learned, best) for seed in SEEDS]
    found: dict[str, list[Trial]] = {kind: [] for kind in recipes}
    for kind, seed in lesson.progress(runs + [(kind, SEEDS[0]) for kind in others], "trials"):
        found[kind].append(trial(recipes[kind], text, lesson.device, seed))
    print(*table({kind: found[kind] for kind in (learned, best)}), sep="\n")
    print("seed 0:", "   ".join(f"{kind} {results[0].nats:.4f}" for kind, results in found.items()))
    losing, winning = (torch.tensor([result.nats for result in found[kind]]) for kind in (learned, best))
    gain = losing - winning
    better = f"{int((gain > 0).sum())} of {len(SEEDS)}, {gain.mean():.3f} less"
    lesson.proves(6, bool((gain > 0).all() and gain.mean() >= 0.3), better, full_run=True)

    lesson.heading(f"Past the trained length: places 64 to {FAR - 1} of windows of {FAR}")
    documents, curves, costs = text.held_out[:SOME], {}, {}
    places = torch.cat([torch.arange(len(document) - 1) % FAR for document in documents])  # (N,)
    for kind in KINDS:
        on, anew = map(torch.stack, zip(*(past(r.model, kind, documents) for r in found[kind]), strict=True))
        curves[kind] = by_place((on - anew).mean(0), places)
        costs[kind] = (on - anew)[:, places >= 64].mean(1).tolist()  # (seeds, N) -> (seeds,)
        row = "  ".join(f"{cost:+.3f}" for cost in costs[kind])
        print(f"{kind:22}  {anew[:, places >= 64].mean():.3f} begun anew, read on: {row}")
    held = min(costs[best] + costs["rotary"]) > 0.15 and max(costs["ALiBi"]) < 0.1
    lesson.proves(7, held, full_run=True)
    lesson.save(picture(found, curves))
    lesson.measured(held_out={kind: [r.nats for r in part] for kind, part in found.items()}, past=costs)


if __name__ == "__main__":
    run(main, data="stories", steps=SETTINGS.steps)
