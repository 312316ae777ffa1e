"""The order of prompts: by seed and epoch alone, and shared by processes."""

from pathlib import Path

import pytest
import torch
from prompt_files import TEXTS, TOKENIZER, both_ways, column, set_up, write_jsonl

from xpo_lightning.data import PromptDataModule


def orders(module: PromptDataModule, epochs: int = 3) -> list[list[str]]:
    loader, found = module.train_dataloader(), []
    for epoch in range(epochs):
        module.trainer.current_epoch = epoch
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        found.append(column(loader))
    return found


@both_ways
def test_order_depends_on_seed_and_epoch_only(source: str, streaming: bool):
    torch.manual_seed(1)
    first = orders(set_up(source, TOKENIZER, streaming=streaming))
    torch.manual_seed(2)
    assert orders(set_up(source, TOKENIZER, streaming=streaming)) == first
    assert all(sorted(order) == TEXTS for order in first)
    others = orders(set_up(source, TOKENIZER, streaming=streaming, seed=1))
    different = {tuple(order) for order in [*first, *others, TEXTS]}
    assert len(different) == 7


@both_ways
def test_without_shuffle_the_order_is_that_of_the_file(source: str, streaming: bool):
    assert orders(set_up(source, shuffle=False, streaming=streaming)) == [TEXTS] * 3


def test_buffer_bounds_how_far_a_prompt_moves(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": str(number)} for number in range(100)])
    order = [int(text) for text in column(set_up(path, streaming=True, shuffle_buffer=5).train_dataloader())]
    assert sorted(order) == list(range(100)) != order
    assert all(number - place < 5 for place, number in enumerate(order))


@pytest.mark.parametrize("workers", [0, 1])
@both_ways
def test_loading_leaves_the_global_random_state_alone(source: str, streaming: bool, workers: int):
    module = set_up(source, TOKENIZER, streaming=streaming, num_workers=workers, validation_source=source)
    before = torch.get_rng_state()
    for loader in (module.train_dataloader(), module.val_dataloader(), module.predict_dataloader()):
        column(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shuffle", [False, True])
@both_ways
def test_two_processes_share_the_batches_of_one(source: str, streaming: bool, shuffle: bool):
    """The first global batch, taken in turns, is the one that a single process with twice the batch size has."""
    options = {"shuffle": shuffle, "streaming": streaming}
    whole = next(iter(set_up(source, **options, batch_size=4).train_dataloader()))["prompt"]
    halves = []
    for rank in range(2):
        module = set_up(source, **options, batch_size=2)
        module.trainer.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}
        loader = module.train_dataloader()
        halves.append(next(iter(loader))["prompt"])
        assert len(column(loader)) == 5
    assert [text for pair in zip(*halves, strict=True) for text in pair] == whole


def test_processes_get_equally_many_prompts(source: str):
    for streaming, expected in ((False, [4, 4, 4]), (True, [3, 3, 3])):
        counts, union = [], set()
        for rank in range(3):
            module = set_up(source, streaming=streaming)
            module.trainer.distributed_sampler_kwargs = {"num_replicas": 3, "rank": rank}
            texts = column(module.train_dataloader())
            counts.append(len(texts))
            union.update(texts)
        assert counts == expected
        assert len(union) == (9 if streaming else 10)
