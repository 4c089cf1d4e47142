"""Where the time goes: a training step, operator by operator, and what makes it faster without changing it.

Run:     uv run sprints/09_training_pipeline/08_where_the_time_goes.py      (8 s on two cores)
Proves:  1. a profiler of a dozen lines sees the operators that PyTorch's own sees, and as many of each
         2. the formula counts a step's operations: 6 for each token and weight, 12LTC for attention
         3. a step starts the same operators for 2 texts as for 128, so small batches pay as much for them
         4. a product of B·T tokens with a matrix (K, N) does 2 / (4/K + 4/N + 4/BT) operations a byte
         5. the fused kernel gives the written-out attention's loss and gradients, with fewer operators
            and without keeping T² weights
         6. AdamW's three forms lead to the same weights; the fused one starts once for all of a group
         7. one thread or all: the same loss and gradients, but for the order of sums
Shapes:  B texts of T tokens, V different ones; L blocks of width C with H heads; N weights in products
Writes:  results/09_training_pipeline/08_where_the_time_goes.png
Note:    notes/08_where_the_time_goes.md
"""

import copy
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager

from lab import BadInput, attention
from lab.attention import attention_weights, causal_mask
from lab.gpt import GPT
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

SIZE = {"V": 1_139, "T": 144, "C": 128, "H": 4, "L": 2}  # about what lesson 02 trains
B, SHORT = 16, 16  # texts in the step that is looked at; tokens of those that batches are made of
BATCHES = 2, 8, 32, 128
TIMES = 5
OPTIONS = {"--compile": {"action": "store_true", "help": "compile a step as well, which takes a minute"}}
KINDS = {  # words in the names of operators, and what they are for
    "products": ("mm", "linear"),
    "attention": ("attention",),
    "loss": ("log_softmax", "nll_loss"),
    "optimiser": ("adam", "norm.Scalar", "_foreach", "vector_norm"),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm",),
    "embedding": ("embedding",),
}
NAMED = ("addmm", "mm", "gelu", "gelu_backward", "native_layer_norm", "native_layer_norm_backward",
         "_log_softmax", "_log_softmax_backward_data", "embedding", "_fused_adamw_")  # fmt: skip
FORMS = {"for loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def wait(device: torch.device) -> None:
    """An accelerator works while Python goes on; a clock must be read when it has finished."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


class Operators(TorchDispatchMode):
    """A profiler: how often each operator of PyTorch was started, and how long it took, in seconds."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.count, self.seconds = device, Counter(), defaultdict(float)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        wait(self.device)
        start = time.perf_counter()
        result = operator(*args, **(kwargs or {}))
        wait(self.device)
        self.count[str(operator)] += 1
        self.seconds[str(operator)] += time.perf_counter() - start
        return result


class Moved(TorchDispatchMode):
    """The intensity of each product of matrices: operations, and bytes that are read or written for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten.mm.default:
            (M, K), N = args[0].shape, args[1].shape[1]
            self.found.append((2 * M * K * N, sum(part.nbytes for part in (*args, result)), (M, K, N)))
        return result


def step(model: GPT, ids: Tensor, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    """One step of a training on ids (B, T + 1); the loss. Gradients stay if there is no optimiser."""
    logits = model(ids[:, :-1])  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())  # (B·T, V), (B·T,)
    loss.backward()
    if optimizer:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def by_formula(B: int, V: int, T: int, C: int, H: int, L: int) -> int:
    """Operations of a step (lesson 08/03): 2 there and 4 back for each token and weight, and attention's."""
    return B * T * (6 * (12 * L * C**2 + V * C) + 12 * L * T * C)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: None = None, *, causal: bool = False) -> Tensor:
    """Attention as equation 1 says it, all T² weights at once."""
    T, S = q.shape[-2], k.shape[-2]
    return attention_weights(q, k, causal_mask(T, S, q.device) if causal else mask) @ v


@contextmanager
def attending(by: Callable):
    """The model's attention is computed by another function."""
    before, attention.attend = attention.attend, by
    yield
    attention.attend = before


def kept(model: GPT, ids: Tensor) -> list[tuple[int, ...]]:
    """The shapes of all that waits for the way back."""
    shapes = []
    with saved_tensors_hooks(lambda tensor: shapes.append(tuple(tensor.shape)) or tensor, lambda x: x):
        model(ids)
    return shapes


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The fastest of TIMES runs, after one that does not count: others use the machine, too."""
    work(), wait(device)
    found = []
    for _ in range(TIMES):
        start = time.perf_counter()
        work(), wait(device)
        found.append(time.perf_counter() - start)
    return min(found)


def compiled(model: GPT, ids: Tensor, device: torch.device) -> str:
    """What torch.compile makes of a step, and how long it takes to make it. BadInput where it cannot."""
    start = time.perf_counter()
    try:
        fast = torch.compile(model)
        loss = step(fast, ids).item()
    except Exception as error:  # no C++ compiler, a Python too new, …: each part of it has errors of its own
        raise BadInput(f"--compile: {str(error).strip().splitlines()[0][:90]}") from error
    took = time.perf_counter() - start
    again = seconds(lambda: step(fast, ids), device)
    return (
        f"{1e3 * again:7.1f} ms   compiled in {took:.1f} s, loss {loss:.4f} (before: {step(model, ids):.4f})"
    )


def kind(operator: str) -> str:
    """What an operator is for."""
    found = (name for name, words in KINDS.items() if any(word in operator for word in words))
    return next(found, "the rest")


def main(lesson: Lesson) -> None:
    device, draw = lesson.device, torch.Generator().manual_seed(lesson.seed)
    torch.manual_seed(lesson.seed)
    model = GPT(**SIZE).to(device)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    V, T = SIZE["V"], SIZE["T"]
    ids = torch.randint(V, (B, T + 1), generator=draw).to(device)
    texts = torch.randint(V, (BATCHES[-1], SHORT + 1), generator=draw).to(device)

    lesson.heading(f"A step with {B} texts of {T} tokens, operator by operator")
    step(model, ids, adamw)
    with Operators(device) as ours:
        step(model, ids, adamw)
    with profile(activities=[ProfilerActivity.CPU]) as theirs:
        step(model, ids, adamw)
    counted = {event.key.removeprefix("aten::"): event.count for event in theirs.key_averages()}
    mine = Counter()
    for operator, count in ours.count.items():
        mine[operator.split(".")[1]] += count
    shares = Counter()
    for operator, took in ours.seconds.items():
        shares[kind(operator)] += took / sum(ours.seconds.values())
    for name, share in shares.most_common():
        print(f"{name:12} {100 * share:5.1f} %  {'▪' * round(60 * share)}")
    lesson.proves_equal(1, [mine[name] for name in NAMED], [counted.get(name, 0) for name in NAMED])

    lesson.heading("Utilisation: operations a second, beside the fastest product of this machine")
    costs, formula = [], []
    for size in (SIZE, {"V": 37, "T": 10, "C": 24, "H": 3, "L": 3}, SIZE | {"L": 1, "C": 64}):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            step(GPT(**size), torch.zeros(3, size["T"] + 1, dtype=torch.long))
        costs.append(counter.get_total_flops())
        formula.append(by_formula(3, **size))
    square = torch.randn(1024, 1024, generator=draw).to(device)
    peak = 2 * 1024**3 / seconds(lambda: square @ square, device)
    print(f"the fastest product: {peak / 1e9:.0f} GFLOP/s")
    used, started = [], []
    for batch in BATCHES:
        took = seconds(lambda batch=batch: step(model, texts[:batch], adamw), device)
        used.append(by_formula(batch, **SIZE | {"T": SHORT}) / took / peak)
        with Operators(device) as seen:
            step(model, texts[:batch], adamw)
        started.append(dict(seen.count))
        speed = f"{1e3 * took:7.1f} ms   {batch * SHORT / took:9,.0f} tokens/s   {used[-1]:4.0%}"
        print(f"{batch:3} texts of {SHORT}   {speed}   {seen.count.total()} operators")
    lesson.proves_equal(2, costs, formula)
    lesson.proves(3, all(counts == started[0] for counts in started), "name by name")

    lesson.heading("Operations for each byte that a product moves")
    cpu = torch.device("cpu")  # whose kernels take float64, too, and can be told how many threads to use
    plain, intensities, expected = copy.deepcopy(model).to(cpu), [], []
    for batch in BATCHES:
        with Moved() as moved:
            step(plain, texts[:batch].to(cpu))
        least, most = (f(count / size for count, size, _ in moved.found) for f in (min, max))
        print(
            f"{batch:3} texts   {len(moved.found)} products   {least:5.1f} to {most:5.1f} operations a byte"
        )
        intensities += [count / size for count, size, _ in moved.found]
        expected += [2 / (4 / k + 4 / n + 4 / m) for _, _, (m, k, n) in moved.found]
    lesson.proves_equal(4, intensities, expected)

    lesson.heading("The same numbers, faster")
    exact = copy.deepcopy(plain).double()
    exact.zero_grad()
    few, graded, starts, shapes = ids[:2].to(cpu), {}, {}, {}
    for name, way in {"fused": attention.attend, "written out": written_out}.items():
        with attending(way):
            with Operators(cpu) as seen:
                loss = step(exact, few)
            graded[name] = [loss, *(weight.grad for weight in exact.parameters())]
            exact.zero_grad()
            starts[name], shapes[name] = seen.count.total(), kept(exact, few[:, :-1])
            took = seconds(lambda: step(model, ids), device)
            print(f"attention {name:12} {1e3 * took:7.1f} ms   {starts[name]} operators, no optimiser")
    if lesson.options.compile:
        print(f"torch.compile          {compiled(model, ids, device)}")
    adamw.zero_grad()
    weights_kept = [sum(shape[-2:] == (T, T) for shape in shapes[name]) for name in graded]
    better = weights_kept[0] == 0, weights_kept[1] > 0, starts["fused"] < starts["written out"]
    lesson.proves_equal(5, [*graded["fused"], *better], [*graded["written out"], True, True, True])

    weights, launched = {}, {}
    for name, options in FORMS.items():
        trained = copy.deepcopy(exact)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, **options)
        for _ in range(3):
            with Operators(cpu) as seen:
                step(trained, few, optimizer)
        weights[name] = [weight.detach().clone() for weight in trained.parameters()]
        launched[name] = seen.count
        copied = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(copied.parameters(), **options)
        step(copied, ids)
        took = seconds(optimizer.step, device)
        print(f"AdamW {name:16} {1e3 * took:7.2f} ms   {seen.count.total()} operators in a step")
    once = launched["fused"]["aten._fused_adamw_.default"]
    lesson.proves_equal(
        6, [weights["foreach"], weights["fused"], once], [weights["for loop"], weights["for loop"], 1]
    )

    threads, found = torch.get_num_threads(), []
    for number in (1, threads):
        torch.set_num_threads(number)
        loss = step(exact, few)
        found.append([loss, *(weight.grad.clone() for weight in exact.parameters())])
        exact.zero_grad()
        took = seconds(lambda: step(model, ids, adamw), device)
        print(f"threads of the CPU: {number:3} {1e3 * took:9.1f} ms")
    lesson.proves_equal(7, *found)

    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 3.4), layout="constrained")
    names = [name for name, _ in shares.most_common()][::-1]
    left.barh(names, [100 * shares[name] for name in names])
    left.set(xlabel="% of a step's time", title=f"by operator, {B} texts of {T}")
    right.plot(BATCHES, [100 * share for share in used], "o-")
    right.set_xscale("log", base=2)
    right.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    right.set(
        xlabel=f"texts of {SHORT} tokens in a step", ylabel="% of the fastest product's speed", ylim=(0, None)
    )
    right.set_title("utilisation")
    figure.suptitle(
        "Products are not all of a step, and larger batches use the machine better", size="medium"
    )
    lesson.save(figure)


if __name__ == "__main__":
    run(main, options=OPTIONS)
