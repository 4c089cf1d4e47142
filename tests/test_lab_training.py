"""lab.training: schedule, steps, resuming to the bit, several processes, files of trained models."""

import contextlib
import copy
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lab import BadInput, checkpoint
from lab.gpt import GPT
from lab.stream import Pieces, Stream
from lab.tokenizer import END, Tokenizer
from lab.training import (
    Settings,
    Training,
    adamw,
    learning_rate,
    load_model,
    place,
    processes,
    save_model,
    workers,
)

import course
import numpy as np
import pytest
import torch
from torch import distributed

CPU, STEPS = torch.device("cpu"), 6
TOKENS = np.random.default_rng(0).integers(0, 50, 997).astype(np.uint16)


def training(dropout: float = 0.0, pieces: bool = False, seed: int = 0, **settings) -> Training:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = GPT(V=50, T=16, C=16, H=2, L=2, dropout=dropout)
    stream = Pieces(TOKENS, 7, 16, seed) if pieces else Stream(TOKENS, 16, seed)
    return Training(model, stream, Settings(**{"B": 8, "steps": STEPS} | settings), CPU)


def weights(training: Training) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in training.model.parameters()])


class TestSchedule:
    @pytest.mark.parametrize(("steps", "warmup"), [(100, 0.1), (10, 0.5), (7, 0.0), (1, 0.1), (2, 1.0)])
    def test_up_and_down(self, steps, warmup):
        rates = [learning_rate(step, steps, 2.0, warmup) for step in range(steps)]
        top = rates.index(max(rates))
        assert max(rates) == 2.0
        assert top == max(1, round(warmup * steps)) - 1
        assert rates[:top] == sorted(rates[:top])
        assert rates[top:] == sorted(rates[top:], reverse=True)
        assert min(rates) > 0

    def test_ends_near_nothing(self):
        assert learning_rate(999, 1_000, 1.0, 0.1) < 1e-5

    def test_every_step_uses_it(self):
        job, used = training(), []
        for _ in job.run():
            used.append(job.optimizer.param_groups[0]["lr"])
        assert used == [learning_rate(step, STEPS, 3e-3, 0.1) for step in range(STEPS)]


def test_only_matrices_decay():
    job = training(decay=0.25)
    decays = {
        id(weight): group["weight_decay"]
        for group in job.optimizer.param_groups
        for weight in group["params"]
    }
    assert len(decays) == len(list(job.model.parameters()))
    for weight in job.model.parameters():
        assert decays[id(weight)] == (0.25 if weight.ndim > 1 else 0.0)
    assert isinstance(adamw(job.model, job.settings), torch.optim.AdamW)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_of_a_batch_are_the_batch(parts, pieces):
    whole, parted = (training(pieces=pieces, accumulate=number) for number in (1, parts))
    torch.testing.assert_close(list(parted.run()), list(whole.run()), rtol=1e-4, atol=1e-4)


def test_a_gradient_is_cut():
    """What SGD would do: the step is no longer than the limit."""
    job = training(clip=0.01)
    before = weights(job)
    job.optimizer = torch.optim.SGD(job.model.parameters(), lr=1.0)
    next(job.run())
    rate = learning_rate(0, STEPS, 3e-3, 0.1)
    assert (weights(job) - before).norm().item() == pytest.approx(0.01 * rate, rel=1e-2)


@pytest.mark.parametrize("settings", [{"B": 9, "accumulate": 2}, {"B": 8, "accumulate": 16}])
def test_windows_that_cannot_be_shared(settings):
    with pytest.raises(BadInput, match="cannot be shared"):
        training(**settings)


class TestResuming:
    @pytest.mark.parametrize("pieces", [False, True])
    @pytest.mark.parametrize("stop", range(STEPS + 1))
    def test_to_the_bit(self, stop, pieces, tmp_path):
        whole, job = (training(dropout=0.2, pieces=pieces) for _ in range(2))
        for _ in whole.run():
            if whole.done == stop:
                checkpoint.save(tmp_path / "a", whole.state())
        if stop == 0:
            checkpoint.save(tmp_path / "a", job.state())
        job.restore(checkpoint.load(tmp_path / "a"))
        assert job.done == stop
        list(job.run())
        assert job.losses == whole.losses
        assert torch.equal(weights(job), weights(whole))

    def test_a_state_is_a_copy(self):
        job = training()
        next(job.run())
        state = job.state()
        kept = copy.deepcopy(state)
        list(job.run())
        again = [training() for _ in range(2)]
        for other in again:
            other.restore(state)
            list(other.run())
        assert torch.equal(weights(again[0]), weights(job))
        assert torch.equal(weights(again[1]), weights(job))
        assert checkpoint.pack(state) == checkpoint.pack(kept)

    def test_looking_on_changes_nothing(self):
        """Whatever else draws random numbers between the steps, dropout goes its way."""
        plain, watched = (training(dropout=0.2) for _ in range(2))
        list(plain.run())
        for _ in watched.run():
            torch.manual_seed(5), torch.rand(3)
        assert watched.losses == plain.losses

    def test_dropout_differs_from_step_to_step(self):
        job = training(dropout=0.5, rate=1e-12, pieces=False)
        job.batch = lambda step: Training.batch(job, 0)
        assert len(set(job.run())) == STEPS

    @pytest.mark.parametrize(
        "other", [{"rate": 1e-3}, {"steps": 9}, {"dropout": 0.1}, {"seed": 1}, {"accumulate": 2}]
    )
    def test_of_another_training(self, other):
        with pytest.raises(BadInput, match=r"another|other settings"):
            training().restore(training(**other).state())

    def test_of_another_text(self):
        state = training().state()
        job = training()
        job.stream.tokens = TOKENS[::-1].copy()
        with pytest.raises(BadInput, match="another text"):
            job.restore(state)


class TestModelFile:
    @pytest.fixture
    def tokenizer(self):
        return Tokenizer.learn(["a story about a story"], 260)

    def test_round_trip(self, tokenizer, tmp_path):
        model = GPT(V=tokenizer.V, T=8, C=8, H=2, L=1).eval()
        (tmp_path / "m").write_bytes(save_model(model, tokenizer, {"loss": 1.5}))
        again, other, facts = load_model(tmp_path / "m", CPU)
        ids = torch.tensor([other.encode("a story")])[:, :8]
        assert other.encode("a story") == tokenizer.encode("a story")
        assert torch.equal(again(ids), model(ids))
        assert not again.training
        assert facts == {"loss": 1.5}
        assert other.special[END] == tokenizer.special[END]

    @pytest.mark.parametrize(
        "wrong",
        [
            {"architecture": {"V": 5}},
            {"architecture": 5},
            {"model": {}},
            {"model": {"tokens.weight": torch.ones(3)}},
            {"tokens": 7},
            {"merges": [(0, 999)]},
            {"special": [END]},
            {"special": {}},
            {"special": {END: 300}},
            {"architecture": {"V": 260, "T": 8, "C": 8, "H": 0, "L": 1}},
        ],
    )
    def test_no_model(self, tokenizer, tmp_path, wrong):
        content = save_model(GPT(V=tokenizer.V, T=8, C=8, H=2, L=1), tokenizer, {})
        state = torch.load(io.BytesIO(content[checkpoint.HEADER.size :]), weights_only=True)
        checkpoint.save(tmp_path / "m", state | wrong)
        with pytest.raises(BadInput) as fault:
            load_model(tmp_path / "m", CPU)
        assert "\n" not in str(fault.value)

    def test_another_tokenizer(self, tokenizer, tmp_path):
        (tmp_path / "m").write_bytes(save_model(GPT(V=259, T=8, C=8, H=2, L=1), tokenizer, {}))
        with pytest.raises(BadInput, match="260 tokens, a model of 259"):
            load_model(tmp_path / "m", CPU)

    def test_something_else(self, tmp_path):
        checkpoint.save(tmp_path / "m", {"model": {}})
        with pytest.raises(BadInput, match="something else"):
            load_model(tmp_path / "m", CPU)


def join(rank: int, store: str) -> contextlib.AbstractContextManager:
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
    return processes(CPU, distributed.FileStore(store, 2))


def half_of_the_work(pipe, rank, store):
    with join(rank, store):
        assert place() == (rank, 2)
        plain, parted = (training(pieces=True, accumulate=parts) for parts in (1, 2))
        masked = training(dropout=0.5)
        next(masked.run())
        mine = masked.model(masked.stream.batch(0, 4)[0]).sum().item()  # of the same windows in both
        distributed.all_gather_object(masks := [None, None], mine)
        pipe.send((list(plain.run()), list(parted.run()), weights(plain).tolist(), masks))


def sleep(pipe, *_):
    pipe.send(os.getpid())
    with contextlib.suppress(EOFError, ConnectionError):
        pipe.recv()


class TestProcesses:
    def test_two_are_one(self, tmp_path):
        with workers(half_of_the_work, [(rank, str(tmp_path / "store")) for rank in range(2)]) as pair:
            first, second = (pipe.recv() for _, pipe in pair)
        one = training(pieces=True)
        losses = list(one.run())
        for plain, parted, *_ in (first, second):
            torch.testing.assert_close([plain, parted], [losses, losses], rtol=1e-4, atol=1e-4)
        assert first == second, "the same losses and weights in both processes"
        assert first[3][0] != first[3][1], "each process has dropout masks of its own"

    def test_they_end_with_the_block(self):
        with contextlib.suppress(KeyError), workers(sleep, [(), ()]) as pair:
            assert len({pipe.recv() for _, pipe in pair}) == 2
            raise KeyError
        assert all(process.exitcode is not None for process, _ in pair)

    def test_alone_nothing_changes(self, monkeypatch):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        with processes(CPU) as device:
            assert device is CPU
            assert place() == (0, 1)

    def test_no_gpu_for_each(self, monkeypatch):
        there = str(torch.cuda.device_count())
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, there)
        with pytest.raises(BadInput, match=r"GPU|nccl"), processes(torch.device("cuda")):
            pass


def test_torchrun(only_full, tmp_path):
    """Rank 0 prints and writes, the other does neither."""
    script = course.ROOT / "sprints" / "09_training_pipeline" / "07_distributed.py"
    environment = os.environ | {"PYTHONPATH": str(course.ROOT / "sprints"), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)),
                *("--device", "cpu", "--results", str(tmp_path)),
            ],
            capture_output=True, encoding="utf-8", cwd=folder, env=environment,
        )  # fmt: skip
        assert not list(Path(folder).iterdir())
    assert run.returncode == 0, run.stdout + run.stderr
    assert not run.stderr
    assert run.stdout.count("✓ 1.") == 1
    assert "6 of 6 claims proven" in run.stdout
    assert [file.name for file in tmp_path.rglob("*.*")] == ["07_distributed.png"]
