"""The bug museum: mistakes with transformer blocks that raise no error, and what finds each of them.

Run:     uv run sprints/07_transformer_block/08_bug_museum.py      (11 s on two cores)
Proves:  1. every wrong version returns what the right one returns, in shape and dtype
         2. the named check catches every wrong version
         3. every right version passes the same check
         4. three mistakes train to a loss that no honest model can reach, and write half as well at most
         5. two more train to the loss of the right version, and write as well as it does
Shapes:  B texts of T letters, each with a source of S = T, V different letters, C width, H heads, L blocks
Writes:  results/07_transformer_block/08_bug_museum.png
Note:    notes/08_bug_museum.md
"""

import math
from abc import abstractmethod

from lab.attention import MultiHeadAttention
from lab.influence import draw, influence, rows
from lab.lesson import Lesson, run
from lab.museum import Exhibit, Outcome, Variant, show
from lab.transformer import DecoderBlock, FeedForward, PreNorm

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, T, V, C, H, L, STEPS = 16, 8, 8, 32, 2, 2, 150
WORDS = 5  # of a source with padding behind
SURE = 0.5  # how often a source decides the letter; otherwise it is any
OTHER = (1 - SURE) / V
ENTROPY = -(SURE + OTHER) * math.log(SURE + OTHER) - (V - 1) * OTHER * math.log(OTHER)  # in nats per letter
ALL, BEFORE = torch.ones(T, T).long(), torch.ones(T, T).tril(-1).long()  # influence matrices


def texts(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sources, and of each letter its successor or, in half of the cases, any letter: (count, T) twice."""
    source, other = torch.randint(V, (2, count, T), generator=generator)
    sure = torch.rand(count, T, generator=generator) < SURE
    return source, torch.where(sure, (source + 1) % V, other)


class Writer(nn.Module):
    """A decoder: from a source, and from the letters before it, what a letter is to be predicted from."""

    norm, residual = nn.LayerNorm, PreNorm

    def __init__(self) -> None:
        super().__init__()
        self.places, self.blocks, self.last = nn.Embedding(T, C), nn.ModuleList(self.stack()), self.norm(C)

    def block(self) -> DecoderBlock:
        layers = MultiHeadAttention(C, H), MultiHeadAttention(C, H), FeedForward(C, 4 * C)
        return DecoderBlock(*(self.residual(layer, self.norm(C)) for layer in layers))

    def stack(self) -> list[DecoderBlock]:
        return [self.block() for _ in range(L)]

    def shifted(self, target: Tensor) -> Tensor:
        """Zeros, and all letters but the last: (B, T, C) -> (B, T, C)."""
        return F.pad(target, (0, 0, 1, -1))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """(B, S, C), (B, T, C) -> (B, T, C)."""
        source, x = source + self.places.weight, self.shifted(target) + self.places.weight
        for block in self.blocks:
            x = block(x, source)
        return self.last(x)


class Case(Exhibit):
    """What the exhibits have in common."""

    look: str  # where one sees something
    check = "influence: of the target what comes before, of the source all"
    expected = ALL, BEFORE  # the influence matrices that the check asks for
    seed: int
    source: Tensor  # (B, S, C), float64
    target: Tensor  # (B, T, C), float64

    @abstractmethod
    def made(self, wrong: bool) -> Tensor:
        """What either version makes of self.source and self.target: (B, T, C)."""

    @abstractmethod
    def seen(self, wrong: bool) -> str:
        """What one sees of either version."""

    def wrong(self) -> Tensor:
        torch.manual_seed(self.seed)
        return self.made(wrong=True)

    def right(self) -> Tensor:
        torch.manual_seed(self.seed)
        return self.made(wrong=False)

    def symptom(self, wrong: Outcome, right: Outcome) -> str:
        return f"{self.look} {self.seen(wrong=True)}   (right: {self.seen(wrong=False)})"

    def influence(self, variant: Variant, count: int = 1) -> tuple[Tensor, Tensor]:
        """Of the places of `count` sources and of their targets: (count·T, count·S), (count·T, count·T)."""

        def function(source: Tensor, target: Tensor) -> Tensor:
            self.source, self.target = source, target
            return variant()

        return influence(function, Case.source[:count], Case.target[:count])

    def passes(self, variant: Variant) -> bool:
        return all(map(torch.equal, self.influence(variant), self.expected))


class Trained(Case):
    """What the exhibits have in common that learn to write a text from its source."""

    look = "loss, and letters right when it writes alone:"
    broken: type[Writer]
    results: dict[type[Writer], tuple[float, float]]  # loss, and how well it writes

    def made(self, wrong: bool) -> Tensor:
        self.writer = (self.broken if wrong else Writer)().to(self.source)
        return self.writer(self.source, self.target)

    def seen(self, wrong: bool) -> str:
        kind = self.broken if wrong else Writer  # the right one is the same for all: it is trained once
        if kind not in self.results:
            self.results[kind] = self.trained(kind)
        loss, written = self.results[kind]
        return f"{loss:.2f} {written:.0%}"

    def trained(self, kind: type[Writer]) -> tuple[float, float]:
        """In new texts: the loss, and how many letters it writes as the alphabet wants."""
        torch.manual_seed(self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        letters, writer, readout = nn.Embedding(V, C), kind(), nn.Linear(C, V)
        model = nn.ModuleList([letters, writer, readout]).to(Case.source)

        def logits(source: Tensor, target: Tensor) -> Tensor:
            return readout(writer(letters(source), letters(target)))  # (count, T, V)

        def loss(count: int) -> Tensor:
            source, target = (ids.to(Case.source.device) for ids in texts(count, generator))
            return F.cross_entropy(logits(source, target).mT, target)  # (count, V, T), (count, T)

        optimiser = torch.optim.Adam(model.parameters(), lr=0.005, fused=True)
        for _ in range(STEPS):
            optimiser.zero_grad()
            loss(B).backward()
            optimiser.step()
        with torch.no_grad():
            source = texts(500, generator)[0].to(Case.source.device)
            written = torch.zeros_like(source)
            for t in range(T):
                written[:, t] = logits(source, written)[:, t].argmax(-1)
            return loss(500).item(), (written == (source + 1) % V).double().mean().item()


class NormedOverTime(Trained):
    """Layer norm over dimension 1, which was the width before there was time"""

    repair = "x.mean(-1), x.var(-1)"

    class broken(Writer):
        class norm(nn.LayerNorm):
            def forward(self, x: Tensor) -> Tensor:
                mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)  # (B, 1, C)
                return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


class ResidualTooLate(Trained):
    """A residual that is taken behind the norm"""

    check = "blocks whose sublayers give zero leave the stream as it is"
    repair = "x + self.sublayer(self.norm(x))"

    class broken(Writer):
        class residual(PreNorm):
            def forward(self, x: Tensor, *others: object, **options: object) -> Tensor:
                x = self.norm(x)
                return x + self.sublayer(x, *others, **options)

    def passes(self, variant: Variant) -> bool:
        variant()
        for part in self.writer.blocks.modules():
            if isinstance(part, nn.Linear):  # such as the last step of every sublayer
                nn.init.zeros_(part.weight), nn.init.zeros_(part.bias)
        x = Case.target
        for block in self.writer.blocks:
            x = block(x, Case.source)
        return torch.equal(x, Case.target)


class OneBlock(Trained):
    """One block, L times"""

    check = "L blocks have L times the weights of one"
    repair = "[block() for _ in range(L)]"

    class broken(Writer):
        def stack(self) -> list[DecoderBlock]:
            return [self.block()] * L

    def passes(self, variant: Variant) -> bool:
        variant()
        parts = self.writer.blocks, self.writer.block()
        of_all, of_one = (sum(weight.numel() for weight in part.parameters()) for part in parts)
        return of_all == L * of_one


class AcrossTexts(Case):
    """PyTorch's layer without batch_first: it takes the texts for time"""

    look = "place 3 of text 0 is made from"
    check = "influence: no text on another"
    repair = "nn.TransformerEncoderLayer(…, batch_first=True)"

    def made(self, wrong: bool) -> Tensor:
        layer = nn.TransformerEncoderLayer(C, H, 4 * C, dropout=0.0, batch_first=not wrong)
        return layer.to(self.source)(self.source)

    def seen(self, wrong: bool) -> str:
        row = rows(self.influence(self.wrong if wrong else self.right, count=2)[0])[3].replace(" ", "")
        return f"{row[:T]} {row[T:]}"

    def passes(self, variant: Variant) -> bool:
        return torch.equal(self.influence(variant, count=2)[0], torch.block_diag(ALL, ALL))


class InvertedPadding(Case):
    """True means hide in PyTorch's padding masks, and was meant as look"""

    look = "each place is made from the source's"
    check = "influence: columns of padding empty"
    repair = "memory_key_padding_mask=~words"
    expected = (torch.arange(T) < WORDS).long().expand(T, T), BEFORE

    def made(self, wrong: bool) -> Tensor:
        layer = nn.TransformerDecoderLayer(C, H, 4 * C, dropout=0.0, batch_first=True).to(self.source)
        words = (torch.arange(T, device=self.source.device) < WORDS).expand(self.source.shape[:2])  # (B, S)
        x, later = F.pad(self.target, (0, 0, 1, -1)), nn.Transformer.generate_square_subsequent_mask(T)
        hidden = words if wrong else ~words
        return layer(x, self.source, tgt_mask=later.to(x), memory_key_padding_mask=hidden)

    def seen(self, wrong: bool) -> str:
        return rows(self.influence(self.wrong if wrong else self.right)[0])[3].replace(" ", "")


class LooksAtItself(Trained):
    """A decoder that is given its target in place of the source"""

    repair = "super().forward(source, target)"

    class broken(Writer):
        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            return super().forward(target, target)


class NotShifted(Trained):
    """A target that is not shifted"""

    repair = "F.pad(target, (0, 0, 1, -1))"

    class broken(Writer):
        def shifted(self, target: Tensor) -> Tensor:
            return target


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    generator, Case.seed, Trained.results = torch.Generator().manual_seed(lesson.seed), lesson.seed, {}
    vectors = torch.randn(2, B, T, C, generator=generator, dtype=torch.float64)
    Case.source, Case.target = vectors.to(lesson.float64_device)
    leaks, alike = [NormedOverTime, LooksAtItself, NotShifted], [ResidualTooLate, OneBlock]
    show(lesson, [NormedOverTime, *alike, AcrossTexts, InvertedPadding, LooksAtItself, NotShifted])

    loss, written = Trained.results[Writer]
    leaked, others = ([Trained.results[kind.broken] for kind in kinds] for kinds in (leaks, alike))
    learned = abs(loss - ENTROPY) < 0.1 and written > 0.9
    held = learned and all(its < ENTROPY - 0.3 and right < written / 2 for its, right in leaked)
    lesson.proves(4, held, f"entropy {ENTROPY:.2f}, ln V {math.log(V):.2f}")
    lesson.proves(5, learned and all(abs(its - loss) < 0.05 and right > 0.9 for its, right in others))

    figure, panels = plt.subplots(2, 5, figsize=(6, 3), layout="constrained", sharex=True, sharey=True)
    cases = [kind() for kind in (NormedOverTime, *leaks, InvertedPadding)]
    names = "right", "norm over time", "target as source", "not shifted", "inverted padding"
    for name, case, column in zip(names, cases, panels.T, strict=True):
        matrices = case.influence(case.right if name == "right" else case.wrong)
        for panel, matrix in zip(column, matrices, strict=True):
            draw(panel, matrix)
            panel.set(xlabel="", ylabel="", xticks=[], yticks=[])
        column[0].set_title(name, size="small")
    panels[0, 0].set_ylabel("source")
    panels[1, 0].set_ylabel("target")
    figure.suptitle("Five outputs of one shape: what each place of them is made from", size="medium")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
