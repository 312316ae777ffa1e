"""Files that were tampered with, or that a disk has damaged: none runs code, and each is refused in a line or harmless.

88 files; `XPO_FUZZ=20` makes about twenty times as many, other ones each time.
"""

import io
import json
import os
import pickle
import random
import re
import shutil
import sqlite3
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import BARE, CONFIGS, make_tokenizer
from interruptions import FOLDERS, quiet_trainer_of
from test_fuzz import TIMES, within
from transformers import AutoModelForCausalLM

from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.core.errors import InputError
from xpo_lightning.models.policy import ModelSpec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600 * TIMES),
    pytest.mark.filterwarnings("ignore:.*metrics.csv of an earlier run is replaced"),
]
MANY = 3 * TIMES
"""Mutations of each kind of file."""
ran: list[str] = []
RUNS_CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn")


def letters(prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [len(text) + 0.01 * text.count("e") for text in completions]


@pytest.fixture(scope="module", autouse=True)
def watched() -> None:
    """Note every process that is begun."""
    sys.addaudithook(lambda event, arguments: ran.append(f"{event} {arguments}") if event in RUNS_CODE else None)


@dataclass(frozen=True)
class Evil:
    """Makes a file, in one of the ways that a pickle can, when it is unpickled."""

    marker: str
    way: int

    def __reduce__(self) -> Any:
        code = f"open({self.marker!r}, 'w').close()"
        return [
            (os.system, (f"touch {self.marker}",)),
            (eval, (code,)),
            (exec, (code,)),
            (Path.touch, (Path(self.marker),)),
            (open, (self.marker, "w")),
        ][self.way % 5]


# ---- a run with everything ----


def config_of(folder: Path, **trainer: Any) -> Path:
    """Write the config of a run of two steps that keeps everything that can be kept."""
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"the cat sat on mat {n}"}) + "\n" for n in range(4))
    )
    config = {
        "seed_everything": 1,
        "model": {
            "policy": {"path": str(folder / "model")},
            "lora": {"r": 2},
            "reward": {"class_path": "PythonReward", "init_args": {"function": f"{__name__}.letters"}},
            "sampling": {"max_new_tokens": 4},
            "reference_cache": str(folder / "cache"),
            "buffer": {"memory_pairs": 1},
        },
        "data": {"source": str(folder / "prompts.jsonl"), "validation_size": 2, "batch_size": 1},
        "trainer": {
            **quiet_trainer_of(folder),
            "devices": 1,
            "max_epochs": 1,
            "callbacks": [
                {"class_path": "CompletionsTable", "init_args": {"terminal": False}},
                {"class_path": "RunSummary"},
                {"class_path": "RunCheckpoint"},  # one checkpoint, so that there is none to fall back on
                {"class_path": "PolicyExport"},
            ],
            **trainer,
        },
        "defaults": BARE,
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a model, the config of a run, and all that the run has left; and one with FSDP2's files."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(folder / "model")
    make_tokenizer("chat").save_pretrained(folder / "model")
    main(["fit", "--config", str(config_of(folder))])
    shutil.copytree(folder / "model", folder / "spread" / "model")
    main(["fit", "--config", str(config_of(folder / "spread", strategy=FOLDERS))])
    torch.distributed.destroy_process_group()
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Give a function that puts everything back as it was, and tells where it is: paths in files still fit."""
    saved = tmp_path / "saved"
    shutil.copytree(whole, saved)

    def restore() -> Path:
        shutil.rmtree(whole)
        shutil.copytree(saved, whole)
        return whole

    yield restore
    restore()


# ---- what is done to files ----


def flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 3, 20))):
        place = chance.randrange(len(changed))
        changed[place] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def zero(data: bytes, chance: random.Random) -> bytes:
    begin = chance.randrange(len(data))
    end = min(begin + chance.randint(1, 400), len(data))
    return data[:begin] + bytes(end - begin) + data[end:]


def repeat(data: bytes, chance: random.Random) -> bytes:
    begin = chance.randrange(len(data))
    end = min(begin + chance.randint(1, 400), len(data))
    return data[:end] + data[begin:]


def garbage(data: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(chance.randint(1, 400))


def odd_value(data: bytes, chance: random.Random) -> bytes:
    """Put something else in the place of a number or a word of a text."""
    words = list(words_of(data))
    if not words:
        return data + b"{"
    begin, end = chance.choice(words)
    odd = chance.choice(
        [b"-1", b"1e999", b"null", b"[]", b"{}", b'"\\ud800"', b"NaN", b"<script>", b"{{7*7}}", b"9" * 30]
    )
    return data[:begin] + odd + data[end:]


def words_of(data: bytes) -> list[tuple[int, int]]:
    return [found.span() for found in re.finditer(rb'"[^"\n]{0,40}"|\d+', data)]


DAMAGES = (flip, cut, zero, repeat, garbage)


def evil_pickle(marker: Path, way: int) -> bytes:
    return pickle.dumps(Evil(str(marker), way))


def evil_zip(data: bytes, marker: Path, way: int) -> bytes:
    """Put a hostile pickle into a checkpoint of torch, with right checksums."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(result, "w") as target:
        for name in source.namelist():
            target.writestr(name, evil_pickle(marker, way) if name.endswith("data.pkl") else source.read(name))
    return result.getvalue()


# ---- what comes of it ----


def outcome(work: Callable[[], Any], capsys: Any, marker: Path, what: str) -> str:
    """Do something with a file that was tampered with; it must be harmless, or refused with one line."""
    ran.clear()
    capsys.readouterr()
    came = "harmless"
    with within(60):
        try:
            work()
        except InputError as error:
            came = str(error)
        except SystemExit as end:
            shown = capsys.readouterr().err
            lines = [line for line in shown.splitlines() if line.startswith("xpo: error: ")]
            if end.code != 2 or len(lines) != 1 or "Traceback" in shown:
                raise AssertionError(f"{what}: status {end.code}: {shown}") from end
            came = lines[0]
        except BaseException as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    assert not marker.exists(), f"{what} was executed"
    assert not ran, f"{what} began {ran}"
    return came


def tamper(
    files: Callable[[Path], list[Path]],
    use: Callable[[Path], Any],
    copy: Callable[[], Path],
    capsys: Any,
    tmp_path: Path,
    damages: Any = DAMAGES,
    count: int = MANY,
) -> list[str]:
    """Damage files of a run one at a time, use them, and return what came of it."""
    seed = 0 if TIMES == 1 else random.randrange(2**32)
    chance, marker = random.Random(seed), tmp_path / "executed"
    came = []
    folder = copy()
    for number in range(count):
        names = files(folder)
        file, damage = names[number % len(names)], chance.choice(damages)
        before = file.read_bytes()
        file.write_bytes(damage(before, chance))
        what = f"seed {seed}, number {number}: {damage.__name__} of {file.relative_to(folder)}"
        came.append(outcome(partial(use, folder), capsys, marker, what))
        folder = copy()
    return came


def fit(folder: Path) -> None:
    main(["fit", "--config", str(folder / "run.yaml"), "--ckpt_path", "last", "--trainer.max_epochs", "2"])


def report(folder: Path) -> None:
    main(["report", str(folder / "runs" / "version_0"), "--out", str(folder / "page.html")])
    main(["plot", str(folder / "runs" / "version_0"), "--out", str(folder / "curves.png")])


def load(folder: Path) -> None:
    spec = ModelSpec(str(folder / "model"))
    spec.load_tokenizer()
    spec.load_config()
    spec.load_model()


def test_checkpoint_file(copy: Any, capsys: Any, tmp_path: Path):
    came = tamper(lambda folder: list(folder.glob("runs/version_0/checkpoints/*.ckpt")), fit, copy, capsys, tmp_path)
    assert sum("no checkpoint can be used" in one for one in came) > MANY / 3


def test_checkpoint_folder(copy: Any, capsys: Any, tmp_path: Path):
    def files(folder: Path) -> list[Path]:
        return sorted(file for file in folder.glob("spread/runs/version_0/checkpoints/*.ckpt/*"))

    came = tamper(files, lambda folder: fit(folder / "spread"), copy, capsys, tmp_path)
    assert all("no checkpoint can be used" in one for one in came)


def test_hostile_pickles(copy: Any, capsys: Any, tmp_path: Path):
    marker = tmp_path / "executed"
    for way in range(5):
        folder = copy()
        (file,) = folder.glob("runs/version_0/checkpoints/*.ckpt")
        (parts,) = folder.glob("spread/runs/version_0/checkpoints/*.ckpt")
        for path, evil, run in (
            (file, evil_zip(file.read_bytes(), marker, way), folder),
            (file, evil_pickle(marker, way), folder),
            (parts / "meta.pt", evil_zip((parts / "meta.pt").read_bytes(), marker, way), folder / "spread"),
            (parts / ".metadata", evil_pickle(marker, way), folder / "spread"),
            (parts / "__0_0.distcp", evil_pickle(marker, way), folder / "spread"),
        ):
            before = path.read_bytes()
            path.write_bytes(evil)
            assert outcome(lambda run=run: fit(run), capsys, marker, f"{path}, way {way}") != "harmless"
            path.write_bytes(before)


def broken_content(content: Any, chance: random.Random) -> Any:
    """Change or remove something somewhere in a checkpoint."""
    if isinstance(content, dict) and content:
        name = chance.choice(list(content))
        if chance.random() < 0.3:
            return {key: value for key, value in content.items() if key != name}
        return {**content, name: broken_content(content[name], chance)}
    if isinstance(content, list) and content and chance.random() < 0.7:
        place = chance.randrange(len(content))
        return [*content[:place], broken_content(content[place], chance), *content[place + 1 :]]
    return chance.choice([None, -1, "text", [], {}, torch.zeros(3), 2.5])


def test_checkpoint_of_another_content(copy: Any, capsys: Any, tmp_path: Path):
    """Whole by its checksums, and not what a run has written."""

    def other(data: bytes, chance: random.Random) -> bytes:
        result = io.BytesIO()
        torch.save(broken_content(torch.load(io.BytesIO(data), weights_only=True), chance), result)
        return result.getvalue()

    tamper(
        lambda folder: list(folder.glob("runs/version_0/checkpoints/*.ckpt")),
        fit,
        copy,
        capsys,
        tmp_path,
        [other],
        2 * MANY,
    )


@pytest.mark.parametrize("pattern", ["cache/*.sqlite", "runs/version_0/*.sqlite"])
def test_cache_and_buffer(copy: Any, capsys: Any, tmp_path: Path, pattern: str):
    tamper(lambda folder: list(folder.glob(pattern)), fit, copy, capsys, tmp_path)

    def blob(data: bytes, chance: random.Random) -> bytes:
        """Damage a value, not the form of the file."""
        file = tmp_path / "one.sqlite"
        file.write_bytes(data)
        with closing(sqlite3.connect(file)) as connection, connection:
            tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            (table,) = chance.choice(tables)
            names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            (row,) = chance.choice(connection.execute(f"SELECT rowid FROM {table}").fetchall())  # noqa: S608
            name = chance.choice(names)
            query = f"SELECT {name} FROM {table} WHERE rowid = ?"  # noqa: S608
            (value,) = connection.execute(query, (row,)).fetchone()
            if isinstance(value, bytes) and value:
                new: Any = chance.choice((flip, cut, garbage))(value, chance)
            else:
                new = chance.choice(["text", -1, 10**6, b"\xff\xfe", 2.5, f"{value}"[:-1]])
            with suppress(sqlite3.IntegrityError):  # A number must be one.
                update = f"UPDATE OR IGNORE {table} SET {name} = ? WHERE rowid = ?"  # noqa: S608
                connection.execute(update, (new, row))
        return file.read_bytes()

    tamper(lambda folder: list(folder.glob(pattern)), fit, copy, capsys, tmp_path, [blob], 2 * MANY)


def test_report_inputs(copy: Any, capsys: Any, tmp_path: Path):
    names = ("metrics.csv", "completions.jsonl", "start.json", "config.yaml")
    tamper(
        lambda folder: [folder / "runs" / "version_0" / name for name in names],
        report,
        copy,
        capsys,
        tmp_path,
        (*DAMAGES, odd_value, odd_value),
        3 * MANY,
    )


def test_run_folder(copy: Any, capsys: Any, tmp_path: Path):
    """The files that a resumed run goes on in."""
    names = ("metrics.csv", "completions.jsonl", "start.json", "config.yaml")
    tamper(lambda folder: [folder / "runs" / "version_0" / name for name in names], fit, copy, capsys, tmp_path)


def test_config_that_would_build_objects(copy: Any, capsys: Any, tmp_path: Path):
    marker = tmp_path / "executed"
    folder = copy()
    for text in (
        f"model: !!python/object/apply:os.system ['touch {marker}']",
        f"model: !!python/object/new:os.system ['touch {marker}']",
        f"? !!python/object/apply:pathlib.Path.touch [ {marker} ]\n: 1",
    ):
        (folder / "run.yaml").write_text(text)
        assert outcome(lambda: fit(folder), capsys, marker, text) != "harmless"


def test_model_and_tokenizer_folder(copy: Any, capsys: Any, tmp_path: Path):
    damages = (*DAMAGES, odd_value, odd_value)
    tamper(lambda folder: sorted((folder / "model").iterdir()), load, copy, capsys, tmp_path, damages, 4 * MANY)


def test_model_folder_that_brings_code(copy: Any, capsys: Any, tmp_path: Path):
    """Its own Python files, a pickle in the place of the weights, and a chat template that reaches for Python."""
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w').close()\nclass Thing: pass\n"
    auto = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "canary.Thing")

    def with_code(folder: Path, file: str, **changes: Any) -> None:
        (folder / "canary.py").write_text(code)
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **changes}))

    def with_pickle(folder: Path, name: str, evil: bytes) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(evil)

    weights = io.BytesIO()
    torch.save({"lm_head.weight": Evil(str(marker), 3)}, weights)
    reaching = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch " + str(
        marker
    )
    for number, change in enumerate(
        [
            lambda model: with_code(model, "config.json", auto_map=auto),
            lambda model: with_code(model, "config.json", auto_map=auto, model_type="canary"),
            lambda model: with_code(
                model,
                "tokenizer_config.json",
                auto_map={"AutoTokenizer": ["canary.Thing"] * 2},
                tokenizer_class="Thing",
            ),
            lambda model: with_pickle(model, "pytorch_model.bin", weights.getvalue()),
            lambda model: with_pickle(model, "pytorch_model.bin", evil_pickle(marker, 0)),
            lambda model: (model / "chat_template.jinja").write_text(reaching + "') }}"),
        ]
    ):
        folder = copy()
        change(folder / "model")

        def use(folder: Path = folder) -> None:
            load(folder)
            tokenizer = ModelSpec(str(folder / "model")).load_tokenizer()
            try:
                tokenizer.apply_chat_template([{"role": "user", "content": "red"}], tokenize=False)
            except Exception as error:
                raise InputError(str(error)) from error

        outcome(use, capsys, marker, f"code {number}")
