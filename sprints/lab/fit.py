"""Training a language model on random windows of a corpus.

Derived in: 04_language_modelling/04_mlp_language_model
"""

import time

from lab.corpus import Corpus
from lab.lesson import Lesson

import torch
import torch.nn.functional as F
from torch import nn


def fit(
    model: nn.Module, corpus: Corpus, lesson: Lesson, *, B: int, T: int, rate: float, steps: int = 0
) -> tuple[list[float], float]:
    """AdamW on batches of B windows of T characters: the loss of every step, and the seconds it took.

    The learning rate rises to `rate` over the first tenth of the steps (lesson.steps, unless given) and falls
    to nothing along a cosine; gradients longer than 1 are cut to length 1.
    """
    steps, draw, losses = steps or lesson.steps, torch.Generator().manual_seed(lesson.seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    start = time.perf_counter()
    for _ in lesson.progress(range(steps), type(model).__name__):
        inputs, targets = corpus.batch(B, T, draw)
        logits, _ = model(inputs)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B·T, V), (B·T,) -> ()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())  # not .item(), which would wait for an accelerator at every step
    return torch.stack(losses).tolist(), time.perf_counter() - start
