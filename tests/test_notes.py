"""What a note quotes is in the script or in its output, and its links lead somewhere."""

import course
import pytest

PAGES = [*course.ROOT.glob("*.md"), *sorted(course.ROOT.glob("sprints/**/*.md"))]


@pytest.mark.parametrize(("script", "device"), course.ON_CPU)
def test_excerpts_and_quotes(script, device, ran):
    assert script.note.exists(), f"no note {script.note.relative_to(course.ROOT)}"
    course.check_excerpts(script)
    course.check_quotes(script, ran(script, device).stdout)


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=str(page.relative_to(course.ROOT))) for page in PAGES]
)
def test_links(page):
    course.check_links(page)


def test_every_note_has_a_lesson():
    notes = set(course.ROOT.glob("sprints/[0-9]*/notes/*"))
    assert notes == {script.note for script in course.LESSONS}
