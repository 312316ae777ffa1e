"""The errors that docs/troubleshooting.md quotes are those that its commands give."""

import re
import shlex
from pathlib import Path

import pytest

from xpo_lightning.cli.lightning_cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^```text\n(xpo .*)\n(xpo: error: .*)\n```$", PAGE, re.MULTILINE)
SMALL = ["--trainer.max_steps=3", "--trainer.num_sanity_val_steps=0", "--data.batch_size=2"]
SMALL += ["--data.max_validation_prompts=2", "--model.sampling.max_new_tokens=8"]
REWARDS = """
import time

def broken(prompts, completions, columns):
    return [float("nan") for _ in completions]

def one(prompts, completions, columns):
    return [1.0]

def slow(prompts, completions, columns):
    time.sleep(3)
    return [1.0 for _ in completions]
"""


def test_page_has_commands_and_nothing_else_that_looks_like_one():
    assert len(QUOTED) == PAGE.count("```text") > 15


@pytest.mark.parametrize(("command", "error"), QUOTED, ids=[error[12:60] for _, error in QUOTED])
def test_error_is_the_one_on_the_page(command, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.jsonl").write_text('{"text": "Once upon a time"}\n')
    (tmp_path / "prompts_long.jsonl").write_text(
        '{"prompt": "One cold morning, Mara found a wet kitten behind the old mill."}\n'
    )
    monkeypatch.delitem(__import__("sys").modules, "my_rewards", raising=False)
    words = shlex.split(command)[1:]
    given = {word.split("=")[0] for word in words}
    words[3:3] = [word for word in SMALL if word.split("=")[0] not in given]
    words[3:3] = ["--trainer.callbacks=[]"]  # what the quickstart shows and writes takes time
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert error in said
    (line,) = [line for line in said.splitlines() if line.startswith("xpo: error: ")]
    assert line.startswith(error)
