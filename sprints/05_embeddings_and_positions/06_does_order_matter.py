"""Does order matter? Without positions attention reads a bag of words, and a causal mask alone counts places.

Run:     uv run sprints/05_embeddings_and_positions/06_does_order_matter.py      (10 s on two cores)
Proves:  1. attention in a loop, as two products and PyTorch's own agree, gradients too, with every bias
         2. without positions, a permuted text gives the permuted output, and every kind of position breaks it
         3. so the mean output, and the last one, of shuffled texts are equal: half of mirrored pairs is right
         4. taught to name the letter 2 back: learned, sinusoidal, rotary above 90 %; without, chance
         5. ALiBi by |t − s| gives the mirrored text the mirrored output: it cannot tell back from ahead
         6. a causal mask alone tells which of two letters came first: above 95 %, without the mask 50 %
         7. seen through that mask, one start letter weighs 1/(t + 1) at place t; a text of one letter is flat
Shapes:  B texts, T places, S places looked at, D width, V letters
Writes:  results/05_embeddings_and_positions/06_does_order_matter.png
Note:    notes/06_does_order_matter.md
"""

import math

from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

T, V, D, B, BACK = 8, 8, 64, 64, 2  # every text holds each of the 8 letters once
BASE = 100.0  # texts are short, so that no hand of the clock needs a wavelength above 100·2π


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Each place takes a mean of all values, weighted by score: (…, T, D) thrice, (T, S) -> (…, T, D)."""
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias  # (…, T, S)
    return scores.softmax(-1) @ v


def attend_by_loop(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same for a single text, one place after the other: (T, D) thrice, (T, S) -> (T, D)."""
    output = []
    for t, query in enumerate(q):
        scores = [query @ key / math.sqrt(len(key)) + bias[t, s] for s, key in enumerate(k)]
        weights = [score.exp() for score in scores]
        output.append(sum(w * value for w, value in zip(weights, v, strict=True)) / sum(weights))
    return torch.stack(output)


class Nowhere(nn.Module):
    """No positions, and the three doors by which they can enter."""

    def add(self, x: Tensor) -> Tensor:
        """To the tokens: (…, T, D) -> (…, T, D)."""
        return x

    def turn(self, x: Tensor) -> Tensor:
        """Queries and keys: (…, T, D) -> (…, T, D)."""
        return x

    def bias(self, x: Tensor) -> Tensor:
        """Onto the scores: (…, T, D) -> (T, S)."""
        return x.new_zeros(T, T)


class Learned(Nowhere):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(T, D))

    def add(self, x: Tensor) -> Tensor:
        return x + self.table


def angles(x: Tensor) -> Tensor:
    """t·ωᵢ: (…, T, D) -> (T, D/2)."""
    return torch.arange(T).to(x)[:, None] * BASE ** -(torch.arange(0, D, 2).to(x) / D)


class Sinusoidal(Nowhere):
    def add(self, x: Tensor) -> Tensor:
        return x + torch.cat([angles(x).sin(), angles(x).cos()], dim=-1)


class Rotary(Nowhere):
    def turn(self, x: Tensor) -> Tensor:
        (a, b), cos, sin = x.chunk(2, dim=-1), angles(x).cos(), angles(x).sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class ALiBi(Nowhere):
    def bias(self, x: Tensor) -> Tensor:
        t = torch.arange(T).to(x)
        return -(t[:, None] - t).abs() / 2


KINDS = {"none": Nowhere, "learned": Learned, "sinusoidal": Sinusoidal, "rotary": Rotary, "ALiBi": ALiBi}


class Reader(nn.Module):
    """One layer of attention, with a kind of position and perhaps a mask that hides what comes later."""

    def __init__(self, kind: type[Nowhere], causal: bool) -> None:
        super().__init__()
        self.letters, self.place, self.causal = nn.Embedding(V, D), kind(), causal
        self.to_qkv, self.to_logits = nn.Linear(D, 3 * D), nn.Linear(D, V)

    def mix(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        x = self.place.add(self.letters(ids))
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)  # (B, T, 3D) -> (B, T, D) each
        bias = self.place.bias(x)
        if self.causal:
            bias = bias + torch.full_like(bias, -torch.inf).triu(1)  # place t sees places up to t
        return attend(self.place.turn(q), self.place.turn(k), v, bias)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> logits (B, T, V)."""
        return self.to_logits(self.mix(ids))


def back(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which letter stood 2 back? One answer at each place that has one: (N, V) logits, (N,) targets."""
    return logits[:, BACK:].flatten(0, 1), ids[:, :-BACK].flatten()


def first(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which came first, letter 0 or 1? One answer per text, a mean over its places: (B, 2), (B,)."""
    places = ids.argsort(1)  # (B, V): where each letter stands
    return logits[..., :2].mean(1), (places[:, 0] > places[:, 1]).long()


def texts(count: int, draw: torch.Generator, device: torch.device) -> Tensor:
    """The letters in random order: (count, T)."""
    return torch.rand(count, T, generator=draw).argsort(1).to(device)


def train(lesson: Lesson, kind: type[Nowhere], causal: bool, task=back) -> tuple[Reader, float]:
    """A trained reader, and its accuracy on 1,000 new texts and their mirror images."""
    draw = torch.Generator().manual_seed(lesson.seed)
    torch.manual_seed(lesson.seed)
    model = Reader(kind, causal).to(lesson.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=lesson.steps, pct_start=0.1)
    for _ in lesson.progress(range(lesson.steps)):
        ids = texts(B, draw, lesson.device)
        loss = F.cross_entropy(*task(model(ids), ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    ids = texts(1_000, draw, lesson.device)
    ids = torch.cat([ids, ids.flip(1)])  # (2·1000, T)
    with torch.no_grad():
        logits, targets = task(model(ids), ids)
    return model, (logits.argmax(-1) == targets).double().mean().item()


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    draw = torch.Generator().manual_seed(lesson.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(lesson.float64_device)

    lesson.heading("Attention, three ways")
    ours, slow, theirs = [], [], []
    causal = torch.full((T, T), -torch.inf).to(randn(1)).triu(1)
    for bias in (torch.zeros_like(causal), causal, ALiBi().bias(randn(T, D)), randn(T, T)):
        q, k, v, slope = randn(4, T, D)
        inputs = [part.requires_grad_() for part in (q, k, v)]
        with_torch = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias)[0]
        results = attend(*inputs, bias), attend_by_loop(*inputs, bias), with_torch
        for found, result in zip((ours, slow, theirs), results, strict=True):
            found += [result, *torch.autograd.grad(result, inputs, slope)]
    lesson.proves_equal(1, [ours, ours], [slow, theirs])

    lesson.heading("A permuted text, no mask")
    ids, order = texts(50, draw, lesson.float64_device), torch.tensor([3, 6, 0, 5, 7, 1, 4, 2])
    readers, shuffled, mirrored = {}, {}, {}
    for name, kind in KINDS.items():
        torch.manual_seed(lesson.seed)
        reader = readers[name] = Reader(kind, causal=False).double().to(lesson.float64_device)
        with torch.no_grad():
            plain = reader.mix(ids)
            shuffled[name] = difference(reader.mix(ids[:, order]), plain[:, order])
            mirrored[name] = difference(reader.mix(ids.flip(1)), plain.flip(1))
        print(f"{name:10}  shuffled: off by {shuffled[name]:.3f}   mirrored: off by {mirrored[name]:.3f}")
    others = [off for name, off in shuffled.items() if name != "none"]
    lesson.proves(2, shuffled["none"] < 1e-10 and min(others) > 0.02, f"by {min(others):.2f} or more")
    before_last = torch.cat([order[order < T - 1], torch.tensor([T - 1])])  # shuffles all but the last
    with torch.no_grad():
        plain, changed = (readers["none"].mix(rows) for rows in (ids, ids[:, before_last]))
    lesson.proves_equal(3, [changed[:, -1], changed.mean(1)], [plain[:, -1], plain.mean(1)])
    _, blind = train(lesson, Nowhere, causal=False, task=first)
    lesson.proves(3, blind == 0.5, f"trained on which came first: {blind:.1%} of texts and mirror images")

    lesson.heading(f"The letter that stood {BACK} back, after training")
    right = {
        mask: {name: train(lesson, kind, mask)[1] for name, kind in KINDS.items()} for mask in (False, True)
    }
    chance = 1 / (V - 1)
    print(f"{'':10}  no mask   causal mask    (chance {chance:.1%})")
    for name in KINDS:
        print(f"{name:10} {right[False][name]:8.1%} {right[True][name]:10.1%}")
    held = min(right[mask][name] for mask in right for name in ("learned", "sinusoidal", "rotary")) > 0.9
    held = held and abs(right[False]["none"] - chance) < 0.03
    lesson.proves(4, held, full_run=True)
    others = [mirrored[name] for name in ("learned", "sinusoidal", "rotary")]
    lesson.proves(5, mirrored["ALiBi"] < 1e-10 and min(others) > 0.02, f"the others by {min(others):.2f}")

    lesson.heading("A causal mask and no positions")
    reader, seen = train(lesson, Nowhere, causal=True, task=first)
    print(f"which of two letters came first: no mask {blind:.1%}, causal mask {seen:.1%}")
    lesson.proves(6, seen > 0.95 and blind == 0.5, full_run=True)
    start = torch.zeros(T, 1).to(causal)
    start[0] = 1  # the value of the start letter; every other letter has 0, and all scores are equal
    weights = {"no mask": torch.zeros_like(causal), "causal mask": causal}
    weights = {
        name: attend(0 * randn(T, D), randn(T, D), start, bias)[:, 0] for name, bias in weights.items()
    }
    for name, weight in weights.items():
        print(f"{name:12} weight of the start:", "  ".join(f"{w:.3f}" for w in weight))
    counted = 1 / weights["causal mask"] - 1
    with torch.no_grad():
        flat = reader.mix(torch.full((1, T), 3, device=lesson.device))[0]  # (T, D)
    lesson.proves_equal(7, [counted, flat], [torch.arange(T).to(counted), flat[:1].expand(T, D)])

    figure, (bars, curve) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained", width_ratios=(3, 2))
    for shift, mask in ((-0.2, False), (0.2, True)):
        heights = list(right[mask].values())
        bars.bar(
            [i + shift for i in range(len(KINDS))], heights, 0.4, label="causal mask" if mask else "no mask"
        )
    bars.axhline(chance, color="black", linestyle=":")
    bars.set(ylabel="share of right answers", title=f"the letter {BACK} back (dotted: chance)", ylim=(0, 1.3))
    bars.set_xticks(range(len(KINDS)), KINDS, rotation=30)
    bars.legend(loc="upper center", ncols=2, fontsize="small")
    for name, weight in weights.items():
        curve.plot(weight.cpu(), "o-", label=name)
    curve.set(xlabel="place", ylabel="weight of the start letter", title="no positions", ylim=(0, 1.3))
    curve.legend(loc="upper center", fontsize="small")
    figure.suptitle("Order has to be put in, and a causal mask puts in a little", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main, steps=250)
