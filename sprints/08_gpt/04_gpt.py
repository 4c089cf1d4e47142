"""GPT-2, whole: from the numbers of tokens to a score for every token that may come next.

Run:     uv run sprints/08_gpt/04_gpt.py      (5 s on two cores)
Proves:  1. GPT-2 written out from its equations, with weights in GPT-2's own layout, equals lab.gpt.GPT in
            its logits and in the gradient of every weight
         2. so does nn.TransformerEncoder with norm_first, a last norm, GELU by tanh, and a mask that hides
         3. one matrix embeds the tokens and scores them: its gradient is the sum of that of both uses
         4. GELU's form by tanh lies within 0.0005 of GELU, and the logits tell one from the other
         5. the influence matrix of the model is the lower triangle, and so is that of the keys and values in
            each block; a mask that hides every token from itself shows in the latter alone
         6. without places one block cannot tell in which order earlier tokens came; two can, and so can one
            with places
         7. T tokens are read, one more is refused with both numbers in one line
Shapes:  B texts of T tokens, V different ones; L blocks of width C, H heads of width D = C/H
Writes:  results/08_gpt/04_gpt.png
Note:    notes/04_gpt.md
"""

import math
from collections.abc import Callable
from functools import partial

from lab.attention import causal_mask
from lab.gpt import GPT, SIZES
from lab.influence import draw, influence, rows
from lab.lesson import Lesson, run

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Weights = dict[str, Tensor]  # under GPT-2's own names; matrices are (inputs, outputs)
#          V, T,  C, H, L
MODELS = ((2, 1, 2, 1, 1), (11, 7, 12, 3, 2), (29, 10, 40, 5, 3))
LAB = {  # GPT-2's names -> the lab's, where c_attn is three
    "wte": "tokens", "wpe": "places", "ln_f": "norm", "h.": "blocks.",
    "ln_1": "attention.norm", "attn.c_attn": "attention.sublayer.*",
    "attn.c_proj": "attention.sublayer.output", "ln_2": "feed_forward.norm",
    "mlp.c_fc": "feed_forward.sublayer.0", "mlp.c_proj": "feed_forward.sublayer.2",
}  # fmt: skip
TORCH = {  # GPT-2's names -> those in nn.TransformerEncoder
    "ln_f": "norm", "h.": "layers.",
    "ln_1": "norm1", "attn.c_attn.": "self_attn.in_proj_", "attn.c_proj": "self_attn.out_proj",
    "ln_2": "norm2", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2",
}  # fmt: skip


def shapes(V: int, T: int, C: int, L: int) -> dict[str, tuple[int, ...]]:
    """What GPT-2 consists of: the name and shape of each weight."""
    found = {"wte.weight": (V, C), "wpe.weight": (T, C)}
    for l in range(L):
        for part, inputs, outputs in (
            ("ln_1", 0, C), ("attn.c_attn", C, 3 * C), ("attn.c_proj", C, C),
            ("ln_2", 0, C), ("mlp.c_fc", C, 4 * C), ("mlp.c_proj", 4 * C, C),
        ):  # fmt: skip
            found[f"h.{l}.{part}.weight"] = (inputs, outputs) if inputs else (outputs,)
            found[f"h.{l}.{part}.bias"] = (outputs,)
    return found | {"ln_f.weight": (C,), "ln_f.bias": (C,)}


def depth(w: Weights) -> int:
    """L: twelve weights belong to each block, and four to none (or five, if scores have a matrix too)."""
    return (len(w) - 4) // 12


# ── Written out ───────────────────────────────────────────────────────────────────────────────────────────


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    """(B, T, inputs) -> (B, T, outputs)."""
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    """Mean 0 and variance 1 at each place, then a scale and a shift: (B, T, C) -> (B, T, C)."""
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / spread * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu_by_tanh(x: Tensor) -> Tensor:
    """Hendrycks and Gimpel 2016, section 2, the approximation."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gpt2(ids: Tensor, w: Weights, H: int, gelu: Callable[[Tensor], Tensor] = gelu_by_tanh) -> Tensor:
    """The logits of the next token: ids (B, T) -> (B, T, V)."""
    t = torch.arange(ids.shape[1], device=ids.device)
    x = w["wte.weight"][ids] + w["wpe.weight"][: len(t)]  # (B, T, C)
    for l in range(depth(w)):
        qkv = linear(norm(x, w, f"h.{l}.ln_1"), w, f"h.{l}.attn.c_attn")  # (B, T, 3C)
        q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))  # (B, H, T, D)
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, T)
        weights = scores.masked_fill(t > t[:, None], -torch.inf).softmax(-1)  # nobody looks at what is later
        mixed = (weights @ v).transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)
        x = x + linear(mixed, w, f"h.{l}.attn.c_proj")
        hidden = gelu(linear(norm(x, w, f"h.{l}.ln_2"), w, f"h.{l}.mlp.c_fc"))  # (B, T, 4C)
        x = x + linear(hidden, w, f"h.{l}.mlp.c_proj")
    scorer = w.get("lm_head.weight", w["wte.weight"])  # the same matrix again, unless one asks what if not
    return norm(x, w, "ln_f") @ scorer.T  # (B, T, C) @ (C, V) -> (B, T, V)


# ── The same from parts ───────────────────────────────────────────────────────────────────────────────────


def renamed(w: Weights, names: dict[str, str]) -> Weights:
    """GPT-2's weights for nn.Linear, which keeps (outputs, inputs), under other names."""
    found = {}
    for name, weight in w.items():
        weight = weight.t() if ".c_" in name else weight
        for old, new in names.items():
            name = name.replace(old, new)
        thirds = zip(("query", "key", "value"), weight.chunk(3), strict=True) if "*" in name else ()
        found |= {name.replace("*", part): third for part, third in thirds} or {name: weight}
    return found


def lab_model(w: Weights, H: int) -> GPT:
    """The lab's, with GPT-2's weights."""
    (V, C), T, L = w["wte.weight"].shape, len(w["wpe.weight"]), depth(w)
    model = GPT(V, T, C, H, L).to(w["wte.weight"])
    model.load_state_dict(renamed(w, LAB))
    return model


def by_lab(ids: Tensor, w: Weights, H: int) -> Tensor:
    """The lab's, computed with the very tensors of w, so that they get its gradients: (B, T) -> (B, T, V)."""
    return functional_call(lab_model(w, H), renamed(w, LAB), (ids,), strict=True)


def by_torch(ids: Tensor, w: Weights, H: int) -> Tensor:
    """The same with PyTorch's blocks: (B, T) -> (B, T, V)."""
    T, C, L = ids.shape[1], w["wte.weight"].shape[1], depth(w)
    options = {"dropout": 0.0, "activation": partial(F.gelu, approximate="tanh"), "batch_first": True}
    layer = nn.TransformerEncoderLayer(C, H, 4 * C, norm_first=True, **options)
    encoder = nn.TransformerEncoder(layer, L, nn.LayerNorm(C), enable_nested_tensor=False)
    x = w["wte.weight"][ids] + w["wpe.weight"][:T]
    hidden = ~causal_mask(T, device=ids.device)  # here True means hide
    inside = {name: weight for name, weight in w.items() if name not in ("wte.weight", "wpe.weight")}
    return functional_call(encoder, renamed(inside, TORCH), (x, hidden), strict=True) @ w["wte.weight"].T


def keys_read(model: Callable[[Tensor], Tensor], attention: nn.Module, ids: Tensor) -> Tensor:
    """Which keys and values reach which outputs of one attention, called as the model calls it: (B·T, B·T).

    Its queries are made from the same tokens; here they stay what they are.
    """
    calls = []
    hook = attention.register_forward_pre_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
    model(ids)
    hook.remove()
    (x, mask), options = calls[0]
    queries, source = x.detach(), x.detach().clone()
    return influence(lambda source: attention(queries, mask, source=source, **options), source)


def with_mask(model: GPT, mask: Tensor, ids: Tensor) -> Tensor:
    """The lab's model with another mask than its own, True means look: (B, T) -> (B, T, V)."""
    x = model.tokens(ids) + model.places.weight[: ids.shape[1]]
    for block in model.blocks:
        x = block(x, mask)
    return F.linear(model.norm(x), model.tokens.weight)


def with_gradients(logits: Tensor, w: Weights, slope: Tensor) -> list[Tensor]:
    """Logits, and how slope · logits changes with each weight."""
    return [logits, *torch.autograd.grad(logits, list(w.values()), slope, materialize_grads=True)]


def answer(model: Callable[[Tensor], Tensor], ids: Tensor) -> str:
    """What a model says to a text."""
    try:
        return f"logits {tuple(model(ids).shape)}"
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def main(lesson: Lesson) -> None:
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    generator = torch.Generator().manual_seed(lesson.seed)
    exact = {"dtype": torch.float64, "device": lesson.float64_device}

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(**exact)

    def random_weights(V: int, T: int, C: int, L: int) -> Weights:
        """All random, those of the norms too, so that none passes for another."""
        return {
            name: (randn(*shape) / 2 + (".weight" in name and len(shape) == 1)).requires_grad_()
            for name, shape in shapes(V, T, C, L).items()
        }

    def random_ids(V: int, *shape: int) -> Tensor:
        return torch.randint(V, shape, generator=generator).to(lesson.float64_device)

    lesson.heading("By hand: token 0 is (4, 0), token 1 is (0, 2), the second place (0, 1); all scores 0")
    w = {
        name: torch.eye(*shape) if len(shape) == 2 else torch.full(shape, 1.0 * (".weight" in name))
        for name, shape in shapes(2, 2, 2, 1).items()
    }
    w["wte.weight"], w["wpe.weight"] = torch.tensor([[4.0, 0], [0, 2]]), torch.tensor([[0.0, 0], [0, 1]])
    w["h.0.attn.c_attn.weight"] = torch.eye(2, 6).roll(4, 1)  # queries and keys are 0, values what is read
    for t, (a, b) in enumerate(gpt2(torch.tensor([[0, 1]]), w, 1)[0].tolist()):
        print(f"after token {t}: token 0 scores {a:+.2f}, token 1 {b:+.2f}")

    lesson.heading("Written out, from the lab's parts, from PyTorch's")
    by_hand, lab, theirs = [], [], []
    for V, T, C, H, L in MODELS:
        w = random_weights(V, T, C, L)
        for B, length in ((1, T), (3, (T + 1) // 2)):
            ids, slope = random_ids(V, B, length), randn(B, length, V)
            logits = gpt2(ids, w, H)
            by_hand += with_gradients(logits, w, slope)
            lab += with_gradients(by_lab(ids, w, H), w, slope)
            theirs += with_gradients(by_torch(ids, w, H), w, slope)
        print(f"V {V:2}, T {T:2}, C {C:2}, H {H}, L {L}:   ids {(B, length)} -> logits {(*logits.shape,)}")
    lesson.proves_equal(1, lab, by_hand)
    lesson.proves_equal(2, theirs, by_hand)

    lesson.heading("One matrix, used twice")
    untied = w | {"lm_head.weight": w["wte.weight"].detach().clone().requires_grad_()}
    uses = [untied["wte.weight"], untied["lm_head.weight"]]
    embeds, scores = torch.autograd.grad(gpt2(ids, untied, H), uses, slope)
    (tied,) = torch.autograd.grad(by_lab(ids, w, H), [w["wte.weight"]], slope)
    norms = [f"{part.norm():.1f}" for part in (embeds, scores, tied)]
    print("size of its gradient: from embedding {}, from scoring {}, in all {}".format(*norms))
    with torch.device("meta"):  # shapes alone, no numbers
        smallest = GPT(50_257, 1_024, **SIZES["gpt2"])
    count, matrix = sum(weight.numel() for weight in smallest.parameters()), smallest.tokens.weight.numel()
    print(f"the smallest GPT-2: {count:,} parameters, with a second such matrix {count + matrix:,}")
    lesson.proves_equal(3, tied, embeds + scores)

    lesson.heading("Two forms of GELU")
    x = torch.linspace(-6, 6, 2001, **exact)
    apart = (gelu_by_tanh(x) - F.gelu(x)).abs().max().item()
    logits, other = gpt2(ids, w, H), gpt2(ids, w, H, F.gelu)
    off = (logits - other).abs().max().item()
    print(f"GELU: at most {apart:.6f} apart; logits of size {logits.std():.1f}: up to {off:.4f} apart")
    lesson.proves(4, apart < 0.0005 and off > 1e-4, f"{apart:.6f}, and {off:.4f} in the logits")

    lesson.heading("Influence of tokens on the model, of keys on its attention; then with a mask off by one")
    V, T, C, H, L = MODELS[1]
    model = lab_model(random_weights(V, T, C, L), H)
    ids = torch.stack([torch.arange(5), torch.arange(5, 0, -1)]).to(lesson.float64_device)  # (B, T)
    off_by_one = partial(with_mask, model, causal_mask(5, device=ids.device).tril(-1))
    found, wrong = (
        [influence(f, ids), *(keys_read(f, block.attention.sublayer, ids) for block in model.blocks)]
        for f in (model, off_by_one)
    )
    first = [looks[:5, :5] for looks in (*found[:2], *wrong[:2])]
    print("\n".join("    ".join(row) for row in zip(*map(rows, first), strict=True)))
    triangle = torch.block_diag(causal_mask(5), causal_mask(5)).long()
    lesson.proves_equal(5, found + wrong, [triangle] * (2 + L) + [triangle.tril(-1)] * L)

    lesson.heading("The earlier tokens in another order: how far the logits of the last token move")
    moved = {}
    for L, places in ((1, 0.0), (2, 0.0), (1, 1.0)):
        model = lab_model(random_weights(V, T, C, L), H)
        model.places.weight.data *= places
        ids = torch.arange(T)[None].to(lesson.float64_device)
        other = torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], dim=1)
        moved[L, places] = (model(ids) - model(other))[0, -1].abs().max().item()
        print(f"{L} block{'s' * (L > 1):1} {'with' if places else 'without'} places: {moved[L, places]:.4f}")
    blind, *seeing = moved.values()
    lesson.proves(6, blind < 1e-9 and min(seeing) > 1e-3, f"{blind:.0e}, at least {min(seeing):.4f}")

    lesson.heading(f"More tokens than the {T} places")
    w = random_weights(V, T, C, L)
    model, ids = lab_model(w, H), random_ids(V, 1, T + 1)
    print("written out ", answer(lambda ids: gpt2(ids, w, H), ids))
    print("the lab     ", told := answer(model, ids))
    held = answer(model, ids[:, :T]) == f"logits {(1, T, V)}"
    lesson.proves(7, held and told == f"ValueError: {T + 1} tokens, but places for only {T}")

    figure, axes = plt.subplots(1, 4, figsize=(6.6, 2.5), layout="constrained")
    titles = ("model", "keys", "model, off by one", "keys, off by one")
    for panel, looks, title in zip(axes, first, titles, strict=True):
        draw(panel, looks, title)
        panel.set_ylabel("output position" if panel is axes[0] else "")
    figure.suptitle(
        "A mask off by one does not show in the model, only in what keys reach", fontsize="medium"
    )
    lesson.save(figure)


if __name__ == "__main__":
    run(main)
