"""How fast the course's GPT trains, beside others, as ratios in one run. Not part of the test suite.

    uv run --with transformers tests/bench_training.py TEXT      (5 minutes on two idle cores)

TEXT is tinyshakespeare, or any other text of about 1 MB.

1. nanoGPT's published configuration for a CPU (4 layers, 4 heads, width 128, context 64, batches of 12, 2,000
   steps; model, schedule and data loader are rebuilt here) against 09_training_pipeline/02_train_gpt on the
   same text and split: the seconds that each trains, and the nats per character of the whole held-out tenth
   in windows of the context. That is 64 characters for nanoGPT, and 32 tokens for ours: a little less, as
   tinyshakespeare has 1.94 characters a token with 512 tokens.
2. Forward and backward of lab.gpt's model against Hugging Face's GPT-2 (if it is there) and against one put
   together from nn.TransformerEncoder, at that size and at 6 × 384 × 256, taking turns.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LAB = Path(__file__).resolve().parents[1] / "sprints"
sys.path.insert(0, str(LAB))

from lab.gpt import GPT  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

OURS = "--vocabulary 512 --context 32 --layers 4 --heads 4 --width 128 --batch 32 --rate 5e-3 --steps 400"


# ── Peers ─────────────────────────────────────────────────────────────────────────────────────────────────


class NanoBlock(nn.Module):
    """nanoGPT's block: one matrix for query, key and value, no biases, exact GELU."""

    def __init__(self, C: int, H: int) -> None:
        super().__init__()
        self.H, self.norm_1, self.norm_2 = H, nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.c_fc, self.c_out = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        parts = self.c_attn(self.norm_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.H, C // self.H).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.c_out(F.gelu(self.c_fc(self.norm_2(x))))


class Nano(nn.Module):
    def __init__(self, V: int, T: int, C: int, H: int, L: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks, self.norm = (
            nn.Sequential(*(NanoBlock(C, H) for _ in range(L))),
            nn.LayerNorm(C, bias=False),
        )
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                last = name.endswith(("c_proj.weight", "c_out.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * L) if last else 1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


class Encoder(nn.Module):
    """GPT-2 from PyTorch's own layers, whose mask says True for what is hidden."""

    def __init__(self, V: int, T: int, C: int, H: int, L: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            C, H, 4 * C, dropout=0.0, activation=nn.GELU("tanh"), batch_first=True, norm_first=True
        )
        self.tokens, self.places = nn.Embedding(V, C), nn.Embedding(T, C)
        self.encoder = nn.TransformerEncoder(layer, L, nn.LayerNorm(C), enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, T = self.tokens(ids) + self.places.weight[: ids.shape[1]], ids.shape[1]
        hidden = nn.Transformer.generate_square_subsequent_mask(T, device=ids.device)
        return F.linear(self.encoder(x, mask=hidden, is_causal=True), self.tokens.weight)


def hugging_face(V: int, T: int, C: int, H: int, L: int) -> nn.Module | None:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H, **quiet))
    forward = model.forward
    model.forward = lambda ids: forward(ids).logits
    return model


# ── 1. To the same loss ───────────────────────────────────────────────────────────────────────────────────


def nanogpt(text: str, steps: int = 2000, B: int = 12, T: int = 64) -> tuple[float, float]:
    """Train as nanoGPT does: the seconds of its training, and its nats per held-out character."""
    torch.manual_seed(1337)
    vocabulary = {character: number for number, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([vocabulary[character] for character in text])
    cut = len(text) * 9 // 10
    train, held_out = ids[:cut], ids[cut:]
    model = Nano(len(vocabulary), T, 128, 4, 4)
    matrices, others = ([w for w in model.parameters() if (w.ndim > 1) is kind] for kind in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    start = time.perf_counter()
    for step in tqdm(range(steps), "nanoGPT", leave=False):
        share = min(1.0, max(0.0, (step - 100) / (steps - 100)))
        rate = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + 0.5 * (1 + math.cos(math.pi * share)) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(train) - T, (B,)).tolist()
        x, y = (torch.stack([train[i + shift : i + shift + T] for i in starts]) for shift in (0, 1))
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds, nats, count = time.perf_counter() - start, 0.0, 0
    with torch.no_grad():
        for i in range(0, len(held_out) - 1, T):
            y = held_out[i + 1 : i + 1 + T]
            logits = model(held_out[None, i : i + len(y)])[0]
            nats, count = nats + F.cross_entropy(logits, y, reduction="sum").item(), count + len(y)
    return seconds, nats / count


def ours(text: Path, options: str) -> tuple[float, float]:
    """The capstone with options: the seconds of its training, and its nats per held-out character."""
    lesson = LAB / "09_training_pipeline" / "02_train_gpt.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, lesson, "--data", text.absolute(), "--results", folder, *options.split()]
        environment = os.environ | {"PYTHONPATH": str(LAB)}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        record = json.loads(Path(folder, "09_training_pipeline", "02_train_gpt.json").read_text("utf-8"))
    rung = record["rungs"][0]
    return rung["training_seconds"], rung["nats_per_character"]


# ── 2. A step ─────────────────────────────────────────────────────────────────────────────────────────────


def step_times(sizes: dict[str, int], B: int, rounds: int) -> dict[str, float]:
    """Seconds of a forward and backward pass of each model, the median of several that take turns."""
    builders: dict[str, Callable] = {
        "lab.gpt": GPT,
        "nn.TransformerEncoder": Encoder,
        "Hugging Face": hugging_face,
    }
    models = {name: model for name, build in builders.items() if (model := build(**sizes)) is not None}
    times: dict[str, list[float]] = {name: [] for name in models}
    ids = torch.randint(sizes["V"], (B, sizes["T"] + 1))
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(found[2:])[len(found[2:]) // 2] for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--ours", default=OURS, help="options of 02_train_gpt")
    parser.add_argument("--only", choices=("loss", "step"))
    options = parser.parse_args()
    if options.only != "step":
        theirs, bar = nanogpt(options.text.read_text(encoding="utf-8"))
        mine, reached = ours(options.text, options.ours)
        print(f"nanoGPT, 2,000 steps     {theirs:6.1f} s  {bar:.4f} nats per held-out character")
        print(f"02_train_gpt             {mine:6.1f} s  {reached:.4f}   {theirs / mine:.2f} times as fast")
    if options.only != "loss":
        small = {"V": 65, "T": 64, "C": 128, "H": 4, "L": 4}
        large = {"V": 65, "T": 256, "C": 384, "H": 6, "L": 6}
        for sizes, B, rounds in ((small, 12, 200), (large, 8, 16)):
            times = step_times(sizes, B, rounds)
            print(f"a step of {B} windows, {sizes['L']} × {sizes['C']} × {sizes['T']}")
            for name, seconds in times.items():
                print(f"  {name:22} {1e3 * seconds:7.1f} ms   {seconds / times['lab.gpt']:.2f}")


if __name__ == "__main__":
    main()
