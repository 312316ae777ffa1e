"""`xpo check` as a user meets it: the numbers of a run that can start, and no file left by it."""

import gc
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from check_bench import LONGEST, Bench, numbers, report
from conftest import make_tokenizer
from test_cli import refused
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    MambaConfig,
)

from xpo_lightning.cli.check.survey import Prompts, pick_evenly
from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.models.forward.cpu import give_memory_back

CONFIGS = Path(__file__).parents[2] / "configs"
PACKAGE = CONFIGS.parent / "xpo_lightning"


# ---- runs that can start ----


def test_quickstart_is_reported_with_its_true_numbers_and_leaves_nothing(
    bench: Bench, capsys: pytest.CaptureFixture[str]
):
    begun = time.monotonic()
    before = bench.files()
    said = report(capsys, "--config", str(CONFIGS / "quickstart.yaml"))
    assert time.monotonic() - begun < LONGEST
    assert bench.files() == before

    from safetensors.torch import load_file

    embedded = PACKAGE / "embedded"
    policy, reward = (load_file(embedded / name / "model.safetensors") for name in ("policy", "reward"))
    weights = sum(tensor.numel() for tensor in policy.values())
    assert f"{weights:,} weights in float32, all trained" in said["policy"]
    assert f"{sum(tensor.numel() for tensor in reward.values()):,} weights" in said["reward"]

    tokenizer = AutoTokenizer.from_pretrained(embedded / "policy")
    lines = (embedded / "prompts.jsonl").read_text().splitlines()
    lengths = sorted(len(tokenizer(json.loads(line)["prompt"])["input_ids"]) for line in lines)
    eos = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id  # which is taken off a prompt
    lengths = [length - eos for length in lengths]
    mean = sum(lengths) / len(lengths)
    within = lengths[math.ceil(0.95 * len(lengths)) - 1]
    assert said["training"] == (
        f"{len(lengths):,} prompts; {mean:.1f} tokens on average, 95% have at most {within}, the longest {lengths[-1]}"
    )
    assert said["validation"].startswith("256 prompts")
    assert said["run"] == f"of 60 optimizer steps; {math.ceil(len(lengths) / 64)} batches an epoch"
    assert said["batch"] == (
        f"64 prompts, 128 completions; {64 * mean:,.0f} prompt tokens on average, at most {128 * 64:,} new tokens; "
        f"1 optimizer step(s)"
    )
    assert said["checkpoint"].startswith(f"about {3 * 4 * weights / 2**20:.1f} MiB, 2 kept"), "weights, Adam's state"
    assert said["warnings"] == ""


def test_numbers_of_a_small_run(bench: Bench, capsys: pytest.CaptureFixture[str]):
    """8 prompts are left to train on: 3 batches an epoch of 3, 3 and 2, each with 2 x 2 updates, in 2 epochs."""
    bench.model(updates_per_rollout=2, epochs_per_rollout=2, bonus_sampler="ReferenceSampler")
    said = report(capsys, "--config", bench.write())
    assert numbers(said["training"])[0] == 8
    assert numbers(said["validation"])[0] == 2
    assert said["run"] == "of 24 optimizer steps; 3 batches an epoch"
    assert said["batch"].startswith("3 prompts, 9 completions;"), "the third of each is for the bonus"
    assert said["batch"].endswith("at most 45 new tokens; 4 optimizer step(s)")
    assert said["tried"].startswith("4 prompts: 8 completions of ")
    assert {"data", "models", "completions", "reward", "gradient"} <= set(re.findall(r"[a-z]+", said["seconds"]))


def test_measured_memory_holds_the_models(bench: Bench, capsys: pytest.CaptureFixture[str]):
    gc.collect()  # What earlier tests have left would be freed meanwhile, or taken again.
    give_memory_back()
    said = report(capsys, "--config", bench.write())
    _, tried = numbers(said["memory"])
    assert tried > 0
    assert numbers(said["estimate"])[0] > 0


def test_memory_of_models_is_that_of_their_weights(bench: Bench, capsys: pytest.CaptureFixture[str]):
    """Policy, reference and a small reward model in float32, and a reward model of two million weights in bfloat16."""
    sizes = {"vocab_size": 304, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1}
    model = AutoModelForSequenceClassification.from_config(LlamaConfig(**sizes, num_attention_heads=2, num_labels=1))
    model.save_pretrained(bench.folder / "large")
    make_tokenizer().save_pretrained(bench.folder / "large")
    bench.classifier("small")
    small = bench.config["model"]["reward"]
    large = {**small, "init_args": {"path": str(bench.folder / "large"), "dtype": "bfloat16"}}
    parts = {"rewards": [small, large], "weights": [1.0, 1.0]}
    bench.model(reward={"class_path": "WeightedSum", "init_args": parts})
    said = report(capsys, "--config", bench.write())
    count = sum(weight.numel() for weight in model.parameters())
    others = 2 * numbers(said["policy"].partition(": ")[2])[0] + 5_000
    assert numbers(said["estimate"].partition("models ")[2])[0] == pytest.approx(
        (2 * count + 4 * others) / 2**20, abs=0.1
    )


@pytest.mark.slow
def test_run_of_an_unknown_architecture_says_what_a_checkpoint_takes(bench: Bench, capsys: pytest.CaptureFixture[str]):
    sizes = {"vocab_size": 304, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = AutoModelForCausalLM.from_config(MambaConfig(**sizes, pad_token_id=0, eos_token_id=2))
    model.save_pretrained(bench.folder / "mamba")
    make_tokenizer().save_pretrained(bench.folder / "mamba")
    bench.model(policy={"path": str(bench.folder / "mamba")})
    said = report(capsys, "--config", bench.write())
    assert said["estimate"] == "none for this architecture"
    weights = sum(weight.numel() for weight in model.parameters())
    assert said["checkpoint"].startswith(f"about {3 * 4 * weights / 2**20:.1f} MiB")


def test_trained_adapters_are_told_from_the_rest(bench: Bench, capsys: pytest.CaptureFixture[str]):
    """Two layers of 32 x 32, 32 x 16 twice, 32 x 32, and three of 32 x 48, at rank 2: 2 x 2 x (128 + 96 + 240)."""
    bench.model(lora={"r": 2})
    said = report(capsys, "--config", bench.write())
    assert f"{2 * 2 * (128 + 96 + 240):,} trained" in said["policy"]
    assert said["reference"] == "the policy with its adapters off"


def test_earlier_policies_are_in_the_checkpoint(bench: Bench, capsys: pytest.CaptureFixture[str]):
    """Weights, Adam's two numbers, and two earlier states of the policy: five times the weights."""
    bench.model(sampler={"class_path": "PreviousPolicySampler"})
    said = report(capsys, "--config", bench.write())
    weights = numbers(said["policy"].partition(":")[2])[0]
    assert numbers(said["checkpoint"])[0] == pytest.approx(5 * 4 * weights / 2**20, abs=0.05)


def test_config_that_a_run_saved_can_be_checked(bench: Bench, capsys: pytest.CaptureFixture[str]):
    file = bench.folder / "saved.yaml"
    file.write_text(yaml.safe_dump({**bench.config, "ckpt_path": None, "weights_only": None}))
    report(capsys, "--config", str(file))
    assert "ckpt_path" in refused(capsys, "check", "--config", bench.write(), "--ckpt_path", "last")


def test_stream_is_looked_at_from_its_beginning(bench: Bench, capsys: pytest.CaptureFixture[str]):
    bench.data(streaming=True, validation_size=0)
    bench.trainer(max_steps=7, max_epochs=-1)
    said = report(capsys, "--config", bench.write())
    assert said["training"].startswith("the first 10 prompts of a stream;")
    assert said["run"] == "of 7 optimizer steps; epochs of unknown length"
    assert said["validation"] == "no prompts"


def test_existing_reference_cache_is_looked_at_and_not_written(bench: Bench, capsys: pytest.CaptureFixture[str]):
    """A cache of another sampling is refused, as by a run, and one that fits stays as it is."""
    bench.model(reference_cache=str(bench.folder / "cache"))
    config, steps = bench.write(), torch.optim.Adam.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", steps)
        main(["fit", "--config", config, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"])
    before = bench.files()
    report(capsys, "--config", config)
    line = refused(capsys, "check", "--config", config, "--model.sampling.temperature", "0.5")
    assert "model.reference_cache" in line
    assert bench.files() == before


def test_several_processes_are_looked_at_by_one(bench: Bench, capsys: pytest.CaptureFixture[str]):
    bench.trainer(devices=2, strategy="ddp")
    said = report(capsys, "--config", bench.write())
    assert said["run"] == "of 4 optimizer steps; 2 batches an epoch on each of 2 devices"
    assert "trainer.devices: one of 2 processes was tried out" in said["warnings"]


def sharded(**options: bool) -> dict[str, object]:
    return {"class_path": "FSDP2Strategy", "init_args": options}


def part(estimate: str, name: str) -> float:
    """Return the MiB of a part of an estimate."""
    return numbers(estimate.partition(f"{name} ")[2])[0]


def test_a_sharded_run_is_estimated_for_each_process(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Two processes have a half each of weights, gradient and Adam's state, and all weights while they write."""
    monkeypatch.setattr("xpo_lightning.cli.check.check.memory_of", lambda _: 2**34)  # the estimate names it
    bench.model(micro_batch_size=1, policy={"path": "package:xpo_lightning/embedded/policy"})
    alone = report(capsys, "--config", bench.write())["estimate"]
    bench.trainer(devices=2, strategy=sharded())
    said = report(capsys, "--config", bench.write())
    assert said["run"] == "of 4 optimizer steps; 2 batches an epoch on each of 2 devices"
    assert said["tried"].startswith("4 prompts: 8 completions of ")
    models = part(alone, "models")
    assert part(said["estimate"], "part of the models") == pytest.approx(models / 2, abs=0.1)
    assert part(said["estimate"], "whole weights while it writes or scores") == models
    bench.trainer(devices=2, strategy="FSDP2Strategy")
    assert report(capsys, "--config", bench.write())["estimate"] == said["estimate"]
    bench.trainer(devices=2, strategy=sharded(reduce_each_micro_batch=True, offload_reference=True))
    less = report(capsys, "--config", bench.write())["estimate"]
    assert part(less, "part of the models") == pytest.approx(models / 4, abs=0.1)  # half of the policy alone
    assert part(less, "micro-batch") < part(said["estimate"], "micro-batch")


def test_a_sharded_run_is_refused_what_needs_whole_weights(bench: Bench, capsys: pytest.CaptureFixture[str]):
    bench.model(reference_refresh={"every": 2})
    bench.trainer(devices=2, strategy=sharded())
    line = refused(capsys, "check", "--config", bench.write())
    assert "model.reference_refresh needs the policy's weights whole" in line
    bench.model(reference_refresh=None)
    bench.trainer(strategy={"class_path": "ModelParallelStrategy"})
    assert "trainer.strategy: a check has one process" in refused(capsys, "check", "--config", bench.write())


def test_models_that_only_fit_several_devices_are_estimated_and_not_tried(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("xpo_lightning.cli.check.check.memory_of", lambda _: 10_000)
    bench.trainer(devices=2, strategy=sharded())
    said = report(capsys, "--config", bench.write())
    assert said["tried"] == "nothing: the models do not fit one device whole, and a check has no other"
    assert numbers(said["estimate"])[0] > 0
    assert "a step may take 0.0 GiB, and 0.0 GiB are there" in said["warnings"]


# ---- parts ----


def test_percentiles_are_of_the_nearest_rank():
    prompts = Prompts([], list(range(1, 21)), 0, is_stream=False)
    assert (prompts.percentile(0.95), prompts.percentile(0.5), prompts.percentile(1.0)) == (19, 10, 20)
    assert Prompts([], [7], 0, is_stream=False).percentile(0.95) == 7


def test_a_closer_look_takes_the_longest_and_others_from_everywhere():
    assert pick_evenly([1, 2, 9, 1, 1, 1], 3) == [2, 0, 3]
    assert sorted(pick_evenly([1, 2, 3], 10)) == [0, 1, 2]
    assert pick_evenly([1, 2, 3], 0) == []
