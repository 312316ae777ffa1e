"""`xpo plot`: the curves of one run and of several, from their files."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from test_cli import refused

from xpo_lightning.cli.lightning_cli import main
from xpo_lightning.reporting.metrics_file import Series, read_metrics, smooth, thin
from xpo_lightning.reporting.panels import PANELS
from xpo_lightning.reporting.picture import figure_of, run_colors
from xpo_lightning.reporting.run_files import find_run, find_runs

CSV = """\
epoch,eval/win_rate,eval/win_rate_stderr,loss/dpo,step,win_rate
0,0.5,0.1,,0,
0,,,0.75,0,0.25
0,,,0.5,1,0.75
0,0.625,0.05,,1,
"""


def write_metrics(folder: Path, text: str = CSV) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text(text)
    return folder / "metrics.csv"


def panel(axes: Sequence[Axes], title: str) -> Axes:
    (one,) = (one for one in axes if one.get_title(loc="left").startswith(title))
    return one


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# ---- series ----


def test_series_come_from_the_file(tmp_path: Path):
    metrics = read_metrics(write_metrics(tmp_path))
    assert metrics["eval/win_rate"] == Series([0, 1], [0.5, 0.625])
    assert metrics["loss/dpo"] == Series([0, 1], [0.75, 0.5])


def test_what_was_done_again_counts_once(tmp_path: Path):
    """A run that went back from step 5 to 2, and on to 4, in one file; its last line was broken off by a kill."""
    text = "eval/win_rate,loss/dpo,step\n,0.9,1\n0.5,,2\n,0.8,2\n,0.7,3\n,0.6,4\n0.6,,4\n,0.5,5\n,0.75,3\n,0.65,4\n,0.5"
    metrics = read_metrics(write_metrics(tmp_path, text))
    assert metrics["loss/dpo"] == Series([1, 2, 3, 4], [0.9, 0.8, 0.75, 0.65])
    assert metrics["eval/win_rate"] == Series([2], [0.5]), "the validation of step 4 was not of this run"


def test_a_cell_that_is_no_number_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_metrics(tmp_path, "loss/dpo,step\n0.9,1\nhigh,2\n")
    line = refused(capsys, "plot", str(tmp_path))
    assert f"{file}, line 3: loss/dpo is 'high', which is no number" in line
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    assert "has no column 'step'" in refused(capsys, "plot", str(tmp_path / "table.csv"))


def test_smoothing_averages_a_tenth_of_the_series():
    assert smooth([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert smooth([float(i % 2) for i in range(20)]) == [0.0] + [0.5] * 19
    broken = smooth([math.nan, *[2.0] * 19, math.inf])
    assert math.isnan(broken[0])
    assert broken[1:] == [2.0] * 20


def test_thinning_keeps_ends_and_extremes():
    values = [math.sin(number / 50) for number in range(10_000)]
    values[1234], values[4321] = 5.0, -7.0
    thinned = thin(Series([*range(10_000)], values), most=100)
    assert len(thinned.values) <= 102
    assert {0, 1234, 4321, 9999} <= set(thinned.steps)
    assert thinned.values == [values[step] for step in thinned.steps]
    short = Series([1, 2], [0.0, 1.0])
    assert thin(short) is short


# ---- one run ----


def test_lines_and_bands_of_one_run_are_its_numbers(tmp_path: Path):
    axes = panel(figure_of({"": read_metrics(write_metrics(tmp_path))}).axes, "Win rate")
    raw, smoothed, held_out, _ = axes.lines
    assert raw.get_xydata().tolist() == smoothed.get_xydata().tolist() == [[0, 0.25], [1, 0.75]]
    assert held_out.get_xydata().tolist() == [[0, 0.5], [1, 0.625]]
    (band,) = axes.collections
    corners = {(float(x), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(0, 0.4), (0, 0.6), (1, 0.575), (1, 0.675)}


def test_a_panel_without_numbers_says_so(tmp_path: Path):
    axes = figure_of({"": read_metrics(write_metrics(tmp_path))}).axes
    assert [texts(one) for one in axes] == [[], ["not logged"], [], *[["not logged"]] * 3]


def test_plot_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_metrics(tmp_path / "runs" / "version_0")
    out = tmp_path / "new" / "one.png"
    main(["plot", str(tmp_path / "runs" / "version_0"), "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "runs/version_0" in capsys.readouterr().out
    assert [entry.name for entry in out.parent.iterdir()] == ["one.png"]


# ---- several runs ----


def test_runs_are_drawn_over_each_other(tmp_path: Path):
    """The second run is shorter, and never logged a divergence or the reference's length."""
    names = ["loss/dpo", "objective/kl", "completions/model_length", "completions/ref_length"]
    for name, steps, columns in (("long", 9, names), ("short", 4, names[::2])):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", *columns])
            writer.writeheader()
            writer.writerows({"step": step, **dict.fromkeys(columns, 1 / step)} for step in range(1, steps + 1))
    figure = figure_of({name: read_metrics(tmp_path / name / "metrics.csv") for name in ("long", "short")})
    blue, orange = run_colors(2)
    loss = panel(figure.axes, "Preference loss")
    assert {to_hex(line.get_color()): len(line.get_xdata()) for line in loss.lines} == {blue: 9, orange: 4}
    assert [line.get_xdata()[-1] for line in loss.lines] == [9, 4]
    assert texts(panel(figure.axes, "KL")) == ["not logged: short"]
    assert texts(panel(figure.axes, "Completion length")) == ["not logged: short (reference)"]
    assert texts(loss) == []
    writers = panel(figure.axes, "Completion length").get_legend().get_texts()
    assert [text.get_text() for text in writers] == ["policy", "reference"]
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["long", "short", "held out, ± standard error", "training, smoothed"]
    handles = [to_hex(line.get_color()) for line in legend.get_lines()[:2]]
    assert handles == [blue, orange]


def test_every_run_has_a_colour_of_its_own():
    assert all(len(set(run_colors(count))) == count for count in (1, 8, 9, 30))


def test_plot_takes_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("a", "b"):
        write_metrics(tmp_path / name / "version_0")
    out = str(tmp_path / "both.png")
    main(["plot", str(tmp_path / "a"), str(tmp_path / "b" / "version_0"), "--out", out])
    assert f"Learning curves of a, b: {out}" in capsys.readouterr().out


# ---- which run is meant ----


def test_newest_version_with_metrics_is_meant_by_the_parent(tmp_path: Path):
    for number in (0, 2, 10):
        write_metrics(tmp_path / f"version_{number}")
    (tmp_path / "version_11").mkdir()  # has not logged anything
    (tmp_path / "validate").mkdir()
    assert find_run(str(tmp_path)).folder == tmp_path / "version_10"
    assert find_run(str(tmp_path / "version_2")).folder == tmp_path / "version_2"
    assert find_run(str(tmp_path / "version_0" / "metrics.csv")).folder == tmp_path / "version_0"


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["x/version_0", "x/version_1"], ["version_0", "version_1"]),
        (["x/a/version_0", "x/b/version_0"], ["a", "b"]),
        (["x/a/version_0", "x/a/version_1", "x/b/version_0"], ["a/version_0", "a/version_1", "b/version_0"]),
        (["x", "x/y"], ["x", "x/y"]),
        (["q/version_0"], ["q/version_0"]),
    ],
)
def test_runs_have_the_shortest_names_that_tell_them_apart(tmp_path: Path, places: list[str], names: list[str]):
    for place in places:
        write_metrics(tmp_path / place)
    assert list(find_runs([str(tmp_path / place) for place in places])) == names


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_metrics(tmp_path / "runs" / "version_0")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    run = str(tmp_path / "runs" / "version_0")
    for words, complaint in {
        ("nowhere",): "RUN: there is no nowhere",
        (str(tmp_path / "notes.txt"),): "neither a run's folder nor a metrics.csv",
        (str(tmp_path / "empty"),): "empty nor a version_0, version_1, ... in it has a metrics.csv",
        (run, f"{run}/metrics.csv"): "are the same run; give it once",
        (run, "--out", "a.pdf"): "--out must end with .png, but is 'a.pdf'",
        (): "are required: runs",
    }.items():
        assert complaint in refused(capsys, "plot", *words)


def test_panels_are_as_many_as_the_picture_has_room_for():
    assert len(PANELS) == 6
