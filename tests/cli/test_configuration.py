"""The configuration page: each of its overlays is run on the quickstart and does what its section says."""

import contextlib
import json
import math
import os
import pty
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from configuration_checks import CHECKS, NEEDS, SLOW
from configuration_page import (
    HEADINGS,
    MODULES,
    PAGE,
    QUICKSTART,
    SECTIONS,
    blocks,
    check_settings,
    overlay,
    passes,
    run,
)
from conftest import GROUPED, make_tokenizer
from test_cli import refused
from test_combinations import COMBINATIONS
from transformers import AutoModelForCausalLM, LlamaConfig

import xpo_lightning
from xpo_lightning import (
    BufferOptions,
    Candidates,
    Judge,
    LabelRule,
    PreferenceLoss,
    ReferenceRefresh,
    RemoteReward,
    Reward,
    Sampler,
    Schedule,
    XPOLightningModule,
)
from xpo_lightning.cli import mistakes
from xpo_lightning.cli.known_options import shipped

KEY = "not-a-real-key"


# ---- stand-ins for what is outside ----


class Answering(BaseHTTPRequestHandler):
    """Answers each request as the server says, and lets it keep what came."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), asked))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(self.server.answer).encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def answering(answer: Any) -> Iterator[tuple[str, list[Any]]]:
    """Serve one answer; give the URL and what was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.answer, server.seen = answer, []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.seen
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def reward_server(tmp_path: Path) -> Iterator[str]:
    """Start the page's reward server as its file would be, on a free port; give its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "reward_server.py").write_text(MODULES["reward_server.py"].replace("8000", str(port)))
    server = subprocess.Popen([sys.executable, "reward_server.py"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1000):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def human(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put somebody at a terminal who answers each question by `1`."""
    master, slave = pty.openpty()
    done = threading.Event()

    def answer() -> None:
        while not done.wait(0.02):
            os.write(master, b"1\n")

    thread = threading.Thread(target=answer, daemon=True)
    with os.fdopen(slave, "r") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
    os.close(master)


def tiny_judge(folder: Path) -> str:
    """Make a tiny language model with room for a question."""
    AutoModelForCausalLM.from_config(LlamaConfig(**{**GROUPED, "max_position_embeddings": 2048})).save_pretrained(
        folder
    )
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def outside(title: str, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Stand in for what a block needs from outside; give the one key that is overridden for it."""
    if title == "Verified answers":
        rows = [{"prompt": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(8)]
        (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield {"data__source": tmp_path / "sums.jsonl"}
    elif title == "Reward over HTTP":
        with reward_server(tmp_path) as url:
            yield {"model__reward__init_args__url": url}
    elif title == "HTTP judge":
        top = [{"token": "A", "logprob": math.log(0.9)}, {"token": "B", "logprob": math.log(0.1)}]
        choice = {"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": top}]}}
        with answering({"choices": [choice]}) as (url, seen):
            yield {"model__reward__init_args__url": f"{url}/v1"}
        path, headers, asked = seen[0]
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == f"Bearer {KEY}"
        assert asked["model"] == "Qwen/Qwen2.5-7B-Instruct"
        assert asked["messages"][0] == {"role": "system", "content": "You are a careful reader."}
    elif title == "Local judge":
        yield {"model__reward__init_args__path": tiny_judge(tmp_path / "judge")}
    else:
        yield {}


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a folder with the page's Python files, where they can be imported."""
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in MODULES:
        sys.modules.pop(name.removesuffix(".py"), None)


# ---- tests ----


@pytest.mark.parametrize("title", SECTIONS)
def test_block_names_options_that_there_are(title: str):
    known = shipped("fit")
    assert known is not None
    Path("mine.yaml").write_text(overlay(title))
    mistakes.check(["fit", "--config", QUICKSTART, "--config", "mine.yaml"], known)


@pytest.mark.parametrize(
    "title",
    [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in SECTIONS if one != "Human judge"],
)
def test_block_runs_and_is_honoured(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    with outside(title, tmp_path) as stand_in:
        overrides = {**NEEDS.get(title, {}), **stand_in}
        done = run(tmp_path, overlay(title), **overrides)
    assert CHECKS[title](done)
    check_settings(done, overlay(title), overrides)


def test_human_judge_is_asked_with_the_callbacks_that_the_block_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    few = {"trainer__max_steps": 1, "data__max_validation_prompts": 2}
    with human(monkeypatch):
        done = run(tmp_path, overlay("Human judge"), small="{}", **few)
    assert CHECKS["Human judge"](done)
    check_settings(done, overlay("Human judge"), few)
    assert (done.folder / "completions.jsonl").is_file()


def test_checks_tell_a_block_from_the_quickstart_alone(tmp_path: Path):
    done = run(tmp_path, "{}")
    defaults = {"Reference", "Sigmoid"}
    assert {title for title, check in CHECKS.items() if passes(check, done)} == defaults


def test_human_judge_without_a_terminal_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.yaml").write_text(overlay("Human judge"))
    line = refused(capsys, "fit", "--config", QUICKSTART, "--config", "mine.yaml")
    assert "model.reward: HumanJudge asks at a terminal, but standard input is none" in line


def test_every_section_has_one_block_and_one_check():
    assert set(CHECKS) == set(SECTIONS)
    assert set(NEEDS) | SLOW <= set(CHECKS)
    assert [len(blocks(text, "yaml")) for text in SECTIONS.values()] == [1] * len(SECTIONS)
    assert len(blocks(PAGE, "yaml")) == len(SECTIONS), "a block outside of a section is run by nobody"


def test_every_class_that_a_config_can_name_has_a_section():
    kinds = (Reward, Judge, Sampler, PreferenceLoss, Schedule)
    exported = {name: getattr(xpo_lightning, name) for name in xpo_lightning.__all__}
    classes = {name for name, one in exported.items() if isinstance(one, type) and issubclass(one, kinds)}
    assert len(classes) > len(kinds)
    bases = {kind.__name__ for kind in kinds}
    own = PAGE.split("\n## Classes of your own\n")[1].split("\n## ")[0]
    assert all(f"`{name}`" in own for name in bases)
    in_sections = " ".join(SECTIONS.values()) + PAGE.split("\n## Bonus\n")[1].split("\n### ")[0]
    for name in classes - bases:
        assert f"`{name}`" in in_sections, f"{name} has no section"


def test_every_option_of_the_algorithm_is_on_the_page():
    """What is left are options of the model, the sampling, the optimizer and of how a step is computed."""
    parameters = set(XPOLightningModule.__init__.__annotations__) - {"return"}
    elsewhere = {"policy", "lora", "sampling", "learning_rate", "optimizer", "lr_schedule", "lr_scheduler"}
    elsewhere |= {"warmup_ratio", "warmup_steps", "max_grad_norm", "micro_batch_size", "micro_batch_tokens"}
    elsewhere |= {"rollout_batch_size", "rollout_graphs", "max_skipped_steps", "reference_cache", "rollout"}
    in_blocks = {key for text in blocks(PAGE, "yaml") for key in yaml.safe_load(text).get("model", {})}
    assert parameters - elsewhere == in_blocks
    for options in (LabelRule, Candidates, BufferOptions, ReferenceRefresh):
        named = [name for name in options.__dataclass_fields__ if not re.search(rf"\b{name}: ", PAGE)]
        assert named == []


def test_reward_server_of_the_page_gives_scores(tmp_path: Path):
    completions = ["a cat", "", "a dog ran away"]
    with reward_server(tmp_path) as url:
        reward = RemoteReward(url, batch_size=2)
        reward.load()
        assert reward(["p"] * 3, completions, {"answer": [1, None, "x"]}).tolist() == [-5.0, 0.0, -14.0]
    assert '("127.0.0.1", 8000)' in MODULES["reward_server.py"]
    assert "url: http://127.0.0.1:8000/" in overlay("Reward over HTTP")


def test_request_and_answer_on_the_page_are_those_of_the_protocol():
    request, answer = (json.loads(block) for block in blocks(SECTIONS["Reward over HTTP"], "json"))
    with answering(answer) as (url, seen):
        reward = RemoteReward(url)
        scores = reward(request["prompts"], request["completions"], request["columns"])
    ((_, _, asked),) = seen
    assert asked == request
    assert scores.tolist() == [1.0, -0.5], "the answer is in the other order"


def test_table_of_contents_has_every_heading_in_order():
    contents = PAGE.split("\n## ")[0].split("Four things")[0]
    linked = re.findall(r"\]\(#([\w-]+)\)", contents.split("\n- ", 1)[1])
    assert linked == [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in HEADINGS]
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) == set(linked)


def test_table_has_every_refused_combination():
    table = PAGE.split("\n## What does not go together\n")[1]
    rows = [line.split(" | ")[:2] for line in table.splitlines() if line.startswith("| `")]
    keys = [tuple(re.search(r"`(model\.\w+)`", cell)[1] for cell in row) for row in rows]
    assert sorted(keys) == sorted(tuple(re.match(r"model\.\w+", key)[0] for key in pair) for pair in COMBINATIONS)
