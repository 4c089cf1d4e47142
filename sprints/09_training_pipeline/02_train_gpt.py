"""The capstone: a GPT learns to tell stories, comes down to the floor, and is kept.

Run:     uv run sprints/09_training_pipeline/02_train_gpt.py
         (92 s on two cores; 22 s with --steps 30)
Proves:  1. before training the loss is that of random logits with a spread of 1.1, ln V + 1.1²/2, within 10 %
         2. the lab's first two steps are those written out here: loss, gradients, clipping, AdamW by hand
         3. the held-out nats, summed in padded batches, equal those of each document read alone
         4. the trained model looks only back: its influence matrix is the lower triangle
         5. the file of the trained model gives it back: the same logits and the same tokens
         6. it loses at most 15 % more nats per held-out character than the floor
         7. the stories that it tells at temperature 1 go 150 characters without a mistake, on average
Shapes:  B windows of T tokens, V different ones; L blocks of width C with H heads
Writes:  results/09_training_pipeline/02_train_gpt.png,
         results/09_training_pipeline/02_train_gpt.json,
         results/09_training_pipeline/02_train_gpt.csv,
         results/09_training_pipeline/02_train_gpt.model
Note:    notes/02_train_gpt.md
"""

import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from lab import BadInput, checkpoint, ladder, training
from lab.attention import causal_mask
from lab.gpt import GPT, initialise
from lab.influence import influence
from lab.lesson import Lesson, run, whole_number
from lab.stream import Pieces, TokenText, evaluate, losses, prepare
from lab.tokenizer import END
from lab.training import Settings, Training, learning_rate

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

STEPS, REPORTS = 1100, 10  # optimiser steps, and lines about them
TOLD, STUDIED = 200, 8  # stories told at the end; documents read one by one
STD = 0.04  # of the first weights, at GPT-2's width of 768, where its own have 0.02


def number(text: str) -> float:
    """The type of an option: a number above 0, not inf or nan (argparse turns the error into one line)."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


SETTINGS = {  # what the claims about the trained model are made for; name, type, default, meaning
    f"--{name}": {"type": kind, "default": default, "help": meaning, "metavar": "N"}
    for name, kind, default, meaning in (
        ("megabytes", whole_number(1), 8, "millions of characters of stories to learn from"),
        ("vocabulary", whole_number(257), 1200, "tokens, at most; 257 are the bytes and the end alone"),
        ("context", whole_number(2), 256, "places: T tokens that the model can look back on"),
        ("width", whole_number(1), 128, "C numbers for a token"),
        ("heads", whole_number(1), 4, "H, a divisor of the width"),
        ("layers", whole_number(1), 2, "L blocks"),
        ("dropout", number, 0.0, "share of numbers that are dropped in training"),
        ("batch", whole_number(1), 32, "B pieces of text in a step, of all processes together"),
        ("rate", number, 6e-3, "the highest learning rate"),
        ("decay", number, 0.05, "weight decay of matrices"),
    )
}
OPTIONS = SETTINGS | {
    "--accumulate": {"type": whole_number(1), "default": 1, "help": "parts of a batch, one after the other"},
    "--precision": {
        "choices": ("auto", "float32", "bfloat16"),
        "default": "auto",
        "help": "of products; auto takes bfloat16 where that is twice as fast",
    },
    "--resume": {"action": "store_true", "help": "go on with the training that was stopped"},
}


# ── The first steps by hand ───────────────────────────────────────────────────────────────────────────────


def by_hand(model: GPT, stream: Pieces, settings: Settings, steps: int) -> list[float]:
    """What Training does in `steps` steps, without optimiser and helpers; the losses."""
    weights, losses = list(model.parameters()), []
    means, squares = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step in range(steps):
        inputs, targets = (part.to(weights[0].device) for part in stream.batch(step * settings.B, settings.B))
        there = targets >= 0  # (B, T): not behind the end of a piece
        chances = model(inputs)[there].softmax(-1)  # (B, T, V) -> (N, V)
        loss = -chances[range(len(chances)), targets[there]].log().mean()
        gradients = torch.autograd.grad(loss, weights)
        length = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        rate = learning_rate(step, settings.steps, settings.rate, settings.warmup)
        for weight, gradient, mean, square in zip(weights, gradients, means, squares, strict=True):
            gradient = gradient * min(1, settings.clip / (length + 1e-6))
            mean.lerp_(gradient, 1 - 0.9)  # Adam (Kingma and Ba 2015, algorithm 1), β₁ = 0.9
            square.lerp_(gradient.square(), 1 - settings.beta2)
            m, s = mean / (1 - 0.9 ** (step + 1)), square / (1 - settings.beta2 ** (step + 1))
            with torch.no_grad():  # decoupled weight decay (Loshchilov and Hutter 2019), of matrices only
                weight -= rate * (settings.decay * weight * (weight.ndim > 1) + m / (s.sqrt() + 1e-8))
        losses.append(loss.item())
    return losses


@torch.no_grad()
def one_by_one(model: GPT, text: TokenText, T: int) -> float:
    """The nats of the first held-out documents, each read alone, window by window."""
    nats, device = 0.0, next(model.parameters()).device
    for document in text.held_out[:STUDIED]:
        for start in range(0, len(document) - 1, T):
            window = document[start : start + T + 1].to(device)
            logits = model(window[None, :-1])[0]  # (T, V)
            nats -= logits.log_softmax(-1)[range(len(window) - 1), window[1:]].double().sum().item()
    return nats


# ── The training ──────────────────────────────────────────────────────────────────────────────────────────


def build(lesson: Lesson, V: int) -> GPT:
    """A model of the size that the options ask for. Twice GPT-2's spread for its width learns sooner."""
    o = lesson.options
    if o.width % o.heads:
        raise BadInput(f"--heads {o.heads} does not divide --width {o.width}")
    torch.manual_seed(lesson.seed)
    model = GPT(V=V, T=o.context, C=o.width, H=o.heads, L=o.layers, dropout=o.dropout)
    initialise(model, std=STD * math.sqrt(768 / o.width))
    nn.init.normal_(model.places.weight, std=0.01)  # as in GPT-2's own code
    return model


class Run:
    """A training that tells how it goes, can be stopped at any time, and taken up again."""

    def __init__(self, lesson: Lesson, text: TokenText, device: torch.device) -> None:
        o, self.text, self.reports = lesson.options, text, []
        self.file = lesson.results / f"{lesson.file.stem}.ckpt"
        state = checkpoint.load(self.file, needs=("seen", "reports")) if o.resume else None
        precision = training.fast_precision(device) if o.precision == "auto" else o.precision
        if state and o.precision == "auto":
            precision = state["settings"]["precision"]  # what was faster when it began
        self.settings = Settings(
            o.batch, lesson.steps, o.rate, decay=o.decay, accumulate=o.accumulate, precision=precision
        )
        stream = Pieces(text.train, text.tokenizer.special[END], o.context, lesson.seed)
        self.training = Training(build(lesson, text.tokenizer.V), stream, self.settings, device)
        if state:
            self.training.restore(state)
            self.reports = state["reports"]

    def go(self) -> None:
        """To the end from wherever it is. Ctrl-C stops it after the step that it comes in."""
        going, steps = self.training, self.settings.steps
        total = steps * self.settings.B * len(going.stream.tokens) // len(going.stream.round(0))
        look = {"unit": " tokens", "unit_scale": True, "leave": False, "disable": bool(going.rank) or None}
        bar = tqdm(total=total, initial=going.tokens, **look)
        with training.interruptible() as stop, bar:
            for _ in going.run():
                done = going.done
                bar.update(going.tokens - bar.n)
                if done % max(1, steps // REPORTS) == 0 or done == steps:
                    self.report()
                    self.save()
                if stop():
                    self.save()
                    raise BadInput(f"stopped after step {done} of {steps}; --resume goes on from there")

    def save(self) -> None:
        if self.training.rank == 0:
            state = {"reports": self.reports} | training.keep(self.text.tokenizer)
            checkpoint.save(self.file, self.training.state() | state)

    def report(self) -> None:
        """How far it is, what it loses on the held-out documents, and how well it tells a story."""
        step, model, text = self.training.done, self.training.model.eval(), self.text
        T, before = self.training.stream.T, self.reports[-1]["step"] if self.reports else 0
        held_out = evaluate(model, text, T) / text.characters
        sample = training.tell(model, text.tokenizer, 1, step)[0]
        model.train()
        recent = self.training.losses[before:]
        nats = sum(recent) / len(recent)
        report = {
            "step": step,
            "tokens": self.training.tokens,
            "seconds": round(self.training.seconds, 1),
            "learning_rate": self.training.optimizer.param_groups[0]["lr"],
            "training_nats_per_token": nats,
            "held_out_nats_per_character": held_out,
        }
        self.reports.append(report)
        floor, told = f"{held_out / text.floor:6.3f}" if text.floor else "", " ".join(sample.split())[:46]
        speed = f"{self.training.tokens / self.training.seconds:7,.0f} tokens/s"
        tqdm.write(f"{step:5} {speed}  {nats:6.3f} {held_out:7.4f} {floor}  {told}")


def draw(reports: list[dict], curve: list[float], text: TokenText) -> Figure:
    """The losses per character against the steps, and the floor."""
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    per_character = sum(len(document) - 1 for document in text.held_out) / text.characters  # tokens
    width = max(1, len(curve) // 60)
    smooth = torch.tensor(curve).unfold(0, width, width).mean(-1) * per_character
    axes.plot(torch.arange(1, len(smooth) + 1) * width, smooth, label=f"training, means of {width} steps")
    steps, held_out = zip(*((r["step"], r["held_out_nats_per_character"]) for r in reports), strict=True)
    axes.plot(steps, held_out, "o", label="held out")
    title = f"The held-out loss comes down to {held_out[-1]:.3f} nats per character"
    if text.floor:
        axes.axhline(text.floor, color="0.4", linestyle="--", label="the floor")
        title = f"The held-out loss comes down to {held_out[-1] / text.floor:.2f} times the floor"
    axes.set(xlabel="optimiser step", ylabel="nats per character", yscale="log", title=title)
    axes.set_yticks((0.15, 0.2, 0.3, 0.5, 1), ("0.15", "0.2", "0.3", "0.5", "1"), minor=False)
    axes.yaxis.set_minor_formatter("")
    axes.legend()
    return figure


def before(lesson: Lesson, going: Run) -> None:
    """What holds before a model of this size has learned anything: claims 1 and 2."""
    o, settings, stream, V = lesson.options, going.settings, going.training.stream, going.text.tokenizer.V
    fresh = build(lesson, V).to(going.training.device).eval()
    inputs, targets = (part.to(going.training.device) for part in stream.batch(0, o.batch))  # (B, T) both
    with torch.no_grad():
        start = F.cross_entropy(fresh(inputs).mT, targets).item()  # (B, T, V) -> (B, V, T)
    random = math.log(V) + 768 * STD**2 / 2
    lesson.proves(1, abs(start / random - 1) < 0.1, f"{start:.3f} nats, {random:.3f} at random")
    slow, fast = (GPT(**fresh.settings | {"dropout": 0.0}) for _ in range(2))
    for copy in (slow, fast):
        copy.load_state_dict(fresh.state_dict())
        copy.to(lesson.float64_device, torch.float64)
    plain = replace(settings, precision="float32", accumulate=1)  # not rounded further, that is
    twice = Training(fast, stream, plain, lesson.float64_device).run()
    theirs = [next(twice) for _ in range(2)]
    ours = by_hand(slow, stream, plain, steps=2)
    lesson.proves_equal(2, [ours, *slow.parameters()], [theirs, *fast.parameters()])


def after(lesson: Lesson, going: Run, folder: Path) -> None:
    """What holds of the trained model, and what is kept of it: claims 3 to 7."""
    text, model, device = going.text, going.training.model.eval(), going.training.device
    T = lesson.options.context
    together = losses(model, text.held_out[:STUDIED], T).double().sum().item()
    lesson.proves_equal(3, one_by_one(model, text, T), together, tolerance=1e-4)
    exact = GPT(**model.settings).to(lesson.float64_device, torch.float64).eval()
    exact.load_state_dict(model.state_dict())
    ids = text.held_out[0][None, : min(12, T)]  # (1, T)
    lesson.proves_equal(4, influence(exact, ids.to(lesson.float64_device)), causal_mask(ids.shape[1]).long())

    nats, seconds = going.reports[-1]["held_out_nats_per_character"], going.training.seconds
    told = training.tell(model, text.tokenizer, TOLD, lesson.seed)
    parameters = sum(weight.numel() for weight in model.parameters())
    rung = ladder.rung_of("GPT-2", text.name, text.floor, nats, told, parameters, seconds)
    content = training.save_model(model, text.tokenizer, rung | {"steps": lesson.steps, "told": TOLD})
    (folder / "kept.model").write_bytes(content)
    again, tokenizer, _ = training.load_model(folder / "kept.model", device)
    with torch.no_grad():
        kept, there = again(ids.to(device)), model(ids.to(device))
    lesson.proves_equal(5, [kept, tokenizer.encode(told[0])], [there, text.tokenizer.encode(told[0])], 0.0)
    bits, words = nats * text.characters / text.bytes / math.log(2), " ".join(told[0].split())
    print(f"held out {nats:.4f} nats per character, {bits:.3f} bits per byte; trained for {seconds:.0f} s")
    print(f"it tells {words[:98]}\n         {words[98:196]}\n         {words[196:290]} …")
    excess = nats / text.floor - 1 if text.floor else math.inf
    lesson.proves(6, excess <= 0.15, f"{excess:.1%} above the floor", full_run=True)
    far, flawless = rung["faultless_characters"], rung["flawless"]
    lesson.proves(7, far >= 150, f"{far:.0f}; {flawless:.1%} of {TOLD} are flawless", full_run=True)

    lesson.save(draw(going.reports, going.training.losses, text))
    lesson.save_file(".model", content)
    table = going.reports[0], *(report.values() for report in going.reports)
    lesson.save_file(".csv", "".join(",".join(map(str, line)) + "\n" for line in table).encode())
    lesson.measured(rungs=[rung], settings=asdict(going.settings), reports=going.reports, bits_per_byte=bits)
    going.file.unlink(missing_ok=True)


def main(lesson: Lesson) -> None:
    o = lesson.options
    if lesson.data != "stories":
        lesson.needs = "the stories"
    elif any(getattr(o, name[2:]) != SETTINGS[name]["default"] for name in SETTINGS):
        lesson.needs = "the lesson's own settings"
    nowhere = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # on Windows the tokens are still open
    with training.processes(lesson.device) as device, nowhere as folder:
        lesson.heading("Before")
        text = prepare(
            lesson.data, lesson.seed, o.vocabulary, Path(folder), characters=o.megabytes * 1_000_000
        )
        going = Run(lesson, text, device)
        print(f"text     {text.name}: {len(text.train):,} tokens, V = {text.tokenizer.V}")
        print(f"steps    {going.settings}")
        print(f"model    {going.training.model.settings}")
        before(lesson, going)
        lesson.heading("Training: step, speed, nats per token, held out per character, × floor, a beginning")
        going.go()
        lesson.heading("The trained model")
        after(lesson, going, Path(folder))


if __name__ == "__main__":
    run(main, data="stories", steps=STEPS, options=OPTIONS)
