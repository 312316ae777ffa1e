"""The tables of both exploration pages are worked out again from the CSV files of the runs behind them."""

import csv
import math
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS, EXPERIMENTS = ROOT / "docs", ROOT / "experiments"
TOY, REALISTIC = DOCS / "exploration.md", DOCS / "exploration_realistic.md"
RESULTS = EXPERIMENTS / "exploration" / "results"
SAW_IT = "| arm | seeds that saw it | labels to the first (median) | regret at 2,000 | regret at"

Table = list[list[str]]
Row = dict[str, str]


def rows_of(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


RUNS = {f"{row['experiment']}/{row['problem']}/{row['arm']}": row for row in rows_of(RESULTS / "runs.csv")}


def table(page: Path, first: str) -> Table:
    """Return the cells of the table whose header begins so, header included."""
    found = re.findall(rf"^{re.escape(first)}.*\n\|[- |]+\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    assert len(found) == 1, f"{len(found)} tables begin with {first}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines()]


def assert_says(cell: str, value: float, error: float | None = None, slack: float = 0.0) -> None:
    """Compare a cell such as `0.357 ± 0.018` with numbers, to the digits that it shows."""
    shown = cell.replace(",", "").split(" ± ")
    wanted = [value] if error is None or len(shown) == 1 else [value, error]
    assert len(shown) == len(wanted), cell
    for text, number in zip(shown, wanted, strict=True):
        half = 0.5 * 10.0 ** -len(text.partition(".")[2])
        assert math.isclose(float(text), number, rel_tol=slack, abs_tol=half + 1e-9), f"{cell}: is {number}"


def says_median(cell: str, row: Row, column: str) -> None:
    """Compare a cell with a median, which half of the seeds may not have reached."""
    if row[column]:
        assert float(cell.replace(",", "")) == float(row[column])
    else:
        assert cell in ("–", f"> {int(row['labels']):,}")


def says_regret(cell: str, row: Row, when: str) -> None:
    """Compare a cell with a regret; the CSV has four digits of it, and two of its error."""
    error = row.get(f"regret_{when}_se")
    assert_says(cell, float(row[f"regret_{when}"]), None if error is None else float(error), slack=5e-4)


# ---- the toy problems ----

E1 = ("beta_0.02", "beta_0.015", "beta_0.0125")
E1_ROWS = {
    "labels to a regret below 1/8 (median): online DPO (π, π)": ("dpo", "labels_to_eighth_median"),
    "labels to the first `a` (median): online DPO": ("dpo", "first_found_median"),
    "seeds of 20 that are never below 1/8 within T: online DPO": ("dpo", "below_eighth_early"),
    "regret at T: online DPO": ("dpo", "regret_early"),
}


def test_table_of_the_lower_bound():
    column = ""
    seen = 0
    for name, *cells in table(TOY, "| | beta 0.02 | beta 0.015"):
        arm, column = ("xpo", column) if name == "the same: XPO" else E1_ROWS.get(name, ("", column))
        for problem, cell in zip(E1, cells, strict=True):
            beta = float(problem.removeprefix("beta_"))
            row = RUNS.get(f"E1/{problem}/{arm}")
            if name == "ref(a)":
                assert cell == f"{math.exp(-1 / (8 * beta)):.1e}".replace("e-0", "e-")
            elif name == "T":
                assert cell == f"{int(math.exp(1 / (8 * beta)) / 2):,}"
            elif name == "predicted":
                continue
            elif column == "below_eighth_early":
                assert int(cell) == round(20 * (1 - float(row[column])))
            elif column == "regret_early":
                says_regret(cell, row, "early")
            else:
                says_median(cell, row, column)
            seen += row is not None
    assert seen == 24, "4 numbers of 2 arms on 3 problems"


ARMS = {
    "XPO": "xpo",
    "XPO on both, (π, π): the paper's own runs": "xpo_both",
    "XPO, wrong sign (alpha = -0.05 beta)": "xpo_wrong_sign",
    "XPO, SGD with learning rate 50": "xpo_sgd",
    "XPO, alpha 1e-5, Adam `eps` 1e-12": "xpo_small",
    "XPO, alpha 1e-5, Adam `eps` 1e-8": "xpo_eps",
    "XPO, alpha 1e-4 (0.001 beta)": "xpo_1e-4",
    "XPO, alpha 1e-3 (0.01 beta)": "xpo_1e-3",
    "XPO, alpha 3e-3 (0.03 beta)": "xpo_3e-3",
    "XPO, alpha 1e-2 (0.1 beta)": "xpo_1e-2",
    "XPO, alpha 3e-2 (0.3 beta)": "xpo_3e-2",
    "XPO, alpha 5e-3 (0.05 beta)": "xpo",
    "XPO, alpha 2e-2 (0.2 beta)": "xpo_2e-2",
    "XPO, alpha 1e-3": "xpo_1e-3",
    "XPO, alpha 3e-2": "xpo_3e-2",
    "XPO, alpha 1e-3, lr 0.02": "xpo_lr_0.02",
    "XPO, wrong sign": "xpo_wrong_sign",
    "XPO on both, (π, π), alpha 1e-3": "xpo_both_1e-3",
    "online DPO (π, π)": "dpo",
    "online DPO": "dpo",
    "DPO (π, ref)": "dpo_reference",
    "DPO (π, ref), alpha 0": "dpo_reference",
    "online DPO, lr 0.02": "dpo_lr_0.02",
    "online DPO, temperature 2": "dpo_hot",
    "online DPO, entropy bonus of weight 0.05 beta": "dpo_entropy",
}
LESS_RARE = {
    "online DPO (π, π), ref(g) = 1e-3": "dpo",
    "DPO (π, ref), ref(g) = 1e-3": "dpo_reference",
    "XPO, alpha 5e-3, ref(g) = 1e-3": "xpo",
    "XPO, alpha 1e-3, ref(g) = 1e-3": "xpo_1e-3",
}


def test_table_of_other_arms():
    rows = table(TOY, "| arm | seeds that drew `a`")
    assert len(rows) == 10
    for name, found, first, below, eighth, regret in rows:
        row = RUNS[f"E1/beta_0.0125/{ARMS[name]}"]
        if row["labels"] == "4000":
            says_regret(regret, row, "end")
        else:  # two runs went on to T: the curve has a point before 4,000 labels and one after
            points = curve("E1", row)
            before = max((one for one in points if int(one["labels"]) <= 4000), key=lambda one: int(one["labels"]))
            after = min((one for one in points if int(one["labels"]) >= 4000), key=lambda one: int(one["labels"]))
            assert float(after["regret"]) - 5e-4 <= float(regret.split()[0]) <= float(before["regret"]) + 5e-4
            assert float(regret.split()[-1]) == pytest.approx(float(before["regret_se"]), abs=1.1e-3)
        for cell, median, column in ((found, first, "first_found"), (below, eighth, "labels_to_eighth")):
            reached = sorted(int(one[column]) for one in seeds(row) if one[column] and int(one[column]) <= 4000)
            assert int(cell) == len(reached), name
            if len(reached) > 10:
                values = [*reached, *[math.inf] * (20 - len(reached))]
                assert float(median.replace(",", "")) == statistics.median(values), name
            else:
                assert median in ("–", "> 4,000")


def curve(experiment: str, run: Row) -> list[Row]:
    rows = rows_of(RESULTS / f"curves_{experiment}.csv")
    return [row for row in rows if (row["problem"], row["arm"]) == (run["problem"], run["arm"])]


def seeds(run: Row) -> list[Row]:
    names = ("experiment", "problem", "arm")
    return [row for row in rows_of(RESULTS / "seeds.csv") if all(row[name] == run[name] for name in names)]


@pytest.mark.parametrize(
    ("header", "problem", "count"),
    [
        (
            "| arm | seeds that saw it | labels to the first (median) | regret at 2,000 | regret at 8,000",
            "E2/rare_best",
            13,
        ),
        ("| arm | seeds that saw `g`", "E3/rare_mode", 13),
        (
            "| arm | seeds that saw it | labels to the first (median) | regret at 2,000 | regret at 9,600",
            "controls/lock",
            4,
        ),
    ],
)
def test_table_of_what_arms_found(header: str, problem: str, count: int):
    rows = table(TOY, header)
    assert len(rows) == count
    for name, found, first, early, end, _predicted in rows:
        row = RUNS[f"E3/less_rare_mode/{LESS_RARE[name]}" if name in LESS_RARE else f"{problem}/{ARMS[name]}"]
        assert int(found) == round(20 * float(row["found"])), name
        says_median(first, row, "first_found_median")
        assert row["early_labels"] == "2000"
        says_regret(early, row, "early")
        says_regret(end, row, "end")


def test_table_of_blind_exploration():
    for tokens, name, start, peak, early, end, _predicted in table(TOY, "| tokens | arm"):
        arm = "dpo" if name == "online DPO" else "xpo_1e-3"
        row = RUNS[f"E2/blind_{tokens}/{arm}"]
        for cell, when in ((start, "start"), (peak, "peak"), (early, "early"), (end, "end")):
            says_regret(cell, row, when)


def test_table_of_good_coverage():
    rows = table(TOY, "| arm | regret at 1,000")
    assert len(rows) == 3
    for name, early, end, _predicted in rows:
        row = RUNS[f"controls/good_coverage/{ARMS[name]}"]
        assert (row["early_labels"], row["labels"]) == ("1000", "4000")
        says_regret(early, row, "early")
        says_regret(end, row, "end")


@pytest.mark.parametrize(
    ("problem", "alpha", "best", "shares"),
    [
        ("E2/rare_best", "xpo_1e-2", "xpo_1e-3", "0.1 beta gives back {}%"),
        ("E3/rare_mode", "xpo_2e-2", "xpo_1e-3", "0.2 beta gives back {}%"),
    ],
)
def test_what_a_large_alpha_gives_back(problem: str, alpha: str, best: str, shares: str):
    end = {arm: float(RUNS[f"{problem}/{arm}"]["regret_end"]) for arm in ("dpo_reference", alpha, best)}
    share = (end[alpha] - end[best]) / (end["dpo_reference"] - end[best])
    assert shares.format(round(100 * share)) in " ".join(TOY.read_text().split())


def test_no_run_is_described_after_labels_that_it_did_not_have():
    for name, row in RUNS.items():
        assert int(row["early_labels"]) <= int(row["labels"]), name


def test_summary_describes_a_short_run_at_its_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXPERIMENTS / "exploration")
    tables, plan = (__import__(name) for name in ("tables", "plan"))
    finished = tables.Finished(plan.Run("E1", "beta_0.0125", "dpo"), [0, 4, 8], [[0.4], [0.3], [0.2]], [None])
    assert tables._summary(finished)["early_labels"] == 8, "T is 11,013, the run has 8 labels"


def test_number_of_runs_and_of_their_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(EXPERIMENTS / "exploration")
    runs = list(__import__("plan").runs())
    assert {run.name for run in runs} == RUNS.keys()
    assert f"The {len(runs)} runs are {sum(run.steps for run in runs):,} steps of 20 seeds" in TOY.read_text()


# ---- language models ----


def at_the_end(task: str, column: str) -> dict[str, dict[str, float]]:
    """Return a number of each seed of each arm after the last label."""
    rows = rows_of(EXPERIMENTS / "realistic" / "results" / f"{task}.csv")
    last = max(int(row["labels"]) for row in rows)
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if int(row["labels"]) == last:
            found.setdefault(row["arm"], {})[row["seed"]] = float(row[column])
    return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


@pytest.mark.parametrize(("task", "labels", "arms"), [("quickstart", "1,920", 4), ("smollm2", "240", 3)])
def test_table_of_a_realistic_task(task: str, labels: str, arms: int):
    rows = table(REALISTIC, f"| after {labels} labels")
    assert len(rows) == arms
    wins = at_the_end(task, "win_rate")
    for name, *cells, gain in rows:
        arm = name.strip("`")
        for cell, column in zip(cells, ("win_rate", "kl", "score"), strict=True):
            assert_says(cell, *mean_and_error(list(at_the_end(task, column)[arm].values())))
            assert re.fullmatch(r"-?\d\.\d{3} ± \d\.\d{3}", cell), "as the command prints it"
        if arm != "dpo_reference":
            assert_says(gain, *mean_and_error([wins[arm][seed] - wins["dpo_reference"][seed] for seed in wins[arm]]))


def test_differences_that_the_page_calls_a_gain_are_beyond_two_standard_errors():
    page = " ".join(REALISTIC.read_text().split())
    wins = at_the_end("smollm2", "win_rate")
    online, xpo, dpo = (list(wins[arm].values()) for arm in ("online_dpo", "xpo", "dpo_reference"))
    for first, second, is_gain in ((online, dpo, True), (online, xpo, False), (xpo, dpo, False)):
        gain, error = mean_and_error([one - other for one, other in zip(first, second, strict=True)])
        assert (gain > 2 * error) == is_gain
        assert f"{gain:.3f} ± {error:.3f}" in page


def test_seeds_that_the_page_names():
    rows = rows_of(EXPERIMENTS / "realistic" / "results" / "smollm2.csv")
    page = REALISTIC.read_text()
    for arm in ("xpo", "online_dpo"):
        at_160 = [float(row["win_rate"]) for row in rows if (row["arm"], row["labels"]) == (arm, "160")]
        assert round(statistics.fmean(at_160), 2) == 0.73
        assert all(f"{value:.3f}" in page for value in at_160), at_160
