"""`xpo serve`, and what `xpo check` asks the servers of a run."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TEST_PATHS
from test_cli import refused
from vllm_stand_in import Handler, standing_in
from vllm_transfer_stand_in import client_modules

from xpo_lightning.cli.lightning_cli import main

Write = Callable[..., str]
LORA = {"r": 9, "alpha": 8}


@pytest.fixture
def write(tmp_path: Path, model_folder: Callable[..., str]) -> Write:
    """Give a function that writes the config of a small run with servers; `options` are those of the engine."""

    def config(lora: Any = None, precision: str = "32-true", tokens: int | None = None, **options: Any) -> str:
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat sat on the mat"}\n' * 8)
        folder = {} if options.get("weights") == "full" else {"adapter_folder": str(tmp_path / "adapters")}
        content = {
            "model": {
                "policy": {"path": model_folder("llama")},
                "reward": {"class_path": "PythonReward", "init_args": {"function": "conftest.longer_is_better"}},
                "lora": lora,
                "sampling": {"max_new_tokens": 5},
                "rollout": {"class_path": "VLLMRollout", "init_args": {**folder, **options}},
            },
            "data": {"source": str(tmp_path / "prompts.jsonl"), "max_prompt_tokens": tokens, "batch_size": 4},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 1,
                "precision": precision,
                "default_root_dir": str(tmp_path / "runs"),
            },
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / "run.yaml")

    return config


def served(config: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    main(["serve", "--config", config])
    return capsys.readouterr().out.splitlines()


def test_commands_have_what_the_run_needs(
    write: Write, model_folder: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_folder("llama")
    assert served(write(LORA, url="http://localhost:8000", tokens=40, model="base"), capsys) == [
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {model} --host 127.0.0.1 --port 8000 --dtype float32 "
        f"--max-model-len 45 --served-model-name base --enable-lora --max-lora-rank 16"
    ]
    (asleep,) = served(write(LORA, url="http://localhost:8000", colocate=True), capsys)
    assert asleep.startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_SERVER_DEV_MODE=1 vllm serve ")
    assert asleep.endswith(" --enable-lora --max-lora-rank 16 --enable-sleep-mode")
    full = {"weights": "full", "url": ["http://127.0.0.1:1", "http://gpu2:2"], "reference_url": "http://localhost:3/v1"}
    one, two, reference = served(write(precision="bf16-mixed", **full), capsys)
    assert one == f"VLLM_SERVER_DEV_MODE=1 vllm serve {model} --host 127.0.0.1 --port 1 --dtype bfloat16"
    assert two.startswith(f"VLLM_SERVER_DEV_MODE=1 vllm serve {model} --host 0.0.0.0 --port 2 --dtype bfloat16")
    assert two.endswith("# on the machine of http://gpu2:2")
    assert reference == f"vllm serve {model} --host 127.0.0.1 --port 3 --dtype bfloat16"


@pytest.mark.parametrize(("backend", "variables"), [("nccl", ""), ("ipc", "VLLM_ALLOW_INSECURE_SERIALIZATION=1 ")])
def test_commands_name_the_transfer_of_the_weights(
    write: Write,
    model_folder: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    variables: str,
) -> None:
    for name, module in client_modules({}).items():
        monkeypatch.setitem(sys.modules, name, module)
    config = write(weights="full", url="http://localhost:1", weights_backend=backend)
    (command,) = served(config, capsys)
    assert command.startswith(f"VLLM_SERVER_DEV_MODE=1 {variables}vllm serve {model_folder('llama')} ")
    assert command.endswith(f""" --weight-transfer-config '{{"backend": "{backend}"}}'""")


def test_configs_are_laid_one_over_the_other_as_for_a_run(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write(LORA, url="http://localhost:8000")
    over = tmp_path / "over.yaml"
    over.write_text(
        "model: {lora: {r: 30}, rollout: {class_path: VLLMRollout, init_args: {url: 'http://localhost:8001'}}}\n"
        "data: {max_prompt_tokens: 20}\ntrainer: {precision: bf16-mixed}\n"
    )
    for words in (
        ["--config", whole, "--config", str(over)],
        [f"--config={whole}", f"--config={over}"],
        ["--config", whole, str(over)],
    ):
        capsys.readouterr()
        main(["serve", *words])
        (line,) = capsys.readouterr().out.splitlines()
        assert "--port 8001 --dtype bfloat16 --max-model-len 25 --enable-lora --max-lora-rank 32" in line
    over.write_text("model: {alpha: 0}\n")
    assert "has no group 'data'" in refused(capsys, "serve", "--config", str(over))


def test_what_has_no_server_is_refused(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write({"r": 4}, url="http://far:8000")
    assert "no URL of model.rollout is on this machine" in refused(capsys, "serve", "--config", config, "--start")
    assert "model.lora.r=600 is above 512" in refused(
        capsys, "serve", "--config", write({"r": 600}, url="http://localhost:8000")
    )
    content = yaml.safe_load(Path(config).read_text())
    del content["model"]["rollout"]
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(content))
    assert "model.rollout is not VLLMRollout" in refused(capsys, "serve", "--config", str(tmp_path / "local.yaml"))


def test_servers_are_started_and_ended(write: Write, tmp_path: Path) -> None:
    """With a stand-in for the command `vllm`, which notes how it was called and waits to be told to end."""
    tool = tmp_path / "vllm"
    tool.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\n"
        f"port = sys.argv[sys.argv.index('--port') + 1]\n"
        f"def end(*_): open(r'{tmp_path}/ended' + port, 'w').close(); sys.exit()\n"
        f"signal.signal(signal.SIGTERM, end)\n"
        f"open(r'{tmp_path}/began' + port, 'w').write(os.environ.get('VLLM_SERVER_DEV_MODE', ''))\n"
        f"time.sleep(60)\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    config = write(weights="full", url=["http://localhost:1", "http://far:2"], reference_url="http://localhost:3")
    environment = {**os.environ, "PYTHONPATH": TEST_PATHS, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "xpo_lightning", "serve", "--config", config, "--start"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        end = time.monotonic() + 60
        while not (tmp_path / "began3").exists() and time.monotonic() < end and run.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)
        run.send_signal(signal.SIGTERM)
        _, errors = run.communicate(timeout=30)
    assert run.returncode == 0, errors
    assert sorted(path.name for path in tmp_path.glob("began*")) == ["began1", "began3"]
    assert [(tmp_path / f"began{port}").read_text() for port in (1, 3)] == ["1", ""]
    assert sorted(path.name for path in tmp_path.glob("ended*")) == ["ended1", "ended3"]


@pytest.mark.parametrize("weights", ["adapter", "full"])
def test_check_asks_the_servers_all_that_the_run_asks(
    write: Write,
    model_folder: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    weights: str,
) -> None:
    quick = {"retries": 0, "timeout": 20.0}
    way = {"weights": "full", "weights_folder": str(tmp_path / "weights")} if weights == "full" else {"together": False}
    lora = None if weights == "full" else LORA
    needed = {"adapter": ["/v1/load_lora_adapter"], "full": ["/collective_rpc", "/reset_prefix_cache", "/weight_info"]}
    with standing_in(model_folder("llama"), dev=True) as one, standing_in(model_folder("llama"), dev=True) as two:
        config = write(lora, url=[one.url, two.url], **quick, **way)
        main(["check", "--config", config])
        assert capsys.readouterr().out.splitlines()[-1] == "The run can start."
        for server in (one, two):
            paths = {path for path, _ in server.seen}
            assert paths >= {"/version", "/v1/models", "/v1/completions", *needed[weights]}
            assert not server.adapters
        assert not [path for path in tmp_path.rglob("*") if path.name.startswith("xpo-")]

        def refuse(request: Handler, number: int) -> bool:
            if request.path != needed[weights][0]:
                return False
            request.answer(404, {"detail": "Not Found"})
            return True

        two.misbehave = refuse
        said = refused(capsys, "check", "--config", config)
        assert two.url in said
        assert {"adapter": "--enable-lora", "full": "VLLM_SERVER_DEV_MODE=1"}[weights] in said
    assert "could not be reached" in refused(capsys, "check", "--config", config)
