"""The checks that every lesson and note must pass, on any course folder, so that they can be tested too.

Each check raises AssertionError with a message that says what to put right.
"""

import ast
import functools
import re
import shutil
import textwrap
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lab.lesson import claims, fields

import play
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES, MOST_OUTPUT, MOST_BYTES = 300, 45, {".png": 100_000, ".html": 1_000_000}
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()


@dataclass(frozen=True)
class Script:
    """One lesson: sprints/<sprint>/<name>.py below a course folder."""

    path: Path

    @property
    def root(self) -> Path:
        return self.path.parents[2]

    @property
    def sprint(self) -> str:
        return self.path.parent.name

    @property
    def key(self) -> str:
        return f"{self.sprint}/{self.path.stem}"

    @property
    def note(self) -> Path:
        return self.path.parent / "notes" / f"{self.path.stem}.md"

    @property
    def damage(self) -> Path:
        return self.root / "tests" / "damage" / f"{self.key}.toml"

    @cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, filename=str(self.path))

    @cached_property
    def docstring(self) -> str:
        return ast.get_docstring(self.tree) or ""

    @property
    def fields(self) -> dict[str, str]:
        return fields(self.docstring)

    @property
    def claims(self) -> dict[int, str]:
        return claims(self.docstring)

    @property
    def writes(self) -> set[str]:
        """The files named under *Writes*, relative to the course folder."""
        return set(re.findall(r"results/\S+\.\w+", self.fields.get("Writes", "")))

    @property
    def data(self) -> str:
        """What the lesson reads through --data: "digits", "text", or nothing."""
        return "".join(re.findall(r'^    run\(main.*data="(\w+)"', self.source, re.MULTILINE))

    @property
    def short_steps(self) -> list[str]:
        """What `uv run pytest` passes to a lesson that takes long: the --steps in its Run line."""
        return re.findall(r"--steps \d+", self.fields.get("Run", ""))

    @property
    def seconds(self) -> int:
        """What the whole run takes, as its Run line says."""
        return int(re.search(r"\([^)]*?(\d+) s", self.fields["Run"])[1])

    @property
    def imports(self) -> set[str]:
        """The modules that the lesson imports, and what it imports from them: "lab", "lab.corpus"."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        return found

    @property
    def full_claims(self) -> set[int]:
        """The claims that a short run leaves to the full one: `proves(…, full_run=True)`."""
        return {
            call.args[0].value
            for call in ast.walk(self.tree)
            if isinstance(call, ast.Call) and any(keyword.arg == "full_run" for keyword in call.keywords)
        }


def scripts(root: Path) -> list[Script]:
    return [Script(path) for path in sorted(root.glob("sprints/[0-9]*/[0-9]*.py"))]


def each(parameters: list[tuple]) -> list:
    """Test parameters named after their parts."""
    return [
        pytest.param(*parts, id="-".join(getattr(part, "key", str(part)) for part in parts))
        for parts in parameters
    ]


LESSONS = scripts(ROOT)
ON_CPU = each([(script, "cpu") for script in LESSONS])
ON_EVERY_DEVICE = each([(script, device) for script in LESSONS for device in DEVICES])


# ── Runs (play.py makes them) ─────────────────────────────────────────────────────────────────────────────


def check_run(run: play.Run) -> None:
    """Exit 0, every claim proven, nothing on stderr, its files and no others."""
    told = f"\n{run.stdout}\n{run.stderr}"
    assert not (broken := run.marked("✗")), f"claims {sorted(broken)} do not hold{told}"
    assert run.code == 0, f"exit status {run.code}{told}"
    assert not run.stderr, f"something on stderr{told}"
    wanted, postponed = run.script.claims.keys(), run.marked("–")
    missing = wanted - run.marked("✓") - postponed
    assert not missing, f"claims {sorted(missing)} were not proven{told}"
    assert run.short or not postponed, f"claims {sorted(postponed)} were postponed in a full run"
    assert run.written == run.script.writes, (
        f"Writes says {run.script.writes}, written was {set(run.written)}"
    )
    assert not run.touched, f"files appeared where none should: {sorted(run.touched)}"
    lines = len(run.stdout.splitlines())
    assert lines <= MOST_OUTPUT, f"{lines} lines of output, at most {MOST_OUTPUT} can be read at a glance"
    for file in run.results.rglob("*.*"):
        size = file.stat().st_size
        assert size < MOST_BYTES.get(file.suffix, size + 1), f"{file.name} takes {size:,} bytes"


# ── Structure ─────────────────────────────────────────────────────────────────────────────────────────────


def check_docstring(script: Script) -> None:
    """The fields are there and true, and the claims are numbered as the code numbers them."""
    place = f"sprints/{script.key}.py"
    assert script.docstring.split("\n")[0].endswith("."), f"{place}: its docstring begins with one sentence"
    for name in ("Run", "Proves", "Note"):
        assert name in script.fields, f"{place}: its docstring has no field {name}"
    assert f"uv run {place} (" in " ".join(script.fields["Run"].split()), (
        f"{place}: Run names another command"
    )
    assert re.search(r"\(.*\d+ s.*\)", script.fields["Run"]), f"{place}: Run names no time"
    assert script.fields["Note"] == f"notes/{script.path.stem}.md", f"{place}: Note names another file"
    for file in script.writes:
        assert file.startswith(f"results/{script.key}."), f"{place}: {file} is not its own result"
        assert (script.root / file).exists(), f"{place}: {file} is not there; run the lesson and commit it"
    try:
        numbers = script.claims.keys()
    except ValueError as error:
        raise AssertionError(f"{place}: {error}") from error
    used = set()
    for node in ast.walk(script.tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("proves", "proves_equal"):
            used |= {part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)}
    assert used <= numbers, (
        f"{place}: proves claim {sorted(used - numbers)}, which its docstring does not list"
    )


def check_shape(script: Script) -> None:
    """Short enough to read; importing it does nothing; it ends with one call into the lab."""
    place = f"sprints/{script.key}.py"
    length = len(script.source.splitlines())
    assert length <= MOST_LINES, f"{place}: {length} lines"
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)
    *body, last = script.tree.body[1:]
    for node in body:
        assert isinstance(node, allowed), f"{place}, line {node.lineno}: importing a lesson must do nothing"
    guard = ast.unparse(last).splitlines()
    assert len(guard) == 2, f"{place}: does not end in one guarded call"
    assert guard[0] == "if __name__ == '__main__':", f"{place}: does not end in a guarded call"
    assert guard[1].startswith("    run(main"), f"{place}: does not end in run(main)"


LOADERS = {"__import__", "exec", "import_module", "run_module", "run_path", "spec_from_file_location"}


def check_imports(script: Script) -> None:
    """No lesson imports a lesson, nor a part of the lab that only a later sprint derives."""
    place = f"sprints/{script.key}.py"
    for node in ast.walk(script.tree):
        assert getattr(node, "level", 0) == 0, (
            f"{place}, line {node.lineno}: a lesson imports nothing from its own folder"
        )
        name = getattr(node, "id", getattr(node, "attr", ""))
        assert name not in LOADERS, f"{place}, line {node.lineno}: {name} could bring in another lesson"
    for module in script.imports & {"importlib", "importlib.util", "runpy"}:
        raise AssertionError(f"{place}: {module} could bring in another lesson")
    for module in sorted(script.imports):
        parts = module.split(".")
        file = (
            script.root / "sprints" / "lab" / f"{parts[1]}.py"
            if parts[0] == "lab" and len(parts) > 1
            else None
        )
        if file and file.exists():
            origin = derived_in(file)
            assert origin is None or origin.split("/")[0][:2] <= script.sprint[:2], (
                f"{place}: imports lab.{parts[1]}, which is derived later, in {origin}"
            )


def derived_in(module: Path) -> str | None:
    """The lesson that derives a module of the lab, as its docstring says; None where there is none."""
    origin = fields(ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").get("Derived in")
    assert origin, f"lab/{module.name}: its docstring does not say where it is derived (Derived in: …)"
    return None if origin == "–" else origin


def check_listed(script: Script) -> None:
    """The lesson stands in its sprint's README and in MILESTONES.md, as a link."""
    for page in (script.path.parent / "README.md", script.root / "MILESTONES.md"):
        targets = {(page.parent / target).resolve() for target in links(page)} if page.exists() else set()
        assert script.path in targets, (
            f"{page.relative_to(script.root)} has no link to sprints/{script.key}.py"
        )


# ── Notes ─────────────────────────────────────────────────────────────────────────────────────────────────


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language in a page of Markdown."""
    text = page.read_text(encoding="utf-8")
    return [
        textwrap.dedent(block) for block in re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.M | re.S)
    ]


def check_excerpts(script: Script) -> None:
    """Every python block of the note stands in the script, line by line, at any one indentation."""
    lines = script.source.splitlines()
    for block in blocks(script.note, "python"):
        wanted = block.rstrip("\n").split("\n")
        windows = ("\n".join(lines[i : i + len(wanted)]) for i in range(len(lines)))
        assert any(textwrap.dedent(window) == "\n".join(wanted) for window in windows), (
            f"{script.note.name} quotes code that is not in the script:\n{block}"
        )


NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")
TIMING = re.compile(NUMBER.pattern + r"(?= ?(?:[nµm]?s|min|GFLOP/s|[KMG]B/s|\w+/s)\b)")


def check_quotes(script: Script, output: str) -> None:
    """Every line of the note's text blocks was printed; numbers may differ a little, timings freely."""
    printed = output.splitlines()
    for block in blocks(script.note, "text"):
        for quote in filter(str.strip, block.splitlines()):
            assert any(same_line(quote, line) for line in printed), (
                f"{script.note.name} quotes a line that was not printed:\n{quote}"
            )


def same_line(quote: str, line: str) -> bool:
    """Alike but for spacing, timings, and numbers within 2% or one unit of the last decimal printed."""
    quote, line = (TIMING.sub("⏱", " ".join(text.split())) for text in (quote, line))
    if NUMBER.sub("#", quote) != NUMBER.sub("#", line):
        return False
    pairs = zip(NUMBER.findall(quote), NUMBER.findall(line), strict=True)
    return all(_close(a.replace(",", ""), b.replace(",", "")) for a, b in pairs)


def _close(quoted: str, printed: str) -> bool:
    decimals = len(quoted.split("e")[0].partition(".")[2])
    unit = 10.0**-decimals if decimals and "e" not in quoted else 0.0
    return abs(float(quoted) - float(printed)) <= max(0.02 * abs(float(printed)), 1.0001 * unit)


def links(page: Path) -> list[str]:
    """The relative link targets of a page, without their anchors."""
    text = re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """What can follow # in a link to this page: its headings, as GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_links(page: Path) -> None:
    """Every relative link leads to a file that is there, and to a heading of it."""
    for link in links(page):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {link} leads nowhere"
        assert not anchor or anchor in anchors(file), f"{page.name}: {link} leads to no heading"


# ── Damage ────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def damages(script: Script) -> list[dict]:
    """The lesson's list of deliberate damages, each with the claim that must fail (tests/damage/…toml)."""
    return (
        tomllib.loads(script.damage.read_text(encoding="utf-8"))["damage"] if script.damage.exists() else []
    )


def check_damages(script: Script) -> None:
    """Every claim has a damage, and every damage fits the script in exactly one place."""
    without = script.claims.keys() - {damage["claim"] for damage in damages(script)}
    assert not without, f"{script.damage.relative_to(script.root)} has no damage for claims {sorted(without)}"
    for damage in damages(script):
        places = _where(script, damage).read_text(encoding="utf-8").count(damage["old"])
        assert places == 1, f"{script.damage.name}: «{damage['what']}» fits in {places} places"


def _where(script: Script, damage: dict) -> Path:
    """The file that is damaged: the lesson, or the module of the lab that the damage names."""
    return script.root / "sprints" / "lab" / damage["lab"] if "lab" in damage else script.path


def damaged(script: Script, damage: dict, scratch: Path) -> Script:
    """A copy of the lesson, and of the lab if that is what is damaged, with the damage done."""
    copy = Script(scratch / "course" / script.path.relative_to(script.root))
    copy.path.parent.mkdir(parents=True)
    shutil.copy(script.path, copy.path)
    trained = script.root / "results" / "09_training_pipeline" / "02_train_gpt.model"
    if trained.name in script.source:  # the story model, from which a lesson starts
        (copy.root / trained.parent.relative_to(script.root)).mkdir(parents=True)
        shutil.copy(trained, copy.root / trained.relative_to(script.root))
    if "lab" in damage:
        shutil.copytree(script.root / "sprints" / "lab", copy.root / "sprints" / "lab")
    text = _where(script, damage).read_text(encoding="utf-8").replace(damage["old"], damage["new"])
    _where(copy, damage).write_text(text, encoding="utf-8")
    return copy


def check_caught(run: play.Run, damage: dict) -> None:
    """The run ended at the claim that the damage is about, and wrote nothing."""
    told = f"\n{run.stdout}\n{run.stderr}"
    assert run.marked("✗") == {damage["claim"]}, f"not caught: {damage['what']}{told}"
    assert run.code == 1, f"exit status {run.code}: {damage['what']}{told}"
    assert "Traceback" not in run.stderr, f"caught by a crash, not by the claim: {damage['what']}{told}"
    written = {file for file in run.written if not file.endswith(".ckpt")}  # with which a training can go on
    assert not written, f"a run that broke a claim wrote {written}"
