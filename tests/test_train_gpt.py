"""The capstone as its users stop it and take it up again."""

import csv
import random
import re
import signal
import subprocess
import sys

from lab.training import load_model

import course
import play
import pytest
import torch

SCRIPT = course.Script(course.ROOT / "sprints" / "09_training_pipeline" / "02_train_gpt.py")
WORDS = "η γάτα κοιμάται στον ήλιο και το σκυλί τρέχει 世界 🙂 ребёнок спит тихо"
SMALL = "--context 32 --width 16 --heads 2 --layers 1 --vocabulary 300 --batch 4 --dropout 0.1 --steps 800"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A small training on a text in several scripts."""
    draw, file = random.Random(0), tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("".join(" ".join(draw.choices(WORDS.split(), k=9)) + ".\n" for _ in range(300)), "utf-8")
    return ["--data", str(file), *SMALL.split(), "--precision", "float32"]


def learned(results) -> tuple[list, list]:
    """The weights, and the reports but for their seconds."""
    files = results / "09_training_pipeline"
    assert not (files / "02_train_gpt.ckpt").exists()
    weights = load_model(files / "02_train_gpt.model", torch.device("cpu"))[0].state_dict()
    with (files / "02_train_gpt.csv").open(newline="") as lines:
        reports = [{k: v for k, v in line.items() if k != "seconds"} for line in csv.DictReader(lines)]
    return list(weights.values()), reports


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_stopped_killed_and_resumed_it_is_the_same_training(tmp_path, options):
    pipe = subprocess.PIPE
    start = play.command(SCRIPT, tmp_path / "in parts", *options)
    with subprocess.Popen(**start, stdout=pipe, stderr=pipe) as process:
        play.until(process, "\n   80 ")
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert re.fullmatch(
        r"02_train_gpt.py: stopped after step \d+ of 800; --resume goes on from there\n", told
    )

    start = play.command(SCRIPT, tmp_path / "in parts", *options, "--resume")
    with subprocess.Popen(**start, stdout=pipe) as process:
        play.until(process, "\n  400 ")
        process.kill()

    other = [option.replace("800", "900") for option in options]
    run = play.run(
        SCRIPT, tmp_path / "other", *other, "--resume", "--results", tmp_path / "in parts", fresh=False
    )
    assert (run.code, run.stderr.count("\n")) == (2, 1)
    assert "a training with other settings" in run.stderr

    run = subprocess.run(**start, capture_output=True, timeout=100)
    assert (run.returncode, run.stderr) == (0, "")
    whole = subprocess.run(
        **play.command(SCRIPT, tmp_path / "whole", *options), capture_output=True, timeout=100
    )
    assert (whole.returncode, whole.stderr) == (0, "")
    (weights, reports), (theirs, told) = (learned(tmp_path / name) for name in ("in parts", "whole"))
    assert reports == told
    assert all(torch.equal(ours, other) for ours, other in zip(weights, theirs, strict=True))


def test_nothing_to_go_on_with(tmp_path, options):
    run = play.run(SCRIPT, tmp_path, *options, "--resume", fresh=False)
    assert (run.code, run.stderr.count("\n")) == (2, 1)
    assert "02_train_gpt.ckpt" in run.stderr
    assert not run.written
