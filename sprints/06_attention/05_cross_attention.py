"""Cross-attention: one sequence asks, another answers, and the weights say which place answered.

Run:     uv run sprints/06_attention/05_cross_attention.py      (8 s on two cores)
Proves:  1. a loop, products, the lab's module and PyTorch's agree with padded sources, gradients too
         2. an output depends on its own place in the target, and on every real place of its own source
         3. shuffling a source changes nothing, and neither does padding: not how much, nor what is in it
         4. trained to fetch letters, it names over 99 % of unseen ones; the question alone is worth 54 %
         5. over 98 % of its largest weights lie on the true place, where chance is 17 %, none on padding
         6. with the true place hidden it is right as often as by chance; with nothing else shown, over 98 %
         7. the loss falls under wrong masks too: inverted, as far as with no source, dropped, all the way;
            the influence matrix tells them apart
Shapes:  B texts, T places in the target, S places in the source, C width, H heads of D = C / H
Writes:  results/06_attention/05_cross_attention.png, results/06_attention/05_cross_attention.json
Note:    notes/05_cross_attention.md
"""

import copy
import math
from collections.abc import Callable

from lab.attention import MultiHeadAttention, padding_mask
from lab.influence import influence, rows
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPES = (1, 1, 1, 2, 1), (2, 3, 5, 6, 3), (3, 6, 2, 8, 2)  # B, T, S, C, H
LETTERS, NUMBERS, FEWEST, HABIT, PADDING = "abcdefghijkl", 9, 4, 0.5, 0
B, T, C, RATE, UNSEEN = 64, 6, 32, 1e-2, 2_000
SEEN = {  # by two questions to a source of 2 words of 4, and two to one of 3, under each of the MASKS
    "right": ["■ ■ · · · · · ·"] * 2 + ["· · · · ■ ■ ■ ·"] * 2,
    "inverted": ["· · ■ ■ · · · ·"] * 2 + ["· · · · · · · ■"] * 2,
    "one short": ["■ · · · · · · ·"] * 2 + ["· · · · ■ ■ · ·"] * 2,
    "dropped": ["■ ■ ■ ■ · · · ·"] * 2 + ["· · · · ■ ■ ■ ■"] * 2,
}

Mask = Callable[[Tensor, int], Tensor]  # lengths (B,), S -> (B, 1, S)


def cross_by_loop(attention: MultiHeadAttention, x: Tensor, source: Tensor, lengths: list[int]) -> Tensor:
    """Text by text, place by place, head by head: x (B, T, C), source (B, S, C) -> (B, T, C)."""
    outputs = []
    for target, its_source, length in zip(x, source, lengths, strict=True):
        for place in target:
            means, width = [], attention.D
            for start in range(0, len(place), width):  # each head has its own part of every projection
                part = slice(start, start + width)
                query = attention.query(place)[part]  # (D,): from the target
                keys = [attention.key(word)[part] for word in its_source[:length]]  # from the source
                values = [attention.value(word)[part] for word in its_source[:length]]
                scores = [(query @ key / math.sqrt(width)).exp() for key in keys]
                means.append(sum(w * v for w, v in zip(scores, values, strict=True)) / sum(scores))
            outputs.append(attention.output(torch.cat(means)))  # H of (D,) -> (C,)
    return torch.stack(outputs).view_as(x)  # (B·T, C) -> (B, T, C)


def cross(attention: MultiHeadAttention, x: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """All at once: x (B, T, C), source (B, S, C), mask (B, 1, S), True means look -> (B, T, C)."""

    def heads(vectors: Tensor) -> Tensor:
        return vectors.unflatten(-1, (-1, attention.D)).transpose(1, 2)  # (B, ·, C) -> (B, H, ·, D)

    q = heads(attention.query(x))  # (B, H, T, D): whoever asks
    k, v = heads(attention.key(source)), heads(attention.value(source))  # (B, H, S, D): whoever answers
    scores = q @ k.mT / math.sqrt(attention.D)  # (B, H, T, S), seldom square
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return attention.output((weights @ v).transpose(1, 2).flatten(2))  # (B, T, H, D) -> (B, T, C)


class Fetcher(nn.Module):
    """Numbers ask for letters: the source holds words such as c3, the letter c under the number 3."""

    def __init__(self) -> None:
        super().__init__()
        spelled = torch.randn(NUMBERS, 1, C) + torch.randn(len(LETTERS), C)  # what words share, to begin with
        table = torch.cat([torch.randn(1, C), spelled.flatten(0, 1) / math.sqrt(2)])  # row 0 is for padding
        self.words = nn.Embedding.from_pretrained(table, freeze=False)
        self.numbers = nn.Embedding(NUMBERS, C)
        self.attention = MultiHeadAttention(C, H=1)
        self.output = nn.Linear(C, len(LETTERS))

    def forward(self, asked: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """asked (B, T), source (B, S), mask (B, 1, S) or (B, T, S) -> logits (B, T, letters)."""
        x = self.numbers(asked)  # (B, T, C)
        return self.output(x + self.attention(x, mask, source=self.words(source)))

    def weights(self, asked: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """Where each question looks: (B, T, S)."""
        return self.attention.weights(self.numbers(asked), mask, source=self.words(source))[:, 0]


def texts(count: int, draw: torch.Generator, device: torch.device) -> list[Tensor]:
    """Words in random order: asked (B, T), source (B, S), lengths (B,), letters (B, T), true places (B, T).

    No number occurs twice. A letter is its number's own (a under 0, b under 1, …) with probability HABIT,
    otherwise any.
    """
    number = torch.rand(count, NUMBERS, generator=draw).argsort(1)  # (B, S)
    letter = torch.randint(len(LETTERS), number.shape, generator=draw)
    letter = torch.where(torch.rand(number.shape, generator=draw) < HABIT, number, letter)
    lengths = torch.randint(FEWEST, NUMBERS + 1, (count,), generator=draw)
    source = 1 + number * len(LETTERS) + letter
    source[torch.arange(NUMBERS) >= lengths[:, None]] = PADDING
    place = (torch.rand(count, T, generator=draw) * lengths[:, None]).long()  # (B, T)
    drawn = number.gather(1, place), source, lengths, letter.gather(1, place), place
    return [tensor.to(device) for tensor in drawn]


def train(lesson: Lesson, mask: Mask) -> tuple[Fetcher, list[float]]:
    """A model, and the loss of every step."""
    torch.manual_seed(lesson.seed)
    model, draw, losses = Fetcher().to(lesson.device), torch.Generator().manual_seed(lesson.seed), []
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=lesson.steps)
    for _ in lesson.progress(range(lesson.steps)):
        asked, source, lengths, letters, _ = texts(B, draw, lesson.device)
        logits = model(asked, source, mask(lengths, NUMBERS))
        loss = F.cross_entropy(logits.flatten(0, 1), letters.flatten())  # (B·T, letters), (B·T,) -> ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return model, torch.stack(losses).tolist()


MASKS: dict[str, Mask] = {
    "right": padding_mask,
    "inverted": lambda lengths, S: ~padding_mask(lengths, S),  # as nn.MultiheadAttention wants it
    "one short": lambda lengths, S: padding_mask(lengths - 1, S),
    "dropped": lambda lengths, S: torch.ones_like(padding_mask(lengths, S)),
    "no source": lambda lengths, S: torch.zeros_like(padding_mask(lengths, S)),
}


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    draw = torch.Generator().manual_seed(lesson.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(lesson.float64_device)

    def pair(C: int, H: int) -> tuple[MultiHeadAttention, nn.MultiheadAttention]:
        """PyTorch's and the lab's, with the same weights."""
        torch.manual_seed(lesson.seed)
        theirs = nn.MultiheadAttention(C, H, batch_first=True).double().to(lesson.float64_device)
        nn.init.normal_(theirs.in_proj_bias)  # which would be 0, and hide a bias that was forgotten
        return MultiHeadAttention(C, H).double().to(lesson.float64_device).copy(theirs), theirs

    lesson.heading("Two sequences, four ways")
    results: list[list[Tensor]] = [[], [], [], []]
    for b, t, s, c, h in SHAPES:
        attention, theirs = pair(c, h)
        x, source, slope = randn(b, t, c).requires_grad_(), randn(b, s, c).requires_grad_(), randn(b, t, c)
        lengths = torch.randint(1, s + 1, (b,), generator=draw).to(x.device)
        mask = padding_mask(lengths, s)  # (B, 1, S)
        layers = attention.query, attention.key, attention.value
        ours = [layer.weight for layer in layers] + [layer.bias for layer in layers]
        ways = (
            (cross_by_loop(attention, x, source, lengths.tolist()), ours),
            (cross(attention, x, source, mask), ours),
            (attention(x, mask, source=source), ours),
            (  # in PyTorch's own module True means hide
                theirs(x, source, source, key_padding_mask=~mask[:, 0])[0],
                [theirs.in_proj_weight, theirs.in_proj_bias],
            ),
        )
        for found, (output, parameters) in zip(results, ways, strict=True):
            slopes = torch.autograd.grad(output, [x, source, *parameters], slope)
            found += [output, *slopes[:2], torch.cat([part.flatten() for part in slopes[2:]])]
    print(f"target {b, t, c}, source {b, s, c}, {h} heads, mask {tuple(mask.shape)} -> {tuple(output.shape)}")
    loop, *others = results
    lesson.proves_equal(1, others, [loop] * 3)

    lesson.heading("What can change what: two texts, two questions each, sources of 2 and 4 words")
    attention, _ = pair(6, 3)
    x, source, lengths = randn(2, 2, 6), randn(2, 4, 6), torch.tensor([2, 4]).to(lesson.float64_device)
    mask = padding_mask(lengths, 4)
    by_hand = influence(lambda x, source: cross(attention, x, source, mask), x, source)
    by_lab = influence(lambda x, source: attention(x, mask, source=source), x, source)
    print("target      source")
    print("\n".join(f"{left}     {right}" for left, right in zip(*map(rows, by_hand), strict=True)))
    blocks = torch.block_diag(torch.tensor([[1, 1, 0, 0]] * 2), torch.ones(2, 4).long())
    wanted = [torch.eye(4).long(), blocks]
    lesson.proves_equal(2, [*by_hand, *by_lab], [*wanted, *wanted])

    lesson.heading("A source is a set, and padding is nothing")
    plain = cross(attention, x, source, mask)
    order = torch.tensor([2, 0, 3, 1]).to(x.device)
    shuffled = cross(attention, x, source[:, order], mask[..., order])
    other = torch.where(mask.mT, source, randn(2, 4, 6))
    alone = cross(attention, x[:1], source[:1, :2], mask[:1, :, :2])
    refilled = cross(attention, x, other, mask)
    print(f"of {plain.numel()} numbers, {(refilled != plain).sum()} change with what is in the padding")
    lesson.proves_equal(3, [shuffled, refilled, alone], [plain, plain, plain[:1]])

    lesson.heading("Fetching letters")
    habit = torch.full((len(LETTERS),), (1 - HABIT) / len(LETTERS))
    habit[0] += HABIT  # the number's own letter, and all others
    best, entropy = habit[0].item(), -(habit * habit.log()).sum().item()
    asked, source, lengths, letters, place = texts(UNSEEN, draw, lesson.device)
    example = (lengths == 8).nonzero()[0].item()
    words = [divmod(word - 1, len(LETTERS)) for word in source[example, :8].tolist()]
    words = [f"{LETTERS[letter]}{number}" for number, letter in words]
    wanted = " ".join(LETTERS[letter] for letter in letters[example].tolist())
    print(f"source {' '.join(words)}   asked {asked[example].tolist()}   answers {wanted}")
    anything = torch.randint(1, 1 + NUMBERS * len(LETTERS), source.shape, generator=draw).to(source)
    leftovers = torch.where(source == PADDING, anything, source)  # as in a buffer that was used before

    def answers(model: Fetcher, mask: Tensor, source: Tensor = leftovers) -> Tensor:
        """The likeliest letters: (B, T)."""
        with torch.no_grad():
            return model(asked, source, mask).argmax(-1)

    def right(given: Tensor) -> float:
        """The share of right answers."""
        return (given == letters).float().mean().item()

    trained, curves, end, shares = {}, {}, {}, {}
    print(f"{'mask':18} loss                right     with leftovers in the padding")
    for name, mask in MASKS.items():
        trained[name], curves[name] = train(lesson, mask)
        look, tail = mask(lengths, NUMBERS), curves[name][-40:]
        end[name] = sum(tail) / len(tail)
        shares[name] = [right(answers(trained[name], look, given)) for given in (source, leftovers)]
        clean, used = shares[name]
        print(f"{name:15} {curves[name][0]:.3f} -> {end[name]:.3f} {clean:12.1%} {used:12.1%}")
    print(f"question alone           {entropy:.3f} {best:12.1%}     (any of 12 letters: {1 / 12:.1%})")
    lesson.proves(4, min(shares["right"]) > 0.99, f"{min(shares['right']):.2%}", full_run=True)

    model, mask = trained["right"], padding_mask(lengths, NUMBERS)
    truth = F.one_hot(place, NUMBERS).bool()  # (B, T, S)
    with torch.no_grad():
        weights = model.weights(asked, leftovers, mask)
    hit, chance = (weights.argmax(-1) == place).float().mean().item(), (1 / lengths).mean().item()
    on_padding = weights[~mask.expand_as(weights)].sum().item()
    held = hit > 0.98 and on_padding == 0
    lesson.proves(5, held, f"{hit:.2%}, chance {chance:.1%}", full_run=True)
    guesses = answers(model, mask & ~truth)
    unmoved = guesses.equal(answers(model, mask & ~truth, source))  # whatever is in the padding
    hidden, alone = right(guesses), right(answers(model, truth))
    chance = (1 - HABIT**2) / len(LETTERS)  # that words under two numbers share their letter
    print(f"true place hidden: right {hidden:.1%} (chance {chance:.1%})   all others hidden: {alone:.1%}")
    lesson.proves(6, abs(hidden - chance) < 0.05 and unmoved and alone > 0.98, full_run=True)

    lesson.heading("What each mask lets it see")
    few, device = torch.tensor([2, 3]).to(lesson.float64_device), lesson.float64_device
    questions, cut = torch.tensor([[0, 1], [2, 3]]).to(device), source[:2, :4].to(device)
    cut = cut.masked_fill(~padding_mask(few, 4)[:, 0], PADDING)

    def sees(name: str) -> list[str]:
        """Which words can change which answers: (2·2, 2·4)."""
        exact, mask = copy.deepcopy(trained[name]).double().to(device), MASKS[name](few, 4)
        return rows(influence(lambda asked, source: exact(asked, source, mask), questions, cut)[1])

    seen = {name: sees(name) for name in SEEN}
    print("     ".join(f"{name:15}" for name in seen).rstrip())
    print("\n".join("     ".join(line) for line in zip(*seen.values(), strict=True)))
    held = seen == SEEN and abs(end["inverted"] - end["no source"]) < 0.05 and end["dropped"] < 0.1
    fallen = curves["inverted"][0] - end["inverted"]
    lesson.proves(7, held and fallen > 0.3, f"inverted it falls by {fallen:.2f}", full_run=True)
    lesson.measured(losses=end, right=shares, aligned=hit, hidden=hidden, alone=alone)

    chosen = slice(example, example + 1)
    numbers, places = ((source[chosen, :8] - 1) // len(LETTERS)).sort(1)  # ask for all of them, in order
    with torch.no_grad():
        weights = model.weights(numbers, source[chosen], mask[chosen])[0].cpu()
    layout, size = [["learned", "loss"], ["true", "loss"]], (6, 3.6)
    figure, axes = plt.subplot_mosaic(layout, figsize=size, layout="constrained", width_ratios=(1, 1.5))
    truth = F.one_hot(places[0], NUMBERS).cpu()
    for name, matrix, title in ("learned", weights, "learned weights"), ("true", truth, "true places"):
        axes[name].imshow(matrix, cmap="Blues", vmin=0, vmax=1)
        axes[name].set_xticks(range(NUMBERS), [*words, "–"], fontsize="x-small")
        axes[name].set_yticks(range(8), numbers[0].tolist(), fontsize="x-small")
        axes[name].set(title=title, ylabel="asked for")
    for name in ("inverted", "one short", "dropped", "right"):
        parts = torch.tensor(curves[name]).chunk(40)  # a mean over each fortieth of the training
        steps = [number * len(parts[0]) for number in range(len(parts))]
        axes["loss"].plot(steps, [part.mean() for part in parts], label=name)
    axes["loss"].axhline(entropy, color="black", linestyle=":", label="no source")
    axes["loss"].set(title="Every mask lets the loss fall", xlabel="step", ylabel="loss", ylim=(0, None))
    axes["loss"].legend(loc="upper right", bbox_to_anchor=(1, 0.62), fontsize="small")
    lesson.save(figure)


if __name__ == "__main__":
    run(main, steps=400)
