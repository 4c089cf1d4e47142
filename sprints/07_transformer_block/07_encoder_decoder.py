"""The whole transformer: an encoder reads, a decoder writes. With inverted masks it only seems to learn.

Run:     uv run sprints/07_transformer_block/07_encoder_decoder.py
         (57 s on two cores; 20 s with --steps 250)
Proves:  1. the lab's model, each text alone without padding and nn.Transformer agree, gradients too
         2. trained with the right masks, it reverses over 99% of unseen words when it runs free
         3. a place sees the target up to itself, and of the source all but the padding
         4. with all masks inverted, nothing else, over 95% of next letters are right and under 2% of words
         5. for that model sees the letters to come and nothing of the source, and every shape is the same
         6. a model of the same kind turns dates in 8 notations into ISO 8601: over 97% of unseen days
Shapes:  B texts, S places of the source, T of the target, C width, H heads, L blocks, V characters
Writes:  results/07_transformer_block/07_encoder_decoder.png,
         results/07_transformer_block/07_encoder_decoder.json
Note:    notes/07_encoder_decoder.md
"""

import calendar
import copy
import datetime
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lab.attention import causal_mask, padding_mask
from lab.influence import draw, influence, rows
from lab.lesson import Lesson, run
from lab.transformer import Transformer

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

C, H, L, B, RATE, TESTED = 32, 4, 2, 64, 6e-3, 1_000
PAD, BEGIN, END = range(3)
LETTERS, LONGEST = "abcdefghijklmnopqrstuvwxyz", 10
FIRST_DAY, SPAN = datetime.date(1970, 1, 1), 36_525  # to the end of 2069
Pair = tuple[str, str]


def word(generator: torch.Generator) -> Pair:
    """1 to 10 random letters, and the same backwards."""
    length = torch.randint(1, LONGEST + 1, (), generator=generator)
    letters = "".join(LETTERS[i] for i in torch.randint(len(LETTERS), (length,), generator=generator))
    return letters, letters[::-1]


def ordinal(d: int) -> str:
    return f"{d}{'th' if 10 < d < 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(d % 10, 'th')}"


def notations(day: datetime.date) -> list[str]:
    """A day as people write it; in the last notation 70 to 99 are 1970 to 1999."""
    y, m, d = day.year, day.month, day.day
    month, weekday = calendar.month_name[m], calendar.day_name[day.weekday()]
    return [
        f"{d} {month} {y}",
        f"{month} {d}, {y}",
        f"{weekday[:3]} {d} {month[:3]} {y}",
        f"the {ordinal(d)} of {month} {y}",
        f"{weekday}, {month} {ordinal(d)}, {y}",
        f"{d}.{m}.{y}",
        f"{m}/{d}/{y}",
        f"{d}-{month[:3].upper()}-{y % 100:02}",
    ]


def date(generator: torch.Generator) -> Pair:
    """A day in one of the notations, and as ISO 8601 writes it."""
    day = FIRST_DAY + datetime.timedelta(torch.randint(SPAN, (), generator=generator).item())
    written = notations(day)
    return written[torch.randint(len(written), (), generator=generator)], day.isoformat()


def is_held_out(target: str) -> bool:
    """One in ten of all targets of more than three characters: the same ones in every run."""
    return len(target) > 3 and zlib.crc32(target.encode()) % 10 == 0


@dataclass(frozen=True)
class Batch:
    """Texts as numbers; the target begins with BEGIN, and what is wanted of the model ends with END."""

    source: Tensor  # (B, S)
    lengths: Tensor  # (B,) of the sources
    target: Tensor  # (B, T)
    wanted: Tensor  # (B, T)

    def masks(self, inverted: bool = False) -> dict[str, Tensor | bool]:
        """Of the source (B, 1, S) and of the target (T, T), which is causal by itself: True means look."""
        look = padding_mask(self.lengths, self.source.shape[1])
        back = causal_mask(self.target.shape[1], device=self.target.device)
        look, back = (~look, ~back) if inverted else (look, back)
        return {"source_mask": look, "mask": back, "causal": False}


class Task:
    """Pairs of texts to learn from and to be tested on, as numbers on the lesson's device."""

    def __init__(self, lesson: Lesson, pair: Callable[[torch.Generator], Pair]) -> None:
        generator, seen, self.unseen = torch.Generator().manual_seed(lesson.seed), [], []
        while len(seen) < lesson.steps * B or len(self.unseen) < TESTED:
            drawn = pair(generator)
            (self.unseen if is_held_out(drawn[1]) else seen).append(drawn)
        del seen[lesson.steps * B :], self.unseen[TESTED:]
        same = torch.Generator().manual_seed(0)  # whatever the seed and however few the steps
        pairs = [pair(same) for _ in range(20_000)]
        self.vocabulary = "".join(
            sorted({character for pair in pairs for text in pair for character in text})
        )
        self.V = len(self.vocabulary) + END + 1
        self.S, self.T = (max(map(len, texts)) for texts in zip(*pairs, strict=True))
        self.train = [self.encode(seen[i : i + B], lesson.device) for i in range(0, len(seen), B)]
        self.test = self.encode(self.unseen, lesson.device)

    def encode(self, pairs: list[Pair], device: torch.device) -> Batch:
        """N pairs -> sources (N, S), targets (N, T + 1)."""
        number = {character: END + 1 + i for i, character in enumerate(self.vocabulary)}
        source = torch.tensor([[*map(number.get, a), *[PAD] * (self.S - len(a))] for a, _ in pairs])
        wanted = torch.tensor([[*map(number.get, b), END, *[PAD] * (self.T - len(b))] for _, b in pairs])
        target = F.pad(wanted[:, :-1], (1, 0), value=BEGIN)  # moved on by one place
        lengths = torch.tensor([len(a) for a, _ in pairs])
        return Batch(*(x.to(device) for x in (source, lengths, target, wanted)))

    def decode(self, ids: Tensor) -> str:
        """(T,) -> the text before END."""
        return "".join(self.vocabulary[number - END - 1] for number in ids.tolist() if number > END)


@dataclass(frozen=True)
class Learnt:
    """A trained model, its last loss, and what it does with unseen texts."""

    model: Transformer
    loss: float
    next_right: float  # share of tokens predicted, with the right tokens before them
    written: list[str]
    whole_right: float  # share of texts, with nothing but its own tokens before them


def learn(lesson: Lesson, task: Task, inverted: bool = False) -> Learnt:
    """Maximum likelihood with teacher forcing, as in the paper; Adam, a rate that rises and falls."""
    torch.manual_seed(lesson.seed)
    model = Transformer(task.V, C, H, L, 4 * C, max(task.S, task.T + 1)).to(lesson.device)
    optimizer = torch.optim.Adam(model.parameters(), RATE, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=lesson.steps, pct_start=0.1, cycle_momentum=False
    )
    for batch in lesson.progress(task.train):
        logits = model(batch.source, batch.target, **batch.masks(inverted))  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.wanted.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    test, masks = task.test, task.test.masks(inverted)
    with torch.no_grad():
        guesses = model(test.source, test.target, **masks).argmax(-1)  # (N, T)
    right = (guesses == test.wanted)[test.wanted != PAD]
    written = list(map(task.decode, model.write(test.source, BEGIN, END, task.T + 1, **masks)))
    whole = [ours == target for ours, (_, target) in zip(written, task.unseen, strict=True)]
    return Learnt(model, loss.item(), right.double().mean().item(), written, sum(whole) / len(whole))


def one_by_one(model: Transformer, batch: Batch) -> Tensor:
    """No padding and no next letter to hide: each text alone, each prefix of its target alone: (B, T, V)."""
    texts = []
    for source, length, target in zip(batch.source, batch.lengths, batch.target, strict=True):
        encoded = model.encode(source[None, :length])  # (1, length, C)
        steps = [model.decode(target[None, : t + 1], encoded)[0, -1] for t in range(len(target))]  # (V,) each
        texts.append(torch.stack(steps))
    return torch.stack(texts)


def pytorch(model: Transformer, batch: Batch) -> Tensor:
    """nn.Transformer, whose weights the model takes over, and whose masks say True for hide: (B, T, V)."""
    parts = {"d_model": C, "nhead": H, "dim_feedforward": 4 * C, "dropout": 0.0, "batch_first": True}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**parts), L, enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**parts), L)
    theirs = nn.Transformer(C, H, custom_encoder=encoder, custom_decoder=decoder, batch_first=True)
    theirs.to(model.embedding.weight)
    for ours, block in zip([*model.encoder, *model.decoder], [*encoder.layers, *decoder.layers], strict=True):
        ours.copy(block)
    look, back, _ = batch.masks().values()
    x = theirs(
        model.embed(batch.source), model.embed(batch.target), tgt_mask=~back,
        src_key_padding_mask=~look[:, 0], memory_key_padding_mask=~look[:, 0],
    )  # fmt: skip
    return x @ model.embedding.weight.T


def sees(lesson: Lesson, learnt: Learnt, batch: Batch, inverted: bool) -> tuple[Tensor, Tensor]:
    """Which letters of the source (B·T, B·S) and of the target (B·T, B·T) change what the model says next."""
    model = copy.deepcopy(learnt.model).double().to(lesson.float64_device)
    return influence(partial(model, **batch.masks(inverted)), batch.source, batch.target)


def shapes(learnt: Learnt, batch: Batch, inverted: bool) -> list[tuple[int, ...]]:
    """Of everything that any part of the model returns."""
    found = []
    hook = nn.modules.module.register_module_forward_hook(lambda *call: found.append(tuple(call[-1].shape)))
    learnt.model(batch.source, batch.target, **batch.masks(inverted))
    hook.remove()
    return found


def picture(models: dict[str, Learnt], looks: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    figure, axes = plt.subplot_mosaic(
        [["bars", "right target", "right source"], ["bars", "inverted target", "inverted source"]],
        figsize=(6.6, 4), layout="constrained", width_ratios=(1.25, 1, 1),
    )  # fmt: skip
    for shift, (name, learnt) in zip((-0.2, 0.2), models.items(), strict=True):
        shares = [learnt.next_right, learnt.whole_right]
        bars = axes["bars"].bar([place + shift for place in range(2)], shares, 0.4, label=f"{name} masks")
        axes["bars"].bar_label(bars, [f"{share:.0%}" for share in shares], fontsize="small")
        for kind, matrix in zip(("source", "target"), looks[name], strict=True):
            draw(axes[f"{name} {kind}"], matrix, f"{name}: {kind}", kind, "next letter")
    axes["bars"].set_xticks(range(2), ["next letter,\nteacher-forced", "whole word,\nrunning free"])
    axes["bars"].set(ylim=(0, 1.35), yticks=(0, 0.5, 1), ylabel="share right, unseen words")
    axes["bars"].legend(loc="upper center", fontsize="small")
    figure.suptitle(
        "Inverted masks: nearly every next letter right, hardly a word, and no source", size="medium"
    )
    return figure


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    words = Task(lesson, word)

    lesson.heading("One model, three ways")
    torch.manual_seed(lesson.seed)
    ours = Transformer(words.V, C, H, L, 4 * C, words.T + 1).double().to(lesson.float64_device)
    batch = words.encode(words.unseen[:7], lesson.float64_device)
    theirs = pytorch(ours, batch)
    ways = [ours(batch.source, batch.target, **batch.masks()), one_by_one(ours, batch), theirs]
    generator = torch.Generator().manual_seed(lesson.seed)
    slope = torch.randn(theirs.shape, generator=generator, dtype=theirs.dtype).to(theirs)
    slopes = [torch.autograd.grad(way, ours.embedding.weight, slope)[0] for way in ways]
    count = sum(weight.numel() for weight in ours.parameters())
    print(f"{count:,} parameters; source {tuple(batch.source.shape)} -> logits {tuple(theirs.shape)}")
    lesson.proves_equal(1, [ways[0], slopes[0]] * 2, [ways[1], slopes[1], ways[2], slopes[2]])

    lesson.heading(f"Words backwards, tested on {TESTED:,} unseen ones with lengths 4 to {LONGEST}")
    models = {"right": learn(lesson, words), "inverted": learn(lesson, words, inverted=True)}
    print("masks        loss   next letter right, teacher-forced   words right, running free")
    for name, learnt in models.items():
        print(f"{name:9} {learnt.loss:7.4f} {learnt.next_right:21.1%} {learnt.whole_right:33.1%}")
    print(f"guessing  {math.log(words.V - 2):7.4f} {1 / (words.V - 2):21.1%}")
    right, inverted = models.values()
    print(f"{words.unseen[0][0]} becomes {right.written[0]!r}, with inverted masks {inverted.written[0]!r}")
    lesson.proves(2, right.whole_right > 0.99, f"{right.whole_right:.1%}", full_run=True)

    lesson.heading("What the next letter of 'mask' can depend on: right masks, then inverted ones")
    batch = words.encode([("mask", "ksam"), ("attention", "noitnetta")], lesson.float64_device)
    looks = {name: sees(lesson, learnt, batch, name == "inverted") for name, learnt in models.items()}
    S, T = batch.source.shape[1], batch.target.shape[1]
    one = {name: (source[:T, :S], target[:T, :T]) for name, (source, target) in looks.items()}
    lines = zip(*(rows(matrix) for pair in one.values() for matrix in reversed(pair)), strict=True)
    print("target                   source                   target                   source")
    for line in lines:
        print("    ".join(line))
    there = [(torch.arange(S) < len(text)).expand(T, S) for text in ("mask", "attention")]  # (T, S) each
    so_far = torch.ones(T, T).tril()
    expected = [torch.block_diag(*there).long(), torch.block_diag(so_far, so_far).long()]
    lesson.proves_equal(3, list(looks["right"]), expected)
    lesson.proves(
        4, inverted.next_right > 0.95 and inverted.whole_right < 0.02,
        f"{inverted.next_right:.1%} of letters, {inverted.whole_right:.1%} of words", full_run=True,
    )  # fmt: skip
    padding, ahead = [~row for row in there], so_far.T
    expected = [torch.block_diag(*padding).long(), torch.block_diag(ahead, ahead).long()]
    both = [shapes(learnt, words.test, name == "inverted") for name, learnt in models.items()]
    lesson.proves_equal(5, [*looks["inverted"], both[1]], [*expected, both[0]])

    lesson.heading(f"Dates; a guess is right once in {SPAN:,}")
    dates = Task(lesson, date)
    reader = learn(lesson, dates)
    day = datetime.date.fromisoformat(dates.unseen[0][1])
    batch = dates.encode([(text, day.isoformat()) for text in notations(day)], lesson.device)
    written = reader.model.write(batch.source, BEGIN, END, dates.T + 1, **batch.masks())
    for text, ids in zip(notations(day), written, strict=True):
        print(f"{text:30} -> {dates.decode(ids)}")
    lesson.proves(6, reader.whole_right > 0.97, f"{reader.whole_right:.1%} of {TESTED:,}", full_run=True)
    lesson.measured(
        words=right.whole_right, words_inverted=inverted.whole_right,
        letters=right.next_right, letters_inverted=inverted.next_right, dates=reader.whole_right,
    )  # fmt: skip
    lesson.save(picture(models, one))


if __name__ == "__main__":
    run(main, steps=800)
