"""A text to learn from: the stories of the written world, or any file, as numbers and with a part held out.

    corpus = load(lesson.data, lesson.seed, lesson.device)       # prints one line that says what it is
    inputs, targets = corpus.batch(B, T, draw)                   # random windows over the training text
    for inputs, targets, mask in corpus.documents(): …           # the held-out stories, from their beginnings

Derived in: 02_datasets_and_dataloaders/07_text_dataset
"""

from collections.abc import Iterator
from dataclasses import dataclass

from lab import BadInput, stories
from lab.lesson import read_text

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

TRAINING, HELD_OUT = 1_000_000, 100_000  # characters of stories, at least
LEAD = 2  # characters before a document that a model is shown first; before a story they are an empty line
PIECE, SHORTEST = 500, 5_000  # characters: a held-out piece of a file; the shortest file worth splitting


@dataclass(frozen=True)
class Corpus:
    """
    name        "stories 0" (their seed), or the file
    vocabulary  the V characters, sorted; the number of a character is its place here
    train       (S,) the training text
    held_out    documents, each (LEAD + T,): the characters before it and then the document
    floor       nats per character of the held-out stories, which no model can beat; None for a file
    """

    name: str
    vocabulary: str
    train: Tensor
    held_out: tuple[Tensor, ...]
    floor: float | None

    @property
    def V(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> Tensor:
        """S characters -> (S,) numbers. KeyError if one is not in the vocabulary."""
        return encode(text, self.vocabulary).to(self.train.device)

    def decode(self, ids: Tensor) -> str:
        return "".join(self.vocabulary[number] for number in ids.tolist())

    def batch(self, B: int, T: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """B windows of T characters from anywhere in the training text, and their targets: (B, T), (B, T)."""
        starts = torch.randint(len(self.train) - T, (B,), generator=draw).to(self.train.device)
        return windows(self.train, T, starts)

    def documents(self, B: int = 64) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All held-out documents in batches: inputs, targets and mask, each (B, LEAD - 1 + T).

        The mask is True where the target belongs to the document: not in its lead, nor in the padding.
        """
        for start in range(0, len(self.held_out), B):
            batch = self.held_out[start : start + B]
            ids = pad_sequence(list(batch), batch_first=True)  # (B, LEAD + T)
            lengths = torch.tensor([len(document) for document in batch]).to(ids.device)
            place = torch.arange(1, ids.shape[1], device=ids.device)  # of each target
            mask = (place >= LEAD) & (place < lengths[:, None])
            yield ids[:, :-1], ids[:, 1:], mask


def encode(text: str, vocabulary: str) -> Tensor:
    """S characters -> (S,) their places in the vocabulary. KeyError if one has none."""
    numbers = {character: number for number, character in enumerate(vocabulary)}
    return torch.tensor([numbers[character] for character in text])


def windows(ids: Tensor, T: int, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The windows of T characters that begin at `starts` (B,), and their targets: (B, T) each."""
    places = starts[:, None] + torch.arange(T + 1, device=ids.device)  # (B, T + 1)
    return ids[places[:, :-1]], ids[places[:, 1:]]


def load(data: str, seed: int, device: torch.device) -> Corpus:
    """The corpus that --data names. BadInput if it names a file that cannot be used."""
    if data == "stories":
        train = "".join(story.text for story in stories.write(seed, TRAINING))
        held_out = stories.write(f"held out {seed}", HELD_OUT)
        floor = sum(story.nats for story in held_out) / sum(len(story.text) for story in held_out)
        documents, name = ["\n" * LEAD + story.text for story in held_out], f"stories {seed}"
    else:
        text, floor, name = read_text(data), None, data
        if len(text) < SHORTEST:
            raise BadInput(f"--data {data}: {len(text):,} characters are too few, {SHORTEST:,} are needed")
        train, rest = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 - LEAD :]
        documents = [rest[start : start + PIECE + LEAD] for start in range(0, len(rest) - LEAD, PIECE)]
    characters = sum(len(document) - LEAD for document in documents)
    print(
        f"text: {name}; {len(train):,} characters for training, {characters:,} held out"
        + (f", floor {floor:.4f} nats each" if floor else "")
    )
    vocabulary = "".join(sorted({"\n", *train, *"".join(documents)}))
    train, *documents = (encode(text, vocabulary).to(device) for text in (train, *documents))
    return Corpus(name, vocabulary, train, tuple(documents), floor)
