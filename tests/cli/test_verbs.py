"""The verbs beside training, as a user calls them."""

import importlib
import inspect
import io
import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import completions_of, make_tokenizer
from docstring_parser import parse as parse_docstring
from huggingface_hub import constants
from test_cli import Write, prompts_file, refused, write_config  # noqa: F401  (fixtures)
from transformers import AutoModelForCausalLM

from xpo_lightning import InputError, PythonJudge, PythonReward, Sampling
from xpo_lightning.cli.commands.chat import Speaker
from xpo_lightning.cli.dispatch import RUNS, VERBS
from xpo_lightning.cli.known_options import shipped
from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.core.batch import Pair
from xpo_lightning.core.recipes import recipes
from xpo_lightning.evaluation.compare import TokenizedPrompts, compare_completions
from xpo_lightning.evaluation.policies import LoadedPolicy, NamedPolicy, find_policy

ROOT = Path(__file__).parents[2]
LORA = {"r": 2, "target_modules": "all-linear"}


def lengths(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [float(len(text)) for text in completions]


def prefers_a(prompts: list[Any], firsts: list[str], seconds: list[str], columns: Any) -> list[float | None]:
    pairs = zip(firsts, seconds, strict=True)
    return [None if "?" in first + second else 0.9 if "a" in first else 0.1 for first, second in pairs]


def trained(config: str, tmp_path: Path) -> str:
    """Run a config; return its checkpoint."""
    main(["fit", "--config", config])
    (checkpoint,) = (tmp_path / "runs" / "version_0" / "checkpoints").glob("*.ckpt")
    return str(checkpoint)


# ---- help and starting ----


def test_help_is_one_screen_with_a_line_for_each_verb(capsys: pytest.CaptureFixture[str]):
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    for verb, purpose in {**RUNS, **VERBS}.items():
        assert any(line.split(None, 1) == [verb, purpose] for line in lines)


@pytest.mark.parametrize("verb", RUNS)
def test_help_of_a_run_is_one_screen_of_options_that_there_are(verb: str, capsys: pytest.CaptureFixture[str]):
    main([verb, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 36
    assert max(map(len, lines)) <= 80
    shown = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    assert len(shown) == 20
    assert set(shown) <= shipped(verb).options.keys()
    assert any(f"xpo {verb} --help_all" in line for line in lines)


def test_help_all_has_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--help_all"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{key}" in shown for key in shipped("fit").options)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_describes_each_of_its_options(verb: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: xpo {verb}" in shown
    function = getattr(importlib.import_module(f"xpo_lightning.cli.commands.{verb}"), verb)
    described = {one.arg_name: one.description for one in parse_docstring(function.__doc__).params}
    assert list(described) == list(inspect.signature(function).parameters)
    for name, text in described.items():
        assert name in shown
        assert " ".join(text.split())[:40] in " ".join(shown.split())


@pytest.mark.parametrize(
    "words",
    [["--help"], ["fit", "--help"], ["--version"], ["fti"], ["recipes"], ["plot", "nowhere"], ["report", "nowhere"]],
    ids=" ".join,
)
def test_what_needs_no_model_starts_without_torch(words: list[str]):
    code = f"import sys; sys.argv[1:] = {words!r}\nfrom xpo_lightning.cli.main import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers', 'lightning', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_env_says_nothing_but_its_lines():
    done = subprocess.run([sys.executable, "-m", "xpo_lightning", "env"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.startswith("python ")


# ---- recipes ----


def test_recipes_are_listed_with_what_they_do(capsys: pytest.CaptureFixture[str]):
    main(["recipes"])
    shown = capsys.readouterr().out
    (quickstart,) = (ROOT / "configs").glob("quickstart.yaml")
    assert recipes()["quickstart"].samefile(quickstart)
    for name, file in recipes().items():
        assert f"{name} " in shown
        assert file.read_text().splitlines()[0].lstrip("# ") in shown


def test_recipe_is_copied_and_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "mine.yaml"
    main(["recipes", "quickstart", str(target)])
    assert target.read_text() == (ROOT / "configs" / "quickstart.yaml").read_text()
    assert "exists" in refused(capsys, "recipes", "quickstart", str(target))
    assert "did you mean 'quickstart'?" in refused(capsys, "recipes", "quikstart")
    nowhere = str(tmp_path / "no" / "such.yaml")
    assert f"'{nowhere}' cannot be used (No such file" in refused(capsys, "recipes", "quickstart", nowhere)


def test_control_c_in_a_verb_ends_with_its_status(monkeypatch: pytest.MonkeyPatch):
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xpo_lightning.cli.dispatch.run", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["chat", "anything"])
    assert stopped.value.code == 130


# ---- compare ----


def result(tmp_path: Path, *args: str) -> dict[str, Any]:
    file = tmp_path / "result.json"
    main(["compare", *args, "--json", str(file)])
    return dict(json.loads(file.read_text()))


def test_exchanging_two_policies_gives_one_minus_the_win_rate(
    model_folder: Callable[..., str],
    prompts_file: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    both = [model_folder("llama"), model_folder("gpt_neox")]
    options = ["--prompts", str(prompts_file), "--reward", "PythonReward", "--reward.function", f"{__name__}.lengths"]
    options += ["--samples", "3", "--sampling.max_new_tokens", "7"]
    one, other = (result(tmp_path, *order, *options) for order in (both, both[::-1]))
    assert one["win_rate"] + other["win_rate"] == pytest.approx(1)
    assert one["win_rate"] != 0.5
    assert (one["low"], one["high"]) == pytest.approx((1 - other["high"], 1 - other["low"]))
    assert (one["wins"], one["losses"], one["ties"]) == (other["losses"], other["wins"], other["ties"])
    assert one["wins"] + one["losses"] + one["ties"] == 8 * 3 * 3
    assert (one["score_a"], one["score_b"]) == (other["score_b"], other["score_a"])
    assert one["sampling"]["max_new_tokens"] == 7
    assert f"A wins      {one['win_rate']:.3f}, 95 % interval" in capsys.readouterr().out


def test_number_does_not_depend_on_how_many_are_written_together(write_config: Write, tmp_path: Path):  # noqa: F811
    config = write_config()
    one, other = (result(tmp_path, "reference", "reference", "--config", config, "--batch_size", n) for n in "14")
    assert one == other
    assert one["prompts"] == 4
    assert one["ties"] + one["wins"] + one["losses"] > 0


def test_two_who_write_greedily_with_the_same_weights_tie(write_config: Write, tmp_path: Path):  # noqa: F811
    checkpoint = trained(write_config(model__learning_rate=1e-9), tmp_path)
    found = result(tmp_path, checkpoint, "--config", write_config(), "--sampling.temperature", "0")
    assert (found["win_rate"], found["ties"]) == (0.5, 4)
    assert found["low"] < 0.5 < found["high"]


def test_checkpoint_with_adapters_is_compared_as_it_was_trained(write_config: Write, tmp_path: Path):  # noqa: F811
    config = write_config(model__lora=LORA, model__learning_rate=0.05)
    checkpoint = trained(config, tmp_path)
    main(["export", checkpoint, "--config", config, "--out", str(tmp_path / "merged"), "--merge"])
    greedy = ["--config", config, "--sampling.temperature", "0", "--sampling.max_new_tokens", "12"]
    assert result(tmp_path, checkpoint, str(tmp_path / "merged"), *greedy)["ties"] == 4
    assert result(tmp_path, checkpoint, "reference", *greedy)["ties"] < 4


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("bf16", torch.bfloat16), ("32-true", torch.float32)]
)
def test_policies_of_a_run_are_computed_in_its_precision(
    write_config: Write,  # noqa: F811
    tmp_path: Path,
    precision: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
):
    seen, seated = [], NamedPolicy.seated

    def watched(self: NamedPolicy, *args: Any) -> LoadedPolicy:
        one = seated(self, *args)
        layer = one.model.model.layers[0].mlp.up_proj
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        return one

    monkeypatch.setattr(NamedPolicy, "seated", watched)
    result(tmp_path, "reference", "reference", "--config", write_config(trainer__precision=precision))
    assert seen[-1] == dtype  # ways are judged in float32 before


def written(texts: list[list[str]]) -> list[Any]:
    """Make completions of B prompts for each list of texts."""
    return [replace(completions_of([[1]] * len(each)), texts=tuple(each)) for each in texts]


ASKED = TokenizedPrompts([[1], [2]], ("p", "q"), {})


def test_every_completion_of_one_meets_every_one_of_the_other():
    """Lengths of prompt p: 3 and 1 against 2 and 1, so 3 > 2, 3 > 1, 1 < 2, and a tie: 2.5 of 4. Of q: 1 and 1 against

    5 and 5: none.
    """
    sides = Pair(written([["aaa", "a"], ["a", "b"]]), written([["bb", "ccccc"], ["c", "ddddd"]]))
    found = compare_completions(PythonReward(lengths), None, ASKED, sides)
    assert found.by_prompt.tolist() == [2.5 / 4, 0.0]
    assert (found.scores.by_policy, found.scores.by_sampler) == (1.5, 3.25)
    assert found.exchanged().by_prompt.tolist() == [1.5 / 4, 1.0]


def test_judge_is_asked_about_pairs_and_one_without_an_answer_is_left_out():
    sides = Pair(written([["a", "?"], ["?", "?"]]), written([["b", "b"], ["b", "b"]]))
    found = compare_completions(PythonJudge(prefers_a), None, ASKED, sides)
    assert found.by_prompt.tolist() == [1.0]
    assert int(found.wins.isnan().sum()) == 3
    tied = compare_completions(PythonJudge(prefers_a, invalid="tie"), None, ASKED, sides)
    assert tied.by_prompt.tolist() == [0.75, 0.5]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["run.ckpt", "--reward", "PythonReward", "--reward.function", f"{__name__}.lengths"], "--prompts"),
        (["somewhere"], "--reward"),
        (["a", "--samples", "0"], "--samples"),
        (["a", "--level", "95"], "--level"),
        (["a", "--config", "quikstart"], "did you mean 'quickstart'?"),
        (["reference", "--config", "iterated"], "model.policy.path"),
        (["nowhere.ckpt", "--config", "quickstart"], "nowhere.ckpt"),
        (["./nowhere", "--config", "quickstart"], "./nowhere"),
        (["reference", "--config", "quickstart", "--sampling.temprature", "1"], "did you mean 'sampling.temperature'?"),
        (["reference", "--config", "quickstart", "--device", "gpuu"], "--device"),
        (["reference", "--config", "quickstart", "--json", "no/such.json"], "--json: there is no folder 'no'"),
        (
            ["reference", "--config", "quickstart", "--sampling.temperature", "-1"],
            "--sampling.temperature must be 0, or",
        ),
        (["package:xpo_lightning/embedded/policy", "nowhere.ckpt", "--config", "quickstart"], "no checkpoint 'nowhere"),
    ],
    ids=str,
)
def test_comparison_that_cannot_be_made_is_refused(args: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    assert expected in refused(capsys, "compare", *args)


@pytest.mark.parametrize("name", ["run.ckpt", "reference"])
def test_what_belongs_to_a_run_is_refused_without_its_config(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference").mkdir()  # A folder of that name is `./reference`.
    with pytest.raises(InputError, match="--config"):
        find_policy(name, None)


def test_what_is_wrong_with_reward_or_column_is_said_before_anybody_writes(
    prompts_file: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("xpo_lightning.evaluation.compare.Comparison.write", lambda *_: pytest.fail("it wrote"))
    policy = ["package:xpo_lightning/embedded/policy"] * 2
    reward = ["--reward", "SequenceClassifierReward", "--reward.path", "./nowhere"]
    assert "./nowhere" in refused(capsys, "compare", *policy, "--prompts", str(prompts_file), *reward)
    options = ["--reward", "PythonReward", "--reward.function", f"{__name__}.lengths", "--prompt_column", "promt"]
    line = refused(capsys, "compare", *policy, "--prompts", str(prompts_file), *options)
    assert "--prompt_column: " in line
    assert "promt" in line


# ---- export ----


def test_export_of_a_checkpoint_has_its_weights(
    write_config: Write,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    config, out = write_config(), tmp_path / "out"
    checkpoint = trained(config, tmp_path)
    main(["export", checkpoint, "--config", config, "--out", str(out)])
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(saved[f"policy.{name}"], weight) for name, weight in model.named_parameters())
    assert "| optimizer steps | 2 |" in (out / "README.md").read_text()
    assert "| peak learning rate | 0.001 |" in (out / "README.md").read_text()
    assert "--merge" in refused(capsys, "export", checkpoint, "--config", config, "--out", str(out), "--merge")
    (tmp_path / "mine").mkdir()
    assert "--out" in refused(capsys, "export", checkpoint, "--config", config, "--out", str(tmp_path / "mine"))


@pytest.mark.slow
def test_export_without_merging_holds_adapters_alone(write_config: Write, tmp_path: Path):  # noqa: F811
    config = write_config(model__lora=LORA)
    main(["export", trained(config, tmp_path), "--config", config, "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()


class StubHub:
    """Stands for `huggingface_hub.HfApi`."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    fault: str | None = None

    def create_repo(self, name: str, **options: Any) -> str:
        if self.fault:
            raise RuntimeError(self.fault)
        self.calls.append((name, options))
        return f"https://hub/{name}"

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> None:
        self.calls.append((repo_id, {"files": sorted(file.name for file in Path(folder_path).iterdir())}))


def test_push_uploads_the_folder_and_shows_no_token(
    write_config: Write,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("xpo_lightning.cli.commands.export.HfApi", StubHub)
    monkeypatch.setattr(StubHub, "calls", [])
    config = write_config()
    words = ["export", trained(config, tmp_path), "--config", config, "--out", str(tmp_path / "out")]
    words += ["--push_to_hub", "me/policy"]
    assert "HF_HUB_OFFLINE" in refused(capsys, *words, "--private")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("xpo_lightning.cli.commands.export.get_token", lambda: os.environ.get("HF_TOKEN"))
    assert "hf auth login" in refused(capsys, *words)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "owner/name" in refused(capsys, *words[:-1], "policy")
    assert "owner/name" in refused(capsys, *words[:-1], "me/my policy")
    assert not (tmp_path / "out").exists()
    main([*words, "--private"])
    assert StubHub.calls[0] == ("me/policy", {"private": True, "exist_ok": True})
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(StubHub.calls[1][1]["files"])
    shown = capsys.readouterr()
    assert "https://hub/me/policy" in shown.out
    assert "hf_secret" not in shown.out + shown.err
    monkeypatch.setattr(StubHub, "fault", "403 forbidden")
    assert "403 forbidden" in refused(capsys, *words)


def test_private_without_a_push_is_refused(capsys: pytest.CaptureFixture[str]):
    assert "--private" in refused(capsys, "export", "a.ckpt", "--config", "quickstart", "--out", "x", "--private")


# ---- chat ----


def test_one_exchange_shows_policy_and_reference_beside_each_other(
    write_config: Write,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    checkpoint = trained(write_config(), tmp_path)
    capsys.readouterr()
    main(["chat", checkpoint, "--config", write_config(), "--prompt", "the cat", "--sampling.temperature", "0.5"])
    first = capsys.readouterr().out.splitlines()[0]
    assert "ckpt" in first
    assert "reference" in first


def test_chat_reads_lines_from_a_pipe_until_they_end(
    model_folder: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n\nred\n/new\n" + "hat " * 70 + "\nsat\n"))
    main(["chat", model_folder(), "--sampling.max_new_tokens", "4"])
    shown = capsys.readouterr().out
    assert shown.count("╭") == 3
    assert "exceed the context" in " ".join(shown.split())


def test_chat_model_remembers_the_conversation(model_folder: Callable[..., str]):
    writer = find_policy(model_folder("llama", "chat"), None)
    speaker = Speaker.seated(writer, Sampling(max_new_tokens=4), torch.device("cpu"), seed=0, place=0)
    answers = [speaker.answer(speaker.hear(line)).removesuffix(" …") for line in ("hi", "go")]
    assert [message["role"] for message in speaker.said] == ["user", "assistant"] * 2
    assert [message["content"] for message in speaker.said] == ["hi", answers[0], "go", answers[1]]
    with pytest.raises(InputError, match=r"and --sampling\.max_new_tokens exceed the context .* leaves \d+ tokens"):
        speaker.hear("hat " * 70)
    assert len(speaker.said) == 4
    assert make_tokenizer("chat").chat_template is not None


@pytest.mark.slow
def test_chat_in_a_terminal_ends_with_control_d(model_folder: Callable[..., str]):
    ours, theirs = pty.openpty()
    words = ["chat", model_folder(), "--sampling.max_new_tokens", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "xpo_lightning", *words], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    for expected, reply in ((b"> ", b"the cat\n"), (b"\xe2\x95\xaf", b"\x04")):
        while expected not in shown:
            assert select.select([ours], [], [], 300)[0], shown
            shown += os.read(ours, 4096)
        shown = b""
        os.write(ours, reply)
    assert process.wait(timeout=60) == 0
    os.close(ours)


# ---- the start of a run ----


def test_banners_and_loading_bars_of_other_libraries_are_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("XPO_DEBUG", raising=False)
    small = "{callbacks: [], num_sanity_val_steps: 0, limit_val_batches: 0, max_steps: 1, enable_checkpointing: false}"
    words = ["--trainer", small, "--data.batch_size", "2", "--model.sampling.max_new_tokens", "4"]
    folders = ["--trainer.default_root_dir", str(tmp_path), "--trainer.logger", "false"]
    main(["fit", "--config", "quickstart", *words, *folders])
    shown = "".join(capfd.readouterr()) + caplog.text
    for banner in ("GPU available", "Tip:", "Seed set", "Loading weights", "litlogger"):
        assert banner not in shown


@pytest.mark.slow
def test_first_step_of_the_embedded_models_needs_no_library_that_the_run_does_not(tmp_path: Path):
    """Its processor time is about 1.3 times that of importing what it cannot do without, 4.2 s on a core of 2026."""
    code = """
import sys, time
from xpo_lightning.cli import lightning_cli
from xpo_lightning.module import XPOLightningModule
def first_step(*_):
    unneeded = {"peft", "datasets", "pandas", "pyarrow", "bitsandbytes", "tensorboard"} & set(sys.modules)
    print("AT", time.process_time(), sorted(unneeded))
    raise SystemExit
XPOLightningModule.training_step = first_step
lightning_cli.main()
"""
    words = ["fit", "--config", "quickstart", "--trainer.callbacks=[]", "--trainer.num_sanity_val_steps=0"]
    words += ["--trainer.logger=false", "--trainer.default_root_dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("AT")]
    _, seconds, unneeded = line.split(None, 2)
    assert unneeded == "[]"
    needed = "import time, torch, lightning.pytorch.cli, transformers.models.llama.modeling_llama"
    alone = [sys.executable, "-c", f"{needed}; print(time.process_time())"]
    least = float(subprocess.run(alone, capture_output=True, text=True, check=True).stdout)
    assert float(seconds) < 2 * least, "which other processes slow down as well"
