"""What every lesson shares: its command line, its device and seed, its claims, its figure and its results.

A lesson ends with `if __name__ == "__main__": run(main)`. `run` reads the numbered claims under *Proves* in
the lesson's docstring, calls `main(lesson)`, and accepts the run only if every claim was proven in it. Figure
and metrics are written last, whole or not at all: what lies in results/ always comes from a run that held.

Derived in: –
"""

import argparse
import inspect
import io
import json
import os
import platform
import re
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lab import STARTED, BadInput

import matplotlib
import numpy as np
import torch
from matplotlib import style
from matplotlib.figure import Figure
from tqdm import tqdm

# How far two ways of computing the same thing may lie apart: |ours - theirs| <= t + t·|theirs|.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DATA_HELP = {
    "digits": "folder with MNIST, or 'rendered'; without it MNIST is downloaded, or else digits are rendered",
    "text": "a UTF-8 text file; without it the lesson's own text",
    "stories": "'stories', which the lab writes, or any UTF-8 text file",
}


def fields(docstring: str) -> dict[str, str]:
    """The labelled parts of a lesson's docstring: {"Run": "uv run …", "Proves": "1. …", …}."""
    found = re.findall(r"^([A-Z]\w+(?: \w+)?):[ ]+(.+(?:\n[ ]+.+)*)", docstring, flags=re.MULTILINE)
    return {name: textwrap.dedent(" " * (len(name) + 1) + text) for name, text in found}


def claims(docstring: str) -> dict[int, str]:
    """The numbered lines under *Proves*: {1: "a loop and a product agree", …}. ValueError if misnumbered."""
    proves = fields(docstring).get("Proves", "")
    found = re.findall(r"^\s*(\d+)\. (.+(?:\n(?!\s*\d+\. ).+)*)", proves, flags=re.MULTILINE)
    numbers = [int(number) for number, _ in found]
    if not numbers or numbers != list(range(1, len(numbers) + 1)):
        raise ValueError(f"claims under Proves must be numbered 1, 2, 3 …, found {numbers}")
    return {int(number): " ".join(text.split()) for number, text in found}


class Lesson:
    """One run of one lesson.

    device          where tensors go
    float64_device  where float64 tensors go: the same, but the CPU where the device has none (MPS)
    seed            for every torch.Generator
    data            the value of --data
    steps           how long to train
    options         the values of the lesson's own options
    needs           what claims about the whole training need, if this run is not it: "the full run"
    """

    def __init__(self, file: Path, docstring: str, options: argparse.Namespace, full_steps: int) -> None:
        self.file, self.claims = file, claims(docstring)
        self.device, self.seed = _device(options.device), options.seed
        self.float64_device = torch.device("cpu") if self.device.type == "mps" else self.device
        self.data, self.steps = getattr(options, "data", None), getattr(options, "steps", 0)
        self.options = options
        self.needs = "the full run" if self.steps < full_steps else ""
        self.results = _writable(Path(options.results).absolute() / file.parent.name)
        self._settled: dict[int, bool] = {}  # claim -> proven (True) or left to the full run (False)
        self.silent = False  # one of several processes, another of which prints and writes
        self._figure: Figure | None = None
        self._files: dict[str, bytes] = {}
        self._metrics: dict[str, object] = {}
        self._headings = 0

    @property
    def short(self) -> bool:
        """Whether claims about the whole training stay unproven in this run."""
        return bool(self.needs)

    def heading(self, title: str) -> None:
        self._headings += 1
        print(f"\n§{self._headings}  {title}")

    def proves(self, number: int, holds: bool, measured: str = "", *, full_run: bool = False) -> None:
        """Claim `number` holds, as `measured` shows; otherwise the run ends here with status 1.

        `full_run=True` marks a claim that needs the whole training: a short run prints it as not proven, and
        so does one that has set lesson.needs, as it is of another text or with other settings.
        """
        if number not in self.claims:
            raise ValueError(f"no claim {number} under Proves in the docstring of {self.file.name}")
        if full_run and self.short:
            self._settled[number] = False
            print(f"– {number}. {self.claims[number]}   (needs {self.needs})")
            return
        if isinstance(holds, torch.Tensor | np.generic) and holds.ndim == 0:
            holds = holds.item()
        if not isinstance(holds, bool):  # a tensor of truths or a tuple would pass for true
            raise TypeError(f"claim {number}: proves() takes one bool, got {type(holds).__name__}")
        self._settled[number] = holds
        mark, measured = "✓" if holds else "✗", f"   ({measured})" if measured else ""
        print(f"{mark} {number}. {self.claims[number]}{measured}")
        if not holds:
            line = next(
                frame.lineno for frame in inspect.stack() if Path(frame.filename).parent.name != "lab"
            )
            _fail(f"{self.file.name}, line {line}: claim {number} does not hold; nothing was written")

    def proves_equal(self, number: int, ours: object, theirs: object, tolerance: float | None = None) -> None:
        """Claim `number`: tensors, arrays, numbers or sequences of them have equal shapes, dtypes and values.

        Whole numbers and booleans must be identical; NaN equals nothing. Tolerances are TOLERANCE, per dtype.
        """
        if ours is theirs:
            raise ValueError(f"claim {number}: compares an object with itself")
        try:
            count, within = _compare(ours, theirs, tolerance)
        except AssertionError as difference:
            self.proves(number, False, " ".join(str(difference).split()))
        else:
            if count == 0:
                raise ValueError(f"claim {number}: compares nothing with nothing")
            how = f"within {within:g}" if within else "identical"
            self.proves(number, True, f"{count:,} value{'s' * (count > 1)} {how}")

    def measured(self, **metrics: object) -> None:
        """Numbers for results/<sprint>/<script>.json."""
        self._metrics.update(metrics)

    def progress(self, steps: Iterable, description: str = "") -> Iterable:
        """A progress bar on a terminal, silent elsewhere."""
        return tqdm(steps, description, disable=None, leave=False)

    def save(self, figure: Figure) -> None:
        """Keep the figure; it is written as results/<sprint>/<script>.png once every claim is proven."""
        self._figure = figure

    def save_file(self, suffix: str, content: bytes) -> None:
        """Keep another result; it is written like the figure, as results/<sprint>/<script><suffix>."""
        self._files[suffix] = content

    def finish(self) -> None:
        """Every claim was settled: write what there is to write, else end with status 1."""
        if missing := sorted(self.claims.keys() - self._settled.keys()):
            _fail(f"{self.file.name}: claim {missing[0]} was never proven; nothing was written")
        if self.silent:
            return
        seconds = time.perf_counter() - STARTED
        print()
        if self._figure:
            image = io.BytesIO()
            self._figure.savefig(image, format="png", dpi=120, metadata={"Software": None})
            self._write(".png", image.getvalue())
        for suffix, content in self._files.items():
            self._write(suffix, content)
        if self._metrics:
            record = {
                "lesson": f"{self.file.parent.name}/{self.file.stem}",
                "seed": self.seed,
                "steps": self.steps,
                "device": self.device.type,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "seconds": round(seconds, 1),
                **({"short": True} if self.short else {}),
            } | self._metrics
            self._write(".json", (json.dumps(record, allow_nan=False) + "\n").encode())
        proven = sum(self._settled.values())
        print(f"{proven} of {len(self.claims)} claims proven on {self.device.type} in {seconds:.1f} s")

    def _write(self, suffix: str, content: bytes) -> None:
        target = self.results / (self.file.stem + suffix)
        write_whole(target, content)
        print(f"wrote {os.path.relpath(target) if target.is_relative_to(Path.cwd()) else target}")


def run(
    main: Callable[[Lesson], None],
    *,
    data: str | None = None,
    steps: int = 0,
    options: dict[str, dict] | None = None,
) -> None:
    """Run a lesson from its command line.

    data     a key of DATA_HELP, if it reads --data
    steps    the length of its training, if it has one
    options  its own options, as argparse takes them: {"--width": {"type": …, "default": 128, "help": …}}

    Under torchrun only the process of rank 0 prints and writes results.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the imports are over; see lab/__init__.py
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8")  # a Windows console or pipe may be cp1252
    matplotlib.use("Agg")  # no window, also where there is no screen
    style.use("petroff10")  # colours that stay apart for colour-blind readers
    matplotlib.rcParams["axes.titlesize"] = "medium"

    file, docstring = Path(main.__globals__["__file__"]).resolve(), main.__globals__["__doc__"]
    parser = _Parser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(name: str, help: str = "", **settings: object) -> None:
        default = "(default: %(default)s)" if settings.get("default") is not None else ""
        parser.add_argument(name, help=f"{help} {default}".strip(), **settings)

    option("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    option("--seed", default=0, metavar="N", type=whole_number(0))
    option("--results", "folder for figures", default=str(file.parents[2] / "results"), metavar="DIR")
    if data:
        defaults = {"default": "stories"} if data == "stories" else {}
        option("--data", DATA_HELP[data], metavar="PATH", **defaults)
    if steps:
        option("--steps", "training steps", default=steps, metavar="N", type=whole_number(1))
    for name, settings in (options or {}).items():
        option(name, **settings)
    lesson = Lesson(file, docstring, parser.parse_args(), steps)
    if int(os.environ.get("RANK", 0)):  # torchrun has started several processes, and this is not the first
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        lesson.silent = True

    torch.manual_seed(lesson.seed)
    print(f"{file.stem} on {lesson.device.type}, seed {lesson.seed}")
    main(lesson)
    lesson.finish()


def write_whole(target: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees half of it: beside its place first, then moved there."""
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        os.replace(part, target)
    except OSError as error:
        raise BadInput(f"cannot write {target} ({error.strerror})") from error
    finally:
        part.unlink(missing_ok=True)


def read_text(path: str) -> str:
    """The text of a UTF-8 file that a user named with --data. BadInput if there is none to be had."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {path} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise BadInput(f"{path} is empty")
    return text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an option, for argparse: a whole number, not below `least`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and least <= int(text) < 2**32):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to 2³² - 1")
        return int(text)

    return parse


def _device(name: str) -> torch.device:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in there if there[device])
    if not there[name]:
        found = ", ".join(device for device in there if there[device])
        raise BadInput(f"--device {name}: PyTorch finds no such device here, only {found}")
    return torch.device(name)


def _writable(folder: Path) -> Path:
    """The folder, made if need be. BadInput before any work is done rather than after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"--results: cannot write to {folder} ({error.strerror})") from error
    return folder


def _compare(ours: object, theirs: object, tolerance: float | None) -> tuple[int, float]:
    """How many values were compared, and within which tolerance. AssertionError where they differ."""
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), f"{len(ours)} against {len(theirs)} items"
        parts = [_compare(a, b, tolerance) for a, b in zip(ours, theirs, strict=True)]
        return sum(count for count, _ in parts), max((within for _, within in parts), default=0.0)
    a, b = (torch.as_tensor(x, dtype=torch.float64 if isinstance(x, float) else None) for x in (ours, theirs))
    within = 0.0 if not b.is_floating_point() else TOLERANCE[b.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), rtol=within, atol=within)
    return b.numel(), within


def _fail(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(1)
