"""lab.lesson: the docstring, claims that can fail, results written whole or not at all, the command line."""

import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path

from lab import BadInput
from lab.lesson import claims, fields, read_text, run, write_whole

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

DOCSTRING = """A lesson for the tests.

Run:     uv run sprints/01_fixture/01_lesson.py      (1 s)
Proves:  1. one is one
         2. two is two,
            and no other number
Note:    notes/01_lesson.md
"""


def lesson_file(folder: Path, docstring: str = DOCSTRING) -> Path:
    file = folder / "sprints" / "01_fixture" / "01_lesson.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'"""{docstring}"""\n', encoding="utf-8")
    return file


@pytest.fixture
def play(tmp_path, monkeypatch):
    """play(main, *options): run a lesson in this process; returns the results folder."""

    def play(main, *options, docstring=DOCSTRING, **settings):
        file = lesson_file(tmp_path, docstring)
        namespace = {"__file__": str(file), "__doc__": docstring}
        monkeypatch.setattr(sys, "argv", [file.name, *options])
        # the lesson's functions must carry the lesson's own globals: run() reads file and docstring there
        run(
            types.FunctionType(main.__code__, main.__globals__ | namespace, closure=main.__closure__),
            **settings,
        )
        return tmp_path / "results" / "01_fixture"

    return play


def prove_both(lesson):
    lesson.proves(1, True)
    lesson.proves(2, True)


class TestDocstring:
    def test_fields(self):
        assert fields(DOCSTRING)["Note"] == "notes/01_lesson.md"
        assert fields("x.\n\nDerived in: 06_attention/02_masks\n") == {"Derived in": "06_attention/02_masks"}

    def test_claims_may_take_two_lines(self):
        assert claims(DOCSTRING) == {1: "one is one", 2: "two is two, and no other number"}

    @pytest.mark.parametrize(
        "proves", ["2. two", "1. one\n         3. three", "1. one\n         1. one", "nothing"]
    )
    def test_misnumbered(self, proves):
        with pytest.raises(ValueError, match="numbered 1, 2, 3"):
            claims(f"A lesson.\n\nProves:  {proves}\n")


class TestClaims:
    def test_proven(self, play, capsys):
        play(prove_both)
        assert "✓ 2. two is two, and no other number" in capsys.readouterr().out

    def test_one_that_does_not_hold_ends_the_run(self, play, capsys):
        def main(lesson):
            lesson.save(plt.figure())
            lesson.proves(1, True)
            lesson.proves(2, False, "3 against 2")
            raise AssertionError("the run went on")

        with pytest.raises(SystemExit) as stop:
            play(main)
        assert stop.value.code == 1
        told = capsys.readouterr()
        assert "✗ 2. two is two, and no other number   (3 against 2)" in told.out
        assert "claim 2 does not hold" in told.err

    def test_one_never_proven(self, play, capsys):
        with pytest.raises(SystemExit) as stop:
            play(lambda lesson: lesson.proves(1, True))
        assert stop.value.code == 1
        assert "claim 2 was never proven" in capsys.readouterr().err

    def test_unknown_number(self, play):
        with pytest.raises(ValueError, match="no claim 3"):
            play(lambda lesson: lesson.proves(3, True))

    @pytest.mark.parametrize(
        "truth", [1, "yes", (True, False), None, torch.tensor([True]), np.array([True, False])]
    )
    def test_only_a_bool_is_a_truth(self, play, truth):
        with pytest.raises(TypeError, match="one bool"):
            play(lambda lesson: lesson.proves(1, truth))

    @pytest.mark.parametrize("truth", [torch.tensor(True), np.bool_(True)])
    def test_single_truths_of_torch_and_numpy(self, play, truth):
        def main(lesson):
            lesson.proves(1, truth)
            lesson.proves(2, truth)

        play(main)

    def test_short_run_proves_nothing_that_needs_the_full_one(self, play, capsys):
        def main(lesson):
            lesson.proves(1, True)
            lesson.proves(2, False, full_run=True)

        play(main, "--steps", "5", steps=100)
        out = capsys.readouterr().out
        assert "– 2. two is two, and no other number   (needs the full run)" in out
        assert "1 of 2 claims proven" in out
        with pytest.raises(SystemExit):
            play(main, steps=100)


EQUAL = [
    (torch.ones(2, 3), torch.ones(2, 3) + 1e-6),
    (torch.tensor([1, 2]), torch.tensor([1, 2])),
    (1.5, 1.5 + 1e-12),
    (np.arange(3.0), torch.arange(3.0, dtype=torch.float64)),
    ([torch.ones(2), torch.ones(3)], (torch.ones(2), torch.ones(3))),
]
UNEQUAL = [
    (torch.ones(2, 3), torch.ones(2, 3) + 1e-3),  # values
    (torch.ones(2, 1), torch.ones(2)),  # shapes that would broadcast
    (torch.ones(2), torch.ones(2, dtype=torch.float64)),  # dtypes
    (torch.tensor([torch.nan]), torch.tensor([torch.nan])),  # NaN equals nothing
    (torch.tensor([1, 2]), torch.tensor([1, 3])),
    (torch.tensor([True]), torch.tensor([False])),
    (1.5, 1.5 + 1e-8),
    ([torch.ones(2)], [torch.ones(2), torch.ones(2)]),  # lengths
    ([torch.ones(2), torch.zeros(1)], [torch.ones(2), torch.ones(1)]),
]


class TestEquality:
    @pytest.mark.parametrize(("ours", "theirs"), EQUAL)
    def test_equal(self, play, ours, theirs):
        def main(lesson):
            lesson.proves_equal(1, ours, theirs)
            lesson.proves_equal(2, theirs, ours)

        play(main)

    @pytest.mark.parametrize(("ours", "theirs"), UNEQUAL)
    def test_unequal(self, play, capsys, ours, theirs):
        with pytest.raises(SystemExit) as stop:
            play(lambda lesson: lesson.proves_equal(1, ours, theirs))
        assert stop.value.code == 1
        assert "✗ 1. one is one" in capsys.readouterr().out

    def test_with_itself_or_with_nothing(self, play):
        same = torch.ones(2)
        with pytest.raises(ValueError, match="with itself"):
            play(lambda lesson: lesson.proves_equal(1, same, same))
        with pytest.raises(ValueError, match="nothing with nothing"):
            play(lambda lesson: lesson.proves_equal(1, [], ()))


class TestResults:
    def test_figure_and_metrics(self, play):
        def main(lesson):
            lesson.save(plt.figure())
            lesson.measured(loss=0.25)
            prove_both(lesson)

        results = play(main, "--seed", "3")
        assert {file.name for file in results.iterdir()} == {"01_lesson.png", "01_lesson.json"}
        (line,) = (results / "01_lesson.json").read_text(encoding="utf-8").splitlines()
        record = json.loads(line)
        assert record["lesson"] == "01_fixture/01_lesson"
        assert (record["seed"], record["loss"]) == (3, 0.25)
        assert (results / "01_lesson.png").read_bytes().startswith(b"\x89PNG")

    def test_nothing_is_written_when_a_claim_fails(self, play, tmp_path):
        def main(lesson):
            lesson.save(plt.figure())
            lesson.measured(loss=0.25)
            lesson.proves(1, False)

        with pytest.raises(SystemExit):
            play(main)
        assert not list((tmp_path / "results" / "01_fixture").iterdir())

    def test_write_whole_leaves_the_old_file_when_it_fails(self, tmp_path, monkeypatch):
        target = tmp_path / "file"
        target.write_text("old")
        monkeypatch.setattr(
            "os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(BadInput, match="No space left"):
            write_whole(target, b"new")
        assert [file.name for file in tmp_path.iterdir()] == ["file"]
        assert target.read_text() == "old"


class TestCommandLine:
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["--device", "tpu"], "invalid choice: 'tpu'"),
            (["--seed", "-1"], "'-1' is not a whole number"),
            (["--seed", "five"], "'five' is not a whole number"),
            (["--steps", "0"], "'0' is not a whole number from 1"),
            (["--bogus"], "unrecognized arguments: --bogus"),
        ],
    )
    def test_one_line_and_status_2(self, play, capsys, options, says):
        with pytest.raises(SystemExit) as stop:
            play(prove_both, *options, steps=10)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line

    @pytest.mark.parametrize("device", ["cuda", "mps"])
    def test_a_device_that_is_not_there(self, play, device):
        if getattr(torch, device).is_available():
            pytest.skip(f"{device} is there")
        with pytest.raises(
            BadInput, match=f"--device {device}: PyTorch finds no such device here, only .*cpu"
        ):
            play(prove_both, "--device", device)

    def test_results_that_cannot_be_written(self, play, tmp_path):
        (tmp_path / "file").write_text("not a folder")
        with pytest.raises(BadInput, match="cannot write to"):
            play(prove_both, "--results", str(tmp_path / "file"))

    def test_the_seed_is_set(self, play):
        seen = []

        def main(lesson):
            seen.append(torch.rand(1).item())
            prove_both(lesson)

        for seed in ("1", "1", "2"):
            play(main, "--seed", seed)
        assert seen[0] == seen[1] != seen[2]


class TestText:
    def test_read(self, tmp_path):
        (tmp_path / "text").write_bytes("naïve\r\n".encode())
        assert read_text(str(tmp_path / "text")) == "naïve\n"

    @pytest.mark.parametrize(
        ("content", "says"), [(b"", "is empty"), (b" \n", "is empty"), (b"a\xff", "not UTF-8")]
    )
    def test_refused(self, tmp_path, content, says):
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(BadInput, match=says):
            read_text(str(tmp_path / "text"))

    def test_missing(self, tmp_path):
        with pytest.raises(BadInput, match="cannot read"):
            read_text(str(tmp_path))


def last_words(tmp_path: Path, code: str) -> subprocess.CompletedProcess:
    """Run a few lines that import only lab, not torch: its last words do not depend on the rest."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code), encoding="utf-8")
    environment = {"PYTHONPATH": str(Path(__file__).parents[1] / "sprints")}
    return subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )


class TestLastWords:
    def test_bad_input(self, tmp_path):
        ended = last_words(tmp_path, "from lab import BadInput\nraise BadInput('no such thing')")
        assert (ended.returncode, ended.stderr) == (2, "script.py: no such thing\n")

    def test_ctrl_c(self, tmp_path):
        ended = last_words(tmp_path, "import lab\nraise KeyboardInterrupt")
        assert (ended.returncode, ended.stderr) == (2, "script.py: stopped by Ctrl-C; nothing was written\n")

    def test_a_bug_keeps_its_traceback(self, tmp_path):
        ended = last_words(tmp_path, "import lab\n1 / 0")
        assert ended.returncode == 1
        assert "ZeroDivisionError" in ended.stderr
