"""Training a GPT on a stream of tokens: schedule, optimiser, steps, checkpoints, several processes.

    with processes(device) as device:                      # under torchrun, each has a share of the work
        training = Training(GPT(…), stream, Settings(B=16, steps=1_500), device)
        for loss in training.run():                        # one optimiser step each, from wherever it stands
            …
        checkpoint.save(file, training.state())            # training.restore(checkpoint.load(file)) goes on

Derived in: 09_training_pipeline/02_train_gpt
"""

import copy
import importlib
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from lab import BadInput, checkpoint
from lab.generation import Sampler, generate
from lab.gpt import GPT
from lab.stream import Stream
from lab.tokenizer import END, Tokenizer

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
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
    """A model, its optimiser, its place in the stream: all that the next step depends on.

    spread       how several processes share the work: DistributedDataParallel, or what lesson 07 puts there
    optimizer    adamw, or another; a group of it with a "scale" has that multiple of the learning rate
    """

    def __init__(
        self,
        model: GPT,
        stream: Stream,
        settings: Settings,
        device: torch.device,
        spread: Callable[[GPT], nn.Module] = DistributedDataParallel,
        optimizer: Callable[[nn.Module, Settings], torch.optim.Optimizer] = adamw,
    ) -> None:
        self.settings, self.stream, self.device = settings, stream, device
        self.rank, self.world = place()
        if settings.B % (self.world * settings.accumulate):
            shares = f"{self.world} processes × {settings.accumulate} parts"
            raise BadInput(f"{settings.B} windows cannot be shared by {shares}")
        self.model = model.to(device).train()
        self.net = spread(self.model) if self.world > 1 else self.model
        self.optimizer = optimizer(self.model, settings)
        self.random = torch.Generator().manual_seed(stream.seed)  # for dropout, see _step
        self.losses: list[float] = []  # of each step
        self.tokens, self.seconds = 0, 0.0  # how many the training has learned from, and for how long

    @property
    def done(self) -> int:
        """Steps."""
        return len(self.losses)

    def run(self) -> Iterator[float]:
        """The steps that are left: the mean loss of each."""
        for step in range(self.done, self.settings.steps):
            start = time.perf_counter()
            self.losses.append(self._step(step))
            self.seconds += time.perf_counter() - start
            yield self.losses[-1]

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(step, self.settings.steps, self.settings.rate, self.settings.warmup)

    def batch(self, step: int) -> tuple[Tensor, Tensor, int]:
        """This process's share of the windows of a step, and their targets: (B / processes, T) both.

        And how many targets all processes have together, as windows are not all equally long.
        """
        inputs, targets = self.stream.batch(step * self.settings.B, self.settings.B)
        mine, count = slice(self.rank, None, self.world), int((targets >= 0).sum())
        return inputs[mine].to(self.device), targets[mine].to(self.device), count

    def _step(self, step: int) -> float:
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step) * group.get("scale", 1.0)
        inputs, targets, count = self.batch(step)
        self.tokens += count
        # Each step and process has random numbers of its own, whatever else draws some between the steps.
        torch.manual_seed(torch.randint(2**62, (), generator=self.random).item() + self.rank)
        total = 0.0
        for part, wanted in zip(inputs.chunk(s.accumulate), targets.chunk(s.accumulate), strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=s.precision == "bfloat16"):
                logits = self.net(part)  # (B / parts, T, V)
                nats = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")  # in float32
            (nats * self.world / count).backward()  # the mean over all targets; processes are averaged
            total = total + nats.detach() / count
        nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.world > 1:
            distributed.all_reduce(total)
        return total.item()

    def state(self) -> dict:
        """Plain data and tensors, copied: everything that restore() needs."""
        state = {
            "model": self.model.state_dict(),
            "architecture": self.model.settings,
            "optimizer": self.optimizer.state_dict(),
            "settings": asdict(self.settings),
            "text": self._text(),
            "losses": self.losses,
            "seen": self.tokens,
            "seconds": self.seconds,
            "random": self.random.get_state(),
        }
        return copy.deepcopy(state)

    def restore(self, state: dict) -> None:
        """Go on from there. BadInput if it is the state of another training."""
        if state["settings"] != asdict(self.settings) or state["architecture"] != self.model.settings:
            raise BadInput("the checkpoint is of a training with other settings")
        if state["text"] != self._text():
            raise BadInput("the checkpoint is of a training on another text, or with another seed")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # which would take it as its own
        self.tokens = state["seen"]
        self.losses, self.seconds = list(state["losses"]), state["seconds"]
        self.random.set_state(state["random"])

    def _text(self) -> list:
        """What tells the stream from others."""
        return [self.stream.T, self.stream.seed, sha256(self.stream.tokens).hexdigest()]


# ── Precision, and stopping ───────────────────────────────────────────────────────────────────────────────


def fast_precision(device: torch.device) -> str:
    """ "bfloat16" where products of bfloat16 take at most half the time of float32 ones, else "float32"."""
    a, b = torch.ones(2048, 256, device=device), torch.ones(256, 1024, device=device)
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for dtype in [*best] * 30:  # they take turns, and often enough that each has its chance
        x, y, start = a.to(dtype), b.to(dtype), time.perf_counter()
        (x @ y)[0, 0].item()  # .item() waits for an accelerator
        best[dtype] = min(best[dtype], time.perf_counter() - start)
    return "bfloat16" if best[torch.bfloat16] <= 0.5 * best[torch.float32] else "float32"


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C does not break off a step; the function that is given says whether it was pressed meanwhile.

    In several processes they agree, so that all of them stop after the same step.
    """
    pressed = torch.zeros(1)
    before = signal.signal(signal.SIGINT, lambda *_: pressed.fill_(1))

    def stop() -> bool:
        if place()[1] > 1:
            everyone = pressed.to("cuda" if distributed.get_backend() == "nccl" else "cpu")
            distributed.all_reduce(everyone, distributed.ReduceOp.MAX)
            pressed.copy_(everyone)
        return bool(pressed)

    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


# ── Several processes ─────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def processes(device: torch.device, store: "distributed.Store | None" = None) -> Iterator[torch.device]:
    """Under torchrun, join the other processes and get a device of one's own; else nothing changes.

    torchrun says in five environment variables who one is: RANK and LOCAL_RANK, of WORLD_SIZE, to meet at
    MASTER_ADDR and MASTER_PORT, instead of which a store can be given. BadInput if it cannot be.
    """
    if "LOCAL_RANK" not in os.environ:
        yield device
        return
    backend, local = "nccl" if device.type == "cuda" else "gloo", int(os.environ["LOCAL_RANK"])
    if not distributed.is_available() or not distributed.is_backend_available(backend):
        raise BadInput(f"several processes need PyTorch with {backend}, which this one is built without")
    if device.type == "cuda":
        if local >= (count := torch.cuda.device_count()):
            raise BadInput(f"process {local + 1} of this machine has no GPU of its own, there are {count}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:  # all on this machine
        for _, name in socket.if_nameindex():  # where there is no network, or no address for the host's name
            if name in ("lo", "lo0"):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield device
    finally:
        distributed.destroy_process_group()


@contextmanager
def workers(work: Callable, arguments: Sequence[tuple]) -> Iterator[list[tuple[BaseProcess, Connection]]]:
    """Processes that do work(pipe, *arguments), with our ends of their pipes; they end when we do.

    `work` should take an EOFError or ConnectionError of its pipe as the word that we are gone.
    """
    linux = sys.platform == "linux"  # where they can be copies of one that has imported all they need
    context = multiprocessing.get_context("forkserver" if linux else "spawn")
    pairs, started = [context.Pipe() for _ in arguments], []
    with ExitStack() as ends:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # passed on: Ctrl-C is for us to answer
        ends.callback(signal.signal, signal.SIGINT, before)
        if linux:
            importlib.import_module("multiprocessing.forkserver").ensure_running()
            signal.signal(signal.SIGINT, before)  # already, as it takes seconds until the first one is there
        for (ours, theirs), values in zip(pairs, arguments, strict=True):
            process = context.Process(target=work, args=(theirs, *values))
            process.start()
            ends.callback(process.join), ends.callback(process.kill)
            theirs.close()
            started.append((process, ours))
        signal.signal(signal.SIGINT, before)
        yield started


def place() -> tuple[int, int]:
    """The number of this process, and of how many."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


# ── Trained models ────────────────────────────────────────────────────────────────────────────────────────


def keep(tokenizer: Tokenizer) -> dict:
    """A tokenizer as plain data."""
    return {"tokens": tokenizer.tokens, "merges": tokenizer.merges, "special": tokenizer.special}


def save_model(model: GPT, tokenizer: Tokenizer, facts: dict) -> bytes:
    """A trained model with its tokenizer and what was measured of it, as the content of one file."""
    weights = {name: weight.cpu() for name, weight in model.state_dict().items()}
    state = {"architecture": model.settings, "model": weights, "facts": facts}
    return checkpoint.pack(state | keep(tokenizer))


def load_model(file: Path, device: torch.device) -> tuple[GPT, Tokenizer, dict]:
    """What save_model saved; a checkpoint of a training that was stopped will do too. BadInput."""
    state = checkpoint.load(file, needs=("architecture", "model", "tokens", "merges", "special"))
    try:
        model = GPT(**state["architecture"])
        model.load_state_dict(state["model"])
        tokenizer = Tokenizer(state["tokens"], state["merges"], state["special"])
        if model.settings["V"] != tokenizer.V or not 0 <= tokenizer.special[END] < tokenizer.V:
            raise ValueError(f"a tokenizer of {tokenizer.V} tokens, a model of {model.settings['V']}")
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise BadInput(f"{file} does not hold a GPT ({' '.join(str(error).split())[:80]})") from error
    return model.to(device).eval(), tokenizer, state.get("facts", {})


def tell(model: GPT, tokenizer: Tokenizer, count: int, seed: int, beginning: str = "") -> list[str]:
    """Texts drawn from the model at temperature 1, each from its beginning to its end or a full context.

    How tokens are drawn, and nothing is computed twice, is the subject of sprint 10.
    """
    end = tokenizer.special[END]
    prompt = [end, *tokenizer.encode(beginning)]
    pick, most = Sampler(torch.Generator().manual_seed(seed)), model.settings["T"] - len(prompt)
    written = generate(model, [prompt] * count, pick, most, end)
    return [beginning + tokenizer.decode([token for token in tokens if token != end]) for tokens in written]
