"""Rows of reasoning-gym's tasks, as prompts of a run whose answers are verified."""

import csv
from pathlib import Path

import pytest
from test_cli import refused

from xpo_lightning import InputError, PromptDataModule
from xpo_lightning.cli.lightning_cli import main

pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym")


def test_rows_have_what_a_verifier_needs_and_are_the_same_each_time():
    first, second, other = (
        PromptDataModule(f"reasoning-gym:chain_sum?size=6&max_terms=2&seed={seed}", batch_size=6, shuffle=False)
        for seed in (1, 1, 2)
    )
    batches = []
    for data in (first, second, other):
        data.setup("fit")
        batches.append(next(iter(data.train_dataloader())))
    assert batches[0] == batches[1] != batches[2]
    assert len(batches[0]["prompt"]) == 6
    for prompt, answer, metadata in zip(*(batches[0][name] for name in ("prompt", "answer", "metadata")), strict=True):
        assert metadata["source_dataset"] == "chain_sum"
        expression = metadata["expression"]
        assert expression in prompt
        assert eval(expression) == int(answer)  # noqa: S307  (made up here)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chain_sun", "reasoning-gym has no task 'chain_sun'; did you mean 'chain_sum'?"),
        ("chain_sum?number=3", "number"),
        ("chain_sum?min_terms=0", "min_terms"),
        ("chain_sum?size", "bad query field"),
    ],
)
def test_mistakes_are_refused_by_name(name: str, message: str):
    with pytest.raises(InputError) as refusal:
        PromptDataModule(f"reasoning-gym:{name}").setup("fit")
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("data.source")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("option", ["split", "subset", "revision", "validation_split"])
def test_options_that_a_task_does_not_have_are_refused(option: str, streaming: bool):
    with pytest.raises(InputError, match=rf"^data\.{option}: .*data\.source '?.*chain_sum"):
        PromptDataModule("reasoning-gym:chain_sum?size=4", streaming=streaming, **{option: "test"}).setup("fit")


@pytest.mark.parametrize(
    ("source", "validation", "shared"),
    [
        ("max_terms=2&size=6&seed=3", "size=4&seed=7&max_terms=2", 2),
        ("size=6", "size=4", 4),
        ("size=4&seed=6", "size=8", 2),
        ("size=6", "size=4&seed=6", 0),
        ("size=4&seed=4", "size=4", 0),
        ("size=6&max_terms=2", "size=4", 0),
    ],
)
def test_problems_in_training_and_validation_are_warned_of(
    source: str, validation: str, shared: int, recwarn: pytest.WarningsRecorder
):
    """Row i is made from seed + i: of the seeds 3 to 8 and 7 to 10, 7 and 8 are in both."""
    source, validation = (f"reasoning-gym:chain_sum?{options}" for options in (source, validation))
    data = PromptDataModule(source, validation_source=validation)
    data.setup("fit")
    prompts, held_out = ([sample["prompt"] for sample in data.prompts[role]] for role in ("training", "validation"))
    said = [str(one.message) for one in recwarn if "of its" in str(one.message)]
    assert len(said) == (shared > 0)
    if shared:
        assert len({*prompts} & {*held_out}) == shared
        for part in (f"data.validation_source={validation} shares {shared} of", "data.source="):
            assert part in said[0]


def test_run_is_scored_by_the_task_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    reward = '{"class_path": "VerifierReward", "init_args": {"verifier": "reasoning_gym"}}'
    sizes = ["--trainer.max_steps", "2", "--data.batch_size", "4", "--model.sampling.max_new_tokens", "4"]
    source = ["--data.source", "reasoning-gym:chain_sum?size=8", "--data.validation_source", "null"]
    folder = [
        "--trainer.default_root_dir",
        str(tmp_path),
        "--trainer.callbacks",
        "[]",
        "--trainer.limit_val_batches",
        "0",
    ]
    main(["fit", "--config", "quickstart", "--model.reward", reward, *source, *sizes, *folder])
    with (tmp_path / "version_0" / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [float(row["objective/scores_margin"]) for row in rows] == [0.0, 0.0], "stories are no sums"
    line = refused(capsys, "fit", "--config", "quickstart", *source[:1], "reasoning-gym:no_task", *folder)
    assert line.startswith("xpo: error: data.source: reasoning-gym has no task 'no_task'")
