"""Sampling: a model gives every token a probability, and how the next one is chosen decides what it writes.

Run:     uv run sprints/10_generation/01_sampling.py      (4 s on two cores)
Proves:  1. the likeliest word each time ends in a circle, whatever the first word; drawn words do not
         2. temperature T turns p into p^(1/T), made to add up to 1; T → 0 is greedy, T → ∞ is even
         3. top-k, top-p and min-p, token by token, leave what the lab's filters leave, with the same
            probabilities, also with ties, k > V, p = 1 and a single token left
         4. top-p leaves the fewest tokens that come to p: few of a sure guess, many of an open one
         5. the repetition penalty, number by number, equals the lab's; it lowers what was said and nothing
            else, and alone of all filters it notices a constant added to every logit
         6. in 20,000 draws, by hand and by the lab, each token comes as often as its probability says
            (chi-squared test, p > 1e-6), and none that was cut
         7. beam search by hand equals the lab's; kept wide it finds the likeliest of all texts, with an end
            and without; of width 1 it is greedy, and misses it
Shapes:  B texts, T tokens so far, V tokens to choose from, N draws
Writes:  results/10_generation/01_sampling.png
Note:    notes/01_sampling.md
"""

import math
from collections import Counter
from itertools import pairwise, product

from lab import generation as lab
from lab.generation import Sampler, beam_search, generate, greedy
from lab.gpt import GPT, initialise
from lab.lesson import Lesson, run
from lab.stories import write

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

SURE, OPEN = "to", "said"  # words that most often have the same word behind them, and one of many names
SIZES = ((1, 1), (1, 5), (2, 5), (3, 4), (50, 3))  # of beam searches: width, tokens
DRAWS = 20_000


class Pairs(nn.Module):
    """A model that looks at the last token only: row s of its table (V, V) holds what may follow s."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)
        self.settings = {"V": len(logits), "T": 1_000, "L": 0}

    def forward(self, ids: Tensor, cache=None) -> Tensor:
        """(B, T) -> logits (B, T, V). A cache (lesson 02) has nothing to keep here."""
        if cache:
            cache.length += ids.shape[1]
        return self.table[ids]


def word_pairs(words: list[str]) -> tuple[Pairs, list[str]]:
    """How often which word follows which: as a model, and its vocabulary."""
    vocabulary = sorted(set(words))
    number = {word: i for i, word in enumerate(vocabulary)}
    counts = torch.zeros(len(vocabulary), len(vocabulary))
    for (before, after), count in Counter(pairwise([*words, words[0]])).items():
        counts[number[before], number[after]] = count
    return Pairs(counts.log()), vocabulary


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


# ── By hand: a list of numbers in, which tokens stay out ──────────────────────────────────────────────────


def top_k_by_hand(chances: list[float], k: int) -> list[bool]:
    """A token stays if fewer than k are likelier."""
    return [sum(other > chance for other in chances) < k for chance in chances]


def top_p_by_hand(chances: list[float], p: float) -> list[bool]:
    """From the likeliest down, of equals the first, until they come to p."""
    left, total = set(), 0.0
    for token in sorted(range(len(chances)), key=lambda token: -chances[token]):
        if not left or total < p:
            left.add(token)
            total += chances[token]
    return [token in left for token in range(len(chances))]


def min_p_by_hand(chances: list[float], p: float) -> list[bool]:
    """A token stays if it is at least p times as likely as the likeliest."""
    return [chance >= p * max(chances) for chance in chances]


def cut(chances: list[float], left: list[bool]) -> list[float]:
    """The rest are given probability 0, and what is left is made to add up to 1."""
    total = sum(chance for chance, stays in zip(chances, left, strict=True) if stays)
    return [chance / total if stays else 0.0 for chance, stays in zip(chances, left, strict=True)]


def penalise_by_hand(logits: list[float], said: list[int], penalty: float) -> list[float]:
    """Each token that was said before, once: a positive logit is divided, a negative one multiplied."""
    logits = list(logits)
    for token in set(said):
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    return logits


def draw_by_hand(chances: list[float], u: float) -> int:
    """The tokens side by side on a line of length 1, each as wide as it is likely: which one is u in?"""
    token = 0
    while u >= chances[token]:
        u -= chances[token]
        token += 1
    return token


def beams_by_hand(model: nn.Module, prompt: list[int], width: int, most: int) -> list:
    """The best `width` texts of one token, of two, …: every one is continued in every way."""
    beams, device = [(0.0, [])], next(model.parameters()).device
    for _ in range(most):
        longer = []
        for score, text in beams:
            logits = model(torch.tensor([prompt + text], device=device))[0, -1]  # (V,)
            longer += [(score + c, [*text, i]) for i, c in enumerate(logits.log_softmax(-1).tolist())]
        beams = sorted(longer, reverse=True)[:width]
    return beams


def every_text(model: GPT, prompt: list[int], most: int, end: int | None) -> list:
    """All texts of `most` tokens, or up to an `end`, and their log probabilities, the best first."""
    found, device = {}, next(model.parameters()).device
    for text in product(range(model.settings["V"]), repeat=most):
        text = text[: text.index(end) + 1] if end in text else text
        if text not in found:
            ids = torch.tensor([[*prompt, *text]], device=device)  # (1, T)
            chances = model(ids)[0, len(prompt) - 1 : -1].log_softmax(-1)  # (tokens of the text, V)
            found[text] = chances.gather(1, ids[0, len(prompt) :, None]).sum().item()
    return sorted(((score, list(text)) for text, score in found.items()), reverse=True)


def circle(words: list[int]) -> int:
    """How long the round is that a text ends in, three times the same at least; 0 for none."""
    lengths = range(1, len(words) // 3 + 1)
    return next((n for n in lengths if words[-n:] * 3 == words[-3 * n :]), 0)


def chi_squared(drawn: Tensor, chances: Tensor) -> float:
    """How often chance alone would put the counts as far from what is expected (Pearson 1900): (N,), (V,)."""
    counts = torch.bincount(drawn, minlength=len(chances)).double()
    there = chances > 0
    if counts[~there].any():
        return 0.0
    expected = len(drawn) * chances[there]
    distance = ((counts[there] - expected).square() / expected).sum()
    return torch.special.gammaincc((there.sum() - 1).double() / 2, distance / 2).item()


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    draw = torch.Generator().manual_seed(lesson.seed)
    exact = {"dtype": torch.float64, "device": lesson.float64_device}
    none = torch.zeros(1, 0, dtype=torch.long, device=exact["device"])  # no token so far: (B, 0)

    lesson.heading("A model of word pairs, from the stories")
    pairs, vocabulary = word_pairs(" ".join(story.text for story in write(lesson.seed, 100_000)).split())
    pairs, was = pairs.requires_grad_(False).to(lesson.device), vocabulary.index("was")
    for name, pick in {
        "greedy": greedy,
        "T = 0.3": Sampler(draw, [lab.temperature(0.3)]),
        "T = 3": Sampler(draw, [lab.temperature(3)]),
        "drawn": Sampler(draw),
    }.items():
        texts = generate(pairs, [[was]] * 50, pick, 100)
        print(f"{name:7}  was", *(vocabulary[word] for word in texts[0][:11]))
    rounds = [circle(text) for text in generate(pairs, [[i] for i in range(len(vocabulary))], greedy, 100)]
    circling = min(rounds) > 0 and not any(map(circle, texts))
    lesson.proves(1, circling, f"{len(rounds)} first words, rounds of {min(rounds)} to {max(rounds)} words")

    lesson.heading("Temperature")
    logits = torch.tensor([[8.0, 4.0, 2.0, 2.0]], **exact).log()
    ours = {T: lab.temperature(T)(logits, none).softmax(-1) for T in (0.5, 1.0, 2.0, 1e-3, 1e12)}
    by_hand = [cut([p ** (1 / T) for p in softmax(logits[0].tolist())], [True] * 4) for T in (0.5, 1.0, 2.0)]
    for T, chances in zip(ours, by_hand, strict=False):
        print(f"T = {T:3}  ", "  ".join(f"{chance:.3f}" for chance in chances))
    by_hand = torch.tensor([*by_hand, [1, 0, 0, 0], [1 / 4] * 4], **exact)
    lesson.proves_equal(2, torch.cat([*ours.values()]), by_hand)

    lesson.heading("What is left, found token by token")
    ties = torch.tensor([[4, 2, 2, 1, 1], [1, 1, 1, 1, 0]]).log().to(**exact)  # also a probability of 0
    texts = [torch.randn(3, V, generator=draw, dtype=torch.float64).to(**exact) * 2 for V in (1, 2, 7, 40)]
    cuts = (
        (lab.top_k, top_k_by_hand, (1, 2, 3, 50)),
        (lab.top_p, top_p_by_hand, (0.0, 0.45, 0.7, 0.95, 1.0)),
        (lab.min_p, min_p_by_hand, (0.0, 0.1, 0.6, 1.0)),
    )
    ours, by_hand = [], []
    for logits, (filter_, hand, settings) in product([ties, *texts], cuts):
        rows = [softmax(row) for row in logits.tolist()]
        for setting in settings:
            chances = filter_(setting)(logits, none).softmax(-1)  # (B, V)
            expected = torch.tensor([cut(row, hand(row, setting)) for row in rows], **exact)
            ours, by_hand = [*ours, chances, chances > 0], [*by_hand, expected, expected > 0]
    lesson.proves_equal(3, ours, by_hand)

    lesson.heading("A sure guess and an open one")
    filters = {"top-k 10": lab.top_k(10), "top-p 0.9": lab.top_p(0.9), "min-p 0.1": lab.min_p(0.1)}
    table, counts = pairs.table.to(**exact), {}  # (V, V)
    print("              likeliest      words", *filters, sep="   ")
    for word in (SURE, OPEN):
        row = table[vocabulary.index(word)][None]  # (1, V)
        counts[word] = [change(row, none).isfinite().sum().item() for change in filters.values()]
        best, most = f"{vocabulary[row.argmax()]} {row.softmax(-1).max():.0%}", row.isfinite().sum()
        print(f"after {word:5}   {best:12} {most:8}", *(f"{count:8}" for count in counts[word]), sep="   ")
    chances, kept = table.softmax(-1), lab.top_p(0.9)(table, none).isfinite()  # (V, V) each
    total, least = (chances * kept).sum(-1), chances.where(kept, 1).amin(-1)  # (V,)
    fewest = bool((total > 0.9 - 1e-9).all() and (total - least < 0.9 + 1e-9).all())
    lesson.proves(4, fewest and counts[SURE][1] < 15 and counts[OPEN][1] > 30, f"after {len(table)} words")

    lesson.heading("Repetition penalty")
    ours, by_hand = [], []
    for (B, T, V), penalty in product(((1, 1, 2), (3, 5, 4), (2, 9, 40)), (1.0, 1.2, 5.0)):
        logits = torch.randn(B, V, generator=draw, dtype=torch.float64).to(**exact) * 2
        ids = torch.randint(V, (B, T), generator=draw)
        ours.append(lab.repetition_penalty(penalty)(logits, ids.to(logits.device)))
        rows = zip(logits.tolist(), ids.tolist(), strict=True)
        by_hand.append(torch.tensor([penalise_by_hand(*row, penalty) for row in rows], **exact))
    said = torch.zeros(B, V, dtype=torch.bool).scatter(1, ids, True).to(logits.device)
    only_lower = bool((ours[-1] < logits)[said].all() and (ours[-1] == logits)[~said].all())
    others, moved = [lab.temperature(0.7), *filters.values()], []
    for change in (*others, lab.repetition_penalty(1.2)):
        before, after = (change(x, ids.to(x.device)).softmax(-1) for x in (logits, logits + 3))
        moved.append((after - before).abs().max().item())
    *still, penalised = moved
    print(f"3 added to every logit: the penalty's moves by {penalised:.3f}, the others' by {max(still):.0e}")
    held = only_lower, max(still) < 1e-10, penalised > 1e-4
    lesson.proves_equal(5, [*ours, *held], [*by_hand, True, True, True])

    lesson.heading(f"Drawn {DRAWS:,} times, and how often chance would be farther off")
    logits, unlikely = (2 + 10 * torch.rand(1, 10, generator=draw)).log(), []
    ids = torch.tensor([[3, 7, 7]])
    for name, changes in {
        "no filter": [],
        "temperature 0.7": [lab.temperature(0.7)],
        "top-k 4": [lab.top_k(4)],
        "top-p 0.6": [lab.top_p(0.6)],
        "min-p 0.5": [lab.min_p(0.5)],
        "penalty 1.5": [lab.repetition_penalty(1.5)],
        "penalty, T, top-p": [lab.repetition_penalty(1.5), lab.temperature(3), lab.top_p(0.5)],
    }.items():
        changed = logits
        for change in changes:
            changed = change(changed, ids)
        chances = softmax(changed[0].tolist())
        points = torch.rand(DRAWS, generator=draw, dtype=torch.float64).tolist()
        hand = torch.tensor([draw_by_hand(chances, u) for u in points])  # (N,)
        many = (given.expand(DRAWS, -1).to(lesson.device) for given in (logits, ids))  # (N, V), (N, T)
        ours = Sampler(draw, changes)(*many).cpu()  # (N,)
        both = [chi_squared(drawn, torch.tensor(chances)) for drawn in (hand, ours)]
        left = sum(chance > 0 for chance in chances)
        print(f"{name:17} {left:2} tokens   by hand p = {both[0]:.3f}   the lab p = {both[1]:.3f}")
        unlikely += both
    lesson.proves(6, min(unlikely) > 1e-6)

    lesson.heading("Beam search")
    tiny = torch.tensor([[0.0, 0.6, 0.4], [0.2, 0.5, 0.3], [0.05, 0.05, 0.9]], **exact)
    tiny, found = Pairs(tiny.log()), []
    for width in (1, 2):
        score, text = beam_search(tiny, [0], width, 2)[0]
        found.append(math.exp(score))
        print(f"width {width}   {' '.join('?ab'[i] for i in text)}   probability {found[-1]:.2f}")
    torch.manual_seed(lesson.seed)
    model = GPT(V=4, T=8, C=8, H=2, L=1).to(**exact).requires_grad_(False)
    initialise(model, std=1.0)
    ours = [beam_search(model, [2, 0], *size) for size in SIZES]
    by_hand = [beams_by_hand(model, [2, 0], *size) for size in SIZES]
    for end in (None, 1):
        ours.append(beam_search(model, [2, 0], 4**4, 4, end))
        by_hand.append(every_text(model, [2, 0], 4, end))
    alone = [beam_search(model, [first], 1, 6)[0][1] for first in range(4)]
    surest = generate(model, [[first] for first in range(4)], greedy, 6)
    lesson.proves_equal(7, [*ours, alone, found[0] < found[1]], [*by_hand, surest, True])

    figure, panels = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained", sharey=True)
    for axes, (word, left) in zip(panels, counts.items(), strict=True):
        ordered = table[vocabulary.index(word)].softmax(-1).sort(descending=True).values[:75].cpu()
        axes.bar(range(1, 76), ordered / ordered[0], width=1, color="0.8")
        for place, (name, count) in enumerate(zip(filters, left, strict=True)):
            y = 1.15 + 0.15 * place
            axes.plot([0.5, count + 0.5], [y, y], f"C{place}", linewidth=5, solid_capstyle="butt")
            axes.text(count + 3, y, f"{name} leaves {count}", va="center", fontsize="small")
        axes.set(xlim=(-3, 155), ylim=(0, 1.6), yticks=(0, 0.5, 1), xlabel="words, the likeliest first")
        axes.set_title(f"after “{word}”")
    panels[0].set_ylabel("probability (likeliest: 1)")
    figure.suptitle("Top-k cuts alike after a sure guess and an open one; the others do not", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
