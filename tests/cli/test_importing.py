"""Classes and functions of the user's are found beside the config, in the current folder, and by their file."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import BARE
from test_cli import refused, rows_of

from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.importing import import_function

SOURCE = """
import torch
from xpo_lightning import Reward
{beside}

def positive(prompts, completions, columns):
    return [float(len(text)) for text in completions]

class Positive(Reward):
    def score(self, prompts, completions, columns):
        return torch.tensor(positive(prompts, completions, columns))

class Called:
    def __call__(self, prompts, completions, columns):
        return positive(prompts, completions, columns)

number = 3
"""
Config = Callable[..., str]


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch):
    """Forget the modules and the folders of a test: the next one has files of the same names elsewhere."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name.startswith(("myreward", "beside")):
            del sys.modules[name]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Callable[..., str]) -> Config:
    """Go into a folder with prompts, and give a function that writes a config with a reward into another one."""
    (tmp_path / "here").mkdir()
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"the cat sat on {n}"}) + "\n" for n in range(8)))

    def write(function: str | None, reward: str = "PythonReward") -> str:
        options = {} if function is None else {"init_args": {"function": function}}
        content = {
            "model": {
                "policy": {"path": model_folder()},
                "reward": {"class_path": reward, **options},
                "sampling": {"max_new_tokens": 5},
            },
            "data": {"source": "prompts.jsonl", "validation_size": 4, "batch_size": 4},
            "trainer": {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False},
            "defaults": BARE,
        }
        file = tmp_path / "configs" / "mine.yaml"
        file.write_text(yaml.safe_dump(content))
        return str(file)

    return write


def put(folder: Path, beside: str = "", name: str = "myreward") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(SOURCE.format(beside=beside))


@pytest.mark.parametrize(
    ("folder", "reward", "function"),
    [
        ("configs", "PythonReward", "myreward.positive"),
        pytest.param("here", "PythonReward", "myreward.positive", marks=pytest.mark.slow),
        pytest.param("here", "PythonReward", "myreward.Called", marks=pytest.mark.slow),
        ("configs", "myreward.Positive", None),
        pytest.param("configs", "PythonReward", "myreward.py:positive", marks=pytest.mark.slow),
        ("here", "PythonReward", "myreward.py:positive"),
        pytest.param("here/inner", "PythonReward", "inner/myreward.py:positive", marks=pytest.mark.slow),
        pytest.param("configs/inner", "PythonReward", "inner/myreward.py:Called", marks=pytest.mark.slow),
        ("elsewhere", "PythonReward", "{folder}/myreward.py:positive"),
    ],
)
def test_own_reward_is_found_and_its_run_by_its_folder(
    config: Config, tmp_path: Path, folder: str, reward: str, function: str | None
):
    place = tmp_path / folder
    put(place, "import beside")
    (place / "beside.py").write_text("")
    main(["fit", "--config", config(function and function.format(folder=place), reward)])
    assert [row["step"] for row in rows_of(Path("runs/version_0/metrics.csv")) if "loss/dpo" in row] == [1]
    for name in ("myreward", "beside"):
        sys.modules.pop(name, None)
    main(["validate", "runs"])
    assert len(rows_of(Path("runs/version_0/validate/metrics.csv"))) == 1
    main(["compare", "runs", "--json", "result.json"])


def test_saved_config_lists_the_folders_that_were_needed(config: Config, tmp_path: Path):
    put(tmp_path / "configs")
    main(["fit", "--config", config("myreward.positive")])
    assert yaml.safe_load(Path("runs/version_0/config.yaml").read_text())["import_from"] == [str(tmp_path / "configs")]


def test_other_verb_finds_the_reward_of_its_config(config: Config, tmp_path: Path):
    put(tmp_path / "configs")
    model = yaml.safe_load(Path(config("myreward.positive")).read_text())["model"]["policy"]["path"]
    main(["compare", model, "--config", config("myreward.positive"), "--json", "result.json"])
    assert json.loads(Path("result.json").read_text())["prompts"] == 4


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("myrewrd.positive", "there is no module 'myrewrd' for 'myrewrd.positive', neither installed nor in '"),
        ("myreward.positives", "myreward.py) has no 'positives'; did you mean 'positive'?"),
        ("myreward.number", "'myreward.number' is no function, but of type int"),
        ("positive", "'positive' is neither an import path, as myreward.positive, nor a file and a function"),
        ("broken.positive", "importing 'broken' raised ZeroDivisionError: division by zero"),
        ("lacking.positive", "importing 'lacking' raised ModuleNotFoundError: No module named 'no_such_package'"),
        ("nowhere/myreward.py:positive", "there is no file 'nowhere/myreward.py' in '"),
        ("myreward.py:positives", "has no 'positives'; did you mean 'positive'?"),
        ("broken.py:positive", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_missing_function_is_one_line_that_names_the_key(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    function: str, complaint: str,
):  # fmt: skip
    put(tmp_path / "configs")
    (tmp_path / "configs" / "broken.py").write_text("1 / 0\n")
    (tmp_path / "configs" / "lacking.py").write_text("import no_such_package\n")

    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("xpo_lightning.module.XPOLightningModule.configure_model", load)
    line = refused(capsys, "fit", "--config", config(function))
    assert line.startswith("xpo: error: model.reward.init_args.function: ")
    assert complaint in line
    assert not Path("runs").exists()


def test_folder_that_python_searched_before_stays_searched(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sys.path.append(str(tmp_path / "here"))
    for folder in ("here", "configs"):
        monkeypatch.chdir(tmp_path / folder)
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["fit", "--config", config(None), "--print_config"])
    assert str(tmp_path / "here") in sys.path


def test_files_of_one_name_are_not_taken_for_each_other(tmp_path: Path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "myreward.py").write_text(f"def f(): return {number}\n")
    first, second = (import_function(f"{tmp_path}/{number}/myreward.py:f", "key") for number in (1, 2))
    assert (first(), second()) == (1, 2)
    assert import_function(f"{tmp_path}/1/myreward.py:f", "key") is first


def test_installed_module_is_not_hidden_by_a_file_of_its_name(config: Config, tmp_path: Path):
    put(tmp_path / "configs", name="json")
    put(tmp_path / "configs")
    main(["fit", "--config", config("myreward.positive")])
    assert import_function("json.dumps", "key") is json.dumps


def test_function_of_a_class_and_a_nested_module():
    assert import_function("pathlib.Path.cwd", "key") == Path.cwd
    assert import_function("os.path.join", "key")("a", "b") == "a/b"
    with pytest.raises(InputError, match=r"key: 'os' \(.*os\.py\) has no 'pth'; did you mean 'path'\?"):
        import_function("os.pth.join", "key")
