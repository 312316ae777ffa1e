"""Opens the fastest session whose results match those of the model on each row alone."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from xpo_lightning.core.batch import Completions, Prompts
from xpo_lightning.core.errors import InputError
from xpo_lightning.models.forward.capabilities import capabilities_of, rows_of, sharing_of
from xpo_lightning.models.forward.causal_forward import base_of
from xpo_lightning.models.forward.cpu_attention import cache_dtype, reads_whole
from xpo_lightning.models.forward.truth import name_of
from xpo_lightning.models.forward.unshared import Rows
from xpo_lightning.rollout.plain_session import PlainSession
from xpo_lightning.rollout.session import Session
from xpo_lightning.rollout.workspace import Workspaces
from xpo_lightning.rollout.writing import Writing, ways_for

REPLAYING = {"cuda"}
"""Device types that replay decoding steps."""
AnySession = Session | PlainSession


def open_session(
    model: nn.Module, prompts: Prompts, room: int, tokens_at_once: int, workspaces: Workspaces | None = None
) -> AnySession:
    """Encode prompts with a model, which must be in eval mode, and return the session.

    Args:
        model: A transformers causal language model on the device of the prompts.
        prompts: B prompts.
        room: Maximum number of tokens that will follow a prompt.
        tokens_at_once: Maximum number of prompt tokens, padding included, in one forward pass.
        workspaces: Buffers of the steps that a GPU replays; None replays none.
    """
    way = writing_of(model, prompts.ids.shape[1] + room)
    if way.is_static and (workspaces is None or not capabilities_of(model).may_replay):
        way = replace(way, is_static=False)
    return _open(model, prompts, room, tokens_at_once, way, workspaces)


def try_ways(*models: nn.Module) -> None:
    """Choose how models run while their weights are unsharded; sharded models are not probed again.

    Args:
        models: Transformers causal language models, the same on each process.

    Raises:
        InputError: A model cannot run padded rows: ranks with different rows would run different numbers of forward
            passes over its sharded layers.
    """
    for model in models:
        sharing_of(model, 1)
        writing_of(model, 1)
        rows_of(model, 1)
        how = capabilities_of(model).surest("scoring")
        if how not in (Rows.PADDED_LEFT, Rows.PADDED_RIGHT):
            raise InputError(
                f"trainer.strategy spreads the weights over processes, and rows go through {name_of(model)} {how}, so "
                f"that processes would wait for each other; use ddp"
            )


def writing_of(model: nn.Module, length: int) -> Writing:
    """Return the way in which a model decodes rows of up to `length` tokens, prompt and completion."""
    found = capabilities_of(model)
    is_static = next(model.parameters()).device.type in REPLAYING
    base, has_head = base_of(model), found.head is not None
    ways = ways_for(
        cache_dtype(base),
        has_head=has_head,
        is_fast=found.is_fast,
        reads_whole=reads_whole(base),
        is_static=is_static,
    )
    return found.choose("writing", ways, _written, length, is_written=True)


def _open(
    model: nn.Module,
    prompts: Prompts,
    room: int,
    tokens_at_once: int,
    way: Writing,
    workspaces: Workspaces | None = None,
) -> AnySession:
    if way.is_shared:
        return Session(model, prompts, room, tokens_at_once, way, workspaces)
    return PlainSession(model, prompts, tokens_at_once, way)


def _written(
    model: nn.Module, prompts: Prompts, completions: Completions, head: nn.Linear | None, way: Writing
) -> Tensor:
    """Return the features that predict each token of two completions per prompt, (2B, T, F), decoded in this way."""
    one, other = (completions.select(range(start, start + len(prompts))) for start in (0, len(prompts)))
    session = _open(model, prompts, completions.ids.shape[1], prompts.ids.numel(), way)
    features = _forced(session, one)
    if isinstance(session, PlainSession):
        return torch.cat([features, _forced(session.again(), other)])
    session.rest()  # Score the other completion, as completions of another model are scored.
    scored = session.continued(slice(0, len(prompts)), other.select(session.places.tolist()))
    return torch.cat([features, scored[session.places.argsort()]])


def _forced(session: AnySession, completions: Completions) -> Tensor:
    """Decode given tokens in a session; return the features that predict each, (B, T, F), in prompt order."""
    order = session.places.argsort()
    ids = completions.ids[session.places]
    later = [session.advance(ids[:, step], step)[order] for step in range(ids.shape[1] - 1)]
    return torch.stack([session.first[order], *later], 1)
