"""Measures, in the first step, how many tokens of a micro-batch fit on a GPU."""

import torch

COUNTING = {"cuda"}
"""Types of devices that report how much memory is allocated on them."""
SHARE = 0.5
"""Share of the free memory that a micro-batch may take."""
MOST = 2**15
"""Most tokens of a micro-batch: more would not be faster."""


def counts_memory(device: torch.device) -> bool:
    """Tell whether a device reports how much memory is allocated on it."""
    return device.type in COUNTING


class MemoryBudget:
    """Measures the memory that a step's micro-batches take, to find how large they may become.

    Args:
        device: The models' device, one of which `counts_memory` is true.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._taken = device, 0
        torch.cuda.reset_peak_memory_stats(device)

    def after_gradients(self) -> None:
        """Record the peak memory of the micro-batches beyond what stays allocated, such as the gradient."""
        stays = torch.cuda.memory_allocated(self.device)
        self._taken = torch.cuda.max_memory_allocated(self.device) - stays

    def tokens(self, tokens: int) -> int:
        """Return how many tokens a micro-batch may have from now on; call it once the optimizer has its state.

        Args:
            tokens: Tokens of the largest micro-batch of this step.

        Returns:
            A power of two, so that similar runs get the same number, or `tokens` if that is more.
        """
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        fit = int(SHARE * (free + kept) * tokens / max(self._taken, 1))
        return max(tokens, min(MOST, 1 << max(fit, 1).bit_length() - 1))
