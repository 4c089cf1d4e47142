"""Every lesson runs as a user runs it, on every device there is, and proves all its claims."""

import course
import play
import pytest

CAPSTONE = 80  # seconds that a lesson takes


@pytest.mark.parametrize(("script", "device"), course.ON_EVERY_DEVICE)
def test_runs(script, device, ran):
    course.check_run(ran(script, device))


@pytest.mark.parametrize(("script", "device"), course.ON_EVERY_DEVICE)
def test_other_seeds(script, device, only_full, tmp_path):
    """At full length, but for the capstone: its short training, as 4 more would take 10 minutes."""
    for seed in ("1", "2", "3", "4"):
        options = {"device": device, "full": script.seconds < CAPSTONE, "fresh": False}
        course.check_run(play.run(script, tmp_path / seed, "--seed", seed, **options))


WITH_WORKERS = [script for script in course.LESSONS if "num_workers" in script.source]


@pytest.mark.parametrize(("script", "device"), course.each([(script, "cpu") for script in WITH_WORKERS]))
def test_spawned_workers(script, device, only_full, tmp_path):
    """As on Windows and macOS, where a worker imports the lesson afresh."""
    course.check_run(play.run(script, tmp_path, device=device, full=True, fresh=False, workers="spawn"))
