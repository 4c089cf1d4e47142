"""Running a lesson for the tests, as a user would: from a foreign folder, offline, on a cp1252 console."""

import contextlib
import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

LAB = Path(__file__).resolve().parents[1] / "sprints"
UNREACHABLE = "http://127.0.0.1:9"  # as a proxy: whatever asks for the network is refused at once
SECONDS = 560
PRELOADED = ["torch", "matplotlib.pyplot", "torchvision.transforms.v2"]  # before a process is copied from


@dataclass(frozen=True)
class Run:
    """What a lesson did."""

    script: object  # a course.Script
    short: bool  # whether it ran with the short --steps of its docstring
    code: int
    stdout: str
    stderr: str
    results: Path
    written: frozenset[str]  # named as if --results had not been given
    touched: frozenset[str]  # files that appeared anywhere else

    def marked(self, mark: str) -> set[int]:
        """The claims printed with ✓ (proven), ✗ (broken) or – (left to the full run)."""
        return set(map(int, re.findall(rf"^{mark} (\d+)\. ", self.stdout, re.MULTILINE)))


def run(script, scratch: Path, *options: str, device="cpu", full=False, fresh=True, workers=None) -> Run:
    """Run a lesson.

    fresh    in an interpreter of its own, as a user does; otherwise in a copy of a process that has imported
             torch already, which saves most of the time (where the system cannot copy, always fresh)
    workers  how DataLoader workers are started, if not fresh: "spawn" as on Windows and macOS
    """
    foreign, temporary, results = (scratch / name for name in ("foreign", "temporary", "results"))
    for folder in (foreign, temporary):
        folder.mkdir(parents=True, exist_ok=True)
    short = [] if full else " ".join(script.short_steps).split()
    data = ["--data", "rendered"] if script.data == "digits" else []
    data += ["--weights", "random"] if '"--weights"' in script.source else []
    arguments = [script.path, "--device", device, "--results", results, *data, *short, *options]
    environment = {
        "PYTHONPATH": os.pathsep.join(
            [str(script.root / "sprints"), str(LAB)]
        ),  # a lab of its own comes first
        "PYTHONIOENCODING": "cp1252",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": str(threads()),
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)),
        **dict.fromkeys(("http_proxy", "https_proxy"), UNREACHABLE),
        "HF_HUB_OFFLINE": "1",  # GPT-2's weights are half a gigabyte
    }
    before, streams = _files(script.root), (scratch / "stdout", scratch / "stderr")
    forkable = "forkserver" in multiprocessing.get_all_start_methods()
    how = _start if fresh or not forkable else functools.partial(_fork, workers=workers)
    code = how(list(map(str, arguments)), foreign, environment, streams)
    stdout, stderr = (stream.read_text(encoding="utf-8") for stream in streams)
    written = _files(results)
    return Run(
        script=script,
        short=bool(short),
        code=code,
        stdout=stdout,
        stderr=stderr,
        results=results,
        written=frozenset(f"results/{Path(file).relative_to(results).as_posix()}" for file in written),
        touched=frozenset((_files(script.root) - before | _files(foreign, temporary)) - written),
    )


def threads() -> int:
    """Per process, when pytest-xdist runs several."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def _files(*folders: Path) -> set[str]:
    skipped = {".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "data"}
    found = set()
    for folder in folders:
        for here, below, names in os.walk(folder):
            below[:] = [name for name in below if name not in skipped]
            found |= {os.path.join(here, name) for name in names if name != "uv.lock"}
    return found


def _start(
    arguments: list[str], folder: Path, environment: dict[str, str], streams: tuple[Path, Path]
) -> int:
    """In a new interpreter: its exit status."""
    with contextlib.ExitStack() as stack:
        stdout, stderr = (stack.enter_context(stream.open("wb")) for stream in streams)
        return subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=os.environ | environment, stdin=subprocess.DEVNULL,
            stdout=stdout, stderr=stderr, timeout=SECONDS,
        ).returncode  # fmt: skip


def _fork(*run: object, workers: str | None) -> int:
    """In a copy of a process that has done nothing but import: its exit status."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_become, args=(*run, workers))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"a lesson ran for {SECONDS} s: {run[0]}")
    return process.exitcode


def _become(
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    streams: tuple[Path, Path],
    workers: str | None,
) -> None:
    """Turn this process into a run of the lesson."""
    import torch  # not above: pytest's controlling process can do without

    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.update(environment)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    tempfile.tempdir = None
    sys.argv = arguments
    torch.set_num_threads(threads())
    multiprocessing.set_start_method(workers, force=True)  # None: the system's own
    main = types.ModuleType("__main__")
    main.__file__ = arguments[0]
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main  # where workers look for what they are sent
    try:
        exec(compile(Path(main.__file__).read_bytes(), main.__file__, "exec"), vars(main))
    except Exception:
        sys.excepthook(*sys.exc_info())  # which the lab has replaced
        sys.exit(1)


# ── Lessons to talk with ──────────────────────────────────────────────────────────────────────────────────


def command(script, results: Path, *options: object) -> dict:
    """Of subprocess: a lesson in a process of its own, whose output comes as it is printed."""
    environment = {"PYTHONPATH": str(script.root / "sprints"), "PYTHONIOENCODING": "cp1252"}
    arguments = [sys.executable, "-u", script.path, "--device", "cpu", "--results", results, *options]
    return {
        "args": list(map(str, arguments)),
        "env": os.environ | environment | {"OMP_NUM_THREADS": str(threads())},
        "encoding": "utf-8",
        "errors": "surrogateescape",
    }


def until(process: subprocess.Popen, words: str) -> None:
    """Read what it prints until it has said these words."""
    said = ""
    while words not in said:
        character = process.stdout.read(1)
        assert character, f"it ended, having said {said!r}"
        said += character
