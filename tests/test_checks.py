"""Tests of the tests: a small course in a temporary folder, good at first, then spoilt in one way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import course
import play
import pytest

LESSON = '''"""A lesson that exists only in the tests.

Run:     uv run sprints/01_fixture/01_sums.py      (4 s on two cores)
Proves:  1. one and one make two
         2. counting gives the same
Writes:  results/01_fixture/01_sums.json
Note:    notes/01_sums.md
"""

from lab.lesson import Lesson, run


def add(a: int, b: int) -> int:
    """The sum."""
    return a + b


def main(lesson: Lesson) -> None:
    lesson.heading("Sums")
    print(f"1 + 1 = {add(1, 1)}, roughly {1.234:.3f}, in 0.1 s")
    lesson.proves(1, add(1, 1) == 2)
    lesson.proves(2, len("ab") == add(1, 1))
    lesson.measured(total=add(1, 1))


if __name__ == "__main__":
    run(main)
'''
NOTE = """# 01 · Sums

See [the lesson](../01_sums.py) and [its heading](#01--sums).

```python
def add(a: int, b: int) -> int:
    \"\"\"The sum.\"\"\"
    return a + b
```

```text
1 + 1 = 2, roughly 1.235, in 0.2 s
✓ 1. one and one make two
```
"""
DAMAGE = """[[damage]]
claim = 1
what = "one too many"
old = "return a + b"
new = "return a + b + 1"

[[damage]]
claim = 2
what = "a longer word"
old = '"ab"'
new = '"abc"'
"""


@pytest.fixture
def fixture(tmp_path) -> course.Script:
    """A course of one lesson that passes every check."""
    root = tmp_path / "course"
    sprint = root / "sprints" / "01_fixture"
    for folder in (
        sprint / "notes",
        root / "results" / "01_fixture",
        root / "tests" / "damage" / "01_fixture",
    ):
        folder.mkdir(parents=True)
    write(sprint / "01_sums.py", LESSON)
    write(sprint / "notes" / "01_sums.md", NOTE)
    write(sprint / "README.md", "# Fixture\n\n- [01_sums](01_sums.py)\n")
    write(root / "MILESTONES.md", "# Milestones\n\n- [x] [sums](sprints/01_fixture/01_sums.py)\n")
    write(root / "tests" / "damage" / "01_fixture" / "01_sums.toml", DAMAGE)
    write(root / "results" / "01_fixture" / "01_sums.json", "{}\n")
    (script,) = course.scripts(root)
    return script


def write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def spoil(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    write(file, text.replace(old, new))


def check_source(script: course.Script) -> None:
    """All that can be checked without running the lesson."""
    course.check_docstring(script)
    course.check_shape(script)
    course.check_imports(script)
    course.check_listed(script)
    course.check_excerpts(script)
    course.check_links(script.note)
    course.check_damages(script)


def test_a_good_lesson_passes(fixture, tmp_path):
    check_source(fixture)
    run = play.run(fixture, tmp_path / "run")
    course.check_run(run)
    course.check_quotes(fixture, run.stdout)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("return a + b", "return a - b", r"claims \[1\] do not hold"),
        (
            '    lesson.heading("Sums")',
            '    import warnings; warnings.warn("careful")',
            "something on stderr",
        ),
        ('    lesson.proves(2, len("ab") == add(1, 1))\n', "", "exit status 1"),
        ('    lesson.heading("Sums")', '    open("left behind", "w").close()', "appeared where none should"),
        ("Writes:  results/01_fixture/01_sums.json\n", "", "Writes says"),
        ('    lesson.heading("Sums")', '    print("\\n" * 60)', "lines of output"),
        ('    lesson.heading("Sums")', "    raise RuntimeError", "exit status 1"),
    ],
)
def test_a_bad_run_is_caught(fixture, tmp_path, old, new, says):
    spoil(fixture.path, old, new)
    with pytest.raises(AssertionError, match=says):
        course.check_run(play.run(course.Script(fixture.path), tmp_path / "run", fresh=False))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("lesson.proves(2,", "lesson.proves(3,", r"proves claim \[3\], which its docstring does not list"),
        ("2. counting", "3. counting", "numbered 1, 2, 3"),
        ("A lesson that exists only in the tests.", "A lesson", "begins with one sentence"),
        ("Note:    notes/01_sums.md\n", "", "no field Note"),
        ("(4 s on two cores)", "(soon)", "names no time"),
        ("uv run sprints/01_fixture/01_sums.py", "uv run sums.py", "names another command"),
        ("01_sums.json", "02_other.json", "not its own result"),
        ("01_sums.json", "01_sums.png", "is not there"),
        ("from lab", "from importlib import import_module\nfrom lab", "importlib could bring in"),
        ("from lab", "import runpy\nfrom lab", "runpy could bring in"),
        ("from lab", "from .other import add\nfrom lab", "nothing from its own folder"),
        ("from lab", "from lab import later\nfrom lab", "derived later, in 06_attention"),
        ("def add(", "print('hello')\n\n\ndef add(", "importing a lesson must do nothing"),
        ("    run(main)", "    run(main)\n    print()", "does not end in one guarded call"),
        ("return a + b", "return b + a", "in the script|fits in 0 places"),
        ('len("ab")', "2", "fits in 0 places"),
        ("    lesson.heading", "    __import__('other')\n    lesson.heading", "could bring in"),
    ],
)  # fmt: skip
def test_a_bad_script_is_caught(fixture, old, new, says):
    lab = fixture.root / "sprints" / "lab"
    lab.mkdir()
    write(lab / "later.py", '"""Later.\n\nDerived in: 06_attention/02_masks\n"""\n')
    write(lab / "lesson.py", '"""Always.\n\nDerived in: –\n"""\n')
    spoil(fixture.path, old, new)
    with pytest.raises(AssertionError, match=says):
        check_source(course.Script(fixture.path))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("    return a + b\n", "    return a + c\n", "code that is not in the script"),
        ("1 + 1 = 2,", "1 + 1 = 3,", "a line that was not printed"),
        ("roughly 1.235", "roughly 1.335", "a line that was not printed"),
        ("✓ 1. one and one make two", "✓ 1. two and two make four", "a line that was not printed"),
        ("✓ 1. one and one make two", "✗ 1. one and one make two", "a line that was not printed"),
        ("(../01_sums.py)", "(../02_sums.py)", "leads nowhere"),
        ("(#01--sums)", "(#02--sums)", "leads to no heading"),
    ],
)
def test_a_bad_note_is_caught(fixture, old, new, says):
    output = "1 + 1 = 2, roughly 1.234, in 0.1 s\n✓ 1. one and one make two\n"

    def check_note() -> None:
        course.check_excerpts(fixture)
        course.check_quotes(fixture, output)
        course.check_links(fixture.note)

    check_note()
    spoil(fixture.note, old, new)
    with pytest.raises(AssertionError, match=says):
        check_note()


@pytest.mark.parametrize("page", ["sprints/01_fixture/README.md", "MILESTONES.md"])
def test_a_lesson_that_no_page_lists_is_caught(fixture, page):
    spoil(fixture.root / page, "01_sums.py", "..")
    with pytest.raises(AssertionError, match="no link to"):
        course.check_listed(fixture)


def test_a_claim_without_damage_is_caught(fixture):
    spoil(fixture.damage, "claim = 2", "claim = 1")
    with pytest.raises(AssertionError, match=r"no damage for claims \[2\]"):
        course.check_damages(course.Script(fixture.path))


def test_a_damage_that_does_nothing_is_caught(fixture, tmp_path):
    whole, harmless = (
        course.damages(fixture)[0],
        {"claim": 1, "what": "nothing", "old": "a + b", "new": "b + a"},
    )
    course.check_caught(
        play.run(course.damaged(fixture, whole, tmp_path / "1"), tmp_path / "1", fresh=False), whole
    )
    run = play.run(course.damaged(fixture, harmless, tmp_path / "2"), tmp_path / "2", fresh=False)
    with pytest.raises(AssertionError, match="not caught: nothing"):
        course.check_caught(run, harmless)


@pytest.mark.parametrize(
    ("quote", "line", "same"),
    [
        ("loss 0.50 in 1.2 s", "loss   0.51 in 9.9 s", True),
        ("loss 0.50", "loss 0.53", False),
        ("12,000 digits", "12,100 digits", True),
        ("12,000 digits", "13,000 digits", False),
        ("3 of 4", "2 of 4", False),
        ("within 1e-05", "within 1e-05", True),
        ("within 1e-05", "within 1e-04", False),
        ("82.5 GFLOP/s", "3.1 GFLOP/s", True),
        ("82.5 MB", "3.1 MB", False),
        ("a b", "a c", False),
        ("rate -1.0", "rate 1.0", False),
    ],
)
def test_how_alike_a_quote_must_be(quote, line, same):
    assert course.same_line(quote, line) is same


def test_a_new_lesson_needs_no_new_test(fixture, only_full):
    """The whole suite, on a course that it has never seen."""
    (fixture.root / "sprints" / "lab").mkdir()
    for module in (course.ROOT / "sprints" / "lab").glob("*.py"):
        if course.derived_in(module) is None:  # the others belong to lessons that are not here
            shutil.copy(module, fixture.root / "sprints" / "lab")
    tests = ("test_lessons.py", "test_notes.py", "test_structure.py", "test_damage.py")
    for file in ("course.py", "play.py", "conftest.py", *tests):
        shutil.copy(course.ROOT / "tests" / file, fixture.root / "tests")
    shutil.copy(course.ROOT / "pyproject.toml", fixture.root)
    environment = os.environ | {"PYTHONPATH": str(fixture.root / "sprints")}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--full"]

    def suite() -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=fixture.root, env=environment, capture_output=True, text=True, check=False
        )

    good = suite()
    assert good.returncode == 0, good.stdout
    spoil(fixture.path, "return a + b", "return a + b + 1")
    bad = suite()
    assert "test_runs[01_fixture/01_sums-cpu]" in bad.stdout, bad.stdout
    assert "test_excerpts_and_quotes[01_fixture/01_sums-cpu]" in bad.stdout
