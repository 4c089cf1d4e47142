"""The bug museum: mistakes with embeddings and positions that raise no error, and what finds each of them.

Run:     uv run sprints/05_embeddings_and_positions/07_bug_museum.py      (4 s on two cores)
Proves:  1. every wrong version returns what the right one returns, in shape and dtype
         2. the named check catches every wrong version
         3. every right version passes the same check
Shapes:  B texts of T words, V different ones, D width
Note:    notes/07_bug_museum.md
"""

import math

from lab.lesson import Lesson, run
from lab.museum import Outcome, Twin, Variant, show

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, T, V, D, LONGEST = 3, 6, 20, 16, 50


def angles(t: Tensor, i: Tensor) -> Tensor:
    """Where hand i of D/2 stands at position t: (T,), (D/2,) -> (T, D/2)."""
    return t[:, None] / 10_000 ** (2 * i / D)


def sinusoids(t: Tensor) -> Tensor:
    """Sine and cosine of each hand, side by side: (T,) -> (T, D)."""
    turned = angles(t, torch.arange(D // 2))
    return torch.stack([turned.sin(), turned.cos()], dim=-1).flatten(1)  # (T, D/2, 2) -> (T, D)


def turn(x: Tensor, t: Tensor, halves: bool = False) -> Tensor:
    """Rotary positions: (T, D), (T,) -> (T, D). Partners are neighbours, or the two `halves`."""
    a, b = x.chunk(2, dim=-1) if halves else (x[:, ::2], x[:, 1::2])  # (T, D/2) each
    cos, sin = angles(t, torch.arange(D // 2)).cos(), angles(t, torch.arange(D // 2)).sin()
    turned = a * cos - b * sin, a * sin + b * cos
    return torch.cat(turned, dim=-1) if halves else torch.stack(turned, dim=-1).flatten(1)


def places(positions: Tensor) -> str:
    """Which places these positions (N, D) stand for."""
    nearest = torch.cdist(positions, sinusoids(torch.arange(LONGEST))).argmin(-1)  # (N, LONGEST) -> (N,)
    return " ".join(str(place) for place in nearest.tolist())


class Case(Twin):
    """What the exhibits have in common."""

    seed: int
    words: Tensor  # (B, T), none of them 0, which stands for padding
    table: Tensor  # (V, D)
    q: Tensor  # queries, keys and values of one text (T, D)
    k: Tensor
    v: Tensor

    def begin(self) -> None:
        torch.manual_seed(self.seed)


class PaddingTrained(Case):
    """A padding vector that is trained like a word"""

    look = "its length, 0 before training and now"
    check = "more padding changes no text's sum"
    repair = "nn.Embedding(V, D, padding_idx=0)"

    def made(self, wrong: bool) -> Outcome:
        embedding = nn.Embedding(V, D, padding_idx=None if wrong else 0)
        embedding.weight.data[0] = 0
        padded = F.pad(self.words, (0, 2))  # (B, T + 2)
        optimiser = torch.optim.SGD(embedding.parameters(), lr=0.02)
        for _ in range(20):
            loss = (embedding(padded).sum(1) - 1).square().sum(-1).mean()  # (B, T + 2, D) -> (B, D) -> ()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        sums = [embedding(words).sum(1).detach() for words in (self.words, padded)]
        return [embedding.weight.detach(), *sums]

    def seen(self, made: Outcome) -> str:
        return f"{made[0][0].norm():.2f}"

    def passes(self, variant: Variant) -> bool:
        _, *sums = variant()
        return torch.allclose(*sums, atol=1e-5)


class TiedByCopy(Case):
    """Input and output matrix tied by a copy"""

    look = "largest difference of the two after training"
    check = "after a step both are the same"
    repair = "output.weight = embedding.weight"
    steps = 20

    def made(self, wrong: bool) -> Outcome:
        embedding, output = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        if wrong:
            output.weight.data = embedding.weight.data.clone()
        else:
            output.weight = embedding.weight
        model = nn.Sequential(embedding, output)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(self.steps):
            logits = model(self.words[:, :-1])  # (B, T - 1, V)
            loss = F.cross_entropy(logits.flatten(0, 1), self.words[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return [embedding.weight.detach(), output.weight.detach()]

    def seen(self, made: Outcome) -> str:
        return f"{(made[0] - made[1]).abs().max():.2f}"

    def passes(self, variant: Variant) -> bool:
        self.steps = 1
        return torch.equal(*variant())


class ExponentTwice(Case):
    """The 2 of the exponent 2i/D taken twice"""

    look = f"sines that stay below 0.1 over {LONGEST} places, of {D // 2}:"
    check = "a loop that reads the formula aloud gives the same"
    repair = "10_000 ** (i / D)   where i already counts 0, 2, 4 …"

    def made(self, wrong: bool) -> Outcome:
        t, i = torch.arange(LONGEST), torch.arange(0, D, 2)
        turned = t[:, None] / 10_000 ** ((2 * i if wrong else i) / D)  # (LONGEST, D/2)
        return torch.stack([turned.sin(), turned.cos()], dim=-1).flatten(1)

    def seen(self, made: Outcome) -> str:
        return str((made[:, ::2].abs().amax(0) < 0.1).sum().item())

    def passes(self, variant: Variant) -> bool:
        loop = torch.zeros(LONGEST, D)
        for t in range(LONGEST):
            for i in range(D // 2):
                angle = t / 10_000 ** (2 * i / D)
                loop[t, 2 * i], loop[t, 2 * i + 1] = math.sin(angle), math.cos(angle)
        return torch.allclose(variant(), loop, atol=1e-4)


class BatchForTime(Case):
    """Positions taken along the batch, not along time"""

    look = "places of the second text's words:"
    check = "a text gets the same vectors alone and in its batch"
    repair = "positions[: x.shape[1]]   x is (B, T, D)"

    def made(self, wrong: bool) -> Outcome:
        x, positions = self.table[self.words], sinusoids(torch.arange(LONGEST))  # (B, T, D), (LONGEST, D)
        return x + (positions[: len(x), None] if wrong else positions[: x.shape[1]])

    def seen(self, made: Outcome) -> str:
        return places(made[1] - self.table[self.words[1]])

    def passes(self, variant: Variant) -> bool:
        found = []
        for self.words in (Case.words, Case.words[1:]):
            found.append(variant())
        return torch.equal(found[0][1:], found[1])


class LeftPadding(Case):
    """Positions counted from where the padding begins"""

    look = "places of the first text's words:"
    check = "padding in front changes no vector"
    repair = "t = (padded != 0).cumsum(1) - 1"
    padding = 4

    def made(self, wrong: bool) -> Outcome:
        padded = F.pad(self.words, (self.padding, 0))  # (B, padding + T)
        counted = torch.ones_like(padded) if wrong else padded != 0
        t = counted.cumsum(1) - 1  # (B, padding + T); what padding itself gets is of no interest
        vectors = self.table[padded] + sinusoids(t.flatten()).unflatten(0, t.shape)  # (B·(padding + T), D)
        return vectors[:, self.padding :]  # (B, T, D)

    def seen(self, made: Outcome) -> str:
        return places(made[0] - self.table[self.words[0]])

    def passes(self, variant: Variant) -> bool:
        found = []
        for self.padding in (0, 4):
            found.append(variant())
        return torch.allclose(*found, atol=1e-5)


class MixedLayouts(Case):
    """Queries and keys turned in different layouts"""

    look = "a score at distance 5, in a text that starts at 0, 10, 20:"
    check = "a text that starts later has the same scores"
    repair = "one function turns both"

    def made(self, wrong: bool) -> Outcome:
        starts = [start + torch.arange(T) for start in (0, 10, 20)]
        scores = [turn(self.q, t) @ turn(self.k, t, halves=wrong).T for t in starts]  # (T, T) each
        return torch.stack(scores) / math.sqrt(D)

    def seen(self, made: Outcome) -> str:
        return " ".join(f"{score:+.2f}" for score in made[:, 5, 0].tolist())

    def passes(self, variant: Variant) -> bool:
        first, *later = variant()
        return all(torch.allclose(scores, first, atol=1e-4) for scores in later)


class CachedFromZero(Case):
    """A cache whose new words all stand at position 0"""

    look = "distance from the outputs of one pass:"
    check = "one word at a time gives what one pass gives"
    repair = "t = torch.arange(len(new)) + len(keys)"

    def made(self, wrong: bool) -> Outcome:
        keys, outputs = [], []
        for q, k in zip(self.q.split(1), self.k.split(1), strict=True):  # (1, D) each: the new word
            t = torch.arange(len(q)) + (0 if wrong else len(keys))
            keys.append(turn(k, t))  # kept for all words to come
            weights = (turn(q, t) @ torch.cat(keys).T / math.sqrt(D)).softmax(-1)  # (1, words so far)
            outputs.append(weights @ self.v[: len(keys)])  # (1, D)
        return torch.cat(outputs)  # (T, D)

    def one_pass(self) -> Tensor:
        t = torch.arange(T)
        q, k, v = (x[None] for x in (turn(self.q, t), turn(self.k, t), self.v))  # (1, T, D)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0]

    def seen(self, made: Outcome) -> str:
        return " ".join(f"{distance:.1f}" for distance in (made - self.one_pass()).norm(dim=-1).tolist())

    def passes(self, variant: Variant) -> bool:
        return torch.allclose(variant(), self.one_pass(), atol=1e-4)


def main(lesson: Lesson) -> None:
    torch.set_default_device(lesson.device)
    torch.set_num_threads(1)
    draw, Case.seed = torch.Generator().manual_seed(lesson.seed), lesson.seed
    Case.words = torch.randint(1, V, (B, T), generator=draw, device="cpu").to(lesson.device)
    Case.table = torch.randn(V, D, generator=draw, device="cpu").to(lesson.device)
    Case.q, Case.k, Case.v = torch.randn(3, T, D, generator=draw, device="cpu").to(lesson.device)
    show(
        lesson,
        [PaddingTrained, TiedByCopy, ExponentTwice, BatchForTime, LeftPadding, MixedLayouts, CachedFromZero],
    )


if __name__ == "__main__":
    run(main)
