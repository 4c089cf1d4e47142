"""Overfit one batch: the test that every training should pass first, and the mistakes that pass it too.

Run:     uv run sprints/08_gpt/06_overfit_one_batch.py      (8 s on two cores)
Proves:  1. a small GPT memorises one batch: under 0.05 nats, all tokens right; alone, it writes the batch
         2. the test exposes five training loops that do not train: their loss stays above 4 nats
         3. four other mistakes pass the test
         4. the right version passes four further checks, and each mistake fails those that are named for it
         5. where contexts repeat, counting gives a floor: the loss comes within 0.02 nats, and only a model
            that sees the future goes below
         6. on other texts the memory is worse than guessing, while as many steps on fresh batches gain a nat
Shapes:  B texts of T tokens, V different ones, C width, H heads, L blocks
Writes:  results/08_gpt/06_overfit_one_batch.png
Note:    notes/06_overfit_one_batch.md
"""

import math
import re
from collections import Counter, defaultdict
from copy import deepcopy

from lab import stories
from lab.gpt import GPT
from lab.influence import influence, rows
from lab.lesson import Lesson, run
from lab.tokenizer import END, Tokenizer

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

B, T, V, C, H, L = 6, 16, 320, 64, 4, 2
STEPS, RATE = 100, 5e-3
NAME = re.compile("|".join(stories.PRONOUNS))
CHECKS = ("alone", "influence", "place", "reads back")


class Training:
    """As it should be"""

    model = GPT

    def __init__(self, texts: Tensor, seed: int) -> None:
        torch.manual_seed(seed)
        self.texts = self.stored(texts)  # (B, T + 1)
        self.net = self.model(V, T, C, H, L).to(texts.device)
        self.optimiser = self.optimised(self.net)

    def stored(self, texts: Tensor) -> Tensor:
        return texts

    def pairs(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets: (B, T + 1) -> (B, T) twice."""
        return texts[:, :-1], texts[:, 1:]

    def optimised(self, net: GPT) -> torch.optim.Optimizer:
        return torch.optim.Adam(net.parameters(), lr=RATE, fused=True)

    def batch(self, step: int) -> Tensor:
        return self.texts

    def nats(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.mT, targets)  # (B, V, T), (B, T) -> ()

    def train(self) -> "Training":
        """STEPS steps; the loss that each of them would print is kept in self.losses."""
        losses = []
        for step in range(STEPS):
            inputs, targets = self.pairs(self.batch(step))
            losses.append(self.nats(self.net(inputs), targets))
            self.optimiser.zero_grad()
            losses[-1].backward()
            self.optimiser.step()
        self.losses = torch.stack(losses).tolist()
        return self


class OtherModel(Training):
    """Optimiser of another model"""

    def optimised(self, net: GPT) -> torch.optim.Optimizer:
        return super().optimised(deepcopy(net))  # the model was loaded, or moved, or made again since


class Detached(Training):
    """Loss detached"""

    def nats(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().nats(logits, targets).detach().requires_grad_()  # "does not require grad" was silenced


class NeverWarm(Training):
    """Warm-up that never steps"""

    def optimised(self, net: GPT) -> torch.optim.Optimizer:
        optimiser = super().optimised(net)
        torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1, step / 10))  # .step() is forgotten
        return optimiser


class Frozen(Training):
    """All frozen but the last norm"""

    def optimised(self, net: GPT) -> torch.optim.Optimizer:
        net.requires_grad_(False)
        net.norm.requires_grad_(True)
        return super().optimised(net)


class SoftmaxTwice(Training):
    """Softmax before cross-entropy"""

    def nats(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().nats(logits.softmax(-1), targets)


class Written(GPT):
    """The lab's forward(), written out so that something can be left out."""

    causal = placed = True

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)  # (B, T, C)
        if self.placed:
            x = x + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, causal=self.causal)
        return F.linear(self.norm(x), self.tokens.weight)  # (B, T, C) -> (B, T, V)


class SeesTheFuture(Training):
    """Mask forgotten"""

    caught = ("alone", "influence")

    class model(Written):
        causal = False


class NotShifted(Training):
    """Targets not shifted"""

    caught = ("alone", "influence")

    def pairs(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        return texts[:, :-1], texts[:, :-1]


class NoPlaces(Training):
    """Positions dropped"""

    caught = ("place",)

    class model(Written):
        placed = False


class OneByte(Training):
    """Tokens stored in a byte"""

    caught = ("reads back",)

    def stored(self, texts: Tensor) -> Tensor:
        return texts.to(torch.uint8).to(texts)


class Fresh(Training):
    """Another batch at every step"""

    def batch(self, step: int) -> Tensor:
        return self.texts[step * B : (step + 1) * B]


BROKEN = OtherModel, Detached, NeverWarm, Frozen, SoftmaxTwice
PASSING = SeesTheFuture, NotShifted, NoPlaces, OneByte


@torch.no_grad()
def right(training: Training) -> float:
    """The share of targets that are the likeliest token, given the text before."""
    inputs, targets = training.pairs(training.texts)
    return (training.net(inputs).argmax(-1) == targets).double().mean().item()


@torch.no_grad()
def written(training: Training) -> Tensor:
    """Free running: the first token of each text, then what the model says to what it wrote: (B, T + 1)."""
    ids = training.texts[:, :1]
    for _ in range(T):
        ids = torch.cat([ids, training.net(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def looks(training: Training, t: int = 5) -> tuple[Tensor, Tensor]:
    """Two texts of t places: which inputs a prediction is made from, and which it may be: (2t, 2t) each.

    It may be those before its target, in the same text. Given the numbers of places, pairs() shows them.
    """
    texts = training.texts[:2, : t + 1].cpu()
    places = torch.arange(texts.numel()).view_as(texts)  # t + 1 of them in a text
    read, said = (numbers.flatten() for numbers in training.pairs(places))  # (2t,) each
    allowed = (read // (t + 1) == said[:, None] // (t + 1)) & (read < said[:, None])
    return influence(deepcopy(training.net).cpu().double(), training.pairs(texts)[0]), allowed.long()


@torch.no_grad()
def places_differ(training: Training) -> bool:
    """In a text that is one token again and again, only the place can change what is said."""
    logits = training.net(training.texts[:1, :1].expand(1, T))  # (1, T, V)
    return (logits - logits[:, :1]).abs().max().item() > 0.01


def floor(texts: Tensor) -> float:
    """The least loss for whom sees what comes before, by counting how it goes on: (B, T + 1) -> nats."""
    after: dict[tuple, Counter] = defaultdict(Counter)
    for text in texts.tolist():
        for t in range(1, len(text)):
            after[tuple(text[:t])][text[t]] += 1
    nats = sum(n * math.log(found.total() / n) for found in after.values() for n in found.values())
    return nats / texts[:, 1:].numel()


@torch.no_grad()
def loss_on(texts: Tensor, net: GPT) -> float:
    """(N, T + 1) -> nats per token."""
    return F.cross_entropy(net(texts[:, :-1]).mT, texts[:, 1:]).item()


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    seed, told = lesson.seed, [story.text for story in stories.write(lesson.seed, 100_000)]
    tokenizer = Tokenizer.learn(told, V)
    named = {text[found.start()]: text[found.start() :] for text in told if (found := NAME.search(text))}
    chosen = list(named.values())[:B]  # from a name on, no two with the same initial: no contexts are alike
    texts = torch.tensor([tokenizer.encode(text)[: T + 1] for text in chosen]).to(lesson.device)
    sound, *broken = (kind(texts, seed).train() for kind in (Training, *BROKEN))

    lesson.heading(f"{B} texts of {T} tokens, {STEPS} steps; ln V is {math.log(V):.2f}")
    print("                                loss   in the end   tokens right")
    for it in (sound, *broken):
        print(f"{it.__doc__:30} {it.losses[0]:5.2f} {it.losses[-1]:12.3f} {right(it):14.0%}")
    by_itself = written(sound)
    print(f"the right one, from its first token: {tokenizer.decode(by_itself[0].tolist())!r}")
    lesson.proves(1, sound.losses[-1] < 0.05 and right(sound) == 1 and torch.equal(by_itself, texts))
    lesson.proves(2, min(min(it.losses) for it in broken) > 4)

    lesson.heading("Mistakes that memorise as well, and what finds them")
    passing, found, allowed, failed = [kind(texts, seed).train() for kind in PASSING], {}, {}, []
    print(f"{'':25}  loss  right  " + " ".join(f"{check:>10}" for check in CHECKS))
    for it in (sound, *passing):
        share = (written(it) == it.texts)[:, 1:].double().mean().item()
        found[it], allowed[it] = looks(it)
        back = all(map(str.startswith, chosen, map(tokenizer.decode, it.texts.tolist())))
        passes = share == 1, torch.equal(found[it], allowed[it]), places_differ(it), back
        failed.append(tuple(check for check, ok in zip(CHECKS, passes, strict=True) if not ok))
        marks = f"{share:.0%}", *("✓" if ok else "✗" for ok in passes[1:])
        print(
            f"{it.__doc__:25} {it.losses[-1]:5.3f} {right(it):6.0%}  " + " ".join(f"{m:>10}" for m in marks)
        )
    lesson.proves(3, all(it.losses[-1] < 0.05 and right(it) == 1 for it in passing))
    future, copying, *_ = passing
    matrices = found[sound], found[future], allowed[sound], allowed[copying]
    print("made from, right   mask forgotten   may be, right   not shifted")
    for lines in zip(*(rows(matrix[:5, :5]) for matrix in matrices), strict=True):
        print("{:18} {:16} {:15} {}".format(*lines))
    lesson.proves(4, failed == [(), *(it.caught for it in passing)])

    lesson.heading(f"{B} stories from their beginning: what follows is not certain")
    begun = [[tokenizer.special[END], *tokenizer.encode(text)[:T]] for text in told[:B]]
    begun = torch.tensor(begun).to(lesson.device)
    honest, future = (kind(begun, seed).train().losses for kind in (Training, SeesTheFuture))
    least = floor(begun)
    print(f"floor {least:.3f}   in the end {honest[-1]:.3f}   mask forgotten {future[-1]:.3f}")
    held = min(honest) > least - 1e-5 and honest[-1] < least + 0.02 and future[-1] < least - 0.02
    lesson.proves(5, held)

    lesson.heading("Other texts")
    stream = torch.tensor([number for text in told for number in tokenizer.encode(text)])
    windows = stream[: len(stream) // (T + 1) * (T + 1)].view(-1, T + 1).to(lesson.device)  # (N, T + 1)
    held_out, fresh = windows[-200:], Fresh(windows[:-200], seed).train()
    before, memory, learned = (loss_on(held_out, it.net) for it in (Training(texts, seed), sound, fresh))
    print(f"before {before:.2f}   one batch {memory:.2f}   fresh batches {learned:.2f}")
    lesson.proves(6, memory > math.log(V) and learned < before - 1)

    figure, panels = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained")
    for panel, others in zip(panels, (broken, passing), strict=True):
        for it in others:
            panel.plot(it.losses, label=it.__doc__)
        panel.plot(sound.losses, "k--", label=sound.__doc__)
        panel.legend(fontsize=7, loc="upper right")
        panel.set(xlabel="step", ylabel="loss, nats per token")
    panels[0].set(ylim=(-0.3, 10)), panels[1].set(yscale="log")
    figure.suptitle(
        "The test finds what does not train (left), not what trains wrongly (right)", size="medium"
    )
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
