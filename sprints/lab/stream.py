"""A text as a stream of tokens in a memory-mapped file, and windows over it for training.

    text = prepare("stories", 0, V=512, folder=folder)          # learns a tokenizer, writes the tokens
    stream = Stream(text.train, T=192, seed=0)
    inputs, targets = stream.batch(first=0, B=16)              # the first 16 windows of the stream
    evaluate(model, text) / text.characters                    # nats per held-out character

Derived in: 09_training_pipeline/01_token_stream
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lab import BadInput, stories
from lab.corpus import HELD_OUT, SHORTEST, TRAINING
from lab.lesson import read_text
from lab.tokenizer import END, Tokenizer

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class TokenText:
    """
    name        "stories 0" (their seed), or the file
    tokenizer   learned on the training part alone
    train       (S,) numbers, memory-mapped: each document and END after it
    held_out    the documents (END, then their tokens) that no training ever sees
    characters  and `bytes` of them all, without the ENDs
    floor       nats per character that no model can beat; None for a file
    """

    name: str
    tokenizer: Tokenizer
    train: np.ndarray
    held_out: tuple[Tensor, ...]
    characters: int
    bytes: int
    floor: float | None


def read(data: str, seed: int, characters: int = TRAINING) -> tuple[str, list[str], list[str], float | None]:
    """Name, training documents, held-out documents and floor of what --data names. BadInput.

    The stories are those of lab.corpus, or more of them for training, as many `characters` as are asked for;
    a file is one document, whose last tenth is held out.
    """
    if data == "stories":
        train, held_out = stories.write(seed, characters), stories.write(f"held out {seed}", HELD_OUT)
        floor = sum(story.nats for story in held_out) / sum(len(story.text) for story in held_out)
        return f"stories {seed}", [s.text for s in train], [s.text for s in held_out], floor
    text = read_text(data)
    if len(text) < SHORTEST:
        raise BadInput(f"--data {data}: {len(text):,} characters are too few, {SHORTEST:,} are needed")
    cut = len(text) * 9 // 10
    return data, [text[:cut]], [text[cut:]], None


def write_tokens(file: Path, documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """Each document and END after it as whole numbers in a file; returns the file, memory-mapped: (S,).

    Two bytes a token where that is enough. BadInput if the file cannot be written.
    """
    kind = np.uint16 if tokenizer.V <= 2**16 else np.uint32
    try:
        with file.open("wb") as out:
            for document in documents:
                np.array([*tokenizer.encode(document), tokenizer.special[END]], dtype=kind).tofile(out)
    except OSError as error:
        raise BadInput(f"cannot write {file} ({error.strerror})") from error
    return np.memmap(file, dtype=kind, mode="r")


def prepare(
    data: str,
    seed: int,
    V: int,
    folder: Path,
    tokenizer: Tokenizer | None = None,
    characters: int = TRAINING,
) -> TokenText:
    """What --data names, as tokens: of a given tokenizer, or of one of V that the training part teaches.

    characters    of stories to learn from, at least
    """
    name, train, held_out, floor = read(data, seed, characters)
    if tokenizer is None:
        tokenizer = Tokenizer.learn(train, V)
    documents = tuple(
        torch.tensor([tokenizer.special[END], *tokenizer.encode(document)]) for document in held_out
    )
    return TokenText(
        name=name,
        tokenizer=tokenizer,
        train=write_tokens(folder / "train.tokens", train, tokenizer),
        held_out=documents,
        characters=sum(map(len, held_out)),
        bytes=sum(len(document.encode()) for document in held_out),
        floor=floor,
    )


class Stream:
    """Windows of T tokens over a stream of S, which is taken as a ring; window number k is always the same.

    A round has S // T windows. They lie side by side from a place that is drawn for each round, and come in
    an order that is drawn too: in a round each token is a target once, but for S % T that lie elsewhere in
    the next. So the whole position of a training in its data is one number, k.
    """

    def __init__(self, tokens: np.ndarray, T: int, seed: int) -> None:
        self.tokens, self.T, self.seed = tokens, T, seed
        self.per_round = max(1, len(tokens) // T)
        self._round, self._starts = -1, np.arange(0)

    def starts(self, round_: int) -> np.ndarray:
        """Where the windows of a round begin: (S // T,)."""
        if round_ != self._round:
            draw = np.random.default_rng([self.seed, round_])
            shift = draw.integers(len(self.tokens))
            self._round, self._starts = round_, shift + self.T * draw.permutation(self.per_round)
        return self._starts

    def batch(self, first: int, B: int) -> tuple[Tensor, Tensor]:
        """Windows number first … first + B - 1, and their targets: (B, T), (B, T)."""
        rounds, numbers = np.divmod(np.arange(first, first + B), self.per_round)
        starts = [self.starts(round_)[numbers[rounds == round_]] for round_ in np.unique(rounds).tolist()]
        places = np.concatenate(starts)[:, None] + np.arange(self.T + 1)  # (B, 1), (T + 1,) -> (B, T + 1)
        ids = torch.from_numpy(self.tokens[places % len(self.tokens)].astype(np.int64))
        return ids[:, :-1], ids[:, 1:]


class Pieces:
    """The documents of a stream in pieces of at most T tokens, in another order each round; piece k is fixed.

    A document is read from its beginning and no piece holds parts of two. One that is longer than T is cut;
    its first cut is drawn for each round. In a round each token is a target exactly once, and the whole
    position of a training in its data is one number, k.
    """

    def __init__(self, tokens: np.ndarray, end: int, T: int, seed: int) -> None:
        self.tokens, self.T, self.seed = tokens, T, seed
        ends = np.flatnonzero(tokens == end) + 1  # the last token of a document is the END behind it
        self.documents = list(pairwise([0, *ends.tolist()]))
        self._rounds = [0]  # the number of the first piece of each round
        self._round, self._pieces = -1, np.empty((0, 2), dtype=np.int64)

    def round(self, number: int) -> np.ndarray:
        """The pieces of a round, in their order, as places of their targets: (N, 2), from and up to."""
        if number != self._round:
            draw, pieces = np.random.default_rng([self.seed, number]), []
            for start, end in self.documents:
                first = start + int(draw.integers(1, self.T + 1)) if end - start > self.T else end
                pieces += pairwise([start, *range(first, end, self.T), end])
            self._round, self._pieces = number, draw.permutation(np.array(pieces))
        return self._pieces

    def batch(self, first: int, B: int) -> tuple[Tensor, Tensor]:
        """Pieces number first … first + B - 1, and their targets: (B, T') both, T' that of the longest.

        Targets are -100, which F.cross_entropy leaves out, where a piece is over.
        """
        while self._rounds[-1] <= first + B:
            self._rounds.append(self._rounds[-1] + len(self.round(len(self._rounds) - 1)))
        chosen = []
        for k in range(first, first + B):
            number = bisect_right(self._rounds, k) - 1
            chosen.append(self.round(number)[k - self._rounds[number]])
        starts, ends = np.array(chosen).T[..., None]  # (B, 1) each
        places = starts + np.arange((ends - starts).max())  # (B, T')
        targets = np.where(places < ends, self.tokens[np.minimum(places, ends - 1)].astype(np.int64), -100)
        inputs = self.tokens[np.minimum(places, ends - 1) - 1].astype(
            np.int64
        )  # before the first: the last END
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def evaluate(model: Callable[[Tensor], Tensor], text: TokenText, T: int, B: int = 32) -> float:
    """The nats of all held-out documents together, each from its beginning, in windows of at most T tokens.

    A document of more than T tokens is cut, and each window knows only what is in it. Divide by
    text.characters, or by text.bytes · ln 2 for bits per byte.
    """
    return losses(model, text.held_out, T, B).double().sum().item()


@torch.no_grad()
def losses(model: Callable[[Tensor], Tensor], documents: Iterable[Tensor], T: int, B: int = 32) -> Tensor:
    """The nats of each token of the documents, one after the other, on the CPU: (N,)."""
    pieces = [
        (document[:-1][i : i + T], document[1:][i : i + T])
        for document in documents
        for i in range(0, len(document) - 1, T)
    ]
    found, device = [], next(model.parameters()).device
    for start in range(0, len(pieces), B):
        inputs, targets = zip(*pieces[start : start + B], strict=True)
        inputs = pad_sequence(inputs, batch_first=True)  # (B, T), what is padded counts for nothing
        targets = pad_sequence(targets, batch_first=True, padding_value=-1)  # (B, T)
        logits = model(inputs.to(device)).float()  # (B, T, V)
        nats = F.cross_entropy(logits.mT, targets.to(device), reduction="none", ignore_index=-1)  # (B, T)
        found.append(nats.cpu()[targets >= 0])
    return torch.cat(found)
