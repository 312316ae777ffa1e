"""Weights spread over two processes: the steps of one, checkpoints of both kinds, exact resume, and the export."""

import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint_folders import Evil, sign
from test_processes import Run, metrics, run, weights
from transformers import AutoModelForCausalLM

from xpo_lightning import InputError
from xpo_lightning.checkpointing.sharded_io import read_folder
from xpo_lightning.models import sharding

__all__ = ["run"]

pytestmark = pytest.mark.slow
FILE = {"class_path": "FSDP2Strategy"}
FOLDER = {"class_path": "FSDP2Strategy", "init_args": {"save_distributed_checkpoint": True}}
# Half of the vocabulary ends a completion, so the two processes write completions of unequal lengths, and one of them
# now and then nothing but single tokens.
ENDING = {"max_new_tokens": 8, "eos_token_ids": list(range(150))}
MOMENTUM = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}
KINDS: dict[str, dict[str, Any]] = {
    "all weights": {"optimizer": MOMENTUM},
    "LoRA": {"lora": {"r": 2}, "optimizer": MOMENTUM, "epochs_per_rollout": 2},
}


def assert_same_steps(one: Path, two: Path, states: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    assert len(metrics(one)) == len(metrics(two)) == 6, "five steps and a validation"
    for step, (single, double) in enumerate(zip(metrics(one), metrics(two), strict=True)):
        for name, value in single.items():
            if "loss/" in name or "scores" in name or "length" in name or name == "grad_norm":
                # Ten steps with momentum carry on what each rounds in another order, more on some processors.
                rounded = name == "grad_norm" and step > 0
                assert double[name] == pytest.approx(value, rel=1e-3 if rounded else 1e-5, abs=1e-6), name
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        error, size = (value - states[1][name]).abs().max(), value.abs().max()
        assert error <= (1e-3 if "lora" in name else 1e-5) * size + 1e-6, (name, float(error), float(size))


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one_and_resume_exactly(run: Run, tmp_path: Path, kind: str):
    """With DDP, with FSDP2, and with FSDP2 from its own checkpoint of the second batch on."""
    options = {**KINDS[kind], "sampling": ENDING, "buffer": {"keep": 2}, "rows": 24}
    run(tmp_path, 1, **options)
    lengths = {row["completions/model_length"] for row in metrics(tmp_path / "1") if "completions/model_length" in row}
    assert any(not length.is_integer() for length in lengths), "completions of unequal lengths"
    for name, strategy in {"ddp": "ddp", "fsdp": FILE}.items():
        run(tmp_path, 2, name=name, strategy=strategy, **options)
        assert_same_steps(tmp_path / "1", tmp_path / name, (weights(tmp_path / "1"), weights(tmp_path / name)))
    whole, checkpoints = weights(tmp_path / "fsdp"), tmp_path / "fsdp" / "version_0" / "checkpoints"
    for file in sorted(checkpoints.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)[1:]:
        file.unlink()
    output = run(tmp_path, 2, name="fsdp", strategy=FILE, resume=True, **options)
    assert "the newest checkpoint is" in output
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path / "fsdp").items())


def test_distributed_checkpoints_resume_exactly_and_damaged_ones_are_passed_over(run: Run, tmp_path: Path):
    """With the reward model spread as well, and an optimizer that has no state."""
    reward = {"class_path": "SequenceClassifierReward", "init_args": {"allow_untrained_head": True}}
    options: dict[str, Any] = {"sampling": ENDING, "reward": reward}
    output = run(tmp_path, 2, name="run", strategy=FOLDER, **options)
    checkpoints = tmp_path / "run" / "version_0" / "checkpoints"
    folders = sorted(checkpoints.glob("*.ckpt"), key=lambda folder: (folder / "meta.pt").stat().st_mtime_ns)
    assert all(folder.is_dir() for folder in folders)
    before = metrics(tmp_path / "run")
    (folders[-1] / ".metadata").unlink()
    for folder in folders[1:-1]:
        shutil.rmtree(folder)
    output = run(tmp_path, 2, name="run", strategy=FOLDER, resume=True, **options)
    assert f"passed over: '{folders[-1]}' is no checkpoint, or a distributed one that is not whole" in output
    assert f"the newest checkpoint is '{folders[0]}'" in output
    assert metrics(tmp_path / "run") == before, "bit for bit"


def test_a_distributed_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path: Path):
    torch.save({"global_step": 1}, tmp_path / "meta.pt")
    marker = tmp_path / "ran"
    for content, message in ((pickle.dumps(Evil(marker)), "could run code"), (b"garbage", "is damaged")):
        (tmp_path / ".metadata").write_bytes(content)
        sign(tmp_path)
        with pytest.raises(InputError, match=message):
            read_folder(tmp_path)
    assert not marker.exists()
    torch.save({"x": Evil(marker)}, tmp_path / "meta.pt")
    sign(tmp_path)
    with pytest.raises(InputError, match="could run code"):
        read_folder(tmp_path)
    assert not marker.exists()
    with zipfile.ZipFile(tmp_path / "meta.pt") as file:
        assert file.namelist()


@pytest.mark.timeout(300)
def test_prompts_that_do_not_divide_evenly_are_predicted(run: Run, tmp_path: Path):
    run(tmp_path, 2, strategy=FILE, command="predict", validation_size=5, sampling=ENDING)
    files = sorted((tmp_path / "2" / "predict").glob("predictions*"))
    assert [file.name for file in files] == ["predictions.jsonl", "predictions.rank1.jsonl"]
    assert [len(file.read_text().splitlines()) for file in files] == [3, 2]


class Part:
    """A weight that is spread, and may be put together but not copied."""

    def full_tensor(self) -> "Part":
        return self

    def cpu(self) -> None:
        raise AssertionError("a process that does not want the weights copies them")


def test_processes_that_do_not_want_the_weights_copy_none(monkeypatch: pytest.MonkeyPatch):
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(model, "state_dict", lambda: {"weight": Part()})
    monkeypatch.setattr(sharding, "is_sharded", lambda model: True)
    assert sharding.gather_full_model(model, torch.nn.Identity, here=False) is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_is_exported_from_its_parts(run: Run, tmp_path: Path, kind: str):
    options = {**KINDS[kind], "sampling": ENDING}
    run(tmp_path, 2, name="run", strategy=FILE, callbacks=[{"class_path": "PolicyExport"}], **options)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "version_0" / "policy").state_dict()
    if kind == "LoRA":
        changed = [name for name, value in exported.items() if "proj" in name and value.abs().max() > 0]
        assert changed
        return
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(exported[name.removeprefix("policy.")], value), name
