"""The baseline, and the protocol: how to find out whether a change to a model helps.

Run:     uv run sprints/11_modern_transformer/01_the_baseline.py
         (35 s on two cores; 14 s with --steps 40)
Proves:  1. a trial depends on recipe, text and seed, and on nothing else: the same bits again, others with
            another seed
         2. what is held out for tuning comes out of the training part, at an end of a document; no training
            sees it, nor what is held out for the end: with other texts there come the same weights
         3. with five seeds each, Student's interval of the paired differences, by hand and by the lab, covers
            the true one in 94 to 96 % of simulated comparisons; 1.96 standard errors do in less than 90 %
         4. of two recipes that lie one spread apart, one run each takes the worse for the better one in over
            20 % of simulated comparisons; the means of five seeds do so in less than 8 %
         5. the best of ten equal recipes looks over 1.4 spreads better than it is on the text on which it was
            chosen, and less than 0.1 on another
         6. of three learning rates the one chosen on the training part is the baseline's; on what is held out
            it beats the next lower on five seeds of five
Shapes:  N comparisons of S seeds; B windows of T characters
Writes:  results/11_modern_transformer/01_the_baseline.png,
         results/11_modern_transformer/01_the_baseline.json
Note:    notes/01_the_baseline.md
"""

import math
from dataclasses import replace

from lab.lesson import Lesson, run
from lab.stream import TokenText
from lab.tokenizer import END
from lab.trials import (
    SEEDS,
    SETTINGS,
    Recipe,
    Trial,
    characters,
    for_tuning,
    interval,
    student,
    table,
    trial,
    trials,
)

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

RATES = (3e-3, 1e-2, 3e-2)
N, RECIPES = 20_000, 10  # simulated comparisons; equal recipes to choose among


# ── What chance does ──────────────────────────────────────────────────────────────────────────────────────


def by_hand(ours: list[float], theirs: list[float], t: float) -> tuple[float, float]:
    """The mean of the differences, seed by seed, give or take t standard errors."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((difference - mean) ** 2 for difference in differences) / (len(differences) - 1)
    error = math.sqrt(variance / len(differences))
    return mean - t * error, mean + t * error


def simulated(S: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """What S runs each of two recipes lose that lie one spread apart, the worse first: (N, S), (N, S)."""
    worse, better = torch.randn(2, N, S, generator=draw, dtype=torch.float64)
    return worse + 1, better


def coverage(differences: Tensor) -> tuple[float, float]:
    """How often the difference of 1 lies in Student's interval, and in that of 1.96 standard errors."""
    low, high = interval(differences)  # (N,), (N,)
    off = (differences.mean(-1) - 1).abs() / (differences.std(-1) / differences.shape[-1] ** 0.5)
    return ((low <= 1) & (high >= 1)).double().mean().item(), (off <= 1.96).double().mean().item()


def winners(draw: torch.Generator) -> tuple[float, float]:
    """Ten recipes that are equally good: how good does the best one look, there and on another text?"""
    here, there = torch.randn(2, N, RECIPES, generator=draw)  # (N, RECIPES) both; lower is better
    best = here.argmin(-1, keepdim=True)
    return -here.gather(-1, best).mean().item(), -there.gather(-1, best).mean().item()


# ── What no training may see ──────────────────────────────────────────────────────────────────────────────


def weights(results: Trial) -> list[Tensor]:
    return [weight.detach().cpu().clone() for weight in results.model.parameters()]


def same(ours: Trial, theirs: Trial) -> bool:
    return all(map(torch.equal, weights(ours), weights(theirs)))


def scrambled(text: TokenText) -> TokenText:
    """Another text where the held-out one was, of the same length."""
    return replace(text, held_out=tuple(document.flip(0) for document in text.held_out))


def is_cut_out(text: TokenText, tuning: TokenText) -> bool:
    """Whether training part and held-out documents of `tuning` are together the training part of `text`.

    A text of one document is cut in it, one of more between two of them.
    """
    end = text.tokenizer.special[END]
    kept = [np.array([*document[1:].tolist(), end]) for document in tuning.held_out]
    whole = np.concatenate([tuning.train, *kept])[: len(text.train)]  # a file may lack its last END
    between = len(tuning.held_out) == 1 or tuning.train[-1] == end
    return np.array_equal(whole, text.train) and between and 0.94 < len(tuning.train) / len(text.train) < 0.96


# ── The baseline ──────────────────────────────────────────────────────────────────────────────────────────


def draw_rates(tuned: dict[float, float], found: dict[str, list[Trial]]) -> Figure:
    """What each rate loses on the tuning text, and what two of them lose on the held-out one."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained", sharey=True)
    left.semilogx(list(tuned), list(tuned.values()), "o-")
    left.set_xticks(list(tuned), [f"{rate:g}" for rate in tuned])
    left.set_xticks([], minor=True)
    left.set(xlabel="learning rate", ylabel="nats per character", title="on the tuning text, one seed")
    for pair in zip(*found.values(), strict=True):
        right.plot([*found], [result.nats for result in pair], "o-", color="C1", alpha=0.7)
    right.set(xlim=(-0.5, len(found) - 0.5), title="on the held-out text, five seeds", xlabel="recipe")
    figure.suptitle("The chosen rate is better with every seed")
    return figure


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # for so small a model threads would only wait for each other
    draw, device = torch.Generator().manual_seed(lesson.seed), lesson.device
    settings = replace(SETTINGS, steps=lesson.steps)
    if lesson.data != "stories":
        lesson.needs = "the stories"  # another text may want another rate
    text = characters(lesson.data, lesson.seed)
    tuning = for_tuning(text)
    budget = settings.steps * settings.B * Recipe("").T
    print(f"{text.name}: {len(text.train):,} characters to learn from, {text.characters:,} held out;")
    print(f"a trial learns from {budget:,}, in {settings.steps} steps of {settings.B} windows")

    lesson.heading("A trial is a function")
    short = Recipe("short", settings=replace(settings, steps=5))
    once, again, other = (trial(short, tuning, device, seed) for seed in (0, 0, 1))
    held = same(once, again) and once.nats == again.nats and not same(once, other)
    lesson.proves(1, held, f"{once.nats:.6f} nats twice, {other.nats:.6f} with another seed")
    blind = trial(short, scrambled(tuning), device, 0)
    final, unseen = (trial(short, part, device, 0) for part in (text, scrambled(text)))
    held = same(once, blind) and same(final, unseen) and blind.nats != once.nats
    lesson.proves(2, held and is_cut_out(text, tuning), f"{tuning.characters:,} characters to tune on")

    lesson.heading(f"What chance does, in {N:,} simulated comparisons")
    worse, better = simulated(len(SEEDS), draw)
    sure, plain = coverage(worse - better)
    labs, t = interval(worse[:50] - better[:50]).T.tolist(), student(len(SEEDS))
    ours = [by_hand(a, b, t) for a, b in zip(worse[:50].tolist(), better[:50].tolist(), strict=True)]
    equal = np.allclose(ours, labs, rtol=1e-9, atol=1e-9)
    lesson.proves(3, equal and 0.94 < sure < 0.96 and plain < 0.9, f"{sure:.1%} and {plain:.1%}, t = {t:.2f}")
    alone, beside = simulated(1, draw)
    fooled = (alone < beside).double().mean().item()
    seldom = (worse.mean(-1) < better.mean(-1)).double().mean().item()
    lesson.proves(4, fooled > 0.2 and seldom < 0.08, f"{fooled:.1%} and {seldom:.1%}")
    looks, is_ = winners(draw)
    lesson.proves(5, looks > 1.4 and abs(is_) < 0.1, f"{looks:.2f} spreads, and {is_:.2f}")

    lesson.heading("A learning rate, chosen on the training part")
    recipes = {rate: Recipe(f"rate {rate:g}", settings=replace(settings, rate=rate)) for rate in RATES}
    tuned, found = {}, {}
    for rate in lesson.progress(RATES, "rates"):
        tuned[rate] = trial(recipes[rate], tuning, device, lesson.seed).nats
    for rate, nats in tuned.items():
        print(f"{recipes[rate].name:10}  {nats:.4f} nats per character")
    for rate in lesson.progress((SETTINGS.rate, RATES[0]), "seeds"):
        found[recipes[rate].name] = trials(recipes[rate], text, device)
    print(f"\nheld out, seeds {SEEDS[0]} to {SEEDS[-1]}")
    print(*table(found), sep="\n")
    chosen, lower = ([result.nats for result in results] for results in found.values())
    floor = f", the floor is {text.floor:.4f}" if text.floor else ""
    chance = math.log(len(np.unique(text.train)))
    print(f"a character at random costs {chance:.4f}{floor}")
    held = min(tuned, key=tuned.get) == SETTINGS.rate and all(map(float.__lt__, chosen, lower))
    lesson.proves(6, held, f"{sum(map(float.__lt__, chosen, lower))} of {len(SEEDS)}", full_run=True)
    lesson.save(draw_rates(tuned, found))
    nats = {name: [result.nats for result in results] for name, results in found.items()}
    lesson.measured(tuning=tuned, held_out=nats, floor=text.floor)


if __name__ == "__main__":
    run(main, data="stories", steps=SETTINGS.steps)
