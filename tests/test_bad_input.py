"""What a user may get wrong, on the lessons themselves: one clear line, status 2, nothing left behind."""

import os
import signal
import subprocess
import sys
import time

import course
import play
import pytest

EMPTY = {
    "digits": {"MNIST/raw/train-images-idx3-ubyte": b"\0\0\x08\x03\0\0"},
    "text": {"text": b" \n"},
    "stories": {"text": b" \n"},
}
FOREIGN = {
    "digits": {"MNIST/raw/train-images-idx3-ubyte": b"<html>"},
    "text": {"text": b"\xff\xfe\0a"},
    "stories": {"text": b"\xff\xfe\0a"},
}
WITH_DATA = [script for script in course.LESSONS if script.data]


def check_refused(run: play.Run) -> None:
    assert run.code == 2, run.stdout + run.stderr
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"{run.script.path.name}: "), line
    assert not run.written | run.touched


@pytest.mark.parametrize(("script", "device"), course.each([(script, "cpu") for script in WITH_DATA]))
def test_data_that_is_no_data(script, device, only_full, tmp_path):
    kind = script.data
    for number, files in enumerate(({}, EMPTY[kind], FOREIGN[kind])):
        for name, content in files.items():
            file = tmp_path / str(number) / name
            file.parent.mkdir(parents=True)
            file.write_bytes(content)
        data = tmp_path / str(number) / ("" if kind == "digits" else "text")
        check_refused(
            play.run(script, tmp_path / f"run{number}", "--data", str(data), device=device, fresh=False)
        )


def test_a_device_that_is_not_there(tmp_path):
    missing = next(device for device in ("cuda", "mps") if device not in course.DEVICES)
    check_refused(play.run(course.LESSONS[0], tmp_path, device=missing, fresh=False))


IMPORTING = """
import lab
print("ready", flush=True)
import torch, torchvision, matplotlib.pyplot
while True:
    pass
"""
RUNNING = '''"""A lesson without end.

Proves:  1. it ends
"""
from lab.lesson import run

def main(lesson):
    print("ready", flush=True)
    while True:
        pass

run(main)
'''


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
@pytest.mark.parametrize("code", [IMPORTING, RUNNING], ids=["importing", "running"])
def test_ctrl_c(tmp_path, code):
    script = tmp_path / "sprints" / "01_fixture" / "01_endless.py"
    script.parent.mkdir(parents=True)
    script.write_text(code, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(course.ROOT / "sprints"), "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, script], env=environment, stdout=pipe, stderr=pipe, text=True
    ) as process:
        while process.stdout.readline() != "ready\n":
            pass
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (2, "01_endless.py: stopped by Ctrl-C; nothing was written\n")
