"""The table of mistakes: what a user wrote, and what the one line that answers it must name."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import refused

from xpo_lightning.cli import known_options, mistakes
from xpo_lightning.cli.lightning_cli import XPOCLI, main
from xpo_lightning.core.recipes import with_config_files

SMALL = """
trainer: {num_sanity_val_steps: 0, limit_val_batches: 0, enable_checkpointing: false, callbacks: [], max_steps: 1}
data: {batch_size: 4, max_prompts: 8}
model: {sampling: {max_new_tokens: 4}}
"""
OWN = """\
model:
  policy:
    path: package:xpo_lightning/embedded/policy
  reward:
    class_path: SequenceClassifierReward
    init_args:
      path: package:xpo_lightning/embedded/reward
data:
  source: package:xpo_lightning/embedded/prompts.jsonl
trainer:
  accelerator: cpu
  max_steps: 1
"""
CONVERSATION = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
FILES = {
    "small.yaml": SMALL,
    "empty.jsonl": "",
    "semicolon.csv": "id;prompt\n1;Hello, you\n",
    "pair.jsonl": '{"chosen": "Hello you", "rejected": "Hello me"}\n',
    "pairs.jsonl": json.dumps({"chosen": CONVERSATION, "rejected": CONVERSATION}) + "\n",
    "chat.jsonl": json.dumps({"messages": CONVERSATION}) + "\n",
    "list.yaml": "- model\n",
    "empty.yaml": "# nothing yet\n",
    "letter.txt": "Dear reader\n",
}
HERE = "on the command line"

# What is added to `xpo fit --config quickstart --config small.yaml`, and what the answer names: where, and what to do.
FLAGS = {
    "--trainer.learning_rate 1e-3": (HERE, "did you mean 'model.learning_rate'?"),
    "--trainer.max-steps 1": (HERE, "did you mean 'trainer.max_steps'?"),
    "--model.alhpa 1": (HERE, "did you mean 'model.alpha'?"),
    "--model.lr 1e-3": (HERE, "did you mean 'model.learning_rate'?"),
    "--trainer.num_train_epochs 3": (HERE, "did you mean 'trainer.max_epochs'?"),
    "--model.lora.rank 8": (HERE, "there are r, alpha, dropout"),
    "--model.reward.init_args.pth x": (HERE, "did you mean 'path'?"),
    "trainer.max_steps=1": (HERE, "--trainer.max_steps=1"),
    "max_steps=1": (HERE, "two dashes", "did you mean 'trainer.max_steps'?"),
    "-trainer.max_steps 1": (HERE, "--trainer.max_steps"),
    "--trainer.max_steps": (HERE, "needs a value"),
    "--trainer.max_steps= 1": (HERE, "trainer.max_steps must"),
    "--trainer.max_steps 1e1": (HERE, "trainer.max_steps must be a whole number, but is '1e1'"),
    "--data.batch_size 2.5": (HERE, "data.batch_size must be a whole number, but is 2.5"),
    "--data.shuffle maybe": (HERE, "data.shuffle must be true or false, but is 'maybe'"),
    "--model.warmup_ratio 10%": (HERE, "model.warmup_ratio must be a number, but is '10%'"),
    "--model.alpha high": (HERE, "model.alpha must be a number, a list of numbers or a Schedule, but is 'high'"),
    "--model.alpha [1,x]": (HERE, "model.alpha[1] must be a number, but is 'x'"),
    "--model.learning_rate fast": (HERE, "model.learning_rate must be a number or null, but is 'fast'"),
    "--model.lora yes": (HERE, "model.lora must be a LoRASpec or null", "its options are r, alpha"),
    "--model.bonus_on chosen": (HERE, "model.bonus_on must be sampler, both, rejected or null, but is 'chosen'"),
    "--trainer.logger tensorbord": (HERE, "trainer.logger must be", "TensorBoardLogger"),
    "--trainer.callbacks [{class_path:RunCheckpont}]": (HERE, "trainer.callbacks"),
    "--model.reward PythonRewrd": (HERE, "did you mean 'PythonReward'?"),
    "--model.policy foo": (HERE, "model.policy.path"),
    "--trainer.max_steps 0": (HERE, "trainer.max_steps=0", "-1"),
    "--trainer.max_epochs 0": (HERE, "trainer.max_epochs=0", "-1"),
    "--model.sampling.top_p 1.5": (HERE, "model.sampling.top_p must be"),
    "--data.source empty.jsonl": (HERE, "data.source", "empty.jsonl", "no rows"),
    "--data.source semicolon.csv": ("semicolon.csv, line 1", "';'", "commas"),
    "--data.source letter.txt": (HERE, "data.source", ".jsonl"),
    "--data.source nowhere.jsonl": (HERE, "data.source", "nowhere.jsonl"),
    "--data.source pair.jsonl": (HERE, "data.source", "pair.jsonl, line 1", "add a column 'prompt'"),
    "--data.source pairs.jsonl --data.prompt_column chosen": (HERE, "data.prompt_column", "remove the line"),
    "--data.source chat.jsonl": ("chat.jsonl, line 1", "data.prompt_column", "did you mean 'messages'?"),
    "--trainer.default_root_dir /proc/x --trainer.logger true": (HERE, "trainer.default_root_dir", "/proc/x"),
    "--config list.yaml": ("list.yaml, line 1", "key: value"),
    "--config empty.yaml": ("empty.yaml", "is empty"),
    "--config quikstart": ("--config", "did you mean 'quickstart'?"),
    "--config methods/depoo": ("--config", "did you mean 'methods/depo'?"),
}

# The text of mine.yaml, given after these two, and what the answer names beside that file.
OVERLAYS = {
    "model:\n  beta: 0.1\n  alhpa: 1\n": ("mine.yaml, line 3", "did you mean 'model.alpha'?"),
    "modle:\n  beta: 0.1\n": ("mine.yaml, line 1", "did you mean 'model'?"),
    "trainer:\n  learning_rate: 1\n": ("mine.yaml, line 2", "did you mean 'model.learning_rate'?"),
    "model:\n  alpha: high\n": ("mine.yaml, line 2", "model.alpha must be a number"),
    "model:\n  lora: true\n": ("mine.yaml, line 2", "model.lora must be", "its options are r, alpha"),
    "model:\n\tbeta: 0.1\n": ("mine.yaml, line 2", "tab"),
    "model: [1, 2\ndata: 3\n": ("mine.yaml, line 2", "no YAML"),
    "model:\n  policy: foo\n": ("mine.yaml, line 2", "model.policy.path"),
    "model:\n  beta: 0.1\nmodel:\n  alpha: 1\n": ("mine.yaml", "'model'", "line 1", "line 3"),
    "model:\n  reward:\n    class_path: WeightedSum\n    rewards: {}\n": ("mine.yaml, line 4", "under init_args"),
    "model:\n  reward:\n    init_args:\n      pth: x\n": ("mine.yaml, line 4", "did you mean 'path'?"),
    "trainer:\n  callbacks:\n    - monitor: loss\n": ("mine.yaml, line 3", "class_path"),
    "trainer:\n  callbacks:\n    - class_path: EarlyStopping\n      init_args: {monitor: eval/winrate}\n": (
        *("mine.yaml, line 2", "did you mean 'eval/win_rate'?"),
    ),
    "trainer:\n  callbacks:\n    - class_path: EarlyStopping\n      init_args: {monitor: val_loss}\n": (
        *("mine.yaml, line 2", "'val_loss'", "eval/win_rate"),
    ),
}

# The text of mine.yaml where it is the only config.
WHOLE = {
    OWN.replace("data:\n  source", "  data:\n    source"): ("mine.yaml, line 8", "beginning of a line"),
    OWN.replace("    class_path: SequenceClassifierReward\n", ""): (
        *("model.reward needs a class_path", "mine.yaml, line 4", "SequenceClassifierReward"),
    ),
    OWN.replace("data:\n  source: package:xpo_lightning/embedded/prompts.jsonl\n", ""): ("data.source", "config"),
}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with the files."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)


def check_answer(capsys: pytest.CaptureFixture[str], words: list[str], parts: tuple[str, ...]) -> None:
    """See that a command is refused in one line with all of the parts, before a model is loaded."""
    line = refused(capsys, *words)
    for part in parts:
        assert part in line
    for jargon in ("Union", "<class", "subtypes", "Parser key", "Subclass types", "unrecognized"):
        assert jargon not in line
    assert len(line) < 500


def test_value_that_is_no_text_is_shown_as_an_escape(capsys: pytest.CaptureFixture[str]):
    line = refused(capsys, "fit", "--config", "quickstart", "--model.sampling.repetition_penalty", "\ud800")
    assert r"model.sampling.repetition_penalty must be a number, but is '\ud800' (on the command line)" in line


@pytest.mark.parametrize("flags", FLAGS)
def test_mistake_on_the_command_line(flags: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("xpo_lightning.models.policy.ModelSpec.load_model", lambda _: pytest.fail("it was loaded"))
    words = ["fit", "--config", "quickstart", "--config", "small.yaml", *flags.split(" ")]
    check_answer(capsys, [word.replace("class_path:", "class_path: ") for word in words], FLAGS[flags])


@pytest.mark.parametrize("text", OVERLAYS)
def test_mistake_in_an_overlay(text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("xpo_lightning.models.policy.ModelSpec.load_model", lambda _: pytest.fail("it was loaded"))
    Path("mine.yaml").write_text(text)
    files = ("quickstart", "small.yaml", "mine.yaml")
    check_answer(capsys, ["fit", *(word for name in files for word in ("--config", name))], OVERLAYS[text])


@pytest.mark.parametrize("text", WHOLE)
def test_mistake_in_a_config_of_its_own(text: str, capsys: pytest.CaptureFixture[str]):
    Path("mine.yaml").write_text(text)
    check_answer(capsys, ["fit", "--config", "mine.yaml"], WHOLE[text])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["fit"], ("model.policy.path, model.reward, data.source", "xpo fit --config quickstart")),
        (["--config", "quickstart"], ("the verb comes first", "xpo fit --config quickstart")),
        (["fti"], ("did you mean 'fit'?",)),
        (["compare", "a", "--smaples", "2"], ("`xpo compare`", "did you mean 'samples'?")),
    ],
    ids=" ".join,
)
def test_mistake_in_the_words_of_a_command(
    words: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    check_answer(capsys, words, parts)


def test_table_holds_the_mistakes_that_it_promises():
    assert len(FLAGS) + len(OVERLAYS) + len(WHOLE) + 4 >= 55


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--model.alpha 10", r"model\.alpha=10 is more than model\.beta=0\.3"),
        ("--data.batch_size 64", r"data\.batch_size=64 is more than the 8 training prompts"),
    ],
)
def test_setting_that_is_seldom_meant_is_warned_of(flags: str, expected: str):
    with pytest.warns(UserWarning, match=expected):
        main(["fit", "--config", "quickstart", "--config", "small.yaml", *flags.split()])


def test_negative_number_in_scientific_notation_is_a_value(monkeypatch: pytest.MonkeyPatch):
    taken = []
    monkeypatch.setattr(XPOCLI, "instantiate_classes", lambda cli: taken.append(cli.config.fit.model.alpha))
    monkeypatch.setattr(XPOCLI, "_run_subcommand", lambda *_: None)
    monkeypatch.setattr(XPOCLI, "after_instantiate_classes", lambda _: None)
    main(["fit", "--config", "quickstart", "--model.alpha", "-1e-5"])
    assert taken == [-1e-5]


# ---- what is accepted ----

ACCEPTED = [
    *(
        "--model.alpha -1e-5",
        "--model.alpha=[0.1,0.2]",
        "--model.alpha Linear --model.alpha.start 1",
        "--model other.yaml",
    ),
    *("--trainer.precision bf16-mixed", "--data.max_prompts 1_0", "--seed_everything true", "--model.lora.r 4"),
    *("--trainer.max_time 00:00:01:00", "--model.reward.init_args.path x", "--model.reward my.module.Reward"),
    *("--trainer.callbacks+ my.module.Callback", "--model.bonus_clip null", "--model.optimizer torch.optim.SGD"),
    *("--model.optimizer SGD --model.optimizer.lr 0.1", "--print_config", "--help", "--model.reward.help PythonReward"),
    *("--trainer.logger.init_args.save_dir x", "--trainer.limit_val_batches 0.5", "--ckpt_path last", "runs/folder"),
]


@pytest.mark.parametrize("flags", ACCEPTED)
def test_check_before_the_imports_refuses_nothing_that_the_parser_takes(flags: str):
    Path("other.yaml").write_text("learning_rate: 1e-3\n")
    known = known_options.shipped("fit")
    assert known is not None
    words = ["fit", "--config", "quickstart", "--config", "small.yaml", *flags.split()]
    mistakes.check(with_config_files(words)[0], known)


@pytest.mark.slow
def test_table_of_options_is_up_to_date_in_a_process_that_has_imported_nothing_else():
    subprocess.run([sys.executable, "docs/tools/reference.py", "--check"], cwd=Path(__file__).parents[2], check=True)


def test_table_for_other_versions_is_not_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(known_options, "version", lambda name: "0")
    assert known_options.shipped("fit") is None


@pytest.mark.parametrize(
    "words", [["fit", "--config", "quickstart", "--model.alhpa", "1"], ["compare", "a", "--smaples", "2"], ["fti"]]
)
def test_mistake_is_answered_without_the_libraries_that_take_seconds(words: list[str]):
    code = f"import sys; sys.argv[1:] = {words!r}\nfrom xpo_lightning.cli.main import main\n"
    code += "try: main()\nexcept SystemExit as end: assert end.code == 2\n"
    code += "print(sorted({'torch', 'transformers', 'lightning', 'peft', 'datasets'} & set(sys.modules)))"
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "did you mean" in done.stderr
    assert time.monotonic() - begun < 5  # about 0.4 s on a free core
