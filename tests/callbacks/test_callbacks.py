"""All callbacks: configs build them, bad settings are refused, and a trial run leaves no files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback
from watched_runs import build_module, loader

from xpo_lightning import callbacks as all_callbacks
from xpo_lightning.callbacks import (
    Baseline,
    CompletionsTable,
    LearningCurves,
    PolicyExport,
    PredictionsWriter,
    RunReport,
    RunSummary,
)
from xpo_lightning.core.errors import InputError


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
        getattr(all_callbacks, name)(**arguments)


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
