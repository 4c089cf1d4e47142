"""Is a change worth it? The same budget, several seeds, all of the held-out part, and paired differences.

    text = characters("stories", seed=0)
    base = Recipe("GPT-2", gpt2, SETTINGS)
    found = {recipe.name: trials(recipe, text, device) for recipe in (base, replace(base, name="…", build=…))}
    for line in table(found):                          # against the first
        print(line)
    trials(base, for_tuning(text), device, seeds=[0])  # whatever is to be chosen is chosen on other text

Derived in: 11_modern_transformer/01_the_baseline
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from lab.gpt import GPT, initialise
from lab.stream import Stream, TokenText, evaluate, prepare
from lab.tokenizer import END, Tokenizer
from lab.training import Settings, Training, adamw

import numpy as np
import torch
from torch import Tensor, nn

SEEDS = range(5)
SETTINGS = Settings(B=8, steps=250, rate=1e-2)  # a small training; lesson 01 chooses its rate


def gpt2(V: int, T: int) -> GPT:
    """The baseline: two blocks of width 64, two heads; the first weights are larger, as in 09/02."""
    model = GPT(V=V, T=T, C=64, H=2, L=2)
    initialise(model, std=0.1)
    return model


@dataclass(frozen=True)
class Recipe:
    """
    build       V tokens, T places -> a new model, from PyTorch's random numbers
    settings    budget and rate
    T           tokens of context
    optimizer   model and settings -> its optimiser
    """

    name: str
    build: Callable[[int, int], nn.Module] = gpt2
    settings: Settings = SETTINGS
    T: int = 64
    optimizer: Callable[[nn.Module, Settings], torch.optim.Optimizer] = adamw


class Trial(NamedTuple):
    nats: float  # per character that was held out
    seconds: float  # of training
    model: nn.Module


def characters(data: str, seed: int) -> TokenText:
    """What --data names, in tokens of one byte each. BadInput."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        text = prepare(data, seed, 257, Path(folder), Tokenizer.learn("", 257))
        return replace(text, train=np.array(text.train))  # in memory: the file goes


def for_tuning(text: TokenText) -> TokenText:
    """The training part alone, of which the last twentieth is held out in place of what is held out."""
    end, cut = text.tokenizer.special[END], len(text.train) * 19 // 20
    ends = np.flatnonzero(text.train == end) + 1
    while text.tokenizer.tokens[text.train[cut]][0] & 0b11000000 == 0b10000000:  # a character goes on
        cut += 1
    if len(ends) > 1:
        cut = int(ends[ends <= cut][-1])  # between two documents
    parts = np.split(text.train[cut:], ends[(ends > cut) & (ends < len(text.train))] - cut)
    documents = tuple(torch.tensor([end, *part[part != end].tolist()]) for part in parts)
    written = [text.tokenizer.decode(document[1:].tolist()) for document in documents]
    return replace(
        text,
        train=text.train[:cut],
        held_out=documents,
        characters=sum(map(len, written)),
        bytes=sum(len(part.encode()) for part in written),
        floor=None,
    )


def trial(recipe: Recipe, text: TokenText, device: torch.device, seed: int) -> Trial:
    """A training from new weights, and what it loses on all that is held out. The seed decides all."""
    torch.manual_seed(seed)
    model = recipe.build(text.tokenizer.V, recipe.T)
    stream = Stream(text.train, recipe.T, seed)
    training = Training(model, stream, recipe.settings, device, optimizer=recipe.optimizer)
    for _ in training.run():
        pass
    return Trial(evaluate(model.eval(), text, recipe.T) / text.characters, training.seconds, model)


def trials(
    recipe: Recipe, text: TokenText, device: torch.device, seeds: Iterable[int] = SEEDS
) -> list[Trial]:
    return [trial(recipe, text, device, seed) for seed in seeds]


def student(n: int) -> float:
    """How many standard errors hold the mean of n numbers 95 times of 100 (Student 1908); n at least 2.

    With t = √(n - 1) tan θ the density of t is that of θ, which is proportional to cos(θ)ⁿ⁻².
    """
    angles = torch.linspace(0, torch.pi / 2, 100_001, dtype=torch.float64)
    below = (angles.cos() ** (n - 2)).cumsum(0)
    return (n - 1) ** 0.5 * angles[(below >= 0.95 * below[-1]).nonzero()[0, 0]].tan().item()


def interval(differences: Tensor) -> Tensor:
    """The 95 % interval for the mean of n differences: (…, n) -> (2, …), from and to."""
    n = differences.shape[-1]
    mean, error = differences.mean(-1), differences.std(-1) / n**0.5
    return torch.stack([mean - student(n) * error, mean + student(n) * error])


def table(found: dict[str, Sequence[Trial]]) -> list[str]:
    """A line for each recipe: mean and spread of its losses, and its paired difference to the first."""
    width, (base, *_) = max(map(len, found)), found.values()
    lines = [f"{'':{width}}  nats per character     against the first, 95 % interval    seconds"]
    for name, results in found.items():
        nats, first = (torch.tensor([t.nats for t in part]).double() for part in (results, base))
        against = ""
        if results is not base:
            low, high = interval(nats - first)
            against = f"{(nats - first).mean():+.4f}   {low:+.4f} to {high:+.4f}"
        seconds = sum(t.seconds for t in results) / len(results)
        lines.append(f"{name:{width}}  {nats.mean():.4f} ± {nats.std():.4f}   {against:37}{seconds:9.1f} s")
    return lines
