"""Embeddings: a word is a number, the number picks a row of a table, and the rows are learned.

Run:     uv run sprints/05_embeddings_and_positions/01_embeddings.py      (5 s on two cores)
Proves:  1. a lookup in a loop, a product with one-hot vectors and F.embedding agree, gradients too
         2. a row's gradient is the sum over its word's places, and SGD moves only the rows of the batch
         3. Adam moves other rows too: one seen a step ago by 0.67 of that step, and weight decay moves all
         4. the padding row stays zero, and all other rows learn as they would without it
         5. tying input to output saves V·D numbers, and the gradient is the sum of both uses
         6. the skip-gram loss pair by pair and the lab's, from a table of counts, agree, gradients too
         7. 95% of the words have one of their own category nearest; with random vectors, 15% at most
Shapes:  B sequences of T words, V words in all, D numbers per word
Writes:  results/05_embeddings_and_positions/01_embeddings.png
Note:    notes/01_embeddings.md
"""

import copy
import math
from itertools import pairwise

from lab.lesson import Lesson, run
from lab.stories import write
from lab.words import CATEGORY, REACH, company, numbered, skip_gram_loss, word_vectors

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, D, RATE, DECAY = 9, 5, 0.1, 0.5
SHAPES = ((), (1,), (7,), (3, 4), (2, 1, 5))
BATCHES = [[[1, 2, 1], [3, 1, 0]], [[1, 4, 5], [4, 0, 0]]]  # two of (B, T) = (2, 3), filled up with zeros
SIZES = (5_000, 10_000, 30_000, 100_000, 300_000)  # characters of stories


def lookup_by_loop(ids: Tensor, table: Tensor) -> Tensor:
    """One row after the other: (…), (V, D) -> (…, D)."""
    rows = torch.stack([table[number] for number in ids.flatten().tolist()])
    return rows.view(*ids.shape, -1)  # (number of ids, D) -> (…, D)


def lookup_by_product(ids: Tensor, table: Tensor) -> Tensor:
    """A one-hot vector has 1 in the place of its word, 0 elsewhere: (…), (V, D) -> (…, V) -> (…, D)."""
    return F.one_hot(ids, len(table)).to(table.dtype) @ table


def train(
    start: Tensor, slopes: Tensor, make: type, padding_idx: int | None = None, **options
) -> list[Tensor]:
    """The table after each of BATCHES, of which `slopes` (2, B, T, D) are the gradients: three of (V, D)."""
    table = nn.Embedding.from_pretrained(start.clone(), freeze=False, padding_idx=padding_idx)
    optimizer, tables = make(table.parameters(), lr=RATE, **options), [start]
    for ids, slope in zip(torch.tensor(BATCHES, device=start.device), slopes, strict=True):
        optimizer.zero_grad()
        (table(ids) * slope).sum().backward()  # (B, T, D) -> ()
        optimizer.step()
        tables.append(table.weight.detach().clone())
    return tables


def loss_by_pairs(centre: Tensor, context: Tensor, ids: list[int]) -> Tensor:
    """How surprising each neighbour of each word is, given the word, on average: (V, D), (V, D) -> ()."""
    losses = []
    for i, word in enumerate(ids):
        for neighbour in ids[max(0, i - REACH) : i] + ids[i + 1 : i + 1 + REACH]:
            losses.append(-(context @ centre[word]).log_softmax(dim=0)[neighbour])  # (V,) -> ()
    return torch.stack(losses).mean()


def factorised(counts: Tensor) -> Tensor:
    """Vectors without training: the pointwise mutual information, clipped at 0, cut to 32 numbers a row."""
    p = counts.double() / counts.sum()
    information = (p / (p.sum(1, keepdim=True) * p.sum(0))).log().clamp(min=0)  # (V, V)
    U, S, _ = torch.linalg.svd(information)
    return U[:, :32] * S[:32].sqrt()


def nearest(vectors: Tensor) -> Tensor:
    """The other words, by the angle between the vectors, the nearest first: (V, D) -> (V, V - 1)."""
    direction = F.normalize(vectors, dim=-1)
    return (direction @ direction.T).fill_diagonal_(-2).argsort(dim=-1, descending=True)[:, :-1]


def agreement(words: list[str], neighbour: list[int]) -> float:
    """The share of the words of a category whose neighbour is of the same one."""
    pairs = [(word, words[other]) for word, other in zip(words, neighbour, strict=True) if word in CATEGORY]
    return sum(CATEGORY[word] == CATEGORY.get(other) for word, other in pairs) / len(pairs)


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # the matrices are so small that threads would only wait for each other
    draw, device = torch.Generator().manual_seed(lesson.seed), lesson.float64_device

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(device)

    lesson.heading("A lookup, three ways")
    table, found = random(V, D).requires_grad_(), []
    for shape in SHAPES:
        ids, slope = torch.randint(V, shape, generator=draw).to(device), random(*shape, D)
        ways = [lookup(ids, table) for lookup in (lookup_by_loop, lookup_by_product, F.embedding)]
        found.append([[rows, *torch.autograd.grad((rows * slope).sum(), table)] for rows in ways])
        print(f"ids {shape!s:9} one-hot {(*shape, V)!s:13} rows {tuple(ways[2].shape)}")
    lesson.proves_equal(1, [three[:2] for three in found], [[three[2]] * 2 for three in found])

    lesson.heading("Which rows a batch moves")
    start, slopes = random(V, D), random(2, 2, 3, D)
    start[0] = 0  # as nn.Embedding(padding_idx=0) begins
    sgd = train(start, slopes, torch.optim.SGD)
    adam = train(start, slopes, torch.optim.Adam)
    decayed = train(start, slopes, torch.optim.AdamW, weight_decay=DECAY)
    print(
        "how far the second batch moves word   1, in both   2, in the first   4, in the second   6, in none"
    )
    for name, tables in (("SGD", sgd), ("Adam", adam), ("AdamW", decayed)):
        moved = (tables[2] - tables[1]).norm(dim=-1)  # (V,)
        print(f"{name:32}", "".join(f"{moved[word]:15.3f}" for word in (1, 2, 4, 6)))
    expected = start.clone()
    for word, slope in zip([1, 2, 1, 3, 1, 0], slopes[0].flatten(0, 1), strict=True):  # (B, T, D) -> (B·T, D)
        expected[word] -= RATE * slope
    lesson.proves_equal(2, sgd[1], expected)
    moved = [(after != before).any(dim=-1).nonzero()[:, 0].tolist() for before, after in pairwise(sgd)]
    lesson.proves(2, moved == [[0, 1, 2, 3], [0, 1, 4, 5]], f"rows {moved}")

    b1, b2 = 0.9, 0.999  # Adam's decay rates
    gone, never = [2, 3], [6, 7, 8]  # words of the first batch only, and of none
    onward = b1 / (1 + b1) * math.sqrt((1 + b2) / b2)  # 0.670: m / √v when a gradient is followed by none
    ours = [(adam[2] - adam[1])[gone], adam[2][never], decayed[2][never]]
    expected = [onward * (adam[1] - start)[gone], start[never], (1 - RATE * DECAY) ** 2 * start[never]]
    lesson.proves_equal(3, ours, expected, tolerance=1e-5)
    padded = train(start, slopes, torch.optim.AdamW, padding_idx=0, weight_decay=DECAY)
    lengths = [tables[2][0].norm().item() for tables in (padded, decayed)]
    print(f"the padding row has length {lengths[0]:.2f} with padding_idx, {lengths[1]:.2f} without")
    lesson.proves_equal(4, [padded[2][0], padded[2][1:]], [torch.zeros_like(start[0]), decayed[2][1:]])

    lesson.heading("One matrix for input and output")
    torch.manual_seed(lesson.seed)
    apart = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, V, bias=False))
    apart = apart.to(lesson.device)
    apart[3].load_state_dict(apart[0].state_dict())  # two matrices that begin alike
    tied = copy.deepcopy(apart)
    tied[3].weight = tied[0].weight
    ids, targets = torch.tensor([[1, 2, 1], [2, 1, 3]]).to(lesson.device)  # a word predicts the next
    for model in (apart, tied):
        F.cross_entropy(model(ids), targets).backward()
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (apart, tied)]
    slopes = [apart[0].weight.grad, apart[3].weight.grad]
    rows = [int(slope.any(dim=-1).sum()) for slope in slopes]
    print(
        f"{sizes[0]} numbers, tied {sizes[1]}; rows with a gradient: input {rows[0]}, output {rows[1]} of {V}"
    )
    lesson.proves_equal(5, [tied[0].weight.grad, sizes[1]], [sum(slopes), sizes[0] - V * D])

    lesson.heading("Words by the company they keep")
    text = "".join(story.text for story in write(lesson.seed, SIZES[-1]))
    words, ids = numbered(text[:400])
    matrices = [random(len(words), D).requires_grad_() for _ in range(2)]
    losses = [loss_by_pairs(*matrices, ids.tolist())]
    losses.append(skip_gram_loss(*matrices, company(ids, len(words)).to(device)))
    ours, theirs = ([loss, *torch.autograd.grad(loss, matrices)] for loss in losses)
    lesson.proves_equal(6, ours, theirs)

    shares: dict[str, list[float]] = {"skip-gram": [], "factorised": [], "random": []}
    for size in SIZES:
        words, vectors = word_vectors(text[:size], seed=lesson.seed, device=lesson.device)
        counts = company(numbered(text[:size])[1], len(words))
        ways = [nearest(v) for v in (vectors.cpu(), factorised(counts), random(len(words), 32))]
        for way, share in zip(ways, shares.values(), strict=True):
            share.append(agreement(words, way[:, 0].tolist()))
        row = "   ".join(f"{name} {share[-1]:6.1%}" for name, share in shares.items())
        print(f"{size:7,} characters, {len(words)} words   {row}")
    for word in ("Ada", "harbour", "red", "aunt"):
        print(f"nearest to {word:7}  ", ", ".join(words[other] for other in ways[0][words.index(word), :6]))
    share, chance = shares["skip-gram"][-1], shares["random"][-1]
    lesson.proves(7, share >= 0.95 and chance <= 0.15, f"{share:.1%}, random vectors {chance:.1%}")

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, share in shares.items():
        axes.semilogx(SIZES, share, "o-", label=name)
    axes.set(xlabel="characters of stories", ylabel="nearest is of the same category", ylim=(0, 1.05))
    axes.set_title("A hundred thousand characters tell which words are of a kind")
    axes.legend(loc="center right", fontsize="small")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
