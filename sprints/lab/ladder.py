"""What every language model of the course is asked, so that all of them stand on one ladder.

A language model is anything that can be called as `logits, state = model(ids, state)`: ids (B, T) are
characters, logits (B, T, V) say what follows each of them, and `state` holds what the model remembers of what
came before (None: nothing did). A table remembers the last characters, a recurrent network its hidden state.

    lesson.measured(rungs=[rung("GRU", model, corpus, parameters, seconds, lesson.seed)])

Derived in: 04_language_modelling/01_next_character
"""

from typing import Any, Protocol, TypedDict, get_type_hints

from lab import stories
from lab.corpus import LEAD, Corpus

import torch
import torch.nn.functional as F
from torch import Tensor

TOLD, LONGEST = 64, 1_200  # stories to sample; characters after which one is cut off (the longest has 870)


class LanguageModel(Protocol):
    def __call__(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """(B, T) -> logits (B, T, V) for the next characters, and the state to go on from."""


@torch.no_grad()
def nats_per_character(model: LanguageModel, corpus: Corpus) -> float:
    """The mean cross-entropy over all characters of the held-out documents, each from its beginning."""
    nats = characters = 0.0
    for inputs, targets, mask in corpus.documents():
        logits, _ = model(inputs)
        losses = F.cross_entropy(logits[mask].float(), targets[mask], reduction="sum")  # (N, V), (N,) -> ()
        nats, characters = nats + losses.item(), characters + mask.sum().item()
    return nats / characters


@torch.no_grad()
def tell(model: LanguageModel, corpus: Corpus, count: int, seed: int, temperature: float = 1.0) -> list[str]:
    """`count` stories drawn character by character, each from its beginning to the first empty line."""
    draw, newline = torch.Generator().manual_seed(seed), corpus.vocabulary.index("\n")
    ids = torch.full((count, LEAD), newline, device=corpus.train.device)  # what comes before a story
    written, state, ended = [], None, torch.zeros(count, dtype=torch.bool)
    while len(written) < LONGEST and not ended.all():
        logits, state = model(ids, state)
        chances = (logits[:, -1].float().cpu() / temperature).softmax(dim=-1)  # (B, V)
        written.append(torch.multinomial(chances, 1, generator=draw))  # (B, 1)
        ids = written[-1].to(ids.device)
        if len(written) > 1:
            ended |= (torch.cat(written[-2:], dim=1) == newline).all(dim=1)
    texts = map(corpus.decode, torch.cat(written, dim=1))  # (B, T)
    return [text[: text.index("\n\n") + 2] if "\n\n" in text else text for text in texts]


def first_mistake(text: str) -> int | None:
    """The character at which a text stops being a story; None if it is one, to its end."""
    try:
        stories.parse(text)
    except stories.Mistake as mistake:
        return mistake.position
    return None


def flawless(texts: list[str]) -> float:
    """The share of the texts that are whole stories without a mistake."""
    return sum(first_mistake(text) is None for text in texts) / len(texts)


class Rung(TypedDict):
    """A model's place on the ladder."""

    name: str
    corpus: str
    floor: float | None
    nats_per_character: float
    flawless: float
    faultless_characters: float
    sample: str
    parameters: int
    training_seconds: float | int


def is_rung(thing: object) -> bool:
    """Whether something out of a JSON file has all that a rung has."""
    kinds = get_type_hints(Rung)
    return isinstance(thing, dict) and all(isinstance(thing.get(key), kind) for key, kind in kinds.items())


def rung(name: str, model: LanguageModel, corpus: Corpus, parameters: int, seconds: float, seed: int) -> Rung:
    """What goes into the lesson's JSON; `seconds` is what its training took."""
    nats, told = nats_per_character(model, corpus), tell(model, corpus, TOLD, seed)
    return rung_of(name, corpus.name, corpus.floor, nats, told, parameters, seconds)


def rung_of(
    name: str, corpus: str, floor: float | None, nats: float, told: list[str], parameters: int, seconds: float
) -> Rung:
    """The same for a model that has been asked already: nats per held-out character, and stories it told."""
    faultless = [len(text) if (at := first_mistake(text)) is None else at for text in told]
    return {
        "name": name,
        "corpus": corpus,
        "floor": floor,
        "nats_per_character": nats,
        "flawless": flawless(told),
        "faultless_characters": sum(faultless) / len(told),
        "sample": told[0],
        "parameters": parameters,
        "training_seconds": round(seconds, 1),
    }
