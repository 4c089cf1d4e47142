"""The story teller as its users use it: prompts, lines of input, a terminal, Ctrl-C, any checkpoint."""

import os
import re
import signal
import subprocess
import sys

from lab import checkpoint
from lab.gpt import GPT
from lab.stream import Pieces, write_tokens
from lab.tokenizer import END, Tokenizer
from lab.training import Settings, Training, keep

import course
import play
import pytest
import torch

SCRIPT = course.Script(course.ROOT / "sprints" / "10_generation" / "03_tell_stories.py")
MODEL = course.ROOT / "results" / "09_training_pipeline" / "02_train_gpt.model"
LINE = "Γειά σου, 世界! नमस्ते 🦉\n"
ENDLESS = ["--temperature", "0", "--tokens", "1000000000", "--prompt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a checkpoint as 02_train_gpt writes them, of a text whose characters its tokens divide.

    And with one that never comes to an end.
    """
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.learn(LINE, 262)
    tokens = write_tokens(folder / "tokens", [LINE] * 20, tokenizer)
    stream = Pieces(tokens, end := tokenizer.special[END], 64, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so small a model others would only wait
    torch.manual_seed(0)
    model = GPT(V=tokenizer.V, T=64, C=32, H=2, L=1)
    training = Training(model, stream, Settings(B=4, steps=60, rate=2e-2), torch.device("cpu"))
    assert list(training.run())[-1] < 0.1
    torch.set_num_threads(threads)
    state = {"reports": []} | training.state() | keep(tokenizer)
    checkpoint.save(folder / "other.ckpt", state)
    state["model"]["tokens.weight"][end] = 0
    checkpoint.save(folder / "endless.ckpt", state)
    return folder


def tell(tmp_path, *options) -> play.Run:
    run = play.run(SCRIPT, tmp_path, *map(str, options), fresh=False)
    assert not run.written | run.touched
    return run


class TestAPrompt:
    def test_one_story_and_what_is_to_be_said_of_it(self, tmp_path):
        run = tell(tmp_path, "--prompt", "There was once a t", "--seed", "3")
        assert (run.code, run.stderr) == (0, "")
        assert re.search(r"^There was once a ti(dy|ny) \w+ called \w+\. ", run.stdout, re.MULTILINE)
        assert re.search(r"^(flawless, all|goes wrong at character) \d+", run.stdout, re.MULTILINE)
        assert not run.marked("✓")

    def test_a_mistake_of_ones_own(self, tmp_path):
        run = tell(tmp_path, "--prompt", "There were once two goats")
        assert "goes wrong in its prompt at character 7 of " in run.stdout
        assert "'were once two goa' in place of 'was once a '" in run.stdout

    def test_longer_than_the_context(self, tmp_path):
        run = tell(tmp_path, "--prompt", "word " * 200, "--tokens", "5")
        assert (run.code, run.stderr) == (0, "")
        assert re.search(
            r"^\(a prompt of \d+ tokens, of which the model reads the last 256\)", run.stdout, re.M
        )
        assert "\n" + "word " * 200 in run.stdout

    def test_the_likeliest_are_the_same_for_every_seed(self, tmp_path):
        runs = [
            tell(tmp_path / seed, "--prompt", "", "--temperature", "0", "--seed", seed, "--tokens", "20")
            for seed in "12"
        ]
        first, second = (run.stdout.partition("\n")[2] for run in runs)
        assert first == second
        assert "no mistake so far, in " in first

    def test_nothing_for_a_terminal_to_obey(self, tmp_path):
        run = tell(tmp_path, "--prompt", "\x1b[2J\a\x9b", "--tokens", "1")
        assert "␛[2J␇␡" in run.stdout
        assert not set("\x1b\a\x9b") & {*run.stdout}


class TestRefused:
    @pytest.mark.parametrize("kind", ["missing", "foreign", "cut off", "changed", "something else"])
    def test_a_file_that_is_no_model(self, tmp_path, kind):
        file, content = tmp_path / "file.model", bytearray(MODEL.read_bytes())
        content[-1] ^= 1
        there = {"foreign": b"PK\3\4", "cut off": content[: len(content) // 2], "changed": content}
        there["something else"] = checkpoint.pack({"step": 100})
        if kind != "missing":
            file.write_bytes(there[kind])
        self.check(tell(tmp_path, "--prompt", "", "--model", file), str(file))

    @pytest.mark.parametrize(
        ("option", "value"),
        [("temperature", "-1"), ("temperature", "nan"), ("top-p", "1.5"), ("top-k", "0"), ("tokens", "many")],
    )
    def test_a_number_that_is_none(self, tmp_path, option, value):
        self.check(tell(tmp_path, "--prompt", "", f"--{option}={value}"), f"--{option}")

    def check(self, run: play.Run, named: str) -> None:
        (line,) = run.stderr.splitlines()
        assert run.code == 2
        assert line.startswith("03_tell_stories.py: ")
        assert named in line


class TestOtherTexts:
    def test_each_line_of_input_is_a_beginning(self, tmp_path, folder):
        """Characters arrive whole; what is no UTF-8 is asked back; nothing is read behind quit."""
        lines = ["Γειά σ", "", "Γειά σου, 世", "\udcff\udc80", "quit", "never"]
        options = ["--prompt", "-", "--temperature", "0", "--tokens", "60"]
        options = play.command(SCRIPT, tmp_path, "--model", folder / "other.ckpt", *options)
        run = subprocess.run(**options, input="\n".join(lines), capture_output=True, timeout=100)
        assert (run.returncode, run.stderr) == (0, "")
        _, _, said, *told = run.stdout.splitlines()
        assert "what it tells is not judged" in said
        assert "goes wrong" not in run.stdout
        told = [line for line in told if line]
        assert told[:3] == [LINE.strip()] * 3
        assert told[3].startswith("??")
        assert "never" not in run.stdout

    def test_the_claims_hold(self, tmp_path, folder, only_full):
        """All but those about a model of stories."""
        run = play.run(SCRIPT, tmp_path, "--model", str(folder / "other.ckpt"), fresh=False)
        assert (run.code, run.stderr) == (0, "")
        assert (run.marked("✓"), run.marked("–")) == ({1, 2, 3, 4}, {5, 6})
        assert "(needs a model of stories)" in run.stdout
        assert not run.written


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send, and no such terminals")
class TestCtrlC:
    def test_ends_the_program(self, tmp_path, folder):
        options = play.command(SCRIPT, tmp_path, "--model", folder / "endless.ckpt", *ENDLESS, "Γ")
        pipe = subprocess.PIPE
        with subprocess.Popen(**options, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL) as process:
            play.until(process, "σου")
            process.send_signal(signal.SIGINT)
            told = process.communicate(timeout=60)[1]
        assert process.returncode == 2
        assert told == "03_tell_stories.py: stopped by Ctrl-C; nothing was written\n"

    def test_on_a_terminal_it_ends_the_story(self, tmp_path, folder):
        pty = pytest.importorskip("pty")
        ours, theirs = pty.openpty()
        options = play.command(SCRIPT, tmp_path, "--model", folder / "endless.ckpt", *ENDLESS, "-")
        with subprocess.Popen(
            **options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=theirs
        ) as process:
            play.until(process, "Ctrl-D or quit ends)")
            for _ in range(2):
                os.write(ours, "Γ\n".encode())
                play.until(process, "σου")
                process.send_signal(signal.SIGINT)
                play.until(process, "(stopped)")
            os.write(ours, b"\x04")
            told = process.communicate(timeout=60)[1]
        os.close(ours), os.close(theirs)
        assert (process.returncode, told) == (0, "")
