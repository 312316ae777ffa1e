"""Pairs of earlier batches in later updates: what is kept, where, and that it comes back as it was."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPTS, Recorder, completions_of, fit_quietly, loader, noise, prompts_of, quiet_trainer

from xpo_lightning import BufferOptions, Experience, InputError, Pair, SigmoidLoss, XPOLightningModule
from xpo_lightning.data.prompts import as_prompts
from xpo_lightning.training.replay_buffer.buffer import Buffer
from xpo_lightning.training.replay_buffer.serialization import decoded, encoded

MakeModule = Callable[..., XPOLightningModule]


def pairs_of(*numbers: int) -> Experience:
    """Make pairs that can be told apart: prompt and completions hold their number."""
    count = len(numbers)
    own = completions_of([[number, 7] for number in numbers])
    values = torch.tensor([float(number) for number in numbers])
    return Experience(
        prompts=prompts_of([[number] * (1 + number % 3) for number in numbers]),
        completions=Pair(own, completions_of([[8] * (number + 1) for number in numbers])),
        scores=Pair(values, -values),
        labels=torch.ones(count),
        reference_logps=Pair(values / 3, values / 7),
        silent=torch.zeros(count, dtype=torch.bool),
    )


def numbers_in(kept: Any) -> list[int]:
    return kept.select(range(len(kept))).completions.by_policy.ids[:, 0].tolist()


@pytest.mark.parametrize("memory_pairs", [100, 1], ids=["memory", "file"])
@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("all", [[1, 2], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]]),
        (1, [[1, 2], [3], [4, 5], [6], [7]]),
        (2, [[1, 2], [1, 2, 3], [3, 4, 5], [4, 5, 6], [6, 7]]),
        (4, [[1, 2], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7]]),
    ],
)
def test_updates_see_the_pairs_that_are_to_be_kept(
    tmp_path: Path, memory_pairs: int, keep: Any, expected: list[list[int]]
):
    buffer = Buffer(BufferOptions(keep, memory_pairs), tmp_path)
    for batch, wanted in zip(((1, 2), (3,), (4, 5), (6,), (7,)), expected, strict=True):
        kept = buffer.add(pairs_of(*batch))
        assert numbers_in(kept) == wanted
        assert kept.sizes == kept.select(range(len(kept))).sizes
        buffer.settle()
    assert len(list(tmp_path.glob("pairs-0-*.sqlite"))) == (memory_pairs == 1)


def test_pairs_come_back_bit_for_bit(make_module: MakeModule):
    module = make_module()
    module.configure_model()
    prompts = as_prompts(PROMPTS, module.prompt_encoder, module.device)
    pairs = module.collector.collect(module.policy, prompts, noise(), training=True)
    back = decoded(encoded(pairs), "cpu")
    assert back.prompts.raw == pairs.prompts.raw
    for name in ("ids", "mask"):
        assert torch.equal(getattr(back.prompts, name), getattr(pairs.prompts, name))
        for side in ("by_policy", "by_sampler"):
            theirs, ours = (getattr(getattr(one.completions, side), name) for one in (pairs, back))
            assert torch.equal(theirs, ours)
    for side in ("by_policy", "by_sampler"):
        assert getattr(back.completions, side).texts == getattr(pairs.completions, side).texts
        for name in ("scores", "reference_logps"):
            assert torch.equal(getattr(getattr(back, name), side), getattr(getattr(pairs, name), side))
    assert torch.equal(back.labels, pairs.labels)
    assert torch.equal(back.without_preference, pairs.without_preference)


def test_marks_of_kept_pairs_come_back():
    marks = {"silent": torch.tensor([False, True, False]), "offline": torch.tensor([True, False, False])}
    back = decoded(encoded(replace(pairs_of(1, 2, 3), **marks)), "cpu")
    assert back.without_preference.tolist() == [False, True, False]
    assert back.offline is not None
    assert back.offline.tolist() == [True, False, False]


@pytest.mark.parametrize("memory_pairs", [100, 3], ids=["memory", "file"])
def test_a_batch_that_was_not_finished_is_not_part_of_the_state(tmp_path: Path, memory_pairs: int):
    options = BufferOptions("all", memory_pairs)
    buffer = Buffer(options, tmp_path)
    for batch in ((1, 2), (3, 4)):
        buffer.add(pairs_of(*batch))
        buffer.settle()
    buffer.add(pairs_of(5, 6))  # and broken off
    state = buffer.state()
    resumed = Buffer(options, tmp_path)
    resumed.load_state(state)
    assert numbers_in(resumed.add(pairs_of(7))) == [1, 2, 3, 4, 7]
    assert numbers_in(buffer.add(pairs_of(8))) == [1, 2, 3, 4, 8]


def test_a_file_goes_with_the_run_into_another_folder(tmp_path: Path):
    buffer = Buffer(BufferOptions("all", 1), tmp_path / "one")
    buffer.add(pairs_of(1, 2))
    buffer.settle()
    state = buffer.state()
    resumed = Buffer(BufferOptions("all", 1), tmp_path / "two")
    resumed.load_state(state)
    assert numbers_in(resumed.add(pairs_of(3))) == [1, 2, 3]
    assert numbers_in(buffer.add(pairs_of(4))) == [1, 2, 4], "the old one is as it was"
    Path(state["file"]).unlink()
    with pytest.raises(InputError, match=r"the pairs that model\.buffer kept in"):
        Buffer(BufferOptions(), tmp_path / "three").load_state(state)


def test_a_longer_memory_than_the_checkpoints_is_refused(tmp_path: Path):
    buffer = Buffer(BufferOptions(2), tmp_path)
    buffer.add(pairs_of(1))
    buffer.settle()
    with pytest.raises(InputError, match=r"model\.buffer\.keep is all, but the checkpoint was made with 2"):
        Buffer(BufferOptions("all"), tmp_path).load_state(buffer.state())
    shorter = Buffer(BufferOptions(1), tmp_path)
    shorter.load_state(buffer.state())
    assert numbers_in(shorter.add(pairs_of(2))) == [2]


@pytest.mark.parametrize(("option", "value"), [("keep", 0), ("memory_pairs", 0)])
def test_numbers_below_one_are_refused(option: str, value: int):
    with pytest.raises(InputError, match=rf"model\.buffer\.{option} must be"):
        BufferOptions(**{option: value})


def test_a_step_is_taken_on_all_that_is_kept(make_module: MakeModule, tmp_path: Path):
    """With a learning rate of 0, the loss of an update is the mean over its own pairs and over all before it."""
    recorders = {}
    for name, buffer in {"none": None, "all": BufferOptions(), "file": BufferOptions(memory_pairs=1)}.items():
        recorders[name] = Recorder()
        module = make_module(learning_rate=0.0, alpha=0.5, buffer=buffer, micro_batch_size=2)
        fit_quietly(module, PROMPTS, batch_size=2, callbacks=[recorders[name]], default_root_dir=tmp_path)
    alone = recorders["none"].of("loss/total")
    sizes = [2, 2, 1]
    for number in range(3):
        mean = sum(size * loss for size, loss in zip(sizes[: number + 1], alone, strict=False)) / sum(
            sizes[: number + 1]
        )
        for name in ("all", "file"):
            assert recorders[name].of("loss/total")[number] == pytest.approx(mean, abs=1e-4)
    for name in ("all", "file"):
        rollouts = ("objective/model_scores", "objective/kl", "win_rate")
        for metric in rollouts:
            assert recorders[name].of(metric) == recorders["none"].of(metric), "of the batch's own samples"


def test_inner_epochs_are_optimizer_steps_on_the_kept_pairs(make_module: MakeModule, tmp_path: Path):
    module = make_module(buffer=BufferOptions(), epochs_per_rollout=3, learning_rate=1e-3)
    trainer = fit_quietly(module, PROMPTS, batch_size=3, default_root_dir=tmp_path)
    assert trainer.global_step == 6


def test_a_buffer_file_that_cannot_be_used_is_named(make_module: MakeModule, tmp_path: Path):
    (tmp_path / "file").touch()
    module = make_module(buffer=BufferOptions(memory_pairs=1))
    with pytest.raises(InputError, match=r"model\.buffer: '.*/file/pairs-0-\w+\.sqlite' cannot be used"):
        quiet_trainer(default_root_dir=tmp_path / "file").fit(module, loader(PROMPTS))


def test_runs_that_share_a_folder_do_not_share_their_pairs(tmp_path: Path):
    options = BufferOptions("all", 1)
    one, other = Buffer(options, tmp_path), Buffer(options, tmp_path)
    for buffer, batch in ((one, (1, 2)), (other, (11, 12)), (one, (3,))):
        kept = buffer.add(pairs_of(*batch))
        buffer.settle()
    assert numbers_in(kept) == [1, 2, 3]
    resumed = Buffer(options, tmp_path)
    resumed.load_state(one.state())
    assert numbers_in(resumed.add(pairs_of(4))) == [1, 2, 3, 4]


def test_a_checkpoint_whose_pairs_were_replaced_is_refused(tmp_path: Path):
    """A run is resumed from its first batch and goes on with other pairs: there is no way back to its second."""
    options = BufferOptions("all", 1)
    run, states = Buffer(options, tmp_path), []
    for batch in ((1, 2), (3,)):
        run.add(pairs_of(*batch))
        run.settle()
        states.append(run.state())
    branch = Buffer(options, tmp_path)
    branch.load_state(states[0])
    branch.add(pairs_of(7, 8))
    branch.settle()
    with pytest.raises(InputError, match="those of a run that went on differently"):
        Buffer(options, tmp_path).load_state(states[1])


def test_a_run_folder_may_be_moved(tmp_path: Path):
    options = BufferOptions("all", 1)
    buffer = Buffer(options, tmp_path / "here")
    buffer.add(pairs_of(1, 2))
    buffer.settle()
    state = buffer.state()
    (tmp_path / "here").rename(tmp_path / "there")
    resumed = Buffer(options, tmp_path / "there")
    resumed.load_state(state)
    assert numbers_in(resumed.add(pairs_of(3))) == [1, 2, 3]


def test_a_file_is_copied_whole_though_its_writer_was_killed(tmp_path: Path):
    """What an unfinished transaction has written must not come along."""
    buffer = Buffer(BufferOptions("all", 1), tmp_path / "one")
    buffer.add(pairs_of(*range(1, 40)))
    buffer.settle()
    state = buffer.state()
    writer = (
        "import os, sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1]); c.execute('PRAGMA cache_size=2')\n"
        "c.execute('BEGIN')\n"
        "c.execute(\"UPDATE pairs SET line = 'broken' || hex(zeroblob(4000))\")\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", writer, state["file"]], check=False)
    assert Path(state["file"] + "-journal").exists()
    resumed = Buffer(BufferOptions("all", 1), tmp_path / "two")
    resumed.load_state(state)
    assert numbers_in(resumed.add(pairs_of(50))) == [*range(1, 40), 50]


def test_a_batch_whose_step_was_left_out_is_not_kept(make_module: MakeModule, tmp_path: Path):
    """Its pairs would make every later step fail as well."""
    losses = iter([1.0, math.nan, 1.0, 1.0, 1.0])

    class Spoiled(SigmoidLoss):
        def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
            return super().__call__(*args, **options) * next(losses)

    module = make_module(
        preference_loss=Spoiled(), buffer=BufferOptions(), max_skipped_steps=1, micro_batch_size=99, alpha=0.0
    )
    trainer = fit_quietly(module, PROMPTS, batch_size=1, default_root_dir=tmp_path)
    assert trainer.global_step == 4
    assert module.guard.skipped == 1
    assert len(module.memory.buffer.store.sizes) == 4
