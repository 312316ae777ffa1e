"""Every YAML parses through the real command line, and the recipes say what they must."""

import re
from functools import cache
from pathlib import Path

import pytest
from jsonargparse import Namespace

from xpo_lightning.cli.lightning_cli import XPOCLI, main
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.paths import resolve
from xpo_lightning.core.recipes import config_file, with_config_files
from xpo_lightning.evaluation.run_config import read_run_config

CONFIGS = Path(__file__).parents[2] / "configs"
OVERLAYS = {
    "tldr_lora.yaml": "tldr.yaml",
    "iterated.yaml": "quickstart.yaml",
    "8b_full_nodes.yaml": "scale/8b_full_8_gpus.yaml",
    "8b_full_8_gpus_vllm.yaml": "scale/8b_full_8_gpus.yaml",
    "8b_lora_vllm.yaml": "scale/8b_lora_one_gpu.yaml",
    "70b_lora_8_gpus_vllm.yaml": "scale/8b_lora_one_gpu.yaml",
    **{file.name: "quickstart.yaml" for file in CONFIGS.glob("methods/*.yaml")},
}
FILES = sorted(CONFIGS.rglob("*.yaml"))


class ParsingCLI(XPOCLI):
    """Parses and checks arguments, and stops there."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def after_instantiate_classes(self) -> None:
        """Look for no checkpoint."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def parse(*args: str) -> Namespace:
    cli = ParsingCLI(list(args))
    return cli.config[cli.subcommand]


@cache
def parse_file(path: Path, *args: str) -> Namespace:
    bases = [CONFIGS / OVERLAYS[path.name]] if path.name in OVERLAYS else []
    return parse("fit", *(part for file in [*bases, path] for part in ("--config", str(file))), *args)


def test_configs_are_found():
    assert {"quickstart.yaml", "tldr.yaml", "tldr_lora.yaml", "smollm2.yaml", "iterated.yaml"} <= {
        file.name for file in FILES
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_config_parses_and_is_complete(file):
    config = parse_file(file)
    assert config.model.policy.path
    assert config.data.source or config.data.preferences
    assert config.model.reward.class_path.startswith("xpo_lightning.")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_config_header_says_what_it_does_needs_and_takes(file):
    header = file.read_text().split("\n\n")[0] + file.read_text()[:1500]
    for heading in ("What it does", "What it needs", "How long"):
        assert f"# {heading}" in header


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_config_files_it_names_exist(file):
    data = parse_file(file).data
    for source in (data.source, data.preferences, data.validation_source):
        if source and source.startswith("package:"):
            assert Path(resolve(source, "data.source")).is_file()


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, marks=[pytest.mark.slow] * (file.name not in ("quickstart.yaml", "sppo.yaml")))
        for file in FILES
    ],
    ids=lambda file: file.name,
)
def test_config_by_its_name_is_the_file(file, tmp_path, monkeypatch):
    expected = parse_file(file)
    monkeypatch.chdir(tmp_path)
    bases = [OVERLAYS[file.name]] if file.name in OVERLAYS else []
    own = f"methods/{file.stem}" if file.parent.name == "methods" else file.stem
    names = [*(Path(name).stem for name in bases), own]
    named = parse("fit", *(part for name in names for part in ("--config", name)))
    for group in ("model", "data", "trainer"):
        assert named[group] == expected[group]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_config_by_its_file_name_is_the_recipe_in_any_folder(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / file.stem).mkdir()  # a folder is no config
    inner = file.relative_to(CONFIGS)
    own = f"methods/{file.stem}" if file.parent.name == "methods" else file.stem
    names = [own, f"{own}.yaml", f"{own}.yml", str(inner), f"configs/{inner}", f"./{inner}"]
    assert [Path(config_file(name)) for name in names] == [file] * len(names)
    words, files = with_config_files(["fit", "--config", f"{own}.yaml", f"--config={own}.yaml", "-c", str(inner)])
    assert files == [str(file)] * 3
    assert words == ["fit", "--config", str(file), f"--config={file}", "-c", str(file)]


def test_own_file_goes_before_a_recipe_and_another_folder_is_not_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("elsewhere/tldr.yaml", "scale/tldr.yaml", str(tmp_path / "tldr.yaml"), "../configs/tldr.yaml"):
        with pytest.raises(InputError, match=r"there is no file .*did you mean 'tldr'"):
            config_file(name)
    (tmp_path / "tldr.yaml").write_text("model: {}\n")
    assert config_file("tldr.yaml") == "tldr.yaml"


def test_recipe_is_found_by_its_file_name_by_every_verb(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for verb in ("fit", "validate", "predict", "check"):
        assert parse(verb, "--config", "quickstart.yaml").model.beta == 0.3
    assert read_run_config("quickstart.yaml").module.objective is not None
    main(["recipes", "quickstart.yaml", "mine.yaml"])
    assert (tmp_path / "mine.yaml").read_bytes() == (CONFIGS / "quickstart.yaml").read_bytes()


def test_tldr_is_the_run_of_trls_example():
    config = parse_file(CONFIGS / "tldr.yaml")
    model, data, trainer = config.model, config.data, config.trainer
    assert model.policy.path == model.reward.init_args.path == "EleutherAI/pythia-14m"
    assert data.source == "trl-lib/tldr"
    assert model.learning_rate == 5e-7
    assert data.batch_size == 4 * 32
    assert model.micro_batch_size == 4
    assert trainer.max_epochs == 3
    assert model.sampling.max_new_tokens == 53
    assert model.warmup_ratio == 0.1
    assert model.missing_eos_penalty == 1.0
    assert (model.alpha, model.beta, model.sampling.temperature) == (1e-5, 0.1, 0.9)


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001"])
def test_alpha_in_yaml_when_in_scientific_notation_then_it_is_a_number(tmp_path, text):
    overlay = tmp_path / "alpha.yaml"
    overlay.write_text(f"model:\n  alpha: {text}\n  learning_rate: {text}\n")
    model = parse_file(CONFIGS / "quickstart.yaml", "--config", str(overlay)).model
    assert model.alpha == model.learning_rate == 1e-5
    assert isinstance(model.alpha, float)


def test_alpha_when_a_list_or_a_schedule_then_both_parse(tmp_path):
    overlay = tmp_path / "alpha.yaml"
    overlay.write_text(
        "model:\n  alpha: [1e-5, 5e-6, 0]\n"
        "  beta:\n    class_path: Cosine\n    init_args: {start: 0.2, end: 0.05, steps: 10}\n"
    )
    model = parse_file(CONFIGS / "quickstart.yaml", "--config", str(overlay)).model
    assert model.alpha == [1e-5, 5e-6, 0]
    assert model.beta.class_path == "xpo_lightning.Cosine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.alfa", "1"],
        ["--model.policy.pfad", "x"],
        ["--data.batchsize", "3"],
        ["--model.sampling.temprature", "1"],
        ["--model.reward.init_args.pth", "x"],
        ["--model.alpha", "much"],
        ["--data.batch_size", "2.5"],
        ["--data.truncate", "right"],
        ["--model.policy.dtype", "int8"],
        ["--model.lr_schedule", "exponential"],
        ["--model.sampling.stop_strings", "7"],
        ["--model.reward", "NoSuchReward"],
    ],
    ids=" ".join,
)
def test_unknown_keys_and_wrong_types_when_given_then_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_file(CONFIGS / "quickstart.yaml", *arguments)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("xpo: error: ")
    assert arguments[0].removeprefix("--").split(".")[-1] in line


def test_no_page_or_config_holds_a_placeholder_or_names_a_page_that_is_not_there():
    root = CONFIGS.parent
    for file in [*FILES, root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").rglob("*.md")]:
        text = file.read_text()
        assert not re.search(r"\b(RESULT|MEASURED|TODO|FIXME|XXX)\b", text), file
        for page in re.findall(r"\bdocs/\w+\.md", text):
            assert (root / page).is_file(), (file, page)
