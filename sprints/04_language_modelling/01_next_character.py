"""Predicting the next character by counting: what it costs in nats, and what such a table writes.

Run:     uv run sprints/04_language_modelling/01_next_character.py      (6 s on two cores)
Proves:  1. counting in a loop, with bincount and in the lab gives the same tables for n = 1, 2, 3
         2. unsmoothed, a trigram never seen costs ∞; α from a validation part is within 1% of the best
         3. the held-out loss: a loop over characters, the table of counts and lab.ladder agree
         4. held-out loss: uniform > unigram > bigram > trigram, and the trigram stays above the floor
         5. perplexity: exp(nats) = 2^bits = the N-th root of Π 1/p; the mean of 1/p is never less
         6. a walk along the cumulative sum equals searchsorted; its draws follow the table, within 0.01
         7. lab.ladder.tell writes what a sampler without batch or state does, at two temperatures
Shapes:  S characters, V different ones; N predictions; B texts; α is added to every count
Writes:  results/04_language_modelling/01_next_character.png
Note:    notes/01_next_character.md
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from lab import ladder
from lab.corpus import LEAD, load
from lab.lesson import Lesson, run
from lab.ngram import NGram

import matplotlib.pyplot as plt
import torch
from torch import Tensor

NAMES = {1: "unigram", 2: "bigram", 3: "trigram"}
ALPHAS = 0.0, 0.0001, 0.001, 0.01, 0.1, 1.0, 10.0
DRAWS, B = 100_000, 4  # characters drawn from one row; texts told
SHOWN, COMMON = 76, 24  # characters of a text; characters in the figure


def count_by_loop(ids: list[int], V: int, n: int) -> Tensor:
    """Move along the text and keep a tally of its n-grams: (S,) -> (V, …, V), n times."""
    tally = Counter()
    for end in range(n, len(ids) + 1):
        tally[tuple(ids[end - n : end])] += 1
    counts = torch.zeros(n * (V,), dtype=torch.long)
    counts[torch.tensor(list(tally)).unbind(1)] = torch.tensor(list(tally.values()))
    return counts


def count(ids: Tensor, V: int, n: int) -> Tensor:
    """The same at once: an n-gram is a number to base V, and bincount counts numbers."""
    number = 0
    for place in range(n):
        number = number * V + ids[place : len(ids) - n + 1 + place]  # (S - n + 1,)
    return torch.bincount(number, minlength=V**n).view(n * (V,))  # (V^n,) -> (V, …, V)


def smooth(counts: Tensor, alpha: float) -> Tensor:
    """Counts -> probabilities of the last character after those before it, α added to every count."""
    more = counts + alpha
    return more / more.sum(-1, keepdim=True).clamp(min=1e-30)  # without any count: zeros, nothing is expected


def nats(counts: Tensor, p: Tensor) -> float:
    """The mean of -ln p over a text, from how often each n-gram occurs in it."""
    return -torch.xlogy(counts, p).sum().item() / counts.sum().item()  # xlogy: 0·ln 0 = 0


def lead(document: Tensor, n: int) -> Tensor:
    """A held-out document with n - 1 characters before it: (T + n - 1,)."""
    return document[LEAD - n + 1 :]


@dataclass
class SlowTable:
    """An n-gram model as nested lists of counts, one context at a time."""

    n: int
    counts: list
    alpha: float

    def row(self, ids: list[int], t: int) -> list[float]:
        """The probabilities of the V characters that can stand at place t of a text."""
        counts = self.counts
        for character in ids[t - self.n + 1 : t]:
            counts = counts[character]
        total = sum(counts) + self.alpha * len(counts)
        return [(times + self.alpha) / total for times in counts]


def pick(row: list[float], u: float) -> int:
    """Lay the probabilities end to end from 0 to 1: on which of them does u lie?"""
    character, edge = 0, row[0]
    while u >= edge:
        character += 1
        edge += row[character]
    return character


def by_sum(rows: list[list[float]], draw: torch.Generator) -> list[int]:
    """One character from each of B rows, by hand."""
    u = torch.rand(len(rows), generator=draw, dtype=torch.float64).tolist()
    return list(map(pick, rows, u))


def by_race(rows: list[list[float]], draw: torch.Generator, temperature: float) -> list[int]:
    """The same by torch.multinomial, so with the random numbers that the lab draws."""
    chances = torch.tensor(rows) ** (1 / temperature)  # (B, V)
    return torch.multinomial(chances, 1, generator=draw).flatten().tolist()


def tell_by_loop(model: SlowTable, vocabulary: str, choose: Callable) -> list[str]:
    """B texts that begin after newlines and end with their first empty line, character by character."""
    texts = [[vocabulary.index("\n")] * model.n for _ in range(B)]
    told = [""] * B
    while len(told[0]) < ladder.LONGEST and not all("\n\n" in text for text in told):
        for text, drawn in zip(texts, choose([model.row(text, len(text)) for text in texts]), strict=True):
            text.append(drawn)
        told = ["".join(vocabulary[number] for number in text[model.n :]) for text in texts]
    return [text[: text.index("\n\n") + 2] if "\n\n" in text else text for text in told]


def main(lesson: Lesson) -> None:
    corpus = load(lesson.data, lesson.seed, lesson.device)
    V, train, vocabulary = corpus.V, corpus.train, corpus.vocabulary

    lesson.heading("Counting")
    lab = [NGram(train, V, n, smoothing=1).counts.view(n * (V,)) for n in NAMES]
    slow = {n: count_by_loop(train.tolist(), V, n) for n in NAMES}
    counts = {n: count(train, V, n) for n in NAMES}
    for n, name in NAMES.items():
        most = torch.unravel_index(counts[n].argmax(), n * (V,))
        most = repr("".join(vocabulary[number] for number in most))
        print(f"{name:8} {(counts[n] > 0).sum():6,} of {V**n:7,} occur; {most} {counts[n].max():,} times")
    lesson.proves_equal(1, [list(counts.values())] * 2, [list(slow.values()), lab])

    lesson.heading("Smoothing: α is chosen on the last tenth of the training text")
    first, last = train.tensor_split([len(train) * 9 // 10])
    held = {n: sum(count(lead(document, n), V, n) for document in corpus.held_out) for n in NAMES}
    print("α       ", *(f"{alpha:8g}" for alpha in ALPHAS))
    chosen, regret = {}, 0.0
    for n, name in NAMES.items():
        known, new = count(first, V, n), count(last, V, n)
        losses = {alpha: nats(new, smooth(known, alpha)) for alpha in ALPHAS}
        chosen[n] = min(ALPHAS[1:], key=losses.get)
        print(f"{name:8}", *(f"{loss:8.4f}" for loss in losses.values()), f"  α = {chosen[n]:g}")
        best = min(nats(held[n], smooth(counts[n], alpha)) for alpha in ALPHAS[1:])
        regret = max(regret, nats(held[n], smooth(counts[n], chosen[n])) / best - 1)
    unseen = new[known == 0].sum().item()  # of the trigrams
    print(f"trigrams of the last tenth that the rest has not: {unseen:,} of {new.sum():,}")
    infinite = [math.isinf(loss) for loss in losses.values()]
    holds = infinite == [unseen > 0] + [False] * len(ALPHAS[1:]) and regret < 0.01
    lesson.proves(2, holds, f"at most {regret:.2%} above the best")

    lesson.heading("The loss on held-out documents")
    tables = {"uniform": SlowTable(1, [0] * V, alpha=1)}  # nothing counted: all characters alike
    tables |= {name: SlowTable(n, slow[n].tolist(), chosen[n]) for n, name in NAMES.items()}
    by_loop, powers, roots, means = [], [], [], []
    print("            nats    bits   perplexity   mean of 1/p")
    for name, table in tables.items():
        p = []
        for document in corpus.held_out:
            ids = lead(document, table.n).tolist()
            p += [table.row(ids, t)[ids[t]] for t in range(table.n - 1, len(ids))]
        N, bits = len(p), sum(-math.log2(x) for x in p) / len(p)
        by_loop.append(sum(-math.log(x) for x in p) / N)
        powers.append([math.exp(by_loop[-1]), 2**bits])
        roots.append(math.prod(x ** (-1 / N) for x in p))  # the root of each factor: Π 1/p would overflow
        means.append(sum(1 / x for x in p) / N)
        print(f"{name:10} {by_loop[-1]:6.4f}  {bits:6.4f}   {roots[-1]:10.4f}   {means[-1]:11.4f}")
    print(f"ln V = {math.log(V):.4f}, floor " + (f"{corpus.floor:.4f} nats" if corpus.floor else "unknown"))
    models = [NGram(train, V, n, chosen[n]) for n in NAMES]
    by_table = [nats(held[n], smooth(counts[n], chosen[n])) for n in NAMES]
    by_ladder = [ladder.nats_per_character(model, corpus) for model in models]
    lesson.proves_equal(3, [by_loop, by_loop[1:]], [[math.log(V), *by_table], by_ladder], tolerance=1e-5)
    steps = by_loop + [corpus.floor] * (corpus.floor is not None)
    falls = all(above > below for above, below in itertools.pairwise(steps))
    lesson.proves(4, falls, " > ".join(f"{loss:.3f}" for loss in steps))
    lesson.proves_equal(5, powers, [[root, root] for root in roots], tolerance=1e-9)
    lesson.proves(5, all(mean > root * (1 - 1e-9) for mean, root in zip(means, roots, strict=True)))

    lesson.heading(f"Drawing: {DRAWS:,} characters from the commonest row of each table")
    draw, far, walked, searched = torch.Generator().manual_seed(lesson.seed), 0.0, [], []
    for n in NAMES:
        rows = smooth(counts[n].cpu().double(), chosen[n]).view(-1, V)  # (V, …, V) -> (V^(n-1), V)
        row = rows[slow[n].view(-1, V).sum(-1).argmax()]  # (V,)
        u = torch.rand(DRAWS, generator=draw, dtype=torch.float64)
        searched.append(torch.searchsorted(row.cumsum(-1), u, right=True))  # (DRAWS,)
        walked.append(torch.tensor([pick(row.tolist(), x) for x in u[:1000].tolist()]))
        far = max(far, (searched[-1].bincount(minlength=V) / DRAWS - row).abs().max().item())
    lesson.proves_equal(6, walked, [drawn[:1000] for drawn in searched])
    lesson.proves(6, far < 0.01, f"at most {far:.4f} off")

    lesson.heading("What the tables write")
    for name, table in tables.items():
        text = tell_by_loop(table, vocabulary, functools.partial(by_sum, draw=draw))[0]
        print(f"{name:8} {text[:SHOWN]!r}")
    fast, slowly = [], []
    for heat in (1.0, 0.5):
        choose = functools.partial(by_race, draw=torch.Generator().manual_seed(lesson.seed), temperature=heat)
        slowly += tell_by_loop(table, vocabulary, choose)  # the last of them
        fast += ladder.tell(models[-1], corpus, B, lesson.seed, heat)
    print(f"at {heat:<5g} {fast[-1][:SHOWN]!r}")
    lesson.proves(7, fast == slowly, f"{sum(map(len, fast)):,} characters")

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    common = slow[1].argsort(descending=True)[:COMMON]
    square = smooth(slow[2], chosen[2])[common][:, common]  # (V, V) -> (COMMON, COMMON)
    image = axes.imshow(square, cmap="Blues", vmin=0, aspect="auto")
    marks = [vocabulary[number] for number in common]  # below: those that the figure's typeface has
    marks = [{" ": "␣", "\n": "↵"}.get(mark, mark if "!" <= mark < "\u0530" else "·") for mark in marks]
    places = range(len(marks))
    axes.set(xticks=places, xticklabels=marks, yticks=places, yticklabels=marks)
    axes.set(
        xlabel="next character", ylabel="character", title="Each character expects only a few others next"
    )
    axes.tick_params(length=0, labelsize=8)
    figure.colorbar(image, label="probability in the bigram table")
    lesson.save(figure)


if __name__ == "__main__":
    run(main, data="stories")
