"""Every lesson runs as a user runs it, on every device there is, and proves all its claims."""

import course
import pytest


@pytest.mark.parametrize(("script", "device"), course.ON_EVERY_DEVICE)
def test_runs(script, device, ran):
    course.check_run(ran(script, device))


@pytest.mark.parametrize(("script", "device"), course.ON_EVERY_DEVICE)
def test_other_seeds(script, device, only_full, tmp_path):
    for seed in (1, 2, 3, 4):
        course.check_run(
            course.run(script, tmp_path / str(seed), "--seed", str(seed), device=device, full=True)
        )


WITH_WORKERS = [script for script in course.LESSONS if "num_workers" in script.source]


@pytest.mark.parametrize(("script", "device"), course.each([(script, "cpu") for script in WITH_WORKERS]))
def test_spawned_workers(script, device, only_full, tmp_path):
    """As on Windows and macOS, where a worker imports the lesson afresh."""
    course.check_run(course.run(script, tmp_path, device=device, full=True, spawn=True))
