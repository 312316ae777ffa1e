"""The configuration page: each of its overlays is run on the quickstart and does what its section says."""

import contextlib
import csv
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import BARE, GROUPED, make_tokenizer
from test_cli import refused
from test_combinations import COMBINATIONS
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import xpo_lightning
from xpo_lightning import (
    BufferOptions,
    Candidates,
    Experience,
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
from xpo_lightning.callbacks import CompletionsTable, PolicyExport, RunCheckpoint
from xpo_lightning.cli import mistakes
from xpo_lightning.cli.known_options import shipped
from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.rewards.llm_judge import is_exchanged

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "configuration.md").read_text()
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
BETA, PENALTY = 0.3, 1.0  # the quickstart's
KEY = "not-a-real-key"

# What makes a run small; before the block, which may want some of it back.
SMALL = """
trainer:
  num_sanity_val_steps: 0
  limit_val_batches: 0
  enable_checkpointing: false
  enable_model_summary: false
  callbacks: []
""" + yaml.safe_dump({"defaults": BARE})
SIZES = {"trainer.max_steps": 2, "data.batch_size": 4, "model.sampling.max_new_tokens": 6}


# ---- the page ----


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


PROSE = re.sub(r"^```.*?^```\n", "", PAGE, flags=re.DOTALL | re.MULTILINE)
HEADINGS = re.findall(r"^##+ (.+)$", PROSE, re.MULTILINE)
SECTIONS = {part.split("\n")[0]: re.split(r"\n## ", part)[0] for part in PAGE.split("\n### ")[1:]}
MODULES = {block.split("\n")[0].removeprefix("# "): block for block in blocks(PAGE, "python")}


def overlay(title: str) -> str:
    (block,) = blocks(SECTIONS[title], "yaml")
    return block


# ---- a run of one block ----


@dataclass
class Run(pl.Callback):
    """A run: what was logged at each batch, the pairs of each, and what it was made of."""

    steps: list[dict[str, float]] = field(default_factory=list)
    pairs: list[Experience] = field(default_factory=list)
    last: ClassVar["Run"]

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        Run.last, self.trainer, self.module = self, trainer, pl_module

    def on_pairs_collected(self, trainer: pl.Trainer, pl_module: Any, experience: Experience) -> None:
        self.pairs.append(experience)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    @property
    def folder(self) -> Path:
        return Path(self.trainer.log_dir)

    def of(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


def run(tmp_path: Path, block: str, small: str = SMALL, **overrides: Any) -> Run:
    """Run a block; `overrides` are keys with `__` for a dot."""
    for name, text in {"small": small, "mine": block}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    settings = {**SIZES, **{key.replace("__", "."): value for key, value in overrides.items()}}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    files = [word for name in (QUICKSTART, "small.yaml", "mine.yaml") for word in ("--config", name)]
    main(["fit", *files, *words, "--trainer.callbacks+", f"{{class_path: {__name__}.Run}}"])
    assert len(Run.last.steps) >= 1
    return Run.last


def check_settings(done: Run, block: str, overrides: dict[str, Any]) -> None:
    """See that the run took every value of the block, but those that had to be overridden."""
    used = dict(leaves(yaml.safe_load((done.folder / "config.yaml").read_text())))
    overridden = {*SIZES, *(key.replace("__", ".").replace(".init_args", "") for key in overrides)}
    values = {key: value for key, value in leaves(yaml.safe_load(block)) if key not in overridden}
    assert values == {key: used[key] for key in values}


def passes(check: Callable[[Run], Any], done: Run) -> bool:
    """Tell whether a check is met; one for another class may look for what is not there."""
    try:
        return bool(check(done))
    except (AttributeError, KeyError, IndexError):
        return False


def leaves(settings: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Give each value of a config by its key; a class by its name, whatever module it is in, and however it is put."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            key = path if name == "class_path" else f"{path}.{name}".removeprefix(".").replace(".init_args", "")
            yield from leaves(value, key)
    elif isinstance(settings, list) and any(isinstance(one, dict | str) for one in settings):
        for number, value in enumerate(settings):
            yield from leaves(value, f"{path}.{number}")
    else:
        is_name = isinstance(settings, str) and re.fullmatch(r"[\w.]+", settings)
        yield path, settings.rpartition(".")[2] if is_name else settings


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


# ---- what each section promises ----


def penalized(run: Run, side: str, score: Callable[[str], float]) -> list[float]:
    written = getattr(run.pairs[0].completions, side)
    cut = (~written.ended).tolist()
    return [score(text) - PENALTY * one for text, one in zip(written.texts, cut, strict=True)]


def unpenalized(run: Run) -> list[float]:
    """Give the reward's own scores of both sides."""
    pairs = run.pairs[0]
    sides = [(getattr(pairs.scores, side), getattr(pairs.completions, side)) for side in ("by_policy", "by_sampler")]
    return torch.cat([scores + PENALTY * ~written.ended for scores, written in sides]).tolist()


def margins(run: Run) -> Tensor:
    scores = run.pairs[0].scores
    return scores.by_policy - scores.by_sampler


def scored(score: Callable[[str], float]) -> Callable[[Run], bool]:
    return lambda run: all(
        getattr(run.pairs[0].scores, side).tolist() == pytest.approx(penalized(run, side, score))
        for side in ("by_policy", "by_sampler")
    )


def shorter_wins(run: Run) -> bool:
    """A pair without an answer is left out, or is a tie, as the judge says."""
    pairs = run.pairs[0]
    texts = zip(pairs.completions.by_policy.texts, pairs.completions.by_sampler.texts, strict=True)
    signs = [(len(other) > len(own)) - (len(other) < len(own)) for own, other in texts]
    wanted = [(1 + sign) / 2 for sign in signs]
    return pairs.labels.tolist() == wanted and {*wanted} > {0.5}


def first_shown_wins(run: Run) -> bool:
    pairs = run.pairs[0]
    texts = (pairs.completions.by_policy.texts, pairs.completions.by_sampler.texts)
    triples = zip(pairs.prompts.raw, *texts, strict=True)
    wanted = [0.5 if own == other else float(not is_exchanged(raw, own, other)) for raw, own, other in triples]
    return pairs.labels.tolist() == wanted


def first_loss(expected: float) -> Callable[[Run], bool]:
    """Policy and reference are equal at first, so each margin is 0; identical completions have no loss."""
    return lambda run: run.of("loss/dpo")[0] == pytest.approx(expected * (1 - run.of("pairs/identical")[0]), rel=1e-4)


def bonus_of(*sums: str) -> Callable[[Run], bool]:
    return lambda run: all(
        step["loss/xpo"] == pytest.approx(step["alpha"] * sum(step[name] for name in sums), rel=1e-4) and step["alpha"]
        for step in run.steps
    )


def alphas(*expected: float) -> Callable[[Run], bool]:
    return lambda run: run.of("alpha") == pytest.approx(expected)


def is_a(part: str, name: str) -> Callable[[Run], bool]:
    """See that a part of the module is of this class; `part` is an attribute, or several with dots."""

    def check(run: Run) -> bool:
        value: Any = run.module
        for attribute in part.split("."):
            value = getattr(value, attribute)
        return type(value).__name__ == name

    return check


def every(*checks: Callable[[Run], Any]) -> Callable[[Run], bool]:
    return lambda run: all(bool(check(run)) for check in checks)


def follows(mix: float) -> Callable[[Run], bool]:
    """The second pairs are measured against the refreshed reference: a copy of the policy makes their KL 0."""
    options = ReferenceRefresh(1, mix)
    return lambda run: (
        run.module.reference_refresh == options and (abs(run.of("objective/kl")[1]) < 1e-4) == (mix == 1.0)
    )


def kept(options: BufferOptions, pairs: int) -> Callable[[Run], bool]:
    """See how many pairs the next batch will find."""
    return lambda run: run.module.buffer_options == options and len(run.module.memory.buffer.store.sizes) == pairs


def best_is_kept(run: Run) -> bool:
    callbacks = {type(one): one for one in run.trainer.callbacks}
    export, checkpoint = callbacks[PolicyExport], callbacks[RunCheckpoint]
    assert isinstance(export, PolicyExport)
    assert isinstance(checkpoint, RunCheckpoint)
    with (run.folder / "metrics.csv").open() as lines:
        values = [row["eval/objective/rlhf_reward"] for row in csv.DictReader(lines)]
    best = max(float(value) for value in values if value)
    assert checkpoint.best_model_path
    assert float(checkpoint.best_model_score) == pytest.approx(best)
    return export.best == pytest.approx(best) and (run.folder / "policy" / "config.json").is_file()


SIGMOID = math.log(2)
CHECKS: dict[str, Callable[[Run], Any]] = {
    "Reward model": lambda run: run.module.reward.max_tokens == 128 and run.module.reward.model is not None,
    "Python reward": scored(lambda text: -abs(len(text.split()) - 20)),
    "Verified answers": every(
        scored(lambda text: 0.0),  # stories have no answer
        lambda run: run.module.reward.verifier == "math" and run.module.reward.format_score == 0.1,
    ),
    "Reward over HTTP": scored(lambda text: -float(len(text))),
    "Weighted rewards": every(
        lambda run: run.module.reward.weights == (1.0, 0.5),
        lambda run: sum(unpenalized(run)) == pytest.approx(0, abs=1e-4),
    ),
    "Local judge": lambda run: run.module.reward.both_orders and "pairs/unanswered" in run.steps[0],
    "HTTP judge": lambda run: {round(one, 3) for one in run.pairs[0].scores.by_policy.tolist()} <= {0.1, 0.9, 0.5},
    "Python judge": every(shorter_wins, lambda run: bool(run.pairs[0].silent.any())),
    "Human judge": every(is_a("reward", "HumanJudge"), first_shown_wins),
    "Pairs without an answer": every(
        shorter_wins, lambda run: run.of("pairs/unanswered")[0] > 0 and not run.pairs[0].silent.any()
    ),
    "Higher score": lambda run: run.module.label_rule == LabelRule("argmax", "random"),
    "Drawn labels": lambda run: (
        run.module.label_rule == LabelRule("bradley_terry") and set(run.pairs[0].labels.tolist()) <= {0.0, 1.0}
    ),
    "Soft labels": lambda run: run.pairs[0].labels.tolist() == pytest.approx(torch.sigmoid(margins(run)).tolist()),
    "Temperature": lambda run: run.pairs[0].labels.tolist() == pytest.approx(torch.sigmoid(margins(run) / 2).tolist()),
    "Flipped labels": lambda run: (
        0.0 < ((2 * run.pairs[0].labels - 1) * margins(run) < 0).float().mean() < 0.3
        and run.module.label_rule == LabelRule(flip=0.1)
    ),
    "Least margin": lambda run: (
        torch.equal(run.pairs[0].silent, margins(run).abs() < 0.5) and run.pairs[0].silent.any()
    ),
    "Best of each side": lambda run: run.module.candidates == Candidates(4, "best_of_each"),
    "Largest margin": lambda run: run.module.candidates == Candidates(4, "largest_margin"),
    "Best and worst": every(
        lambda run: run.module.candidates == Candidates(4, "best_and_worst"), is_a("sampler", "PolicySampler")
    ),
    "Tournament": every(
        lambda run: run.module.candidates == Candidates(4, "best_of_each", "tournament"),
        lambda run: 1 < run.of("pairs/comparisons")[0] <= 7,
    ),
    "All pairs of a prompt": every(
        lambda run: run.module.candidates == Candidates(4, "best_and_worst", "all_pairs", 12),
        lambda run: 1 < run.of("pairs/comparisons")[0] <= 13,
    ),
    "DPO": lambda run: run.steps[0]["loss/xpo"] == 0 and "objective/kl" not in run.steps[0] and not run.pairs,
    "Beside sampled pairs": lambda run: "pairs/truncated" in run.steps[0] and len(run.pairs[0]) > 0,
    "Reference": is_a("sampler", "ReferenceSampler"),
    "Online DPO": every(is_a("sampler", "PolicySampler"), alphas(0.0, 0.0)),
    "The policy with a bonus": every(is_a("sampler", "PolicySampler"), bonus_of("logps/chosen", "logps/rejected")),
    "Previous policy": every(is_a("sampler", "PreviousPolicySampler"), lambda run: run.module.sampler.every == 10),
    "Mixture": every(is_a("sampler", "MixtureSampler"), lambda run: run.module.sampler.reference_share == 0.25),
    "Python sampler": lambda run: all(
        text and "They lived happily ever after.".startswith(text) for text in run.pairs[0].completions.by_sampler.texts
    ),
    "Rejected completion": bonus_of("logps/rejected"),
    "Another bonus": every(is_a("objective.bonus", "GEBBonus"), bonus_of("logps/rejected")),
    "Third completion": every(
        is_a("bonus_sampler", "ReferenceSampler"),
        lambda run: run.of("loss/xpo")[0] == pytest.approx(1e-5 * float(run.pairs[0].sample.reference_logps.mean())),
    ),
    "Clipped bonus": lambda run: run.module.objective.bonus_clip == 500.0,
    "Alpha in beta": every(alphas(0.05 * BETA, 0.05 * BETA), is_a("objective.alpha", "Constant")),
    "Alpha by epoch": every(alphas(1e-5, 5e-6), is_a("objective.alpha", "PerEpoch")),
    "Alpha on a line": alphas(1e-4, 1e-4 * 39 / 40),
    "Alpha on a cosine": alphas(1e-4, 1e-4 * (1 + math.cos(math.pi / 40)) / 2),
    "All pairs": every(kept(BufferOptions("all"), 8), lambda run: run.trainer.global_step == 16),
    "Last batches": kept(BufferOptions(4), 12),
    "Pairs on disk": every(
        kept(BufferOptions("all", 100), 128), lambda run: bool([*run.folder.glob("pairs-0-*.sqlite")])
    ),
    "Alpha by iteration": every(alphas(1e-5, 5e-6), is_a("objective.alpha", "PerIteration")),
    "New reference": follows(1.0),
    "Reference that follows": follows(0.1),
    "Best iterate": best_is_kept,
    "Sigmoid": every(first_loss(SIGMOID), is_a("objective.preference_loss", "SigmoidLoss")),
    "Hinge": first_loss(1.0),
    "IPO": first_loss((1 / (2 * BETA)) ** 2),
    "Robust": every(first_loss(SIGMOID), lambda run: run.module.objective.preference_loss.flip_rate == 0.1),
    "Label smoothing": lambda run: run.module.objective.preference_loss.label_smoothing == 0.1,
    "DPO-Positive": every(first_loss(SIGMOID), lambda run: run.module.objective.preference_loss.penalty == 5.0),
    "Length-normalised": lambda run: run.module.objective.preference_loss.length_normalized,
    "Nash-MD": every(first_loss(0.0), is_a("objective.preference_loss", "NashMDLoss")),
    "SPPO": first_loss(2 * (1 / (2 * BETA)) ** 2),
    "INPO": first_loss((0.25 / (2 * BETA)) ** 2),
    "Other divergences": every(first_loss(SIGMOID), lambda run: run.module.objective.preference_loss.margin_clip == 10),
    "Mixed losses": every(first_loss(1.0), lambda run: run.module.objective.preference_loss.weights == [1.0, 0.2]),
    "Entropy bonus": lambda run: all(
        step["loss/total"] - step["loss/dpo"] - step["loss/xpo"]
        == pytest.approx(-0.01 * step["objective/token_entropy"], abs=1e-5)
        for step in run.steps
    ),
    "Other callbacks": lambda run: (
        [one.rows for one in run.trainer.callbacks if isinstance(one, CompletionsTable)] == [3]
        and "throughput/tokens_per_second" in run.steps[-1]
    ),
    "Own loss": every(first_loss(1.0), is_a("objective.preference_loss", "SquaredHinge")),
}
# Blocks of whose kind another one is run by default.
SLOW = {
    *("Higher score", "Drawn labels", "Temperature", "Best of each side", "Largest margin"),
    *("Reference", "Online DPO", "Previous policy", "Mixture", "Rejected completion", "Clipped bonus"),
    *("Alpha on a line", "Alpha on a cosine", "Alpha in beta", "Last batches", "Pairs on disk", "New reference"),
    *("Hinge", "Robust", "Label smoothing", "DPO-Positive", "Nash-MD", "SPPO", "INPO", "Mixed losses"),
}
# What a run needs beside `SIZES` to show what it is to show.
NEEDS: dict[str, dict[str, Any]] = {
    "Flipped labels": {"data__batch_size": 64, "trainer__max_steps": 1},
    "Least margin": {"data__batch_size": 32, "trainer__max_steps": 1},
    "Python judge": {"data__batch_size": 64, "trainer__max_steps": 1},
    "Pairs without an answer": {"data__batch_size": 64, "trainer__max_steps": 1},
    "Alpha by epoch": {"trainer__limit_train_batches": 1},
    "All pairs": {"trainer__max_steps": 16},
    "Last batches": {"trainer__max_steps": 5},
    "Pairs on disk": {"data__batch_size": 64},
    "Best iterate": {
        "trainer__enable_checkpointing": True,
        "trainer__limit_val_batches": 1,
        "data__validation_batch_size": 4,
    },
}


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
