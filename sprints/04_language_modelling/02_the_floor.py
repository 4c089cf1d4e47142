"""The floor: the least that any model of the stories can lose, known exactly because we wrote the stories.

Run:     uv run sprints/04_language_modelling/02_the_floor.py      (11 s on two cores)
Proves:  1. a tiny grammar: each of its 16 texts has one derivation, and their probabilities sum to 1
         2. its entropy is the same from that list, from Grammar.entropy() and, within its error, from samples
         3. the predictor's chances are those of the definition: of all texts that begin so, how many go on so
         4. stories parse back to the choices that wrote them; the means of a sample are the exact ones
         5. on every held-out story the predictor loses the story's information: on average, the floor
         6. any share of a bigram table makes it worse; a long table that seems better has memorised its text
         7. with 32 characters of memory no predictor comes within 10% of the floor
Shapes:  N characters held out, V in the vocabulary
Writes:  results/04_language_modelling/02_the_floor.png
Note:    notes/02_the_floor.md
"""

import contextlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from statistics import fmean, stdev

from lab.corpus import LEAD, load
from lab.lesson import Lesson, run
from lab.stories import GRAMMAR, PRONOUNS, Grammar, Story, parse, write

import matplotlib.pyplot as plt
import torch

TINY = Grammar(
    {
        "note": ["{owner=name} has a {thing=thing}. <news>"],
        "news": {
            "{owner.He} likes it.": 2,  # twice as likely as each of the others
            "It is old. <news>": 1,  # nothing is said twice: next time only the other two remain
            "Now {guest=name} wants {owner.his} {thing}.": 1,
        },
    },
    {"name": ["Mia", "Ben"], "thing": ["hat", "bell"]},
)
COUNTED = 500_000  # characters of stories to check and to count
TABLES = (1, 2, 4, 8, 16, 32)  # how many characters the tables look back
Chances = list[dict[str, float]]  # for each character of a text, which ones can come and how likely


class Predictor:
    """Reads a text for Grammar.walk, and before each character says what can come and how likely."""

    def __init__(self, text: str) -> None:
        self.text, self.position, self.chances = text, 0, []

    def choose(self, options: list, weights: list[float], lead: Callable) -> int:
        """The options still possible share the next character, until the text has decided for one."""
        begins = ["".join(words for words, _ in lead(option)) for option in options]
        left = list(range(len(options)))
        for place in itertools.count():
            if len(begins[left[0]]) == place:  # no option begins with all of another: this one is alone
                return left[0]
            shares = Counter()
            for option in left:
                shares[begins[option][place]] += weights[option]
            character = self._read(shares)
            left = [option for option in left if begins[option][place] == character]

    def say(self, words: str, fact: str) -> None:
        """Nothing to choose: each character is certain (those read while choosing are done already)."""
        for character in words[len(self.chances) - self.position :]:
            self._read({character: 1})
        self.position += len(words)

    def _read(self, shares: dict[str, float]) -> str:
        """Predict the next character, and only then look at it: IndexError where the text ends."""
        self.chances.append({character: share / sum(shares.values()) for character, share in shares.items()})
        return self.text[len(self.chances) - 1]


def predict(grammar: Grammar, text: str) -> Chances:
    """The chances of each character of a text and, if it is only a beginning, of the one after it."""
    reader = Predictor(text)
    with contextlib.suppress(IndexError):
        grammar.walk(reader)
    return reader.chances


def every_text(grammar: Grammar, beginning: str = "") -> list[str]:
    """All texts of a grammar that begin so."""
    following = predict(grammar, beginning)[len(beginning) :]  # nothing where the text is whole
    texts = [every_text(grammar, beginning + character) for chances in following for character in chances]
    return list(itertools.chain(*texts)) or [beginning]


def count(texts: dict[str, float], k: int) -> tuple[Counter, Counter]:
    """A table of the last k characters, from texts and their weights: with and without what comes next."""
    stretches, contexts = Counter(), Counter()
    for text, weight in texts.items():
        for t in range(len(text)):
            stretches[text[max(0, t - k) : t + 1]] += weight
    for stretch, weight in stretches.items():
        contexts[stretch[:-1]] += weight
    return stretches, contexts


def own_loss(stretches: Counter, contexts: Counter) -> float:
    """What a table loses on the very texts that it counted: there no other of its length loses less."""
    return sum(weight * math.log(contexts[stretch[:-1]] / weight) for stretch, weight in stretches.items())


def back_off(tables: dict[int, tuple[Counter, Counter]], text: str, V: int) -> Iterator[list[float]]:
    """The chance of each character by each table: its counts, and one vote of the next shorter table."""
    for t, character in enumerate(text):
        chances = [1 / V]
        for k, (stretches, contexts) in tables.items():
            context = text[max(0, t - k) : t]
            chances.append((stretches[context + character] + chances[-1]) / (contexts[context] + 1))
        yield chances[1:]


def forgotten(grammar: Grammar, story: Story, chances: Chances, k: int) -> float:
    """Nats that a story costs on top, at least, for a reader who sees k characters back.

    Charged are only words without an alternative, said before, and of what is out of sight the reader is told
    everything but that word: it can be any that no other fact has taken.
    """
    nats = 0.0
    for number, mention in enumerate(story.mentions):
        before, word = story.mentions[:number], story.facts[mention.fact]
        again = [other for other in before if story.facts[other.fact] == word]
        if all(chances[t][c] == 1 for t, c in enumerate(mention.text, start=mention.position)):
            edge = mention.position - k  # a word of which only the end is in sight counts as seen
            seen = {other.text for other in again if other.position + len(other.text) > edge}
            taken = {story.facts[other.fact] for other in before} - {word}
            (category,) = (set(words) for words in grammar.words.values() if word in words)
            left = [other for other in category - taken if all(fits(other, text) for text in seen)]
            nats += math.log(len(left) / sum(fits(other, mention.text) for other in left))
    return nats


def fits(word: str, text: str) -> bool:
    """Whether a text says this word, by itself or by its pronoun."""
    return text == word or text.lower() in PRONOUNS.get(word, ())


def bound(grammar: Grammar, told: list[tuple[float, Story, Chances]], k: int) -> float:
    """What stories of these weights cost, at least, with k characters of memory."""
    return sum(
        weight * (story.nats + forgotten(grammar, story, chances, k)) for weight, story, chances in told
    )


def average(values: list[float]) -> tuple[float, float]:
    """The mean of a sample and its standard error."""
    return fmean(values), stdev(values) / math.sqrt(len(values))


def main(lesson: Lesson) -> None:
    lesson.heading("A grammar so small that its texts can be listed")
    notes = {text: TINY.parse(text) for text in every_text(TINY)}
    listed = {text: math.exp(-note.nats) for text, note in notes.items()}
    for text, p in list(listed.items())[:4]:
        print(f"{text:49} probability 1/{1 / p:<2.0f}   {-math.log(p):.3f} nats")
    draw, total = random.Random(lesson.seed), sum(listed.values())
    drawn = [TINY.tell(draw) for _ in range(5_000)]
    same = len(listed) == 16 and all(notes[note.text] == note for note in drawn)
    lesson.proves(1, same and math.isclose(total, 1), f"{len(drawn):,} samples read; the sum is {total:.9f}")
    entropy, (exact, _) = sum(-p * math.log(p) for p in listed.values()), TINY.entropy()
    mean, error = average([note.nats for note in drawn])
    print(f"entropy: of the list {entropy:.4f}, exact {exact:.4f}, mean of samples {mean:.4f} ± {error:.4f}")
    lesson.proves(2, math.isclose(entropy, exact) and abs(mean - exact) < 5 * error, f"{exact:.4f} nats")

    lesson.heading("A predictor that knows the grammar")
    for text in ("Mia has a hat. ", "Mia has a hat. It is old. "):
        chances = predict(TINY, text)[-1].items()
        print(f"after {text!r:28}", *(f"{character!r} {chance:.3f}  " for character, chance in chances))
    rows, (stretches, contexts) = [], count(listed, k=100)  # the context: everything since the beginning
    for text in listed:
        for t, chances in enumerate(predict(TINY, text)):
            share = {c: stretches[text[:t] + c] / contexts[text[:t]] for c in set().union(*listed)}
            rows += [(chances.get(c, 0), share[c]) for c in share]
    lesson.proves_equal(3, *torch.tensor(rows, dtype=torch.float64).T)

    lesson.heading("The floor of the stories")
    stories, held = write(lesson.seed, COUNTED), True
    sizes = [story.nats for story in stories], [len(story.text) for story in stories]
    for name, values, exact in zip(("nats", "characters"), sizes, GRAMMAR.entropy(), strict=True):
        mean, error = average(values)
        print(f"{name:10} in a story: exactly {exact:.2f}, mean of {len(stories)} {mean:.2f} ± {error:.2f}")
        held = held and abs(mean - exact) < 5 * error
    lesson.proves(4, held and all(parse(story.text) == story for story in stories), f"{len(stories)} stories")
    corpus = load("stories", lesson.seed, lesson.device)
    held_out = [parse(corpus.decode(document[LEAD:])) for document in corpus.held_out]
    told = [(1 / len(held_out), story, predict(GRAMMAR, story.text)) for story in held_out]
    came = [[now[c] for now, c in zip(seen, story.text, strict=True)] for _, story, seen in told]
    nats = [-sum(map(math.log, chances)) for chances in came]
    sums = [sum(now.values()) for _, _, chances in told for now in chances]
    floor = sum(nats) / len(sums)
    print(f"nats per character: uniform ln V = {math.log(corpus.V):.4f}, the predictor {floor:.4f}")
    wanted = [story.nats for story in held_out], [1.0] * len(sums), [corpus.floor]
    pairs = [[torch.tensor(part).double() for part in way] for way in ((nats, sums, [floor]), wanted)]
    lesson.proves_equal(5, *pairs)
    _, first, chances = told[0]
    blind = all(predict(GRAMMAR, first.text[:t])[-1] == chances[t] for t in range(0, len(first.text), 10))
    lesson.proves(5, blind, "and it says the same when given no more than what came before")

    lesson.heading("Nothing else stays that low")
    tables = {k: count({story.text: 1 for story in stories}, k) for k in TABLES}
    by_table = itertools.chain(*(back_off(tables, story.text, corpus.V) for story in held_out))
    rows = [(p, *others) for p, others in zip(itertools.chain(*came), by_table, strict=True)]
    p = torch.tensor(rows, dtype=torch.float64)  # (N, 1 + tables): the predictor's chance and the tables'
    mixed = [-((1 - a) * p[:, 0] + a * p[:, 1]).log().mean().item() for a in (0, 0.01, 0.1, 0.5, 1)]
    print("nats with 0, 1, 10, 50, 100 % of the bigrams:", *(f"{value:.4f}" for value in mixed))
    measured = dict(zip(TABLES, (-p[:, 1:].log().mean(dim=0) / floor).tolist(), strict=True))
    own = {k: own_loss(*table) / sum(sizes[0]) for k, table in tables.items()}
    told_apart = f"32 characters: {own[32]:.2f} × floor on its own text, {measured[32]:.2f} × floor held out"
    lesson.proves(6, mixed == sorted(set(mixed)) and own[32] < 0.7 < 1.5 < min(measured.values()), told_apart)

    lesson.heading("Memory")
    weighted = [(listed[text], note, predict(TINY, text)) for text, note in notes.items()]
    least = [(bound(TINY, weighted, k), own_loss(*count(listed, k))) for k in range(50)]
    held = all(low < best + 1e-9 for low, best in least) and math.isclose(*least[-1])
    lesson.proves(7, held, "tiny texts: the bound is never above the best table there can be")
    bounds = {k: bound(GRAMMAR, told, k) / fmean(nats) for k in (*TABLES, 64, 128, 256, 512, 1024)}
    print(f"{'characters of memory':20}", *(f"{k:6}" for k in bounds))
    for name, values in (("at least, × floor", bounds), ("table, held out", measured), ("its own text", own)):
        print(f"{name:20}", *(f"{value:6.2f}" for value in values.values()))
    falling = all(more >= less for more, less in itertools.pairwise(bounds.values()))
    held = falling and bounds[32] > 1.1 and math.isclose(bounds[1024], 1)
    lesson.proves(7, held, f"stories: at least {bounds[32]:.2f} × floor")

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    axes.plot(measured.keys(), measured.values(), "o-", label="table, on held-out stories")
    axes.plot(own.keys(), own.values(), "o--", label="table, on the text that it counted")
    axes.fill_between(
        list(bounds), 0.3, list(bounds.values()), color="0.85", label="out of reach, on new stories"
    )
    axes.axhline(1, color="black", linewidth=1)
    axes.text(1024, 1.03, "the floor", ha="right", va="bottom")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xticks=list(bounds), xticklabels=list(bounds), ylim=(0.3, 25))
    axes.set_yticks((0.5, 1, 2, 5, 10, 20), (0.5, 1, 2, 5, 10, 20))
    axes.minorticks_off()
    axes.set(xlabel="characters of memory", ylabel="loss / floor")
    axes.set_title("Without memory of the whole story, the floor is out of reach")
    axes.legend(loc="upper right", fontsize="small")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
