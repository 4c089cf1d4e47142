"""The bug museum: mistakes with attention that raise no error, and what finds each of them.

Run:     uv run sprints/06_attention/08_bug_museum.py      (8 s on two cores)
Proves:  1. every wrong version returns what the right one returns, in shape and dtype
         2. the named check catches every wrong version
         3. every right version passes the same check
         4. four mistakes train to a lower loss than the right version, and than any honest model can reach
Shapes:  B texts of T letters, V different ones, C width, H heads of width D = C / H
Writes:  results/06_attention/08_bug_museum.png
Note:    notes/08_bug_museum.md
"""

import math
from abc import abstractmethod

from lab.attention import MultiHeadAttention, attend, causal_mask, padding_mask
from lab.influence import draw, influence, rows
from lab.lesson import Lesson, run
from lab.museum import Exhibit, Outcome, Variant, show

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, T, V, C, H, STEPS = 32, 8, 8, 32, 4, 200
D = C // H
SURE = 0.5  # how often the alphabet decides; otherwise any letter follows
OTHER = (1 - SURE) / V
ENTROPY = -(SURE + OTHER) * math.log(SURE + OTHER) - (V - 1) * OTHER * math.log(OTHER)  # in nats per letter
EARLIER = torch.ones(T, T).tril().long()  # what a causal model's influence matrix must be


def texts(count: int, generator: torch.Generator) -> Tensor:
    """After a letter comes the next of the alphabet or, in half of the cases, any letter: (count, T + 1)."""
    sure = torch.rand(count, T + 1, generator=generator) < SURE
    return torch.where(sure, 1, torch.randint(V, sure.shape, generator=generator)).cumsum(1) % V


class Case(Exhibit):
    """What the exhibits have in common: one layer of attention."""

    name: str  # in the figure
    look: str  # where one sees something
    check = "influence: lower triangular"
    expected = EARLIER  # the influence matrix that the check asks for
    seed: int
    x: Tensor  # (B, T, C), float64

    @abstractmethod
    def mix(self, x: Tensor, wrong: bool) -> Tensor:
        """Attention, either version: (B, T, C) -> (B, T, C)."""

    @abstractmethod
    def seen(self, wrong: bool) -> str:
        """What one sees of either version."""

    def begin(self) -> None:
        torch.manual_seed(self.seed)
        self.attention = MultiHeadAttention(C, H).to(Case.x)

    def made(self, wrong: bool) -> Tensor:
        self.begin()
        return self.mix(self.x, wrong)

    def wrong(self) -> Tensor:
        return self.made(wrong=True)

    def right(self) -> Tensor:
        return self.made(wrong=False)

    def symptom(self, wrong: Outcome, right: Outcome) -> str:
        return f"{self.look} {self.seen(wrong=True)}   (right: {self.seen(wrong=False)})"

    def influence(self, variant: Variant) -> Tensor:
        """Of the places of one text on each other: (T, T)."""

        def function(x: Tensor) -> Tensor:
            self.x = x
            return variant()

        return influence(function, Case.x[:1])

    def passes(self, variant: Variant) -> bool:
        return torch.equal(self.influence(variant), self.expected)

    def heads(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values: (B, T, C) -> (B, T, H, D) -> (B, H, T, D) each."""
        layers = self.attention.query, self.attention.key, self.attention.value
        return [layer(x).view(-1, T, H, D).transpose(1, 2) for layer in layers]

    def joined(self, mixed: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, T, H, D) -> (B, T, C)."""
        return self.attention.output(mixed.transpose(1, 2).flatten(2))


class Trained(Case):
    """What the exhibits have in common that are trained to name the next letter."""

    look = "loss, and what place 3 is made from:"
    losses: dict[bool, list[float]]  # of the wrong versions, and of the right ones

    def seen(self, wrong: bool) -> str:
        self.losses[wrong].append(self.trained(wrong))
        matrix = self.influence(self.wrong if wrong else self.right)
        return f"{self.losses[wrong][-1]:.2f} {rows(matrix)[3].replace(' ', '')}"

    def trained(self, wrong: bool) -> float:
        """The loss in new texts after STEPS steps."""
        self.begin()
        generator = torch.Generator().manual_seed(self.seed)
        letters, places, readout = nn.Embedding(V, C), nn.Embedding(T, C), nn.Linear(C, V)
        model = nn.ModuleList([self.attention, letters, places, readout]).to(Case.x)

        def loss(count: int) -> Tensor:
            ids = texts(count, generator).to(Case.x.device)
            x = letters(ids[:, :-1]) + places.weight  # (count, T, C)
            logits = readout(x + self.mix(x, wrong))  # (count, T, V)
            return F.cross_entropy(logits.mT, ids[:, 1:])  # (count, V, T), (count, T)

        optimiser = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
        for _ in range(STEPS):
            optimiser.zero_grad()
            loss(B).backward()
            optimiser.step()
        with torch.no_grad():
            return loss(1_000).item()


class Inverted(Trained):
    """An inverted mask: True means hide, and the attention reads look"""

    name = "inverted"
    repair = "self.attention(x, ~hidden)   or name a mask after what True means"

    def mix(self, x: Tensor, wrong: bool) -> Tensor:
        hidden = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)  # as nn.MultiheadAttention wants
        return self.attention(x, hidden if wrong else ~hidden)


class OffByOne(Trained):
    """A mask that is off by one"""

    name = "off by one"
    repair = "torch.ones(T, T).tril(0)"

    def mix(self, x: Tensor, wrong: bool) -> Tensor:
        return self.attention(x, torch.ones(T, T, device=x.device).tril(1 if wrong else 0).bool())


class Padding(Case):
    """A mask forgotten for padding"""

    name = "padding not masked"
    look = "1, 2, 3 places of padding move a word by"
    check = "influence: columns of padding empty"
    repair = "self.attention(x, padding_mask(lengths, S))"
    words = 5
    expected = (torch.arange(T) < words).long() | torch.eye(T).long()  # by its query

    def mix(self, x: Tensor, wrong: bool) -> Tensor:
        lengths = torch.full((len(x),), self.words, device=x.device)
        return self.attention(x, None if wrong else padding_mask(lengths, x.shape[1]))

    def seen(self, wrong: bool) -> str:
        made = []
        for padding in range(T - self.words + 1):
            self.x = Case.x[:, : self.words + padding]
            made.append(self.made(wrong)[:, : self.words])
        return " ".join(f"{(padded - made[0]).norm(dim=-1).mean():.2f}" for padded in made[1:])


class OverQueries(Trained):
    """Softmax over the queries: dimension 2 was that of the keys before there were heads"""

    name = "softmax(2)"
    repair = "scores.softmax(-1)"

    def mix(self, x: Tensor, wrong: bool) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.mT / math.sqrt(D)  # (B, H, T, S)
        weights = scores.masked_fill(~causal_mask(T, device=x.device), -torch.inf).softmax(2 if wrong else -1)
        return self.joined(weights @ v)


class ViewOnly(Trained):
    """Heads split by view alone, without transpose"""

    name = "view, no transpose"
    repair = "x.view(B, T, H, D).transpose(1, 2)"

    def mix(self, x: Tensor, wrong: bool) -> Tensor:
        layers = self.attention.query, self.attention.key, self.attention.value
        q, k, v = [layer(x).view(-1, H, T, D) for layer in layers] if wrong else self.heads(x)
        return self.joined(attend(q, k, v, causal=True))


class WholeWidth(Case):
    """Scores divided by √C, not √D"""

    name = "√C for √D"
    look = f"largest of {T} weights, on average"
    check = "PyTorch's own attention gives the same"
    repair = "math.sqrt(q.shape[-1])   after the heads are split"

    def weights(self, x: Tensor, wrong: bool) -> Tensor:
        q, k, _ = self.heads(x)
        scores = q @ k.mT / math.sqrt(C if wrong else D)  # (B, H, T, S)
        return scores.masked_fill(~causal_mask(T, device=x.device), -torch.inf).softmax(-1)

    def mix(self, x: Tensor, wrong: bool) -> Tensor:
        return self.joined(self.weights(x, wrong) @ self.heads(x)[2])

    def seen(self, wrong: bool) -> str:
        return f"{self.weights(Case.x, wrong)[:, :, -1].amax(-1).mean():.2f}"

    def passes(self, variant: Variant) -> bool:
        theirs = self.joined(F.scaled_dot_product_attention(*self.heads(Case.x), is_causal=True))
        return torch.allclose(variant(), theirs)


class NanToNum(Case):
    """Rows with nothing to look at, put right by nan_to_num"""

    name = "nan_to_num"
    look = "NaN in the outputs, and in their gradients:"
    check = "influence: comparison and gradient agree"
    repair = "scores + bias.masked_fill(blind, 0), and weights.masked_fill(blind, 0)"
    padding = 3  # in front: the first places look at nothing
    expected = EARLIER * (torch.arange(T) >= padding)

    def mix(self, x: Tensor, wrong: bool) -> Tensor:
        mask = causal_mask(T, device=x.device) & (torch.arange(T, device=x.device) >= self.padding)
        blind = ~mask.any(-1, keepdim=True)  # (T, 1)
        bias = torch.zeros(T, T).to(x).masked_fill(~mask, -torch.inf)
        q, k, v = self.heads(x)
        scores = q @ k.mT / math.sqrt(D)  # (B, H, T, S)
        if wrong:
            weights = (scores + bias).softmax(-1).nan_to_num(0)
        else:
            weights = (scores + bias.masked_fill(blind, 0)).softmax(-1).masked_fill(blind, 0)
        return self.joined(weights @ v)

    def seen(self, wrong: bool) -> str:
        self.x = Case.x.clone().requires_grad_()
        made = self.made(wrong)
        (slope,) = torch.autograd.grad(made.sum(), self.x)
        forward, backward = (numbers.isnan().double().mean() for numbers in (made, slope))
        return f"{forward:.0%} {backward:.0%}"


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    generator = torch.Generator().manual_seed(lesson.seed)
    x = torch.randn(B, T, C, generator=generator, dtype=torch.float64) * math.sqrt(3)  # queries spread like 1
    Case.x, Case.seed, Trained.losses = x.to(lesson.float64_device), lesson.seed, {True: [], False: []}
    exhibits = [Inverted, OffByOne, Padding, OverQueries, ViewOnly, WholeWidth, NanToNum]
    show(lesson, exhibits)
    held = max(Trained.losses[True]) < ENTROPY - 0.3
    held = held and all(abs(loss - ENTROPY) < 0.1 for loss in Trained.losses[False])
    lesson.proves(4, held, f"entropy {ENTROPY:.2f}, ln V {math.log(V):.2f}")

    figure, panels = plt.subplots(2, 4, figsize=(6, 3.4), layout="constrained", sharex=True, sharey=True)
    inverted = Inverted()
    shown = {"right": inverted.influence(inverted.right)}
    for exhibit in (kind() for kind in exhibits):
        shown[exhibit.name] = exhibit.influence(exhibit.wrong)
    for panel, (name, matrix) in zip(panels.flat, shown.items(), strict=True):
        draw(panel, matrix)
        panel.set(xlabel="", ylabel="", xticks=[], yticks=[])
        panel.set_title(name, size="small")
    figure.suptitle("Eight outputs of one shape: what each place of them is made from", size="medium")
    figure.supxlabel("input place", size="small")
    figure.supylabel("output place", size="small")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
