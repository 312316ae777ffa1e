"""The cache of what the reference writes: the same numbers with less work, or a clear refusal."""

import dataclasses
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import (
    BARE,
    PROMPTS,
    ChainModel,
    Recorder,
    chain_module,
    completions_of,
    fit_quietly,
    loader,
    longer_is_better,
    make_tokenizer,
    noise,
    prompts_of,
    quiet_trainer,
)
from torch import nn
from torch.utils.data import DataLoader

from xpo_lightning import Experience, InputError, LoadedModel, Sampling, XPOLightningModule
from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.data.prompts import as_prompts
from xpo_lightning.models.logprobs import token_logps
from xpo_lightning.models.policy import LoRASpec
from xpo_lightning.rewards import PythonReward, Reward, SequenceClassifierReward, WeightedSum
from xpo_lightning.rollout.reference_cache import ReferenceCache
from xpo_lightning.training.collector import Collector
from xpo_lightning.training.metrics import rollout_metrics
from xpo_lightning.training.objective import Objective

MakeModule = Callable[..., XPOLightningModule]
RATE = 0.03
"""A learning rate at which the policy's samples change from one epoch to the next."""


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> list[Experience]:
    """Give a list of all batches of pairs that are collected, in training and elsewhere."""
    kept: list[Experience] = []
    collect = Collector.collect

    def recording(self: Collector, *args: Any, **options: Any) -> Experience:
        kept.append(collect(self, *args, **options))
        return kept[-1]

    monkeypatch.setattr(Collector, "collect", recording)
    return kept


def fitted(module: XPOLightningModule, prompts: Any = PROMPTS, epochs: int = 2, **options: Any) -> XPOLightningModule:
    """Train on prompts and return the module."""
    fit_quietly(module, prompts, max_epochs=epochs, **options)
    return module


def fit_on_rows(module: XPOLightningModule, rows: dict[str, list[Any]], epochs: int = 2) -> None:
    """Train on one batch that has columns."""
    torch.manual_seed(0)
    quiet_trainer(max_epochs=epochs).fit(module, DataLoader([rows], batch_size=None))


def assert_same_reference(first: Experience, second: Experience) -> None:
    """Check that the reference's side is the same to the last bit."""
    one, other = first.completions.by_sampler, second.completions.by_sampler
    for name in ("ids", "mask", "ended", "token_logps"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.texts == other.texts
    assert torch.equal(first.scores.by_sampler, second.scores.by_sampler)
    assert torch.equal(first.reference_logps.by_sampler, second.reference_logps.by_sampler)


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def entries(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "reference-0.sqlite")) as connection:
        return int(connection.execute("SELECT count(*) FROM kept").fetchone()[0])


def where(kind: str, tmp_path: Path) -> str:
    return "memory" if kind == "memory" else str(tmp_path / "cache")


# ---- hits ----


@pytest.mark.parametrize("kind", ["memory", "folder"])
@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "mistral_sliding"])
def test_second_epoch_takes_the_reference_from_the_cache(
    make_module: MakeModule, collected: list[Experience], tmp_path: Path, kind: str, arch: str
):
    module = fitted(make_module(arch, reference_cache=where(kind, tmp_path), learning_rate=RATE), epochs=3)
    first, second, third = collected
    assert_same_reference(first, second)
    assert_same_reference(first, third)
    assert first.completions.by_policy.texts != second.completions.by_policy.texts
    assert module.timer.counts["reference_rollout"] == 1
    assert module.timer.counts["policy_rollout"] == module.timer.counts["reference_scoring"] == 3


def test_without_a_cache_every_epoch_samples_anew(make_module: MakeModule, collected: list[Experience]):
    module = fitted(make_module())
    assert collected[0].completions.by_sampler.texts != collected[1].completions.by_sampler.texts
    assert module.timer.counts["reference_rollout"] == 2


@pytest.mark.parametrize(
    ("rows_at_once", "lora"),
    [(None, False), (2, True), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in ((None, True), (2, False)))],
)
def test_hits_change_neither_the_first_epoch_nor_the_noise_of_the_policy(
    make_module: MakeModule, collected: list[Experience], lora: bool, rows_at_once: int | None
):
    """With a learning rate of 0 the policy's samples depend on the noise alone, in the second epoch too."""
    options = {"lora": LoRASpec(r=2) if lora else None, "rollout_batch_size": rows_at_once, "learning_rate": 0.0}
    fitted(make_module(**options))
    fitted(make_module(**options, reference_cache="memory"))
    plain, cached = collected[:2], collected[2:]
    assert_same_reference(plain[0], cached[0])
    for one, other in zip(plain, cached, strict=True):
        assert torch.equal(one.completions.by_policy.ids, other.completions.by_policy.ids)
        assert torch.equal(one.scores.by_policy, other.scores.by_policy)
        assert one.reference_logps.by_policy.tolist() == pytest.approx(
            other.reference_logps.by_policy.tolist(), abs=1e-5
        )


def test_kept_log_probabilities_are_those_that_the_reference_gives(
    make_module: MakeModule, load_model: Callable[..., nn.Module], collected: list[Experience]
):
    fitted(make_module(reference_cache="memory", learning_rate=RATE))
    second, reference = collected[1], load_model()
    with torch.no_grad():
        again = second.completions.map(lambda side: token_logps(reference, second.prompts, side).sum(1))
    assert second.reference_logps.by_sampler.tolist() == pytest.approx(again.by_sampler.tolist(), abs=1e-4)
    assert second.reference_logps.by_policy.tolist() == pytest.approx(again.by_policy.tolist(), abs=1e-4)


def test_losses_of_a_cached_epoch_are_those_of_pairs_that_are_scored_anew(
    make_module: MakeModule,
    load_model: Callable[..., nn.Module],
    collected: list[Experience],
    monkeypatch: pytest.MonkeyPatch,
):
    module, recorder = make_module(reference_cache="memory", learning_rate=RATE, alpha=0.1), Recorder()
    states: list[dict[str, Any]] = []
    evaluate = Objective.evaluate

    def remembering(*args: Any, **weights: float) -> Any:
        states.append({name: value.clone() for name, value in module.policy.state_dict().items()})
        return evaluate(*args, **weights)

    monkeypatch.setattr(Objective, "evaluate", remembering)
    fitted(module, callbacks=[recorder])
    second, reference = collected[1], load_model()
    with torch.no_grad():
        anew = second.completions.map(lambda side: token_logps(reference, second.prompts, side).sum(1))
        module.policy.load_state_dict(states[1])
        pairs = dataclasses.replace(second, reference_logps=anew)
        _, numbers = evaluate(module.objective, module.policy, pairs, alpha=0.1, beta=0.1)
        numbers |= rollout_metrics(pairs, beta=0.1)
    for name in ("loss/dpo", "loss/xpo", "objective/kl"):
        assert recorder.of(name)[1] == pytest.approx(float(numbers[name].mean()), abs=1e-4), name


# ---- what is asked of the models ----


def test_reward_scores_a_kept_completion_once(make_module: MakeModule):
    calls: list[tuple[list[Any], list[str], list[int]]] = []

    def score(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        calls.append((prompts, completions, columns["number"]))
        return longer_is_better(prompts, completions, columns)

    rows = {"prompt": list(PROMPTS), "number": list(range(5))}
    module = make_module(reward=PythonReward(score), reference_cache="memory")
    fit_on_rows(module, rows)
    (first, _, first_numbers), (second, completions, numbers) = calls
    assert first == PROMPTS * 2
    assert first_numbers == [*range(5), *range(5)]
    assert second == PROMPTS
    assert numbers == list(range(5))
    assert len(completions) == 5


def test_only_prompts_without_an_entry_are_sampled(make_module: MakeModule, collected: list[Experience]):
    """A batch of which some rows are known: the others are sampled as they are where nothing is known."""
    alone = make_module(reference_cache="memory")
    fitted(alone, [PROMPTS[1], PROMPTS[3]], epochs=1)
    batch = as_prompts(list(PROMPTS), alone.prompt_encoder, alone.device)
    mixed = alone.collector.collect(alone.policy, batch, noise(), training=True)
    plain = alone.collector.collect(alone.policy, batch, noise(), training=False)
    before, mine, fresh = (pairs.completions.by_sampler for pairs in (collected[0], mixed, plain))
    assert [mine.texts[row] for row in (1, 3)] == list(before.texts)
    assert [mine.texts[row] for row in (0, 2, 4)] == [fresh.texts[row] for row in (0, 2, 4)]
    assert mine.texts != fresh.texts
    assert mixed.completions.by_policy.texts == plain.completions.by_policy.texts
    rows = [0, 2, 4]
    assert mixed.scores.by_sampler[rows].tolist() == plain.scores.by_sampler[rows].tolist()
    assert mixed.scores.by_sampler[[1, 3]].tolist() == collected[0].scores.by_sampler.tolist()
    torch.testing.assert_close(mixed.reference_logps.by_policy, plain.reference_logps.by_policy, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        mixed.reference_logps.by_sampler[rows], plain.reference_logps.by_sampler[rows], atol=1e-5, rtol=0
    )


def test_prompt_twice_in_a_batch_is_kept_once(make_module: MakeModule, collected: list[Experience], tmp_path: Path):
    folder = tmp_path / "cache"
    fitted(make_module(reference_cache=str(folder)), ["the cat", "red", "the cat"])
    first, second = (pairs.completions.by_sampler.texts for pairs in collected)
    assert second == (first[0], first[1], first[0])
    assert entries(folder) == 2


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_cache_finds_the_prompt_and_nothing_else(tmp_path: Path, kind: str):
    """Padding is no part of a prompt, what it was made of is; discarded entries and later ones are gone."""
    cache = ReferenceCache(where(kind, tmp_path), {})
    prompts = replace(prompts_of([[5, 6], [7, 8, 9], [4]]), raw=("a", "b", "c"))
    written = completions_of([[11], [12, 13, 14], [15, 16]], [False, True, True])
    written = replace(written, token_logps=-torch.arange(1.0, 10).reshape(3, 3))
    scores = torch.tensor([0.5, 1.5, 2.5])
    cache.put(prompts.select([0, 1]), written.select([0, 1]), scores[:2])
    cache.settle(keep=False)
    assert cache.get(prompts) == [None] * 3
    cache.put(prompts.select([0, 1]), written.select([0, 1]), scores[:2])
    cache.settle(keep=True)
    state = cache.shared_state() | cache.state()
    cache.put(prompts.select([2]), written.select([2]), scores[2:])
    cache.settle(keep=True)
    short, middle, last = cache.get(prompts)
    assert (short.ids.tolist(), short.token_logps.tolist(), short.ended, short.score) == ([11], [-1.0], False, 0.5)
    assert (middle.ids.tolist(), middle.token_logps.tolist()) == ([12, 13, 14], [-4.0, -5.0, -6.0])
    assert last is not None
    assert cache.get(prompts_of([[5, 6]])) == [None], "made of another text"
    assert cache.get(prompts.select([0]))[0].ids.tolist() == [11], "padded to another width"
    cache.load_state(state)
    assert [entry is not None for entry in cache.get(prompts)] == [True, True, False]


def test_rows_that_differ_in_a_column_alone_are_kept_apart(make_module: MakeModule, tmp_path: Path):
    rows = {"prompt": ["red"] * 3, "answer": [torch.tensor([1.0]), torch.tensor([2.0]), {1}], "n": [1, 1, 1]}
    fit_on_rows(make_module(reference_cache=str(tmp_path)), rows)
    assert entries(tmp_path) == 3


def test_conversations_are_kept(make_module: MakeModule, collected: list[Experience], tmp_path: Path):
    chats = [[{"role": "user", "content": text}] for text in ("red", "the cat")]
    fitted(make_module(tokenizer="chat", reference_cache=str(tmp_path)), chats)
    assert_same_reference(*collected)
    assert entries(tmp_path) == 2


def test_missing_eos_penalty_is_taken_once_from_a_kept_score(collected: list[Experience], tmp_path: Path):
    """The chain 20-20-20-... never ends: 1 - 5 = -4 in each epoch, and 1 in the cache."""

    def one_each(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        return [1.0] * len(completions)

    reward, sampling = PythonReward(one_each), Sampling(max_new_tokens=3)
    for penalty, expected in ((5.0, [-4.0, -4.0]), (2.0, [-1.0, -1.0]), (None, [1.0, 1.0])):
        collected.clear()
        module = chain_module(
            ChainModel({}, otherwise=20),
            make_tokenizer(),
            reward=reward,
            sampling=sampling,
            missing_eos_penalty=penalty,
            reference_cache=str(tmp_path),
        )
        fitted(module, ["red", "sat"])
        assert [pairs.scores.by_sampler.tolist() for pairs in collected] == [expected] * 2


def test_validation_samples_anew_and_leaves_nothing_behind(
    make_module: MakeModule, collected: list[Experience], tmp_path: Path
):
    module = make_module(reference_cache=str(tmp_path))
    trainer = quiet_trainer(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, loader(PROMPTS), loader([*PROMPTS[:2], "a hat"]))
    assert len(collected) == 4  # training and validation in each of two epochs
    assert entries(tmp_path) == len(PROMPTS)
    validation = collected[1]
    trained_on = collected[0].completions.by_sampler.texts[:2]
    assert validation.completions.by_sampler.texts[:2] != trained_on
    assert module.timer.counts["reference_rollout"] == 3


# ---- on disk ----


def test_folder_serves_another_run_with_another_seed(
    make_module: MakeModule, collected: list[Experience], tmp_path: Path
):
    folder = tmp_path / "made" / "here"
    fitted(make_module(reference_cache=str(folder)), epochs=1)
    later = fitted(make_module(reference_cache=str(folder), lora=LoRASpec(r=2)), epochs=1, seed=5)
    assert_same_reference(*collected)
    assert later.timer.counts["reference_rollout"] == 0
    assert files(folder) == ["reference-0.sqlite"]


def test_run_that_breaks_off_leaves_what_it_had_finished(
    make_module: MakeModule, collected: list[Experience], tmp_path: Path
):
    calls = []

    def dies(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 2:
            raise OSError("gone")
        return [float(len(text)) for text in completions]

    reward = PythonReward(dies)
    with pytest.raises(InputError, match="gone"):
        fitted(make_module(reward=reward, reference_cache=str(tmp_path)), batch_size=2, epochs=1)
    assert entries(tmp_path) == 2
    fitted(make_module(reward=reward, reference_cache=str(tmp_path)), batch_size=2, epochs=1)
    assert entries(tmp_path) == len(PROMPTS)
    assert calls == [4, 4, 2, 4, 2]  # both sides of two pairs; the kept pairs need the policy's side alone
    assert_same_reference(collected[0], collected[1])


def steps_of(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]], step: int = 1) -> list[float]:
    return [float(len(text) // step) for text in completions]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sampling": Sampling(max_new_tokens=6, temperature=0.5)}, "model.sampling.temperature (1.0 there, 0.5 now)"),
        ({"sampling": Sampling(max_new_tokens=6, eos_token_ids=[7])}, "model.sampling.eos_token_ids"),
        ({"reward": PythonReward(steps_of, {"step": 3})}, "model.reward.arguments.step (2 there, 3 now)"),
        ({"reward": PythonReward(longer_is_better)}, "model.reward.function"),
        ({"arch": "gpt_neox"}, "model.policy.fingerprint"),
    ],
    ids=["temperature", "eos", "arguments", "function", "model"],
)
def test_stale_cache_is_refused(make_module: MakeModule, tmp_path: Path, change: dict[str, Any], field: str):
    options = {"reward": PythonReward(steps_of, {"step": 2}), "reference_cache": str(tmp_path)}
    fitted(make_module(**options), epochs=1)
    with pytest.raises(InputError) as error:
        fitted(make_module(**{**options, **change}), epochs=1)
    for part in ("model.reference_cache", str(tmp_path), field, "delete"):
        assert part in str(error.value)
    assert fitted(make_module(**options), epochs=1).timer.counts["reference_rollout"] == 0


def test_cache_of_other_weights_under_the_same_name_is_refused(load_model: Callable[..., nn.Module], tmp_path: Path):
    def module(scale: float) -> XPOLightningModule:
        model = load_model()
        with torch.no_grad():
            model.get_input_embeddings().weight *= scale
        reward = PythonReward(longer_is_better)
        policy = LoadedModel(model, make_tokenizer())
        return XPOLightningModule(policy, reward, sampling=Sampling(max_new_tokens=4), reference_cache=str(tmp_path))

    fitted(module(1.0), epochs=1)
    with pytest.raises(InputError, match=r"another model\.policy\.fingerprint \("):
        fitted(module(1.5), epochs=1)


def test_cache_of_another_precision_is_refused(make_module: MakeModule, tmp_path: Path):
    fitted(make_module(reference_cache=str(tmp_path)), epochs=1)
    with pytest.raises(InputError, match=r"trainer\.precision \('32-true' there, 'bf16-mixed' now\)"):
        fitted(make_module(reference_cache=str(tmp_path)), epochs=1, precision="bf16-mixed")


@pytest.mark.parametrize("kind", ["a file", "no database", "empty"])
def test_place_that_cannot_hold_a_cache_is_refused(make_module: MakeModule, tmp_path: Path, kind: str):
    place = tmp_path / "here"
    if kind == "a file":
        place.write_text("")
    elif kind == "no database":
        place.mkdir()
        (place / "reference-0.sqlite").write_text("this is no database " * 100)
    with pytest.raises(InputError, match=r"^model\.reference_cache"):
        fitted(make_module(reference_cache="" if kind == "empty" else str(place)))


# ---- what a reward says of itself ----


class Threshold(Reward):
    """A reward of somebody else's."""

    def __init__(self, least: int, file: Path) -> None:
        super().__init__()
        self.least, self.file = least, file
        self.anything = object()
        self.head = nn.Linear(1, 1)
        self._seen = 0

    def score(self, prompts: Any, completions: Any, columns: Any) -> torch.Tensor:
        return torch.tensor([float(len(text) >= self.least) for text in completions])


def test_reward_is_known_by_its_class_its_settings_and_its_weights():
    reward = Threshold(3, Path("words.txt"))
    identity = reward.identity()
    assert identity.pop("class") == f"{__name__}.Threshold"
    before = identity.pop("fingerprint")
    assert identity == {"least": 3, "file": "words.txt"}
    nn.init.constant_(reward.head.bias, 7.0)
    assert reward.identity()["fingerprint"] != before


def test_weighted_sum_is_known_by_its_parts():
    parts = [PythonReward(steps_of, {"step": 2}), Threshold(3, Path("words.txt"))]
    identity = WeightedSum(parts, [1.0, -0.5]).identity()
    assert identity["weights"] == [1.0, -0.5]
    assert [part["class"].rpartition(".")[2] for part in identity["rewards"]] == ["PythonReward", "Threshold"]
    assert identity["rewards"][0]["function"] == f"{__name__}.steps_of"


def test_classifier_is_known_by_what_its_scores_depend_on(model_folder: Callable[..., str]):
    options: dict[str, Any] = {"allow_untrained_head": True}
    plain = SequenceClassifierReward(model_folder(), **options)
    plain.load()
    before = plain.identity()
    assert json.loads(json.dumps(before)) == before
    plain.score(["red"] * 2, [" hat", " cat"], {})
    assert plain.identity() == before
    for change in ({"append_eos": True}, {"max_tokens": 9}, {"truncate": "right"}, {"dtype": "bfloat16"}):
        other = SequenceClassifierReward(model_folder(), **options, **change)
        other.load()
        assert other.identity() != before, change
    faster = SequenceClassifierReward(model_folder(), **options, micro_batch_size=1)
    faster.load()
    assert faster.identity() == before


# ---- on the command line ----


@pytest.fixture
def write_config(tmp_path: Path, model_folder: Callable[..., str]) -> Callable[[str], str]:
    """Give a function that writes the config of a small run with such a cache, and returns its path."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    reward = {"class_path": "PythonReward", "init_args": {"function": f"{__name__}.longer_is_better"}}
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = {"accelerator": "cpu", "max_epochs": 2, "default_root_dir": str(tmp_path / "runs"), **silent}

    def write(reference_cache: str) -> str:
        model = {
            "policy": {"path": model_folder()},
            "reward": reward,
            "sampling": {"max_new_tokens": 5},
            "reference_cache": reference_cache,
        }
        data = {"source": str(prompts), "validation_size": 2, "batch_size": 3}
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": trainer, "defaults": BARE}))
        return str(file)

    return write


def test_cli_keeps_a_cache_and_refuses_a_stale_one(
    write_config: Callable[[str], str],
    collected: list[Experience],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    config = write_config(str(tmp_path / "cache"))
    main(["fit", "--config", config])
    assert entries(tmp_path / "cache") == 3
    written = sorted(pairs.completions.by_sampler.texts for pairs in collected)
    collected.clear()
    main(["fit", "--config", config, "--seed_everything", "7"])
    training = [sorted(pairs.completions.by_sampler.texts) for pairs in collected if len(pairs) == 3]
    assert len(training) == 2
    assert training[0] == training[1]
    assert training[0] in [sorted(texts) for texts in written]
    with pytest.raises(SystemExit):
        main(["fit", "--config", config, "--model.sampling.temperature", "0.5"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("xpo: error: model.reference_cache: ")
    assert "model.sampling.temperature (1.0 there, 0.5 now)" in line


def test_cli_takes_memory(write_config: Callable[[str], str], collected: list[Experience]):
    main(["fit", "--config", write_config("memory")])
    first, second = (sorted(pairs.completions.by_sampler.texts) for pairs in collected if len(pairs) == 3)
    assert first == second


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_cli_neither_reads_nor_writes_a_cache_outside_of_fit(
    write_config: Callable[[str], str], tmp_path: Path, command: str
):
    main([command, "--config", write_config(str(tmp_path / "cache"))])
    assert not (tmp_path / "cache").exists()
