"""Distributed training: two processes share every batch, and train the model that one would have trained.

Run:     uv run sprints/09_training_pipeline/07_distributed.py      (11 s on two cores)
Proves:  1. gradients of the shares, averaged by all_reduce, are those of the whole batch in one process
         2. DistributedDataParallel gives these very gradients
         3. two processes with it have the losses of one, pieces of unequal length included, and equal weights
         4. so have two with FSDP2, and each weight, like both of AdamW's numbers for it, is held by only one
         5. each of five mistakes is caught by a check that the right way passes
         6. what two processes have begun, one goes on with: the same losses
Shapes:  B windows of T tokens, V different ones; the processes have B / 2 windows each
Writes:  results/09_training_pipeline/07_distributed.png
Note:    notes/07_distributed.md
"""

import contextlib
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

from lab import BadInput, checkpoint, stories
from lab.gpt import GPT
from lab.lesson import Lesson, run
from lab.stream import Pieces, Stream
from lab.tokenizer import END, Tokenizer
from lab.training import Settings, Training, adamw, place, processes, workers

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

CHARACTERS, V, C, H, L, B, T = 30_000, 320, 32, 2, 2, 8, 32
SHAPES = ((8, 1), (8, 5), (16, 32))  # B, T of batches whose gradients are compared
STEPS, PROCESSES = 24, 2
SETTINGS = Settings(B=B, steps=STEPS, rate=1e-3)


def model(seed: int, device: torch.device) -> GPT:
    torch.manual_seed(seed)
    return GPT(V, T, C, H, L).to(device)


def loss_of(net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """(B, T) twice -> the mean over all B·T tokens."""
    return cross_entropy(net(inputs).flatten(0, 1), targets.flatten())  # (B, T, V) -> (B·T, V)


def flat(tensors: list[Tensor]) -> np.ndarray:
    """All numbers in a row, fit to be sent to another process."""
    return torch.cat([tensor.detach().flatten().cpu() for tensor in tensors]).numpy()


def average(weights: list[nn.Parameter]) -> None:
    """Every process has its own gradients before, and the mean of all afterwards."""
    for weight in weights:
        distributed.all_reduce(weight.grad)  # the sum over the processes, in each of them
        weight.grad /= distributed.get_world_size()


def add_up(weights: list[nn.Parameter]) -> None:
    for weight in weights:
        distributed.all_reduce(weight.grad)


def mean_of_all(loss: Tensor) -> float:
    total = loss.detach().clone()
    distributed.all_reduce(total)
    return total.item() / distributed.get_world_size()


def every_other(step: int, rank: int, world: int) -> range:
    """The numbers of the windows that a process reads in a step: a share of the step's B."""
    return range(step * B + rank, (step + 1) * B, world)


def the_same(step: int, rank: int, world: int) -> range:
    return every_other(step, 0, world)


def too_slow(step: int, rank: int, world: int) -> range:
    """In each step all move on by one share, so that each reads what its neighbour has read before."""
    share = B // world
    return range((step + rank) * share, (step + rank + 1) * share)


CHECKS = ("windows", "gradients", "replicas", "losses")
WAYS = {  # which windows each reads, what is done with gradients and losses; the checks that must catch it
    "the right way": (every_other, average, mean_of_all, set()),
    "all read the same windows": (the_same, average, mean_of_all, {"windows", "gradients", "losses"}),
    "the place moves on by a share": (too_slow, average, mean_of_all, {"windows", "losses"}),
    "gradients added up": (every_other, add_up, mean_of_all, {"gradients", "losses"}),
    "gradients not exchanged": (every_other, list, mean_of_all, {"gradients", "replicas", "losses"}),
    "the loss of one process": (every_other, average, Tensor.item, {"losses"}),
}


def train(share: Callable, combine: Callable, report: Callable, net: GPT, stream: Stream) -> dict:
    """A training with its way of sharing written out; what it read, found and became."""
    weights, optimizer, read, found, losses = list(net.parameters()), adamw(net, SETTINGS), [], [], []
    for step in range(STEPS):
        windows = share(step, *place())
        pairs = [stream.batch(k, 1) for k in windows]  # B / processes of (1, T) and (1, T)
        inputs, targets = (torch.cat(part).to(weights[0].device) for part in zip(*pairs, strict=True))
        loss = loss_of(net, inputs, targets)
        loss.backward()
        combine(weights)
        found.append(flat([weight.grad for weight in weights]))
        nn.utils.clip_grad_norm_(weights, SETTINGS.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(report(loss))
        read += windows
    return {"windows": read, "gradients": found[0], "weights": flat(weights), "losses": losses}


def sharded(net: GPT) -> nn.Module:
    """FSDP2: each process keeps a share of every weight, and borrows the rest while a block needs it."""
    from torch.distributed.fsdp import fully_shard  # here, as it takes long and only the workers need it

    mesh = distributed.init_device_mesh(net.tokens.weight.device.type, (place()[1],))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def gradients(tokens: np.ndarray, seed: int, device: torch.device, way: str) -> list[np.ndarray]:
    """Of a batch of each of SHAPES, in float64: by "one process", or shared and put together."""
    (rank, world), found = place(), []
    for count, length in SHAPES:
        net = model(seed, device).double()
        mine = slice(rank, None, world)  # of one process: all
        inputs, targets = (part[mine].to(device) for part in Stream(tokens, length, seed).batch(0, count))
        shared = DistributedDataParallel(net) if way == "DDP" else net
        loss_of(shared, inputs, targets).backward()
        if way == "by hand":
            average(list(net.parameters()))
        found.append(flat([weight.grad for weight in net.parameters()]))
    return found


def held(tensors: list[Tensor]) -> int:
    """How many of their numbers are in this process."""
    return sum((x.to_local() if hasattr(x, "to_local") else x).numel() for x in tensors)


def trained(tokens: np.ndarray, seed: int, device: torch.device, spread: Callable) -> dict:
    """By lab.training: its losses, weights, what this process held, and the state half way."""
    pieces = Pieces(tokens, tokens[-1], T, seed)
    job, state = Training(model(seed, device), pieces, SETTINGS, device, spread), {}
    for _ in job.run():
        if job.done == STEPS // 2 and spread is DistributedDataParallel:
            state = job.state()
    weights = list(job.model.parameters())
    memory = [each[key] for each in job.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in weights]
    counts = {"weights": held(weights), "memory": held(memory)}
    return {"losses": job.losses, "weights": flat(whole), "held": counts, "state": checkpoint.pack(state)}


def measure(tokens: np.ndarray, seed: int, device: torch.device) -> list[dict]:
    """What all processes have found, in each of them."""
    stream = Stream(tokens, T, seed)
    found = {
        "by hand": gradients(tokens, seed, device, "by hand"),
        "DDP": gradients(tokens, seed, device, "DDP"),
        "replicated": trained(tokens, seed, device, DistributedDataParallel),
        "sharded": trained(tokens, seed, device, sharded),
        "ways": {name: train(*way, model(seed, device), stream) for name, (*way, _) in WAYS.items()},
    }
    everyone = [{} for _ in range(place()[1])]
    distributed.all_gather_object(everyone, found)
    return everyone


def worker(pipe: Connection, rank: int, store: str, task: tuple[np.ndarray, int, torch.device]) -> None:
    """One of our own processes; torchrun would set these four variables too."""
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(PROCESSES))
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone: so are we
        try:
            with processes(task[-1], distributed.FileStore(store, PROCESSES)) as device:
                pipe.send(measure(*task[:-1], device))
        except (BadInput, RuntimeError) as error:
            pipe.send(str(error))


def together(tokens: np.ndarray, seed: int, device: torch.device) -> list[dict]:
    """What each process has found: those that torchrun has started, or two of our own. BadInput."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        with processes(device) as device:
            return measure(tokens, seed, device)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))  # a file through which they find each other
        arguments = [(rank, store, (tokens, seed, device)) for rank in range(PROCESSES)]
        with workers(worker, arguments) as started:
            try:
                found = wait([pipe for _, pipe in started])[0].recv()
            except EOFError:
                found = "one of them has ended without a word"
    if isinstance(found, str):
        raise BadInput(f"two processes cannot work together here: {' '.join(found.split())[:200]}")
    return found


def largest(ours: list[float], theirs: list[float]) -> float:
    """The largest difference of two curves at any step."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def alike(arrays: list[np.ndarray]) -> bool:
    return all(np.array_equal(array, arrays[0]) for array in arrays)


def failed(runs: list[dict], one: dict) -> set[str]:
    """Which of CHECKS these processes fail; `one` is the training of a single one."""
    apart = [np.linalg.norm(each["gradients"] - one["gradients"]) for each in runs]
    holds = {
        "windows": sorted(k for each in runs for k in each["windows"]) == one["windows"],
        "gradients": max(apart) < 1e-3 * np.linalg.norm(one["gradients"]),
        "replicas": alike([each["weights"] for each in runs]),
        "losses": largest(runs[0]["losses"], one["losses"]) < 1e-3,
    }
    return {check for check in CHECKS if not holds[check]}


def main(lesson: Lesson) -> None:
    documents = [story.text for story in stories.write(lesson.seed, CHARACTERS)]
    tokenizer = Tokenizer.learn(documents, V)
    ids = [token for text in documents for token in (*tokenizer.encode(text), tokenizer.special[END])]
    tokens, seed = np.array(ids, dtype=np.uint16), lesson.seed  # (S,)
    torch.set_num_threads(1)
    world = max(int(os.environ.get("WORLD_SIZE", 1)), PROCESSES)
    if B % world:
        raise BadInput(f"{B} windows cannot be shared by {world} processes")
    each_one = lesson.device.type == "cuda" and torch.cuda.device_count() >= world
    device = lesson.device if each_one else torch.device("cpu")
    why = "" if device == lesson.device else f", as there is no {lesson.device.type} for each of them"
    print(f"{world} processes on {device.type}{why}, by {'nccl' if each_one else 'gloo'}")
    everyone = together(tokens, seed, device)
    found = everyone[0]

    lesson.heading("The gradients of one batch")
    alone = gradients(tokens, seed, device, "one process")
    print("lengths of the whole gradients:", [round(float(np.linalg.norm(one)), 4) for one in alone])
    lesson.proves_equal(1, found["by hand"], alone)
    lesson.proves_equal(2, found["DDP"], found["by hand"], tolerance=0 if world == 2 else None)

    lesson.heading("A whole training")
    one = trained(tokens, seed, device, DistributedDataParallel)
    print("              weights   AdamW's memory   first loss   last loss")
    rows = {"one process": one, "DDP, each": found["replicated"], "FSDP2, each": found["sharded"]}
    for name, row in rows.items():
        counts, losses = row["held"], row["losses"]
        print(f"{name:11} {counts['weights']:9,} {counts['memory']:16,} {losses[0]:12.4f} {losses[-1]:11.4f}")
    apart = {name: largest(found[name]["losses"], one["losses"]) for name in ("replicated", "sharded")}
    same = alike([each["replicated"]["weights"] for each in everyone])
    lesson.proves(3, apart["replicated"] < 1e-4 and same, "losses within 1e-4, weights identical")
    counts = [[each["sharded"]["held"][kind] for each in everyone] for kind in one["held"]]
    once = [sum(count) for count in counts] == list(one["held"].values()) and all(map(all, counts))
    lesson.proves(4, apart["sharded"] < 1e-4 and once, "losses within 1e-4")

    lesson.heading("Five mistakes, and what catches them")
    stream = Stream(tokens, T, seed)
    single = train(every_other, list, Tensor.item, model(seed, device), stream)
    print(f"{'':30}" + "".join(f"{check:>10}" for check in CHECKS) + "   last loss")
    caught = {}
    for name in WAYS:
        caught[name] = failed([each["ways"][name] for each in everyone], single)
        marks = "".join(f"{'WRONG' if check in caught[name] else 'ok':>10}" for check in CHECKS)
        print(f"{name:30}{marks} {found['ways'][name]['losses'][-1]:11.4f}")
    lesson.proves(5, caught == {name: expected for name, (*_, expected) in WAYS.items()})

    lesson.heading("Begun by two, finished by one")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "half.ckpt")
        file.write_bytes(found["replicated"]["state"])
        job = Training(model(seed, device), Pieces(tokens, tokens[-1], T, seed), SETTINGS, device)
        job.restore(checkpoint.load(file))
    begun, _ = job.done, list(job.run())
    print(f"one process goes on after step {begun}: last loss {job.losses[-1]:.4f}")
    same = largest(job.losses, one["losses"]) < 1e-4
    lesson.proves(6, same and begun == STEPS // 2, "losses within 1e-4")

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name in WAYS:
        pairs = zip(found["ways"][name]["losses"], single["losses"], strict=True)
        axes.semilogy(range(1, STEPS + 1), [max(abs(a - b), 1e-7) for a, b in pairs], label=name)
    axes.set(xlabel="step", ylabel="difference of the loss, at least 1e-7")
    axes.set_title("Only the right way keeps to the curve of one process")
    figure.legend(loc="outside lower center", ncols=3, fontsize="x-small")
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
