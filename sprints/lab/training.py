"""Training a GPT on a stream of tokens: schedule, optimiser, steps, checkpoints, several processes.

    with processes(device) as device:                      # under torchrun, each has a share of the work
        training = Training(GPT(…), stream, Settings(B=16, steps=1_500), device)
        for loss in training.run():                        # one optimiser step each, from wherever it stands
            …
        checkpoint.save(file, training.state())            # training.restore(checkpoint.load(file)) goes on

Derived in: 09_training_pipeline/02_train_gpt
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import BadInput, checkpoint
from lab.gpt import GPT
from lab.stream import Stream
from lab.tokenizer import Tokenizer

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Settings:
    """
    B            windows in an optimiser step, of all processes together
    steps        optimiser steps
    rate         the highest learning rate; it rises to it over `warmup` of the steps, then falls on a cosine
    decay        weight decay of matrices (Loshchilov and Hutter 2019)
    clip         gradients longer than this are cut to it
    accumulate   parts that a batch is worked on in, one after the other
    precision    what products are computed in: "float32" or "bfloat16"
    """

    B: int
    steps: int
    rate: float = 3e-3
    warmup: float = 0.1
    decay: float = 0.1
    beta2: float = 0.98
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "float32"


def learning_rate(step: int, steps: int, rate: float, warmup: float) -> float:
    """Of step 0 … steps - 1: up a straight line, then down a cosine to nothing (lesson 03)."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return rate * (step + 1) / rise
    return rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def adamw(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Weight decay on matrices only: biases and norms are few, and nothing is gained by shrinking them."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, settings.beta2), fused=True)


class Training:
    """A model, its optimiser, its place in the stream: all that the next step depends on."""

    def __init__(self, model: GPT, stream: Stream, settings: Settings, device: torch.device) -> None:
        self.settings, self.stream, self.device = settings, stream, device
        self.rank, self.world = place()
        if settings.B % (self.world * settings.accumulate):
            shares = f"{self.world} processes × {settings.accumulate} parts"
            raise BadInput(f"{settings.B} windows cannot be shared by {shares}")
        self.model = model.to(device).train()
        self.optimizer = adamw(self.model, settings)
        self.net = DistributedDataParallel(self.model) if self.world > 1 else self.model
        self.losses: list[float] = []  # of each step
        self.seconds = 0.0

    @property
    def tokens(self) -> int:
        """How many the training has seen."""
        return len(self.losses) * self.settings.B * self.stream.T

    def run(self) -> Iterator[float]:
        """The steps that are left: the mean loss of each."""
        for step in range(len(self.losses), self.settings.steps):
            start = time.perf_counter()
            self.losses.append(self._step(step))
            self.seconds += time.perf_counter() - start
            yield self.losses[-1]

    def _step(self, step: int) -> float:
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, s.steps, s.rate, s.warmup)
        inputs, targets = (
            part[self.rank :: self.world].to(self.device) for part in self.stream.batch(step * s.B, s.B)
        )
        total = torch.zeros((), device=self.device)
        for part, wanted in zip(inputs.chunk(s.accumulate), targets.chunk(s.accumulate), strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=s.precision == "bfloat16"):
                logits = self.net(part)  # (B / parts, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten()) / s.accumulate
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.world > 1:
            distributed.all_reduce(total)
        return total.item() / self.world

    def state(self) -> dict:
        """Plain data and tensors: everything that restore() needs."""
        return {
            "model": self.model.state_dict(),
            "architecture": self.model.settings,
            "optimizer": self.optimizer.state_dict(),
            "settings": asdict(self.settings),
            "losses": self.losses,
            "seconds": self.seconds,
            "random": [home.get_rng_state() for home in self._homes()],
        }

    def restore(self, state: dict) -> None:
        """Go on from there. BadInput if it is the state of another training."""
        if state["settings"] != asdict(self.settings) or state["architecture"] != self.model.settings:
            raise BadInput("the checkpoint is of a training with other settings")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = list(state["losses"]), state["seconds"]
        for home, there in zip(self._homes(), state["random"], strict=True):
            home.set_rng_state(there)

    def _homes(self) -> list:
        """Where dropout draws from: the CPU's generator and the accelerator's."""
        return [torch] if self.device.type == "cpu" else [torch, torch.get_device_module(self.device)]


# ── Several processes ─────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Under torchrun, join the other processes and get a device of one's own; else nothing changes."""
    if "LOCAL_RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """The number of this process, and of how many."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


# ── Trained models ────────────────────────────────────────────────────────────────────────────────────────


def save_model(model: GPT, tokenizer: Tokenizer, facts: dict) -> bytes:
    """A trained model with its tokenizer and what was measured of it, as the content of one file."""
    return checkpoint.pack(
        {
            "architecture": model.settings,
            "model": {name: weight.cpu() for name, weight in model.state_dict().items()},
            "tokens": tokenizer.tokens,
            "merges": tokenizer.merges,
            "special": tokenizer.special,
            "facts": facts,
        }
    )


def load_model(file: Path, device: torch.device) -> tuple[GPT, Tokenizer, dict]:
    """What save_model saved; a checkpoint of a training that was stopped will do too. BadInput."""
    state = checkpoint.load(file, needs=("architecture", "model", "tokens", "merges", "special"))
    try:
        model = GPT(**state["architecture"])
        model.load_state_dict(state["model"])
        tokenizer = Tokenizer(state["tokens"], state["merges"], state["special"])
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise BadInput(f"{file} does not hold a GPT ({' '.join(str(error).split())[:80]})") from error
    return model.to(device).eval(), tokenizer, state.get("facts", {})
