"""Every file that a run writes, where it cannot be written: one line, exit status 2, and what there was is intact."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_cli
from conftest import PROMPTS, fit_quietly
from damage import file_size_limit
from test_cli import Write, refused

from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.explanations import explanation
from xpo_lightning.training.replay_buffer.buffer import BufferOptions

pytestmark = pytest.mark.timeout(120)
write_config, prompts_file = test_cli.write_config, test_cli.prompts_file
TABLE = {"class_path": "CompletionsTable", "init_args": {"terminal": False}}
EXPORT = {"class_path": "PolicyExport"}
SUMMARY = {"class_path": "RunSummary"}


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give a function after which files whose name begins with something can take no byte more."""
    opened = Path.open

    def fill(name: str) -> None:
        def opening(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = opened(path, mode, *args, **options)
            if path.name.lstrip(".").startswith(name) and mode[0] in "wax":
                file.close()
                file = opened(Path("/dev/full"), mode[:1] + mode[1:], *args, **options)
            return file

        monkeypatch.setattr(Path, "open", opening)

    return fill


def snapshot(folder: Path) -> dict[str, bytes]:
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {name: content for name, content in files.items() if not name.endswith("run.yaml")}


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "start.json", "completions.jsonl"])
def test_full_disk_is_one_line_for_each_file(
    write_config: Write, tmp_path: Path, capsys: Any, full: Callable[[str], None], name: str
):
    config = write_config(trainer__callbacks=[TABLE, SUMMARY], trainer__num_sanity_val_steps=0)
    main(["fit", "--config", config])
    before = snapshot(tmp_path / "runs")
    full(name)
    options = ["--ckpt_path", "last", "--trainer.max_epochs", "2"]
    line = refused(capsys, "fit", "--config", config, *options)
    assert f"{name}' could not be written: No space left on device" in line
    after = snapshot(tmp_path / "runs")
    for file, content in before.items():
        grows = Path(file).name in ("metrics.csv", "completions.jsonl", "config.yaml", "start.json")
        assert after[file] == content or (grows and name not in file), file
    assert not [file for file in after if file.endswith((".part", ".old"))]


def test_full_disk_while_predicting_keeps_what_there_was(
    write_config: Write, tmp_path: Path, capsys: Any, full: Callable[[str], None]
):
    config = write_config(trainer__logger=False)
    main(["predict", "--config", config])
    before = snapshot(tmp_path / "runs")
    full("predictions.jsonl")
    assert "predictions.jsonl' could not be written: No space left" in refused(capsys, "predict", "--config", config)
    name = "predict/predictions.jsonl"
    assert snapshot(tmp_path / "runs")[name] == before[name]


@pytest.mark.filterwarnings("ignore:.*metrics.csv of an earlier run is replaced")
def test_full_disk_while_exporting_keeps_the_export_of_before(write_config: Write, tmp_path: Path, capsys: Any):
    config = write_config(trainer__callbacks=[EXPORT], trainer__enable_checkpointing=False, data__validation_size=0)
    folder = tmp_path / "runs" / "version_0"
    main(["fit", "--config", config, "--trainer.logger.init_args.version", "0"])
    before = snapshot(folder / "policy")
    with file_size_limit(max(map(len, before.values())) // 2):
        line = refused(capsys, "fit", "--config", config, "--trainer.logger.init_args.version", "0")
    assert f"'{folder / 'policy'}' could not be written" in line
    assert snapshot(folder / "policy") == before
    assert not list(folder.glob(".policy*"))


@pytest.mark.parametrize("verb", ["report", "plot"])
def test_verb_that_cannot_write_says_so(write_config: Write, tmp_path: Path, capsys: Any, verb: str):
    main(["fit", "--config", write_config(trainer__callbacks=[TABLE])])
    metrics = tmp_path / "runs" / "version_0" / "metrics.csv"
    suffix = ".html" if verb == "report" else ".png"
    (tmp_path / f"taken{suffix}").mkdir()
    before = metrics.read_bytes()
    for target in (tmp_path / f"{'n' * 300}{suffix}", tmp_path / f"taken{suffix}", metrics / f"inside{suffix}"):
        line = refused(capsys, verb, str(metrics), "--out", str(target))
        reasons = ("File name too long", "Is a directory", "Not a directory", "File exists")
        assert any(reason in line for reason in reasons), line
    assert metrics.read_bytes() == before
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("name", ["n" * 300, "../run.yaml/inside"])
def test_run_folder_that_cannot_be_made_is_one_line(write_config: Write, tmp_path: Path, capsys: Any, name: str):
    config = write_config(data__validation_size=0)
    line = refused(capsys, "fit", "--config", config, "--trainer.logger.init_args.name", name)
    assert "could not be written" in line


@pytest.mark.parametrize("option", ["reference_cache", "buffer"])
def test_cache_and_buffer_on_a_full_disk_are_one_line(make_module: Any, tmp_path: Path, option: str):
    value: Any = str(tmp_path / "cache") if option == "reference_cache" else BufferOptions(memory_pairs=1)
    module = make_module(**{option: value})
    with file_size_limit(6000), pytest.raises(InputError, match=rf"^model\.{option}: '.*' cannot be used"):
        fit_quietly(module, PROMPTS, default_root_dir=str(tmp_path))


def test_what_anything_else_says_of_the_file_system_is_one_line():
    """Loggers and libraries raise as they like."""
    assert explanation(OSError(28, "No space left on device")).startswith("a file could not be written or read: No ")
    assert "'/x' could not" in str(explanation(OSError(30, "Read-only file system", "/x")))
    assert explanation(ConnectionRefusedError(111, "refused")) is None


def test_half_of_a_character_in_a_column_is_written_as_json_escapes_it(write_config: Write, tmp_path: Path):
    rows = [{"prompt": f"the cat sat on mat {n}", "note": "half \ud83d of one"} for n in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["predict", "--config", write_config(data__validation_size=0)])
    (file,) = (tmp_path / "runs").rglob("predictions.jsonl")
    assert [json.loads(line)["columns"]["note"] for line in file.read_text().splitlines()] == ["half \ud83d of one"] * 4
