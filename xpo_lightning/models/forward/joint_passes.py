"""Runs forward passes of sharded models on all processes together, where each needs another number of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from xpo_lightning.core.distributed import all_gather_guarded, helping, mark_out_of_step, take_turn
from xpo_lightning.models.forward.causal_forward import base_of, eval_mode
from xpo_lightning.models.sharding import sharded_roots


@contextmanager
def joint_passes(*models: nn.Module, device: torch.device) -> Iterator[None]:
    """Let each process run as many forward passes in a block as it needs, without ever unsharding a whole model.

    A pass gathers the weights of one layer after the other from all processes. So before each, a process tells which
    model it is about to run. The others run that one too: on a batch of their own if they are about to, else on a
    single token, the result of which is dropped. A process that has finished takes part until all have. Only the
    weights outside of layers stay unsharded from one pass to the next, and only those of the model that ran last.

    The block runs without gradients. It must be inside guarded work, so that an error in one process reaches all of
    them; an error in the middle of a pass reaches them through the lifeline.

    Args:
        models: The models that may run; nothing is done for those that are not sharded.
        device: The device of their passes.
    """
    roots = [root for model in models for root in sharded_roots(model)]
    if not roots:
        yield
        return
    passes = _Passes(roots, device)
    try:
        # What FSDP2 allocates in inference mode could not be trained with.
        with torch.inference_mode(False), torch.no_grad(), helping(passes.take_part):
            yield
            all_gather_guarded(None)
    except BaseException as error:
        if passes.is_inside:
            mark_out_of_step(error)
        raise
    finally:
        passes.close()


class _Passes:
    """The passes of a block, and the hooks that see them begin and end.

    Args:
        roots: Sharded models, in the same order on all processes.
        device: The device of their passes.

    Attributes:
        is_inside: Whether a pass has begun, and has not ended.
    """

    def __init__(self, roots: list[Any], device: torch.device) -> None:
        self.roots, self.device = roots, device
        self.is_inside = self._is_helping = False
        self._latest: int | None = None
        self._hooks = [
            hook
            for number, root in enumerate(roots)
            for hook in (
                # Before FSDP2's own hook, which gathers the first weights.
                root.register_forward_pre_hook(lambda *_, number=number: self._begin(number), prepend=True),
                root.register_forward_hook(lambda *_: self._end()),
            )
        ]

    def take_part(self, number: int) -> None:
        """Run a model on a single token, for a process that needs its result."""
        root, token = self.roots[number], _last_token(self.roots[number])
        ids = torch.tensor([[token]], device=self.device)
        self._is_helping = True
        try:
            with eval_mode(root):
                root(input_ids=ids, attention_mask=torch.ones_like(ids))
        finally:
            self._is_helping = False

    def close(self) -> None:
        """Remove the hooks, and reshard what is unsharded."""
        for hook in self._hooks:
            hook.remove()
        if self._latest is not None and not self.is_inside:
            self.roots[self._latest].reshard()

    def _begin(self, number: int) -> None:
        if self.is_inside:
            raise RuntimeError("a pass over sharded weights was broken off")
        if not self._is_helping:
            take_turn(number)
        if self._latest not in (None, number):
            self.roots[self._latest].reshard()
        self._latest, self.is_inside = number, True

    def _end(self) -> None:
        self.is_inside = False


def _last_token(model: nn.Module) -> int:
    """Return a token that a row may end with; encoder-decoders read their score at EOS."""
    eos = getattr(getattr(base_of(model), "config", None), "eos_token_id", None)
    return eos if isinstance(eos, int) else 0
