"""Stop and resume: a training that was killed goes on as if nothing had happened, to the last bit.

Run:     uv run sprints/09_training_pipeline/05_stop_and_resume.py      (12 s on two cores)
Proves:  1. from the file written after any step, the next step leads to the same state, bit for bit
         2. without any one of its five parts it ends with other weights; the curve shows it at once, or one
            step later where optimizer or schedule are missing
         3. a checkpoint of another model, of other settings, another text or another seed is refused
         4. killed with SIGKILL while half of a checkpoint is written, a process leaves the last one whole
         5. killed at any moment, and while it wrote, and resumed by other processes, it ends with the weights
            of a training never stopped, bit for bit, and with the same curve
Shapes:  B windows of T tokens, V different ones, C width
Writes:  results/09_training_pipeline/05_stop_and_resume.png
Note:    notes/05_stop_and_resume.md
"""

import contextlib
import math
import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

from lab import BadInput, checkpoint, stories
from lab.gpt import GPT
from lab.lesson import Lesson, run
from lab.stream import Stream
from lab.tokenizer import END, Tokenizer
from lab.training import Settings, Training, workers

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

CHARACTERS, V, T, C, H, L = 30_000, 320, 32, 32, 2, 2
STEPS, MIDDLE, EVERY = 40, 20, 4  # parts are left out in the middle; the killed write every 4 steps
SETTINGS = Settings(B=8, steps=STEPS)
PARTS = {"weights": "model", "optimizer": "optimizer", "random numbers": "random"}  # as a state calls them


def training(
    tokens: np.ndarray,
    seed: int,
    device: torch.device,
    kind: type[Training] = Training,
    settings: Settings = SETTINGS,
    width: int = C,
) -> Training:
    """From the beginning: a small GPT with dropout, on a stream of tokens (S,)."""
    torch.set_num_threads(1)  # more threads would split a sum, and round it, in another way
    torch.manual_seed(seed)
    return kind(GPT(V, T, width, H, L, dropout=0.1), Stream(tokens, T, seed), settings, device)


class StreamAnew(Training):
    """Has forgotten, when it goes on in the middle, how far it had read."""

    def batch(self, step: int) -> tuple[Tensor, Tensor, int]:
        return super().batch(step - MIDDLE)


class ScheduleAnew(Training):
    """Has forgotten how far its schedule was."""

    def rate(self, step: int) -> float:
        return super().rate(step - MIDDLE)


def finished(training: Training, state: dict) -> Training:
    """From that state to the end."""
    training.restore(state)
    for _ in training.run():
        pass
    return training


def leaves(state: object) -> list[Tensor | float]:
    """All tensors and numbers in a state, but for how long it took."""
    if isinstance(state, dict):
        return [leaf for key, part in state.items() if key != "seconds" for leaf in leaves(part)]
    if isinstance(state, list | tuple):
        return [leaf for part in state for leaf in leaves(part)]
    return [state] if isinstance(state, Tensor | int | float) else []


def largest_difference(ours: nn.Module, theirs: nn.Module) -> float:
    """Of two weights in the same place."""
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def refusal(training: Training, state: dict) -> str:
    """Why the training does not go on from this state; nothing if it does."""
    try:
        training.restore(state)
    except BadInput as fault:
        return str(fault)
    return ""


def steps_in(file: Path) -> int:
    """How many steps the training in a file has done; 0 if there is no file that can be used."""
    try:
        return len(checkpoint.load(file)["losses"])
    except BadInput:
        return 0


def follow(pipe: Connection, until: float) -> str:
    """Listen to a process until it has told of that step, writes a file that stalls, or has ended."""
    told: float = 0
    with contextlib.suppress(EOFError, ConnectionError):  # it has ended
        while told < until:
            last, told = told, pipe.recv()
    return f"told of step {told}" if told < math.inf else f"writing after step {last}"


def stall(pipe: Connection, descriptor: int) -> None:
    """In place of os.fsync: the disk has taken half of the file, and now nothing more happens."""
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    pipe.send(math.inf)
    time.sleep(3600)


def child(pipe: Connection, file: Path, tokens: np.ndarray, seed: int, device: torch.device) -> None:
    """Runs in a process of its own: wait for the word, resume, train, and tell each step."""
    # Where the parent is gone so are we, and a file that can't be used is for the parent to tell.
    with contextlib.suppress(EOFError, ConnectionError, BadInput):
        stalls = pipe.recv()
        job = training(tokens, seed, device)
        if file.exists():
            job.restore(checkpoint.load(file))
        for _ in job.run():
            if job.done % EVERY == 0:
                if job.done >= stalls:
                    os.fsync = partial(stall, pipe)
                checkpoint.save(file, job.state())
            pipe.send(job.done)


def main(lesson: Lesson) -> None:
    documents = [story.text for story in stories.write(lesson.seed, CHARACTERS)]
    tokenizer = Tokenizer.learn(documents, V)
    ids = [token for text in documents for token in (*tokenizer.encode(text), tokenizer.special[END])]
    tokens = np.array(ids, dtype=np.uint16)  # (S,)
    start = partial(training, tokens, lesson.seed, lesson.device)
    draw = torch.Generator().manual_seed(lesson.seed)

    with tempfile.TemporaryDirectory() as folder:
        killed, files = Path(folder, "last.ckpt"), [Path(folder, f"{k}.ckpt") for k in range(STEPS + 1)]
        # The processes start now, as importing torch takes seconds, and wait for their turn.
        with workers(child, [(killed, tokens, lesson.seed, lesson.device)] * 3) as processes:
            lesson.heading("From any step to the next")
            whole = start()
            checkpoint.save(files[0], whole.state())
            for _ in whole.run():
                checkpoint.save(files[whole.done], whole.state())
            reached, expected = [], []
            for before, after in pairwise(files):
                again = start()
                again.restore(checkpoint.load(before))
                next(again.run())
                reached += leaves(again.state())
                expected += leaves(checkpoint.load(after))
            weights = sum(weight.numel() for weight in whole.model.parameters())
            size = files[-1].stat().st_size / weights
            print(f"{weights:,} weights in float32, {STEPS} steps; the file has {size:.1f} bytes a weight")
            lesson.proves_equal(1, reached, expected, tolerance=0)

            lesson.heading(f"Resumed after step {MIDDLE} without one part of the state")
            state, fresh = checkpoint.load(files[MIDDLE]), start().state()
            runs = {"(nothing)": finished(start(), state)}
            for part, key in PARTS.items():
                runs[part] = finished(start(), state | {key: fresh[key]})
            runs["place in the stream"] = finished(start(StreamAnew), state)
            runs["step of the schedule"] = finished(start(ScheduleAnew), state)
            print("without              first other loss   largest difference of a weight   last 10 losses")
            first, apart = {}, {}
            for part, job in runs.items():
                pairs = enumerate(zip(job.losses, whole.losses, strict=True), start=1)
                first[part] = next((step for step, (ours, theirs) in pairs if ours != theirs), None)
                apart[part] = largest_difference(job.model, whole.model)
                mean = sum(job.losses[-10:]) / 10
                print(f"{part:20} {first[part] or 'none':>17} {apart[part]:32.4f} {mean:16.3f}")
            late = {"optimizer", "step of the schedule"}
            expected = {part: MIDDLE + 1 + (part in late) for part in runs if part != "(nothing)"}
            held = first == {"(nothing)": None, **expected} and apart.pop("(nothing)") == 0
            least = min(apart.values())
            lesson.proves(2, held and least > 1e-3, f"some weight by {least:.3f} at least")

            lesson.heading("The state of another training")
            wider = start(width=2 * C).state()
            longer = start(settings=replace(SETTINGS, steps=STEPS + 1)).state()
            other_text = training(tokens[::-1].copy(), lesson.seed, lesson.device).state()
            other_seed = training(tokens, lesson.seed + 1, lesson.device).state()
            others = [wider, longer, other_text, other_seed]
            answers = [refusal(start(), other) for other in others]
            for what, answer in zip(("model", "settings", "text", "seed"), answers, strict=True):
                print(f"{what:9} {answer}")
            held = all(answers) and not refusal(start(), whole.state())
            lesson.proves(3, held, "its own is taken")

            lesson.heading("Killed, and resumed by another process")
            at, until, writing = torch.rand(3, generator=draw).tolist()
            until, writing = STEPS * (1 + until) / 4, round(STEPS * (0.5 + writing / 3))
            fates, came = [], []
            for number, (process, pipe) in enumerate(processes, start=1):
                came.append(steps_in(killed))
                pipe.send(writing if number == 2 else math.inf)
                told = follow(pipe, until if number == 1 else math.inf)
                if number == 1:
                    time.sleep(0.02 * at)  # meanwhile it goes on; where it will be is anybody's guess
                if number < 3:
                    process.kill()  # SIGKILL, on Windows TerminateProcess: it has no time for last words
                process.join()
                fates.append(process.exitcode < 0)
                print(f"process {number}: from step {came[-1]}, {told}, exit code {process.exitcode}")
                if number == 2:
                    parts, there = list(Path(folder).glob(".*")), steps_in(killed)
                    print(f"on the disk: half a file {parts[0].name}, and the file of step {there}")
                    lesson.proves(4, there >= max(came[-1], EVERY))
            end = checkpoint.load(killed)
            lesson.proves_equal(
                5, leaves([fates, end]), leaves([[True, True, False], whole.state()]), tolerance=0
            )

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    shown = range(MIDDLE // 2, STEPS)
    for part, job in runs.items():
        losses = [job.losses[step] for step in shown]
        axes.plot([step + 1 for step in shown], losses, label=part, lw=1 if part in apart else 4)
    axes.set(xlabel="step", ylabel="loss", title="Most missing parts hardly show in the loss")
    figure.legend(loc="outside right upper", title="resumed without", fontsize="small")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
