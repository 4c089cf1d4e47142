"""nn.Module: what you assign is filed by its kind, and everything else is a walk through the files.

Run:     uv run sprints/03_models_and_training_loops/01_nn_module.py      (5 s on two cores)
Proves:  1. a Module by hand files parameters and buffers as nn.Module does: names, order, shapes, types
         2. outputs, gradients and buffers equal those on nn.Module, in training and in evaluation mode
         3. a state dict loads into either; missing, unexpected and misshapen entries are refused alike
         4. forward hooks see every output in the same order, may replace it, and are silent once removed
         5. neither files a Parameter in a list or a plain tensor, nor lets that take a Parameter's place
Shapes:  N samples, D inputs, H outputs
Note:    notes/01_nn_module.md
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

from lab.lesson import Lesson, run

import torch
from torch import Tensor, nn


class Module:
    """A container that knows which tensors and which other modules it contains."""

    def __init__(self) -> None:
        vars(self).update(_parameters={}, _buffers={}, _modules={}, _unsaved=set(), _hooks={}, training=True)

    def __setattr__(self, name: str, value: object) -> None:
        files = vars(self)
        if isinstance(value, nn.Parameter):
            files["_parameters"][name] = value
        elif isinstance(value, Module):
            files["_modules"][name] = value
        elif name in files["_buffers"]:
            files["_buffers"][name] = value
        elif name in files["_parameters"]:
            raise TypeError(f"{name} is a Parameter, and {type(value).__name__} is none")
        else:
            files[name] = value

    def __getattr__(self, name: str) -> object:  # Python asks here for what it finds nowhere else
        files = vars(self)
        for kind in ("_parameters", "_buffers", "_modules"):
            if name in files[kind]:
                return files[kind][name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name}")

    def register_buffer(self, name: str, tensor: Tensor, persistent: bool = True) -> None:
        """File a tensor that belongs to the model and is not trained; if not persistent, not saved either."""
        self._buffers[name] = tensor
        if not persistent:
            self._unsaved.add(name)

    def walk(self, prefix: str = "") -> Iterator[tuple[str, "Module"]]:
        """This module, then those in it, each with what its names begin with, such as "encoder."."""
        yield prefix, self
        for name, module in self._modules.items():
            yield from module.walk(f"{prefix}{name}.")

    def _named(self, kind: str) -> list[tuple[str, Tensor]]:
        found = {}  # by identity: a tensor that two modules share is listed once, under its first name
        for prefix, module in self.walk():
            for name, tensor in vars(module)[kind].items():
                found.setdefault(id(tensor), (prefix + name, tensor))
        return list(found.values())

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return self._named("_parameters")

    def named_buffers(self) -> list[tuple[str, Tensor]]:
        return self._named("_buffers")

    def state_dict(self) -> dict[str, Tensor]:
        """What a saved model consists of, under every name: the tensors themselves, not copies of them."""
        return {
            prefix + name: tensor.detach()
            for prefix, module in self.walk()
            for name, tensor in (module._parameters | module._buffers).items()
            if name not in module._unsaved
        }

    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True) -> tuple[list[str], list[str]]:
        """Copy values into the tensors that are there. Returns the names that are missing or unexpected."""
        own = self.state_dict()
        missing = [name for name in own if name not in state]
        unexpected = [name for name in state if name not in own]
        misshapen = [name for name in own if name in state and own[name].shape != state[name].shape]
        if misshapen or (strict and (missing or unexpected)):
            raise RuntimeError(f"missing {missing}, unexpected {unexpected}, misshapen {misshapen}")
        for name in own.keys() & state.keys():
            own[name].copy_(state[name])
        return missing, unexpected

    def train(self, mode: bool = True) -> "Module":
        for _, module in self.walk():
            module.training = mode
        return self

    def eval(self) -> "Module":
        return self.train(False)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Module":
        """Parameters and buffers alike; whole numbers stay whole."""
        for _, tensor in (*self.named_parameters(), *self.named_buffers()):
            tensor.data = tensor.data.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        return self

    def register_forward_hook(self, hook: Callable) -> SimpleNamespace:
        self._hooks[key := object()] = hook
        return SimpleNamespace(remove=lambda: self._hooks.pop(key))

    def __call__(self, *inputs: Tensor) -> Tensor:
        output = self.forward(*inputs)
        for hook in self._hooks.values():
            replaced = hook(self, inputs, output)
            output = output if replaced is None else replaced
        return output


AnyModule = Module | nn.Module


def build(base: type, D: int = 5, H: int = 3) -> AnyModule:
    """The same network on top of either Module, with everything that can make a difference in it."""

    class Layer(base):
        """Weights, a bias, and a running mean that centres the outputs: (N, D) -> (N, H)."""

        def __init__(self, D: int, H: int) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(H))
            self.register_buffer("batches", torch.tensor(0))
            self.register_buffer("last", torch.zeros(H), persistent=False)
            self.weight, self.bias = nn.Parameter(torch.randn(H, D)), nn.Parameter(torch.randn(H))

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight.T + self.bias
            if self.training:
                self.last, self.batches = y.detach().mean(0), self.batches + 1
                self.mean = 0.9 * self.mean + 0.1 * self.last
            return y - self.mean

    class Pair(base):
        """There and back: (N, D) -> (N, D)."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Layer(D, H), Layer(H, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    class Network(base):
        """Modules in modules, and one tensor with two names: (N, D) -> (N, D)."""

        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = Pair(), Pair()
            self.decode.first.weight = self.encode.first.weight
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.decode(self.encode(x))

    return Network()


def inventory(network: AnyModule) -> list[list[tuple]]:
    """Parameters, buffers and state dict: name, shape, type, and which of the model's tensors it is."""
    parts = network.named_parameters(), network.named_buffers(), network.state_dict().items()
    parts = [list(part) for part in parts]
    which = {tensor.data_ptr(): i for i, (_, tensor) in enumerate(parts[0] + parts[1])}  # by place in memory
    return [[(name, t.shape, t.dtype, which.get(t.data_ptr())) for name, t in part] for part in parts]


def trace(network: AnyModule, steps: list[tuple[str, Tensor]]) -> list[list[Tensor]]:
    """After each batch, in its mode: the output, the gradients and the buffers."""
    found, parameters = [], [parameter for _, parameter in network.named_parameters()]
    for mode, x in steps:
        getattr(network, mode)()  # network.train() or network.eval()
        y = network(x)
        gradients = torch.autograd.grad(y.square().mean(), parameters)
        found.append([y, *gradients, *(buffer.clone() for _, buffer in network.named_buffers())])
    return found


def attempt(action: Callable, *arguments: object) -> object:
    """What the action returns, or that it was refused."""
    try:
        return action(*arguments)
    except (RuntimeError, TypeError):
        return "refused"


def overhear(network: AnyModule, x: Tensor) -> list[Tensor]:
    """The output while hooks listen, one of which doubles what it hears; the output afterwards; all heard."""
    heard = []

    def hook(module: AnyModule, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        heard.append(output)
        return 2 * output if module is network.encode.second else None

    modules = network, network.encode, network.encode.first, network.encode.second
    handles = [module.register_forward_hook(hook) for module in modules]
    doubled = network(x)
    for handle in handles:
        handle.remove()
    return [doubled, network(x), *heard]


def main(lesson: Lesson) -> None:
    draw, device = torch.Generator().manual_seed(lesson.seed), lesson.float64_device
    networks = []
    for base in (Module, nn.Module):
        torch.manual_seed(lesson.seed)
        networks.append(build(base).to(device, torch.float64))

    lesson.heading("What is filed, and under which names")
    ours, theirs = map(inventory, networks)
    for kind, part in zip(("parameters", "buffers", "state dict"), ours, strict=True):
        print(f"{len(part):2} {kind:10}  {', '.join(name for name, *_ in part[:5])}, …")
    lesson.proves(1, ours == theirs, "and the state dict holds the tensors themselves")

    lesson.heading("Two modes")
    a, b, c = (torch.randn(N, 5, generator=draw, dtype=torch.float64).to(device) for N in (7, 4, 1))
    traces = [trace(network, [("train", a), ("train", b), ("train", c), ("eval", a)]) for network in networks]
    for name, (first, *_, last) in zip(("ours", "nn.Module"), traces, strict=True):
        told = f"training {first[0][0, 0]:+.6f}   evaluation {last[0][0, 0]:+.6f}"
        print(f"{name:9}   the same sample: {told}")
    lesson.proves_equal(2, *traces)

    lesson.heading("Saved and loaded")
    fresh = [build(base).to(device, torch.float64) for base in (nn.Module, Module)]
    for new, old in zip(fresh, networks, strict=True):
        new.load_state_dict(old.state_dict())
    loaded = [[tensor.tolist() for tensor in new.state_dict().values()] for new in networks + fresh]
    whole = networks[0].state_dict()
    wrong = {
        "too few": {name: whole[name] for name in whole if name not in ("scale", "decode.first.bias")},
        "too many": whole | {"ghost": torch.zeros(1)},
        "misshapen": whole | {"encode.first.bias": torch.zeros(1)},  # copy_ would broadcast it
    }
    answers = [
        [
            attempt(network.load_state_dict, state, strict)
            for state in wrong.values()
            for strict in (True, False)
        ]
        for network in networks
    ]
    for i, name in enumerate(wrong):
        strict, lenient = answers[0][2 * i : 2 * i + 2]
        print(f"{name:9}   {strict}   strict=False: {lenient}")
    lesson.proves(3, loaded[:2] == loaded[2:] and answers[0] == answers[1], "both ways; 6 answers")

    lesson.heading("Listening in")
    heard = [overhear(network, a) for network in networks]
    for name, (doubled, plain, *rest) in zip(("ours", "nn.Module"), heard, strict=True):
        told = f"output {plain[0, 0]:+.6f}   with one of them doubled inside {doubled[0, 0]:+.6f}"
        print(f"{name:9}   {len(rest)} outputs heard   {told}")
    lesson.proves_equal(4, *heard)

    lesson.heading("What is filed by neither")
    before, refused = ours, []
    for network in networks:
        network.listed, network.plain = [nn.Parameter(torch.ones(1))], torch.ones(1)
        refused.append(attempt(setattr, network, "scale", torch.ones(1)))
    unchanged = [inventory(network) == before for network in networks]
    print(f"a list, a plain tensor: not filed {unchanged}   a plain tensor in a Parameter's place: {refused}")
    lesson.proves(5, all(unchanged) and refused == ["refused"] * 2, "ours, nn.Module")


if __name__ == "__main__":
    run(main)
