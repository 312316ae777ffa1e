"""Training runs whose completions a vLLM server writes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import (
    BARE,
    CONFIGS,
    PROMPTS,
    TEST_PATHS,
    Recorder,
    fit_quietly,
    make_tokenizer,
    naive_token_logps,
    quiet_trainer,
    randomize_adapters,
)
from transformers import AutoModelForCausalLM
from vllm_rollouts import COMPLETIONS, LORA, QUICK, Engine, MakeModule, Serve, begun, both, broken, trained, worst_gap
from vllm_stand_in import Handler, StandIn

from xpo_lightning import Candidates, InputError, LoRASpec, PolicySampler, PythonReward, PythonSampler, Sampling
from xpo_lightning.cli.lightning_cli import main


def letters(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    """Score a completion by how much of it is letters."""
    return [sum(char.isascii() and char.isalpha() for char in text) / (len(text) + 1) for text in completions]


@pytest.mark.slow
def test_training_gains_as_much_as_with_local_rollouts(
    serve_vllm: Serve, engine: Engine, make_module: MakeModule
) -> None:
    options: dict[str, Any] = {"lora": LoRASpec(r=8, alpha=32), "learning_rate": 4e-2, "beta": 0.02}
    options |= {"reward": PythonReward(letters), "sampling": Sampling(max_new_tokens=4)}
    server = serve_vllm()
    for rollout in (None, engine(server, together=True)):
        recorder = Recorder()
        module = make_module(rollout=rollout, **options)
        fit_quietly(module, ["the cat"] * 64 * 14, batch_size=64, callbacks=[recorder], max_steps=14)
        wins, margins = recorder.of("win_rate"), recorder.of("objective/scores_margin")
        assert abs(margins[0]) < 0.15  # the policy is the reference
        assert sum(wins[-4:]) / 4 > 0.9
        assert sum(margins[-4:]) / 4 > 0.4
        assert torch.tensor(recorder.of("loss/total")).isfinite().all()
    drifts = recorder.of("rollout/logp_drift") + recorder.of("rollout/policy_logp_drift")
    assert 0 < max(drifts) < 1e-4
    assert len(server.asked("/v1/load_lora_adapter")) == 1 + 14  # The first was to see whether it keeps them apart.
    assert not server.adapters  # It has been told that the run is over.


@pytest.mark.parametrize("sampler", [PolicySampler(), PythonSampler(lambda prompts, columns: ["cat"] * len(prompts))])
def test_second_completion_may_be_by_somebody_else(
    serve_vllm: Serve, engine: Engine, make_module: MakeModule, sampler: Any
) -> None:
    server = serve_vllm()
    recorder = trained(make_module(rollout=engine(server), lora=LORA, sampler=sampler), steps=2)
    assert {payload["model"] for payload in server.asked(COMPLETIONS)}.isdisjoint({server.folder})
    assert max(recorder.of("rollout/policy_logp_drift")) < 1e-4
    assert "rollout/logp_drift" not in recorder.steps[-1]


def test_several_candidates_a_side_are_written_at_once(
    serve_vllm: Serve, engine: Engine, make_module: MakeModule
) -> None:
    server = serve_vllm()
    trained(make_module(rollout=engine(server), lora=LORA, candidates=Candidates(3, "best_of_each")), steps=1)
    seeds = [payload["seed"] for payload in server.asked(COMPLETIONS)]
    assert len(seeds) == len(set(seeds)) == 2 * 3 * 40


def test_reference_scores_are_computed_here(
    serve_vllm: Serve, engine: Engine, make_module: MakeModule, load_model: Any
) -> None:
    module = make_module(rollout=engine(serve_vllm()), lora=LORA)
    (experience,) = quiet_trainer().predict(module, torch.utils.data.DataLoader([PROMPTS], batch_size=None))
    model = load_model("llama")
    for side, logps in (
        (experience.completions.by_policy, experience.reference_logps.by_policy),
        (experience.completions.by_sampler, experience.reference_logps.by_sampler),
    ):
        for row, total in enumerate(logps.tolist()):
            prompt = experience.prompts.ids[row][experience.prompts.mask[row]].tolist()
            expected = naive_token_logps(model, prompt, side.ids[row][side.mask[row]].tolist())
            assert total == pytest.approx(sum(expected), abs=1e-4)


@pytest.fixture
def other_folder(tmp_path: Path) -> str:
    """Save a model of the same shape with other weights."""
    torch.manual_seed(99)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_server_with_another_base_model_ends_the_run(
    serve_vllm: Serve, engine: Engine, make_module: MakeModule, other_folder: str
) -> None:
    server = serve_vllm(other_folder)
    module = make_module(rollout=engine(server), lora=LORA)
    with pytest.raises(InputError) as caught:
        trained(module, steps=1)
    assert "of the reference's completions differ by" in str(caught.value)
    assert "model.rollout.init_args.max_logp_drift=0.5" in str(caught.value)
    assert other_folder in str(caught.value)
    assert module.global_step == 0
    unlimited = make_module(rollout=engine(server, max_logp_drift=None), lora=LORA)
    assert trained(unlimited, steps=1).of("rollout/logp_drift")[0] > 0.5


def test_server_that_lost_the_adapter_ends_the_run(serve_vllm: Serve, engine: Engine, make_module: MakeModule) -> None:
    server = serve_vllm()
    module = make_module(rollout=engine(server), lora=LORA)
    module.configure_model()
    randomize_adapters(module.policy)

    def base_instead(request: Handler, number: int) -> bool:
        for name in server.adapters:
            server.adapters[name] = server.base
        return False

    server.misbehave = base_instead
    with pytest.raises(InputError, match=r"of the policy's completions differ by"):
        trained(module, steps=1)


def test_server_that_lets_the_adapter_into_the_reference_is_refused_at_once(
    serve_vllm: Serve, engine: Engine, policy: Any, tmp_path: Path
) -> None:
    server = serve_vllm(leaks=True)
    with pytest.raises(InputError, match=r"together: .* as vLLM does on a CPU; set .*together to false"):
        begun(engine(server, together=True), policy)
    assert not server.adapters
    assert not list((tmp_path / "adapters").iterdir())
    by_reference = both(begun(engine(server), policy))[1]
    with policy.disable_adapter():
        assert worst_gap(policy, by_reference) < 1e-4


def test_adapter_that_leaks_later_is_found_out_by_the_drift(
    serve_vllm: Serve, engine: Engine, make_module: MakeModule
) -> None:
    server = serve_vllm()
    module = make_module(rollout=engine(server, together=True), lora=LORA)
    module.configure_model()
    randomize_adapters(module.policy, 1.0)

    def leak(request: Handler, number: int) -> bool:
        if len(server.asked("/v1/load_lora_adapter")) == 2:
            server.base = next(iter(server.adapters.values()), server.base)
        return False

    server.misbehave = leak
    with pytest.raises(InputError, match=r"of the reference's completions differ"):
        trained(module, steps=1)


# --- runs of the command line


@pytest.fixture
def write_config(tmp_path: Path, model_folder: Callable[..., str]) -> Callable[..., str]:
    """Give a function that writes the config of a small run with a server."""

    def write(server: StandIn, together: bool = False, **trainer: Any) -> str:
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat sat on the mat"}\n' * 16)
        rollout = {"url": server.url, "adapter_folder": str(tmp_path / "adapters"), **QUICK, "together": together}
        config = {
            "seed_everything": 1,
            "model": {
                "policy": {"path": model_folder("llama")},
                "reward": {"class_path": "PythonReward", "init_args": {"function": "conftest.longer_is_better"}},
                "lora": {"r": 4, "alpha": 8},
                "sampling": {"max_new_tokens": 5},
                "rollout": {"class_path": "VLLMRollout", "init_args": rollout},
                "learning_rate": 1e-3,
            },
            "data": {"source": str(tmp_path / "prompts.jsonl"), "validation_size": 4, "batch_size": 4},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 1,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": str(tmp_path / "runs"),
                "logger": {
                    "class_path": "ResumableCSVLogger",
                    "init_args": {"save_dir": str(tmp_path / "runs"), "name": ""},
                },
                "callbacks": [{"class_path": "RunCheckpoint", "init_args": {"every_n_train_steps": 1}}],
                **trainer,
            },
            "defaults": BARE,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        return str(tmp_path / "run.yaml")

    return write


def logged(tmp_path: Path, name: str) -> list[float]:
    import csv

    with (tmp_path / "runs" / "version_0" / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_command_line_trains_and_validates_with_a_server(
    serve_vllm: Serve, write_config: Callable[..., str], tmp_path: Path
) -> None:
    server = serve_vllm()
    main(["fit", "--config", write_config(server)])
    losses = logged(tmp_path, "loss/total")
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)
    assert max(logged(tmp_path, "rollout/logp_drift")) < 1e-4
    assert len(logged(tmp_path, "eval/win_rate")) == 1
    assert len(server.asked(COMPLETIONS)) == 2 * (3 * 4 + 4)


def test_server_that_dies_in_a_run_leaves_a_checkpoint_to_go_on_from(
    serve_vllm: Serve, write_config: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve_vllm()
    config = write_config(server)
    server.misbehave = broken(COMPLETIONS, Handler.hang_up, after=2 * 8 + 3)  # in the third step
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", config])
    assert ended.value.code not in (0, None)
    said = f"{ended.value.code}\n{capsys.readouterr().err}"
    assert "model.rollout.init_args.url" in said
    assert "Traceback" not in said
    assert len(logged(tmp_path, "loss/total")) == 2
    server.misbehave = None
    main(["fit", "--config", config, "--ckpt_path", "last"])
    assert logged(tmp_path, "step") == [1.0, 2.0, 3.0, 3.0]  # the last one is of validation


@pytest.mark.slow
@pytest.mark.parametrize("refusing", [False, True])
def test_two_processes_ask_one_server(
    serve_vllm: Serve, write_config: Callable[..., str], tmp_path: Path, refusing: bool
) -> None:
    server = serve_vllm()
    if refusing:
        server.misbehave = broken("/v1/load_lora_adapter", lambda request: request.answer(400, "no"), after=2)
    config = write_config(server, together=True, devices=2, strategy="ddp", max_steps=2)
    environment = {**os.environ, "PYTHONPATH": TEST_PATHS, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "xpo_lightning", "fit", "--config", config]
    run = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    if refusing:
        assert run.returncode != 0
        assert "--enable-lora" in run.stderr + run.stdout
        assert "Traceback" not in run.stderr
        return
    assert run.returncode == 0, run.stderr
    assert len(server.asked("/v1/load_lora_adapter")) == 1 + 3  # a trial, two steps, and validation of their outcome
    asked = [payload for payload in server.asked(COMPLETIONS) if "watermarking" in payload]
    assert len({payload["seed"] for payload in asked[: 2 * 2 * 8]}) == 2 * 2 * 8


@pytest.mark.slow
def test_two_processes_cannot_take_turns(serve_vllm: Serve, write_config: Callable[..., str]) -> None:
    config = write_config(serve_vllm(), devices=2, strategy="ddp")
    environment = {**os.environ, "PYTHONPATH": TEST_PATHS, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "xpo_lightning", "fit", "--config", config]
    run = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode != 0
    assert "model.rollout.init_args.together=false has one model write at a time" in run.stderr + run.stdout
