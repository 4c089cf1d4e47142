"""The ladder: every model of the course on the same stories, and how far above the floor each remains.

Run:     uv run sprints/04_language_modelling/06_the_ladder.py
         (6 s on two cores; where networks must be trained first 16 s, 9 s with --steps 100)
Proves:  1. the floor is what the parser finds in the held-out stories: the -log p of their choices
         2. a rung from a lesson's JSON counts only if it was measured on these stories, by a full run
         3. uniform, unigram, bigram, trigram: each stands lower than the one before, a network lowest of all
         4. no rung stands below the floor
         5. the share of flawless stories tells stories from others: all as written, none with a word changed
Shapes:  V characters
Writes:  results/04_language_modelling/06_the_ladder.png,
         results/04_language_modelling/06_the_ladder.json
Note:    notes/06_the_ladder.md
"""

import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from lab import BadInput, ladder, stories
from lab.corpus import LEAD, Corpus, load
from lab.fit import fit
from lab.ladder import Rung
from lab.lesson import Lesson, run
from lab.mlp import WindowMLP
from lab.ngram import NGram
from lab.recurrent import RecurrentLM

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import nn

TABLES = {"uniform": (1, 1e12), "unigram": (1, 0.1), "bigram": (2, 0.1), "trigram": (3, 0.1)}  # n, smoothing


def small_networks(V: int, steps: int) -> dict[str, tuple[Callable[[], nn.Module], dict[str, float]]]:
    """What is trained here if no lesson has left a rung of that name, for about the same time each."""
    return {
        "MLP": (lambda: WindowMLP(V, K=16, E=16, H=256), {"B": 4, "T": 64, "rate": 4e-3, "steps": 4 * steps}),
        "GRU": (
            lambda: RecurrentLM(V, E=32, H=128, cell=nn.GRU),
            {"B": 8, "T": 64, "rate": 8e-3, "steps": steps},
        ),
    }


def read(folder: Path) -> Iterator[tuple[str, dict]]:
    """The JSON of every lesson that has rungs to show: which lesson, what it measured."""
    for file in sorted(folder.glob("*/*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadInput(f"{file} cannot be read ({error}); run its lesson again") from error
        if isinstance(record, dict) and "rungs" in record:
            if not (isinstance(record["rungs"], list) and all(map(ladder.is_rung, record["rungs"]))):
                raise BadInput(f"{file} has rungs that no lesson wrote; run its lesson again")
            yield record.get("lesson", file.stem), record


def counts(record: dict, rung: Rung, corpus: Corpus) -> bool:
    """Whether a rung was measured on these very stories, after all of its training."""
    same = rung["corpus"] == corpus.name and math.isclose(rung["floor"], corpus.floor)
    return same and "short" not in record


def spoilt(story: stories.Story) -> str:
    """The story, with the last word of a fact that it repeats exchanged for another of the same category."""
    *_, last = (mention for mention in story.mentions if mention.text in story.facts.values())
    words = next(words for words in stories.WORDS.values() if last.text in words)
    other = words[words.index(last.text) - 1]
    return story.text[: last.position] + other + story.text[last.position + len(last.text) :]


def draw(rungs: list[Rung], floor: float) -> Figure:
    figure, axes = plt.subplots(figsize=(6, 1.2 + 0.34 * len(rungs)), layout="constrained")
    for place, rung in enumerate(rungs):
        axes.plot(rung["nats_per_character"], place, "o", color="C1" if rung["training_seconds"] else "C0")
        axes.annotate(
            f"{rung['flawless']:.0%} flawless", (1, place), xycoords=("axes fraction", "data"),
            xytext=(-6, 0), textcoords="offset points", ha="right", va="center", fontsize="small",
        )  # fmt: skip
    axes.axvspan(floor / 2, floor, color="0.85")
    axes.annotate(
        "the floor", (floor, -0.6), ha="right", xytext=(-4, 0), textcoords="offset points", fontsize="small"
    )
    axes.set(
        xscale="log",
        xlim=(floor / 2, 25),
        xticks=(0.1, 0.2, 0.5, 1, 2, 4),
        xticklabels=(0.1, 0.2, 0.5, 1, 2, 4),
    )
    axes.minorticks_off()
    axes.set(
        yticks=range(len(rungs)), yticklabels=[rung["name"] for rung in rungs], ylim=(-1, len(rungs) - 0.4)
    )
    axes.set(xlabel="held-out nats per character (blue: counted, orange: trained)")
    axes.set_title("Every model stands above the floor")
    axes.grid(axis="y", alpha=0.3)
    return figure


def main(lesson: Lesson) -> None:
    corpus = load("stories", lesson.seed, lesson.device)

    lesson.heading("The floor")
    held_out = [stories.parse(corpus.decode(document[LEAD:])) for document in corpus.held_out]
    nats, characters = sum(story.nats for story in held_out), sum(len(story.text) for story in held_out)
    print(f"{len(held_out)} held-out stories: {nats:,.0f} nats in {characters:,} characters")
    lesson.proves_equal(1, nats / characters, corpus.floor)

    lesson.heading("The rungs")
    rungs = []
    for name, (n, smoothing) in TABLES.items():
        table = NGram(corpus.train, corpus.V, n, smoothing)
        rungs.append(ladder.rung(name, table, corpus, table.counts.numel(), 0, lesson.seed))
    found = [
        (where, rung, counts(record, rung, corpus))
        for where, record in read(lesson.results.parent)
        for rung in record["rungs"]
    ]
    for where, rung, right in found:
        print(f"{rung['name']} of {where}" + ("" if right else ": left out, other stories or a short run"))
    trained = [rung for _, rung, right in found if right]
    for name, (build, how) in small_networks(corpus.V, lesson.steps).items():
        if not any(rung["name"].startswith(name) for rung in trained):
            torch.manual_seed(lesson.seed)
            model = build().to(lesson.device)
            _, seconds = fit(model, corpus, lesson, **how)
            parameters = sum(p.numel() for p in model.parameters())
            trained.append(ladder.rung(f"{name}, small", model, corpus, parameters, seconds, lesson.seed))
            print(f"{name}: no lesson has left one, so a small one was trained for {seconds:.1f} s")
    ours = {"corpus": corpus.name, "floor": corpus.floor}
    doubts = [{**ours, "corpus": "stories -1"}, {**ours, "floor": corpus.floor + 0.01}]
    kept = [
        counts({}, ours, corpus),
        counts({"short": True}, ours, corpus),
        *(counts({}, rung, corpus) for rung in doubts),
    ]
    lesson.proves(2, kept == [True, False, False, False], f"{len(trained)} networks count")

    tables = [rung["nats_per_character"] for rung in rungs]
    rungs = sorted(rungs + trained, key=lambda rung: -rung["nats_per_character"])
    print("\n                   nats   × floor   first mistake at   flawless   training")
    for rung in rungs:
        nats = rung["nats_per_character"]
        print(
            f"{rung['name']:18} {nats:.4f} {nats / corpus.floor:8.2f} {rung['faultless_characters']:14.1f}"
            f" {rung['flawless']:13.0%} {rung['training_seconds']:8.1f} s"
        )
    print(f"{'the floor':18} {corpus.floor:.4f} {1:8.2f}")
    lowest = rungs[-1]["nats_per_character"]
    lesson.proves(3, all(above > below for above, below in pairwise([*tables, lowest])), full_run=True)
    lesson.proves(4, lowest > corpus.floor, f"the lowest is {lowest / corpus.floor - 1:.0%} above it")

    lesson.heading("What they write")
    for rung in rungs[1:]:
        print(f"{rung['name']:18} {rung['sample'][:70]!r}")
    shares = [
        ladder.flawless([story.text for story in held_out]),
        ladder.flawless(list(map(spoilt, held_out))),
    ]
    lesson.proves(5, shares == [1, 0], f"{len(held_out)} of each")
    lesson.measured(floor=corpus.floor, ladder=rungs)
    lesson.save(draw(rungs, corpus.floor))


if __name__ == "__main__":
    run(main, steps=400)
