"""How many tokens a GPU can take forward and backward together, measured in the first step."""

import torch

COUNTING = {"cuda"}
"""Kinds of devices that count their memory."""
SHARE = 0.5
"""Share of the free memory that a micro-batch may take."""
MOST = 2**15
"""Most tokens of a micro-batch: more would not be faster."""


def counts_memory(device: torch.device) -> bool:
    """Tell whether a device counts what is allocated on it."""
    return device.type in COUNTING


class MemoryBudget:
    """Measures what a step's micro-batches take, and what is left beside them.

    Args:
        device: Where the models are; its memory must be counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._taken = device, 0
        torch.cuda.reset_peak_memory_stats(device)

    def after_gradients(self) -> None:
        """Note what the micro-batches took beyond the gradient, which stays."""
        stays = torch.cuda.memory_allocated(self.device)
        self._taken = torch.cuda.max_memory_allocated(self.device) - stays

    def tokens(self, tokens: int) -> int:
        """Return how many tokens a micro-batch may have from now on; to be asked when the optimizer has its state.

        Args:
            tokens: Those of the largest micro-batch of this step.

        Returns:
            A power of two, so that a run and one like it find the same; as many as in this step at least.
        """
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        fit = int(SHARE * (free + kept) * tokens / max(self._taken, 1))
        return max(tokens, min(MOST, 1 << max(fit, 1).bit_length() - 1))
