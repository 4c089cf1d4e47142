"""Words as vectors, learned from the company they keep: skip-gram, with the softmax over all words.

    words, vectors = word_vectors(text, seed=0, device=lesson.device)      # V words, (V, D)

Mikolov, Chen, Corrado and Dean, *Efficient Estimation of Word Representations in Vector Space*, 2013, section
3.2. They have a million words and have to approximate the softmax. Ours are a few hundred, so all pairs of a
text fit into one (V, V) table of counts, and every step of the training sees the whole text.

Derived in: 05_embeddings_and_positions/01_embeddings
"""

import re

from lab import stories

import torch
from torch import Tensor

REACH, RATE = 2, 0.05  # how many words to either side count as company; the learning rate

# What a word of the written world is: {"Ada": "name", "harbour": "place", …}, those of one word alone.
CATEGORY = {word: kind for kind, words in stories.WORDS.items() for word in words if " " not in word}


def numbered(text: str) -> tuple[list[str], Tensor]:
    """The V different words of a text, sorted, and the text as their numbers, (S,)."""
    sequence = re.findall(r"\w+", text)
    words = sorted(set(sequence))
    numbers = {word: number for number, word in enumerate(words)}
    return words, torch.tensor([numbers[word] for word in sequence])


def company(ids: Tensor, V: int) -> Tensor:
    """How often word j stands at most REACH places from word i: (S,) -> (V, V), symmetric."""
    pairs = torch.cat([ids[:-k] * V + ids[k:] for k in range(1, REACH + 1)])  # i·V + j, one number per pair
    counts = torch.bincount(pairs, minlength=V * V).view(V, V)  # (V²,) -> (V, V)
    return counts + counts.T


def skip_gram_loss(centre: Tensor, context: Tensor, counts: Tensor) -> Tensor:
    """Nats to guess a word of the company of another, on average: (V, D), (V, D), (V, V) -> ()."""
    return -(counts * (centre @ context.T).log_softmax(dim=-1)).sum() / counts.sum()


def word_vectors(
    text: str, *, seed: int, device: torch.device, D: int = 32, steps: int = 200
) -> tuple[list[str], Tensor]:
    """The V different words of a text, sorted, and their vectors, (V, D). Half a second for 300 kB."""
    words, ids = numbered(text)
    counts = company(ids, len(words)).to(device)
    draw = torch.Generator().manual_seed(seed)
    start = 0.3 * torch.randn(2, len(words), D, generator=draw)
    matrices = [matrix.to(device).requires_grad_() for matrix in start]  # of the word, of its company
    optimizer = torch.optim.Adam(matrices, lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        skip_gram_loss(*matrices, counts).backward()
        optimizer.step()
    return words, matrices[0].detach()
