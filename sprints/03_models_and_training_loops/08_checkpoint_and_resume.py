"""Checkpoint and resume: a run that was killed goes on where it was, as if nothing had happened.

Run:     uv run sprints/03_models_and_training_loops/08_checkpoint_and_resume.py      (12 s on two cores)
Proves:  1. resumed in the middle of an epoch, a run ends with the weights and losses of one never stopped
         2. it ends with other weights if any one part of its state is missing
         3. killed at random moments and resumed, it still ends with the very same weights and losses
Shapes:  N samples, B samples in a batch, F features, H hidden numbers, C classes
Writes:  results/03_models_and_training_loops/08_checkpoint_and_resume.png
Note:    notes/08_checkpoint_and_resume.md
"""

import contextlib
import io
import math
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from lab.lesson import Lesson, run, write_whole

import matplotlib.pyplot as plt
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

N, B, F, H, C = 500, 32, 2, 32, 3
RATE, STEPS, EVERY, KILLS = 0.2, 1500, 100, 2  # a checkpoint every 100 steps


class Part:
    """Something that changes in training: its attributes are its state."""

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


class Momentum(Part):
    """An optimiser: v ← 0.9·v + gradient, weight ← weight - rate·v."""

    def __init__(self, model: nn.Module) -> None:
        self.rate, self.velocity = RATE, [torch.zeros_like(weight) for weight in model.parameters()]

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        for v, weight in zip(self.velocity, model.parameters(), strict=True):
            v.mul_(0.9).add_(weight.grad)
            weight -= self.rate * v


class Schedule(Part):
    """A learning rate that falls to 0 in a straight line."""

    done = 0

    def step(self, optimiser: Momentum) -> None:
        self.done += 1
        optimiser.rate = RATE * (1 - self.done / STEPS)


class Order(Part):
    """Which samples come next: a permutation for each epoch, and how far into it we are."""

    def __init__(self, seed: int) -> None:
        self.generator, self.order, self.at = Generator().manual_seed(seed).get_state(), torch.arange(0), 0

    def batch(self) -> Tensor:
        """Indices of at most B samples: (B,)"""
        if self.at >= len(self.order):
            draw = Generator().set_state(self.generator)
            self.order, self.at = torch.randperm(N, generator=draw), 0
            self.generator = draw.get_state()
        self.at += B
        return self.order[self.at - B : self.at]


class RandomStates:
    """Where the global generators stand, which dropout draws from: the CPU's, any accelerator's."""

    def __init__(self, device: torch.device) -> None:
        self.homes = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]

    def state_dict(self) -> dict:
        return {"states": [home.get_rng_state() for home in self.homes]}

    def load_state_dict(self, state: dict) -> None:
        for home, there in zip(self.homes, state["states"], strict=True):
            home.set_rng_state(there)


class Training:
    """A classifier of points on rings about the origin, and everything that its next step depends on."""

    def __init__(self, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.x = torch.randn(N, F, generator=Generator().manual_seed(seed))
        self.y = self.x.norm(dim=1).long().clamp(max=C - 1)  # (N, F) -> (N,): 0 within distance 1, 1 within 2
        self.device, self.losses = device, []
        model = nn.Sequential(nn.Linear(F, H), nn.ReLU(), nn.Dropout(0.1), nn.Linear(H, C)).to(device)
        self.parts = {"model": model, "optimiser": Momentum(model), "schedule": Schedule()}
        self.parts |= {"data order": Order(seed), "random states": RandomStates(device)}

    def finish(self, folder: Path | None = None, tell: Callable[[int], object] = int) -> "Training":
        """Train to the end from wherever it is; checkpoints go into the folder, each step is told."""
        torch.set_num_threads(1)  # more threads would split a sum, and round it, in another way
        model, optimiser, schedule, order, _ = self.parts.values()
        for step in range(len(self.losses) + 1, STEPS + 1):
            batch = order.batch()  # (B,)
            loss = cross_entropy(model(self.x[batch].to(self.device)), self.y[batch].to(self.device))
            model.zero_grad()
            loss.backward()
            optimiser.step(model)
            schedule.step(optimiser)
            self.losses.append(loss.item())
            if folder and step % EVERY == 0:
                self.save(folder / f"step-{step:06}.ckpt")
            tell(step)
        return self

    def save(self, file: Path) -> None:
        """The losses so far and the state of every part, in a file that is there whole or not at all."""
        content, parts = io.BytesIO(), {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({"losses": self.losses, **parts}, content)
        write_whole(file, content.getvalue())

    def restore(self, file: Path, without: str = "") -> "Training":
        """Go back to what was saved, or to all of it but one part."""
        state = torch.load(file, weights_only=True)  # plain data and tensors; 08b shows why
        self.losses = state["losses"]
        for name, part in self.parts.items():
            if name != without:
                part.load_state_dict(state[name])
        return self

    def weights(self) -> Tensor:
        return torch.cat([weight.detach().flatten().cpu() for weight in self.parts["model"].parameters()])


def child(pipe: Connection, folder: Path, seed: int, device: torch.device) -> None:
    """Runs in a process of its own: wait for the word, resume, train, and tell each step."""
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone: so are we
        pipe.recv()
        training = Training(seed, device)
        if files := sorted(folder.glob("*.ckpt")):
            training.restore(files[-1])
        training.finish(folder, tell=pipe.send)


def start(folder: Path, lesson: Lesson, ends: contextlib.ExitStack) -> tuple:
    """A process that waits to train, and a pipe to it; it ends when we do, however we do."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=child, args=(theirs, folder, lesson.seed, lesson.device))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # passed on: Ctrl-C is for us to answer
    process.start()
    ends.callback(process.join), ends.callback(process.kill)
    signal.signal(signal.SIGINT, before)
    theirs.close()
    return process, ours


def main(lesson: Lesson) -> None:
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as ends:
        quiet, killed = Path(scratch, "never stopped"), Path(scratch, "killed")
        quiet.mkdir(), killed.mkdir()
        # All start now, as importing torch takes seconds, and wait for their turn.
        processes = [start(killed, lesson, ends) for _ in range(KILLS + 1)]

        lesson.heading("What the next step depends on")
        whole = Training(lesson.seed, lesson.device).finish(quiet)
        middle = STEPS // 2 // EVERY * EVERY
        file = quiet / f"step-{middle:06}.ckpt"
        print(f"{file.name}: {middle % math.ceil(N / B)} batches into an epoch")
        print("resumed without   first other loss   largest difference of a weight   mean of last 100 losses")
        runs, apart = {}, {}
        for part in ("(nothing)", *whole.parts):
            runs[part] = Training(lesson.seed, lesson.device).restore(file, without=part).finish()
            apart[part] = (runs[part].weights() - whole.weights()).abs().max().item()
            pairs = enumerate(zip(runs[part].losses, whole.losses, strict=True), start=1)
            first = next((f"step {step}" for step, (ours, theirs) in pairs if ours != theirs), "none")
            print(f"{part:17} {first:16} {apart[part]:32.3f} {sum(runs[part].losses[-100:]) / 100:25.3f}")
        same = runs["(nothing)"]
        lesson.proves_equal(1, [same.losses, same.weights()], [whole.losses, whole.weights()], tolerance=0)
        least = min(apart[part] for part in whole.parts)
        lesson.proves(2, least > 1e-3, f"some weight by {least:.2f} at least")

        lesson.heading("Killed, and resumed by another process")
        draw, fates, last = Generator().manual_seed(lesson.seed), [], killed / f"step-{STEPS:06}.ckpt"
        for k, (process, pipe) in enumerate(processes):
            saved, told = EVERY * len(list(killed.glob("*.ckpt"))), 0
            chance, delay = torch.rand(2, generator=draw).tolist()
            until = STEPS * (0.1 + 0.25 * k + 0.2 * chance) if k < KILLS else math.inf
            pipe.send("go")
            with contextlib.suppress(EOFError, ConnectionError):  # it has ended
                while told < until:
                    told = pipe.recv()
            if k < KILLS:
                time.sleep(0.02 * delay)  # meanwhile it goes on; where it will be is anybody's guess
                process.kill()  # SIGKILL, on Windows TerminateProcess: it has no time for last words
            process.join()
            fates.append([process.exitcode < 0, last.exists()])
            told = f"told of step {told}, exit code {process.exitcode}"
            print(f"process {k + 1}: resumed after step {saved}, {told}")
        end = Training(lesson.seed, lesson.device).restore(max(killed.glob("*.ckpt")))
        expected = [[True, False]] * KILLS + [[False, True]]  # killed before the end, and the last one not
        ours, theirs = [fates, end.losses, end.weights()], [expected, whole.losses, whole.weights()]
        lesson.proves_equal(3, ours, theirs, tolerance=0)

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for part, again in runs.items():
        smooth = torch.tensor(again.losses).unfold(0, 50, 1).mean(1)  # (STEPS - 49, 50) -> (STEPS - 49,)
        axes.plot(range(50, STEPS + 1), smooth, label=part, lw=1 if apart[part] else 4)
    axes.set(xlabel="step", ylabel="loss, mean of 50", title="Most missing parts hardly show in the loss")
    axes.legend(title="resumed without", fontsize="small")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
