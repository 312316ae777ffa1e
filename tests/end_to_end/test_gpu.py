"""On a CUDA device: the numbers of a CPU, the same resume, every precision. Runs with `-m gpu` alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import PROMPTS, Recorder, fit_quietly, make_tokenizer, prompts_of, quiet_trainer, random_rows
from test_quickstart import CONFIG, metrics
from test_resume import Tape
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from xpo_lightning import (
    LoRASpec,
    ModelSpec,
    PromptDataModule,
    Sampling,
    SequenceClassifierReward,
    XPOLightningModule,
)
from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.core.rng import RolloutRNG
from xpo_lightning.rollout import opening, replay
from xpo_lightning.rollout.local import LocalRollout

pytestmark = pytest.mark.gpu
GPU: dict[str, Any] = {"accelerator": "gpu"}
COMPARED = ("loss/dpo", "loss/xpo", "objective/kl", "objective/entropy", "objective/scores_margin", "grad_norm")
MakeModule = Callable[..., XPOLightningModule]
SIZES = {"vocab_size": 304, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
WIDE: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None),
    "gpt_neox": GPTNeoXConfig(**SIZES, num_attention_heads=4, bos_token_id=None, eos_token_id=None),
}


@pytest.fixture(autouse=True)
def _a_device_is_there() -> None:
    assert torch.cuda.is_available(), "-m gpu needs a CUDA device"


def trained(module: XPOLightningModule, **options: Any) -> tuple[Recorder, dict[str, torch.Tensor]]:
    """Train two epochs; return what was logged, and the trained weights on the CPU."""
    recorder = Recorder()
    fit_quietly(module, PROMPTS * 2, batch_size=5, max_epochs=2, callbacks=[recorder], **options)
    return recorder, {name: value.detach().cpu() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("lora", [None, LoRASpec(r=2)], ids=["all weights", "LoRA"])
def test_steps_are_those_of_a_cpu(make_module: MakeModule, arch: str, lora: LoRASpec | None):
    """The same samples, metrics and weights; in float32, sums of other orders differ in the last digits."""

    def module() -> XPOLightningModule:
        torch.manual_seed(5)
        options: dict[str, Any] = {"optimizer": partial(torch.optim.SGD, lr=0.05), "max_grad_norm": None}
        made = make_module(arch, lora=lora, micro_batch_size=3, alpha=0.01, **options)
        made.configure_model()  # Later, adapters would be drawn on the device, with other numbers.
        return made

    of_cpu, cpu_weights = trained(module())
    of_gpu, gpu_weights = trained(module(), **GPU)
    for name in COMPARED:
        assert of_gpu.of(name) == pytest.approx(of_cpu.of(name), rel=2e-3, abs=2e-4), name
    for name, value in cpu_weights.items():
        torch.testing.assert_close(gpu_weights[name], value, rtol=2e-3, atol=2e-4, msg=name)


def test_scores_of_a_reward_model_are_those_of_a_cpu(tmp_path: Path):
    config = LlamaConfig(**SIZES, num_attention_heads=4, num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    scores = []
    for device in ("cpu", "cuda"):
        reward = SequenceClassifierReward(str(tmp_path), micro_batch_size=2)
        reward.load()
        reward.to(device)
        scores.append(reward.score(PROMPTS, ["the mat", "a dog", "red hat today", "", "ran"], {}).cpu())
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ({}, {"precision": "bf16-mixed"}),
        ({"gradient_checkpointing": True}, {"precision": "bf16-mixed"}),
        ({"dtype": "bfloat16"}, {}),
    ],
    ids=["bf16-mixed", "checkpointing", "bfloat16 under LoRA"],
)
def test_lower_precision_stays_close_to_float32(
    kind: str, spec: dict[str, Any], options: dict[str, Any], make_module: MakeModule, tmp_path: Path
):
    """Log-probabilities of given text, in nats a token, and a first step whose numbers are near those of float32."""
    AutoModelForCausalLM.from_config(WIDE[kind]).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    lora = LoRASpec(r=4) if "dtype" in spec else None

    def module(**more: Any) -> XPOLightningModule:
        return make_module(policy=ModelSpec(str(tmp_path), **more), lora=lora, learning_rate=1e-4)

    exact, _ = trained(module(), **GPU)
    near, _ = trained(module(**spec), **GPU, **options)
    assert near.of("logps/chosen")[0] == pytest.approx(exact.of("logps/chosen")[0], rel=0.1)
    assert near.of("loss/dpo")[0] == pytest.approx(exact.of("loss/dpo")[0], rel=0.02)
    assert abs(near.of("objective/kl")[0]) < 0.05, "the policy starts as the reference"


def test_adapters_train_on_quantized_weights(make_module: MakeModule, tmp_path: Path):
    """The reference is the quantized model without adapters, and is what it was when training has ended."""
    AutoModelForCausalLM.from_config(WIDE["llama"]).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    spec = ModelSpec(str(tmp_path), dtype="bfloat16", quantize="4bit")
    module = make_module(policy=spec, lora=LoRASpec(r=4), learning_rate=1e-2)
    module.configure_model()
    module.to("cuda")
    ids = torch.tensor([[1, 2, 3]], device="cuda")
    with module.reference.lent() as reference, torch.no_grad():
        before = reference(input_ids=ids).logits
    recorder, weights = trained(module, **GPU)
    assert abs(recorder.of("objective/kl")[0]) < 0.05
    assert abs(recorder.of("objective/kl")[-1]) > 1e-2
    assert all("lora_" in name for name in weights)
    module.to("cuda")
    with module.reference.lent() as reference, torch.no_grad():
        torch.testing.assert_close(reference(input_ids=ids).logits, before)


@pytest.mark.parametrize("lora", [None, LoRASpec(r=2, dropout=0.1)], ids=["all weights", "LoRA with dropout"])
def test_a_resumed_run_ends_as_the_run_that_was_never_stopped(
    make_module: MakeModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: LoRASpec | None
):
    """Bit for bit, with torch's deterministic algorithms; dropout draws from the device's own random state."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS * 2))

    def run(tape: Tape, resume: Path | None = None) -> dict[str, torch.Tensor]:
        pl.seed_everything(3, verbose=False)
        module = make_module(lora=lora, learning_rate=1e-2, lr_schedule="constant")
        trainer = quiet_trainer(**GPU, max_steps=4, deterministic=True, callbacks=[tape])
        try:
            trainer.fit(module, datamodule=PromptDataModule(str(source), batch_size=2), ckpt_path=resume)
        finally:
            torch.use_deterministic_algorithms(False)
        return {name: value.detach().cpu() for name, value in module.state_dict().items()}

    rest = Tape()
    whole = run(Tape(tmp_path))
    resumed = run(rest, tmp_path / "2.ckpt")
    assert list(rest.logged) == [3, 4]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_the_first_step_finds_room_for_more_pairs(make_module: MakeModule):
    module = make_module()
    fit_quietly(module, PROMPTS * 4, batch_size=20, max_steps=2, **GPU)
    assert module.run_state.tokens_together == 2**15  # a tiny model on any card


def test_the_quickstart_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    steps = ["--trainer.max_steps", "20", "--trainer.val_check_interval", "20"]
    main(["fit", "--config", str(CONFIG), "--trainer.accelerator", "gpu", *steps])
    rows = metrics((tmp_path / "runs" / "quickstart" / "version_0", ""))
    before, after = (row["eval/win_rate"] for row in rows if "eval/win_rate" in row)
    assert abs(before - 0.5) < 0.15
    assert after > 0.6


def test_a_run_can_be_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    main(["check", "--config", str(CONFIG), "--trainer.accelerator", "gpu"])
    assert "The run can start." in capsys.readouterr().out


def test_stop_strings_and_ends_of_several_lengths(make_module: MakeModule):
    """Rows leave the device's buffers as they end; the lengths are those of a CPU."""
    lengths = []
    for options in ({}, GPU):
        sampling = Sampling(max_new_tokens=12, eos_token_ids=list(range(60)))
        recorder, _ = trained(make_module(sampling=sampling, learning_rate=1e-4), **options)
        lengths.append(recorder.of("completions/model_length"))
    assert lengths[0] == pytest.approx(lengths[1], abs=0.5)
    assert lengths[0][0] < 12


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.5, "top_p": 0.9, "top_k": 50, "min_p": 0.01}])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_replayed_steps_write_what_is_written_without(
    arch: str,
    precision: str,
    settings: dict[str, Any],
    load_model: Callable[..., torch.nn.Module],
    monkeypatch: pytest.MonkeyPatch,
):
    prompts = prompts_of(random_rows([4, 9, 2, 7, 1, 6] * 6, seed=1))
    prompts = replace(prompts, ids=prompts.ids.cuda(), mask=prompts.mask.cuda())
    written, captured = [], []
    plainly = replay.capture
    monkeypatch.setattr(replay, "capture", lambda step: captured.append(step) or plainly(step))
    for devices in (set(), {"cuda"}):
        monkeypatch.setattr(opening, "REPLAYING", devices)
        model = load_model(arch, dtype=precision).to("cuda")
        sampling = Sampling(max_new_tokens=24, **settings)
        written.append(LocalRollout(make_tokenizer(), sampling, list(range(0, 304, 20)))(model, prompts, RolloutRNG(3)))
    assert captured
    same = (written[0].ids[:, :4] == written[1].ids[:, :4]).all(1).float().mean()
    assert same > (0.99 if precision == "float32" else 0.8)  # rounding may decide between two tokens
    if precision == "float32":
        torch.testing.assert_close(written[0].token_logps[:, 0], written[1].token_logps[:, 0], atol=1e-3, rtol=0)


def test_a_capture_that_breaks_off_leaves_nothing_behind():
    counter = torch.zeros(1, device="cuda")
    with pytest.raises(RuntimeError):
        replay.capture(lambda: counter.add_(1).item())
    torch.rand(2, device="cuda")
    counter.zero_()
    again = replay.capture(lambda: counter.add_(torch.ones(1, device="cuda")))
    again()
    again()
    assert counter.item() == 3  # taken once before it was captured
