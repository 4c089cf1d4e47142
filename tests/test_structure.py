"""The house rules, read off the source: docstrings, numbering, imports, listings, style."""

import importlib.util
import subprocess
import sys

import course
import pytest

CHECKS = (
    course.check_docstring,
    course.check_shape,
    course.check_imports,
    course.check_listed,
    course.check_damages,
)


@pytest.mark.parametrize("script", [pytest.param(script, id=script.key) for script in course.LESSONS])
@pytest.mark.parametrize("check", CHECKS)
def test_lesson(script, check):
    check(script)


def test_lesson_folders_hold_only_numbered_scripts():
    """Any other .py there would shadow a module of that name: a script's own folder is first on sys.path."""
    assert set(course.ROOT.glob("sprints/[0-9]*/*.py")) == {script.path for script in course.LESSONS}


def test_the_lab_says_where_it_is_derived():
    for module in sorted((course.ROOT / "sprints" / "lab").glob("*.py")):
        if origin := course.derived_in(module):
            lesson = course.Script(course.ROOT / "sprints" / f"{origin}.py")
            assert lesson.path.exists(), f"lab/{module.name} is derived in {origin}, which is not there"
            assert f"lab.{module.stem}" in lesson.imports, f"{origin} does not import its finished form"


def test_results_belong_to_lessons():
    there = {file.relative_to(course.ROOT).as_posix() for file in course.ROOT.glob("results/*/*")}
    assert there == set().union(*(script.writes for script in course.LESSONS))


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids="-".join)
def test_style(command):
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    style = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", course.ROOT], capture_output=True, text=True
    )
    assert style.returncode == 0, style.stdout
