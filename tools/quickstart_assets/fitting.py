"""The training loop that the policy and the reward model share."""

import math
import time
from collections.abc import Callable
from typing import Final

import torch

MATRIX_RATE: Final = 0.02
OTHER_RATE: Final = 3e-3
WARMUP: Final = 40
WEIGHT_DECAY: Final = 0.05
MAX_NORM: Final = 1.0
PRINT_EVERY: Final = 50


def schedule(steps: int) -> Callable[[int], float]:
    """Returns the factor of the learning rates by step: a linear warm-up, then a cosine to a fiftieth."""

    def factor(step: int) -> float:
        done = min(1.0, step / steps)
        return min(1.0, (step + 1) / WARMUP) * (0.02 + 0.49 * (1.0 + math.cos(math.pi * done)))

    return factor


def optimizers_of(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Makes Muon for the matrices of the layers, and AdamW for embeddings, norms and the head."""
    matrices, others = list[torch.nn.Parameter](), list[torch.nn.Parameter]()
    for name, weight in model.named_parameters():
        (matrices if ".layers." in name and weight.ndim == 2 else others).append(weight)
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY),
    ]


def fit(name: str, model: torch.nn.Module, steps: int, draw_loss: Callable[[], torch.Tensor]) -> None:
    """Trains a model, and leaves it in evaluation mode.

    Args:
        name: What to call the model in the progress lines.
        model: The model.
        steps: Optimizer steps.
        draw_loss: Draws a batch and returns its loss.
    """
    optimizers = optimizers_of(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps)) for optimizer in optimizers]
    started = time.monotonic()
    model.train()
    for step in range(steps):
        loss = draw_loss()
        model.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        for optimizer in optimizers:
            optimizer.step()
        for rates in schedules:
            rates.step()
        if step % PRINT_EVERY == 0 or step == steps - 1:
            print(f"{name} step {step}: loss {loss.item():.3f} ({time.monotonic() - started:.0f} s)", flush=True)
    model.train(False)
