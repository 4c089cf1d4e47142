"""What is a token: a unit of counting. A loss per token depends on the unit, bits per byte on the text alone.

Run:     uv run sprints/08_gpt/02_what_is_a_token.py      (5 s on two cores)
Proves:  1. bytes and BPE spell any text in any script and give it back; characters only those they know
         2. a distribution over texts, cut into characters, bytes or BPE: each text keeps its nats, and the
            distribution its bits per byte, while the loss per token grows with the tokens
         3. an arithmetic coder turns a text into the bits that a table's loss says and 1 to 2 more, and back
         4. unigrams of 257, of 320, of 512 tokens: each loses more per token and fewer bits per byte
         5. the floor of the stories has the same bits per byte in any tokens, and no table is below it
         6. a token model gives a text the sum over all its spellings, by a forward pass as by a listing; the
            tokenizer's own has less, so that its bits per byte are an upper bound
         7. in other letters the stories keep their nats, but not their bits per byte; and a tokenizer that
            has never met those letters needs over six times as many tokens
Shapes:  V tokens, S of them in the training text, T in a document
Writes:  results/08_gpt/02_what_is_a_token.png
Note:    notes/02_what_is_a_token.md
"""

import math
import random
import string
from itertools import accumulate, pairwise
from operator import mul

from lab import stories
from lab.corpus import HELD_OUT
from lab.lesson import Lesson, run
from lab.ngram import NGram
from lab.tokenizer import END, Tokenizer

import matplotlib.pyplot as plt
import numpy as np
import torch

TRAINING = 300_000  # characters of stories, at least
SIZES = (257, 320, 512, 768, 1024)  # tokens; 257 are the bytes and END
EDGES = "\x7f\x80\u07ff\u0800\uffff\U00010000\U0010ffff"  # the last and first characters of each length
SENTENCES = {  # Universal Declaration of Human Rights, article 1
    "English": "All human beings are born free and equal in dignity and rights.",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。",
    "smileys": "🙂🙃🙂🙃",
}
LETTERS = "абвгдежзиклмнопрстуфхцчшыя"  # 26 of the Cyrillic ones, of two bytes each
CYRILLIC = str.maketrans(string.ascii_letters, LETTERS + LETTERS.upper())
WORDS = dict.fromkeys(("cat", "cow", "dog", "dot"), 1 / 4)  # each with its chance
Interval = tuple[int, int, int]


class Characters:
    """The characters of a text, to be used like a Tokenizer. KeyError for any other."""

    def __init__(self, text: str) -> None:
        self.known = {character: number for number, character in enumerate(sorted(set(text)))}
        self.V, self.special = len(self.known) + 1, {END: len(self.known)}

    def encode(self, text: str) -> list[int]:
        return [self.known[character] for character in text]


def utf8(character: str) -> bytes:
    """A character's bytes: 7 bits in one, or 5, 4 or 3 bits in the first and 6 in each that follows."""
    number = ord(character)
    if number < 2**7:
        return bytes([number])
    more = 1 + (number >= 2**11) + (number >= 2**16)
    first = 0b1111_0000 << (3 - more) & 0xFF | number >> 6 * more  # 110…, 1110… or 11110…
    return bytes([first, *(0b1000_0000 | number >> 6 * i & 0b11_1111 for i in reversed(range(more)))])


def documents(texts: list[str], spelling: Characters | Tokenizer) -> list[list[int]]:
    """Each text with END before it, which a model is shown first, and END behind it, which it must say."""
    end = spelling.special[END]
    return [[end, *spelling.encode(text), end] for text in texts]


def in_tokens(texts: list[list[int]], chances: list[float]) -> list[list[float]]:
    """-ln p of each token: of all texts that begin alike, the share that goes on with it. N texts, T each."""
    after, share, paths = {}, [0.0], []  # (place, token) -> place; the chance that a text comes by a place
    for ids, chance in zip(texts, chances, strict=True):
        path = [0]
        for token in ids[1:]:
            path.append(after.setdefault((path[-1], token), len(share)))
            share += [0.0] * (path[-1] == len(share))
        for place in path:
            share[place] += chance
        paths.append(path)
    return [[-math.log(share[b] / share[a]) for a, b in pairwise(path)] for path in paths]


def bits_per_byte(loss: float, tokens: float, size: float) -> float:
    """Nats per token, tokens and bytes of a text -> bits per byte."""
    return loss * tokens / math.log(2) / size


# ── Tables, and files as small as they say ────────────────────────────────────────────────────────────────


def table(texts: list[list[int]], V: int, n: int, device: torch.device) -> NGram:
    """The n-grams of documents one after the other, with a tenth added to each count."""
    stream = [texts[0][0], *(token for ids in texts for token in ids[1:])]  # (S,)
    return NGram(torch.tensor(stream, device=device), V, n, smoothing=0.1)


def nats(model: NGram, texts: list[list[int]]) -> list[float]:
    """-ln p of each document, its END included, by a table of unigrams (1, V) or bigrams (V, V)."""
    log_p = model.table.cpu().double()
    ids = [torch.tensor(text) for text in texts]
    return [-log_p[text[:-1] * (model.n - 1), text[1:]].sum().item() for text in ids]


def narrow(interval: Interval, sums: list[int], token: int) -> Interval:
    """The part of an interval that belongs to a token; `sums` are those of the counts, from 0 on: (V + 1,).

    (low, width, unit) reaches from low / unit to (low + width) / unit.
    """
    low, width, unit = interval
    return low * sums[-1] + width * sums[token], width * (sums[token + 1] - sums[token]), unit * sums[-1]


def compress(ids: list[int], sums: list[list[int]]) -> tuple[int, int]:
    """The share of [0, 1) that belongs to a document: a number in it, and how many binary digits it has."""
    interval = 0, 1, 1
    for before, token in pairwise(ids):
        interval = narrow(interval, sums[before], token)
    low, width, unit = interval
    bits = (unit // width).bit_length() + 1
    return -(-(low << bits) // unit), bits


def expand(number: int, bits: int, sums: list[list[int]], end: int) -> list[int]:
    """The document to whose share the number belongs, token by token."""
    ids, interval = [end], (0, 1, 1)
    while len(ids) == 1 or ids[-1] != end:
        row, (low, width, unit) = sums[ids[-1]], interval
        within = (number * unit - (low << bits)) * row[-1] // (width << bits)
        ids.append(int(np.searchsorted(row, within, side="right")) - 1)
        interval = narrow(interval, row, ids[-1])
    return ids


# ── All spellings of a text ───────────────────────────────────────────────────────────────────────────────


def spellings(text: bytes, tokens: set[bytes]) -> list[list[bytes]]:
    """Every sequence of tokens that reads so, by trying each beginning: "ab" -> a b, ab."""
    if not text:
        return [[]]
    heads = [text[:i] for i in range(1, len(text) + 1) if text[:i] in tokens]
    return [[head, *rest] for head in heads for rest in spellings(text[len(head) :], tokens)]


def all_spellings(text: bytes, log_p: dict[bytes, float]) -> float:
    """ln of the sum over all spellings: the first i bytes end in some token; before it are fewer bytes."""
    longest, total = max(map(len, log_p)), [0.0]  # total[i]: of the first i bytes
    for i in range(1, len(text) + 1):
        lasts = [text[start:i] for start in range(max(0, i - longest), i)]
        ways = [total[i - len(last)] + log_p[last] for last in lasts if last in log_p]
        total.append(max(ways) + math.log(sum(math.exp(way - max(ways)) for way in ways)))
    return total[-1]


def main(lesson: Lesson) -> None:
    draw = random.Random(lesson.seed)
    told = stories.write(f"held out {lesson.seed}", HELD_OUT)
    train, texts = (
        [story.text for story in stories.write(lesson.seed, TRAINING)],
        [story.text for story in told],
    )
    size = len("".join(texts).encode())
    characters, bpe = Characters("".join(train)), {V: Tokenizer.learn(train, V) for V in SIZES}
    smallest, largest = bpe[SIZES[0]], bpe[SIZES[-1]]  # the smallest has learned nothing: it knows bytes

    lesson.heading("Four texts, in bytes and in tokens learned from the stories")
    held, spelt = all(utf8(character) == character.encode() for character in EDGES), []
    for name, text in SENTENCES.items():
        spelling, unknown = b"".join(map(utf8, text)), len(set(text) - characters.known.keys())
        held = held and list(spelling) == smallest.encode(text)
        held = held and all(tokens.decode(tokens.encode(text)) == text for tokens in bpe.values())
        spelt += [name] * (unknown == 0)
        sizes = f"{len(text):3} characters {len(spelling):4} bytes {len(largest.encode(text)):4} tokens"
        print(f"{name:8} {sizes}   {unknown:2} characters that the stories lack")
    lesson.proves(1, held and spelt == ["English"], "the characters of the stories spell only English")

    lesson.heading("One distribution, cut in several ways")
    parts = {text: draw.random() for text in texts[:50]}
    world = {text: part / sum(parts.values()) for text, part in parts.items()}
    ways = {"characters": characters, "bytes": smallest, "BPE": largest}
    cases = [(WORDS, "4 words, bytes", smallest), (WORDS, "4 words, BPE", Tokenizer.learn(WORDS, 300))]
    ours, theirs, losses = [], [], []
    for chances, name, spelling in cases + [(world, f"50 stories, {way}", ways[way]) for way in ways]:
        size_of_one, p = sum(p * len(text.encode()) for text, p in chances.items()), chances.values()
        rows = in_tokens(documents(list(chances), spelling), list(p))
        tokens, total = (sum(map(mul, p, map(count, rows))) for count in (len, sum))  # expected of a text
        losses.append(total / tokens)
        ours += [*map(sum, rows), bits_per_byte(losses[-1], tokens, size_of_one)]
        theirs += [*(-math.log(q) for q in p), sum(-q * math.log2(q) for q in p) / size_of_one]
        print(f"{name:24} {tokens:6.2f} tokens of {losses[-1]:.4f} nats, {ours[-1]:.5f} bits per byte")
    held = all(math.isclose(a, b) for a, b in zip(ours, theirs, strict=True))
    rising = losses[0] < losses[1] and losses[2] == losses[3] < losses[4]
    measured = f"{len(ours)} values; stories: up to {losses[4] / losses[2]:.1f} times the loss per token"
    lesson.proves(2, held and rising, measured)

    lesson.heading("A file as small as the loss says")
    surplus = []
    for spelling in (characters, smallest, largest):
        model = table(documents(train, spelling), spelling.V, 2, lesson.device)
        counts = (10 * model.counts + 1).tolist()  # in whole numbers a tenth for each is 1 for each
        sums, asked = [[0, *accumulate(row)] for row in counts], documents(texts[:3], spelling)
        for ids, loss in zip(asked, nats(model, asked), strict=True):
            number, bits = compress(ids, sums)
            same = expand(number, bits, sums, ids[0]) == ids
            surplus.append(bits - loss / math.log(2) if same else math.inf)
        said = f"a loss of {loss:.1f} nats is {loss / math.log(2):.1f} bits, the file has {bits}"
        print(f"V {spelling.V:5,}   {8 * len(texts[2].encode()):,} bits of text; {said}")
    held = min(surplus) > 0.999 and max(surplus) < 2.001  # the table has seven digits
    lesson.proves(3, held, f"{len(surplus)} texts, {min(surplus):.2f} to {max(surplus):.2f} more")

    lesson.heading(f"Tables of {TRAINING:,} characters, on {len(texts)} held-out stories")
    floor, losses, per_byte = sum(story.nats for story in told), [], []
    print("    V    tokens   nats per token: unigrams, bigrams, floor   bits per byte: the same")
    for V, spelling in bpe.items():
        learn, ask = documents(train, spelling), documents(texts, spelling)
        totals = [sum(nats(table(learn, V, n, lesson.device), ask)) for n in (1, 2)]
        tokens = sum(len(ids) - 1 for ids in ask)
        losses.append([total / tokens for total in (*totals, floor)])
        per_byte.append([bits_per_byte(loss, tokens, size) for loss in losses[-1]])
        print(f"{V:5,}   {tokens:7,}  ", *(f"{each:9.4f}" for each in losses[-1] + per_byte[-1]))
    (a, x), (b, y), (c, z) = ((row[0], found[0]) for row, found in zip(losses[:3], per_byte, strict=False))
    lesson.proves(4, a < b < c and x > y > z)
    choices = sum(-math.log2(choice.probability) for story in told for choice in story.choices) / size
    held = all(math.isclose(found[-1], choices) for found in per_byte)
    least = min(min(found[:-1]) for found in per_byte) / choices
    lesson.proves(5, held and least > 1, f"the best table has {least:.2f} times the floor")

    lesson.heading("Many ways to spell")
    model = table(documents(train, largest), largest.V, 1, lesson.device)
    log_p = dict(zip(largest.tokens, model.table[0].cpu().tolist(), strict=True))
    end, listed, summed = log_p.pop(END.encode()), [], []
    for word in (b" hedgehog", b" Hedgehog"):
        ways = spellings(word, set(log_p))
        listed.append(math.log(sum(math.exp(sum(log_p[token] for token in way)) for way in ways)))
        summed.append(all_spellings(word, log_p))
        own = [largest.tokens[number] for number in largest.encode(word)]
        share = math.exp(sum(log_p[token] for token in own) - summed[-1])
        text = " ".join(token.decode().replace(" ", "␣") for token in own)
        print(f"{len(ways):3} ways; the tokenizer's, {text:12}, has {share:.3%} of the sum")
    own = nats(model, documents(texts, largest))
    every = [-all_spellings(text.encode(), log_p) - end for text in texts]
    held = all(math.isclose(a, b) for a, b in zip(summed, listed, strict=True))
    held = held and all(a > b for a, b in zip(own, every, strict=True))
    one, all_ = (bits_per_byte(sum(found), 1, size) for found in (own, every))
    lesson.proves(6, held, f"held-out stories: {one:.4f} bits per byte, in all spellings {all_:.4f}")

    lesson.heading("The stories in Cyrillic letters")
    found = []
    for name, letters in (("Latin", {}), ("Cyrillic", CYRILLIC)):
        learn, ask = ([text.translate(letters) for text in some] for some in (train, texts))
        spelling, size = Characters("".join(learn)), len("".join(ask).encode())
        model = table(documents(learn, spelling), spelling.V, 2, lesson.device)
        total = sum(nats(model, documents(ask, spelling)))
        bits = [bits_per_byte(each, 1, size) for each in (total, floor)]
        tokens = [len(each.encode("".join(ask))) for each in (largest, Tokenizer.learn(learn, largest.V))]
        found.append((total, *bits, *tokens))
        print(f"{name:8} {total:.0f} nats in {size:7,} bytes:", end="")
        print(" {:.4f} bits per byte, floor {:.4f}; {:7,} tokens, its own {:6,}".format(*bits, *tokens))
    latin, cyrillic = found
    held = math.isclose(latin[0], cyrillic[0], rel_tol=1e-5) and cyrillic[3] > 6 * latin[3]
    held = held and all(b < a / 1.5 for a, b in zip(latin[1:3], cyrillic[1:3], strict=True))
    lesson.proves(7, held, f"{cyrillic[3] / latin[3]:.1f} times")

    figure, panels = plt.subplots(1, 2, figsize=(6.4, 3.4), layout="constrained")
    for axes, rows, unit in zip(panels, (losses, per_byte), ("nats per token", "bits per byte"), strict=True):
        for row, name in zip(zip(*rows, strict=True), ("unigrams", "bigrams", "floor"), strict=True):
            axes.plot(SIZES, row, "k--" if name == "floor" else "o-")
            axes.annotate(name, (SIZES[2], row[2]), (6, 14), textcoords="offset points")
        axes.set(xscale="log", xticks=SIZES, xticklabels=SIZES, ylim=(0, 6), xlabel="tokens V", ylabel=unit)
        axes.minorticks_off()
    figure.suptitle("Per token even the floor depends on the cut, per byte it does not", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
