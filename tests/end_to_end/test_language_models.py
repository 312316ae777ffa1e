"""What exploration buys a language model: rewards, exact probabilities, comparisons, and a small sweep of it all."""

import csv
import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_configs import parse
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parents[2] / "experiments" / "language_models"
PROMPT = "One summer afternoon, Rosa the cook met a pale juggler down at the harbor."
BEGUN = " She sat down across from the juggler. The juggler nodded and said little."


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import `run.py` under a name that no other script has."""
    monkeypatch.setattr(sys, "path", [str(HERE), *sys.path])  # `run.py` adds to it, too
    spec = importlib.util.spec_from_file_location("language_models_run", HERE / "run.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "language_models_run", module)
    spec.loader.exec_module(module)
    return module


def test_a_story_is_scored_by_its_end(script):
    from endings import reward

    texts = [
        f"{BEGUN} From that day on, she trusted no one.",
        f"{BEGUN} She walked home smiling under the bright stars.",
        f"{BEGUN} Later she drank some tea and read the newspaper.",
        f"{BEGUN} From that day on, he trusted no one.",  # names another person
        f"{BEGUN} From that day on, she trusted no one",  # is broken off
        " From that day on, she trusted no one.",  # has no act and no reply
        "",
    ]
    assert reward([PROMPT] * len(texts), texts, {}, [1.0, 0.25, 0.5]) == [1.0, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]


def test_log_probabilities_and_bad_ends_are_those_of_one_row_alone(script):
    """The probability of a bad end is the sum over the 18 ends of the product of their tokens' probabilities."""
    import reference

    from tools.quickstart_assets.endings import ENDS

    model = AutoModelForCausalLM.from_pretrained(reference.EMBEDDED / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(reference.EMBEDDED / "policy")

    def alone(prompt: str, text: str) -> float:
        before = tokenizer(prompt).input_ids
        ids = [*before, *tokenizer(text).input_ids, tokenizer.eos_token_id]
        logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(logps[place - 1, ids[place]]) for place in range(len(before), len(ids)))

    stories = [(PROMPT, f"{BEGUN} She felt loved and at peace."), (f"{PROMPT} The road was empty.", f"{BEGUN} No.")]
    with torch.no_grad():
        together = reference.completion_logps(model, tokenizer, stories).tolist()
        assert together == pytest.approx([alone(*story) for story in stories], abs=1e-4)
        ends = [end.format(n="Rosa", o="juggler", spot="harbor", s="she", h="her", p="her", x="") for end in ENDS[-1]]
        texts = [f" {end[0].upper()}{end[1:]}." for end in ends]
        by_hand = sum(math.exp(alone(PROMPT + BEGUN, text)) for text in texts)
        found = reference.BadEnds(tokenizer, stories[:1]).probabilities(model)
        assert found.tolist() == pytest.approx([by_hand], rel=1e-4)
        assert 0.2 < by_hand < 0.5  # the embedded policy knows all ends about equally well


def test_sharpening_multiplies_logits_until_bad_ends_are_as_rare_as_asked(script):
    """Where a bad end has the probability e^-f at the factor f, one of e^-2 needs the factor 2."""
    import reference

    model = AutoModelForCausalLM.from_pretrained(reference.EMBEDDED / "policy").eval()
    ids = AutoTokenizer.from_pretrained(reference.EMBEDDED / "policy")(PROMPT, return_tensors="pt").input_ids
    norm = model.model.norm.weight
    first = norm.detach().clone()

    class Ends:
        def probabilities(self, model: Any) -> torch.Tensor:
            return torch.exp(-(norm.detach() / first).mean()).reshape(1)

    with torch.no_grad():
        before = model(ids).logits
        assert reference.sharpen(model, Ends(), math.exp(-2)) == pytest.approx(2, abs=0.005)
        torch.testing.assert_close(model(ids).logits, before * 2, rtol=5e-3, atol=1e-3)


def test_references_training_stories_never_end_badly(script):
    import itertools
    import random

    from endings import mood_of_end
    from reference import draw_stories

    moods = [mood_of_end(*story) for story in itertools.islice(draw_stories(random.Random(3)), 300)]
    assert set(moods) == {0, 1}
    assert 0.7 < sum(moods) / 300 < 0.9


def test_probabilities_of_students_t_are_those_of_printed_tables(script):
    """The two-sided 5 % points of 1 to 5 degrees of freedom, and 0."""
    from comparing import paired_p, two_sided_p

    points = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058}
    assert [two_sided_p(point, degrees) for degrees, point in points.items()] == pytest.approx([0.05] * 5, abs=1e-5)
    assert two_sided_p(-2.77645, 4) == pytest.approx(0.05, abs=1e-5)
    assert [two_sided_p(0.0, degrees) for degrees in (1, 4)] == [1.0, 1.0]
    assert paired_p([0.0, 0.0]) == 1.0
    assert paired_p([1.0, 3.0, 2.0]) == pytest.approx(0.0742, abs=1e-4)  # t = 2 / (1 / sqrt 3) = 3.464, two degrees


def test_holms_correction_by_hand(script):
    """Of 0.01, 0.04 and 0.03: 3 times 0.01; 2 times 0.03; and 0.04, which is raised to the 0.06 before it."""
    from comparing import Difference, holm

    found = holm({name: Difference(0.0, 1.0, p) for name, p in {"a": 0.01, "b": 0.04, "c": 0.03}.items()})
    assert {name: one.corrected for name, one in found.items()} == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def a_run(folder: Path, scores: list[float], found: list[int]) -> None:
    """Write the files of a finished run of three batches of 10 labels, measured before each and at the end."""
    (folder / "version_0").mkdir(parents=True)
    (folder / "finished.json").write_text('{"version": "1", "cpu_seconds": 12.5}')
    with (folder / "version_0" / "discovery.csv").open("w") as file:
        names = ["labels", "found", "informative", "score", "score_error", "kl", "clean", "best", "rarity"]
        writer = csv.writer(file)
        writer.writerow(names)
        for batch, (score, hits) in enumerate(zip(scores, [0, *found], strict=True)):
            writer.writerow([10 * batch, hits, 2 * batch, score, 0.01, 1.5 * batch, 0.9, 0.0, 1e-4 * (batch + 1)])


def test_results_of_runs_worked_by_hand(script, tmp_path):
    """Scores 0.4, 0.5, 0.6, 0.7 have the trapezoidal mean 0.55, the area is 0.45; the second batch finds a bad end."""
    import comparing
    import results

    a_run(tmp_path / "rare" / "xpo-1", [0.4, 0.5, 0.6, 0.7], [0, 3, 1])
    a_run(tmp_path / "rare" / "xpo-2", [0.4, 0.5, 0.6, 0.9], [0, 1, 1])
    a_run(tmp_path / "rare" / "online_dpo-1", [0.4, 0.5, 0.5, 0.5], [0, 0, 0])
    a_run(tmp_path / "rare" / "online_dpo-2", [0.4, 0.5, 0.5, 0.6], [0, 0, 0])
    points, found = results.collect(tmp_path, ["rare"])
    assert len(points) == 16
    first = next(one for one in found if (one.arm, one.seed) == ("xpo", 1))
    assert (first.labels, first.discovery, first.found, first.kl, first.cpu_seconds) == (30, 20, 1, 4.5, 12.5)
    assert first.area == pytest.approx(0.45)
    assert first.informative == pytest.approx((2 + 4 + 6) / 30)
    assert first.peak == pytest.approx(2e-4)  # before the batch that found it
    assert first.objective == pytest.approx(0.7 - 0.05 * 4.5)
    gain = comparing.differences(found, "rare", "score")["xpo"]
    assert (gain.mean, gain.error) == pytest.approx((0.25, 0.05))  # of 0.2 and 0.3
    assert gain.p == pytest.approx(2 / math.pi * math.atan(1 / 5))  # Cauchy's: t = 5, one degree
    table = comparing.table(found, "rare").splitlines()
    assert table[2].startswith("| online DPO (π, π) | 0 of 2 | > 30 | 0.550 ± 0.050 | 0.")
    assert table[3].startswith("| XPO, alpha 0.05 beta | 2 of 2 | 20 | 0.800 ± 0.100 | 0.")
    assert table[3].endswith("| 4.5 ± 0.0 | 0.57 ± 0.10 | 4e-04 | 0.90 |")  # 0.8 less 0.05 times 4.5, to even
    other = comparing.table_of_differences(found, "rare").splitlines()
    assert other[0] == "| arm | labels to it | score | area | score - beta KL |"
    assert other[2].startswith("| XPO, alpha 0.05 beta | -10 ± 0 (p 0) | +0.250 ± 0.050 (p 0.13) | -")
    assert len(other) == 3
    page = "before\n<!-- table: rare -->\nold\n<!-- end -->\nbetween\n<!-- differences: rare --><!-- end -->\n"
    page = page.replace("--><!--", "-->\n<!--")
    marks = ["<!-- table: rare -->", *table, "<!-- end -->", "between", "<!-- differences: rare -->", *other]
    assert comparing.with_tables(page, found).splitlines() == ["before", *marks, "<!-- end -->"]
    results.write(found, tmp_path / "runs.csv")
    again = results.read(results.Result, tmp_path / "runs.csv")
    for one, kept in zip(found, again, strict=True):
        for name, value in vars(one).items():
            assert getattr(kept, name) == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)


def test_runs_that_are_made_elsewhere_join_those_of_the_csv_files(script, tmp_path):
    """Of three runs in the file one is made again, in a folder that the others are not in."""
    import results

    for seed in (1, 2):
        a_run(tmp_path / "there" / "rare" / f"xpo-{seed}", [0.4, 0.5, 0.6, 0.7], [0, 3, 1])
    a_run(tmp_path / "there" / "long" / "xpo_both-1", [0.4, 0.5, 0.6, 0.7], [0, 3, 1])
    a_run(tmp_path / "here" / "rare" / "xpo-2", [0.4, 0.5, 0.6, 0.9], [0, 1, 1])
    for folder, tasks in (("there", ["long", "rare"]), ("here", ["rare"])):
        points, found = results.collect(tmp_path / folder, tasks)
        points = results.add(points, results.Point, tmp_path / "curves.csv")
        found = results.add(found, results.Result, tmp_path / "runs.csv")
    assert [(one.task, one.arm, one.seed, one.score) for one in found] == [
        ("rare", "xpo", 1, 0.7),
        ("rare", "xpo", 2, 0.9),
        ("long", "xpo_both", 1, 0.7),
    ]
    assert [point.score for point in points if point.seed == 2] == [0.4, 0.5, 0.6, 0.9]
    assert len(points) == 12


WITH_POLICY = {
    "bonus_alone_both",
    "online_dpo",
    "xpo_both",
    "selm",
    "sepopo",
    "geb",
    "copo",
    "entropy",
    "hot",
    "best_of_n",
}
WITHOUT_BONUS = {"online_dpo_every_10", "online_dpo", "dpo_reference", "entropy", "hot", "best_of_n"}


@pytest.mark.parametrize("task", ["rare", "long", "trap", "behind", "reason", "covered", "sums", "sums_covered"])
def test_arms_are_what_they_are_called(script, task, monkeypatch, tmp_path):
    """Each run of a task by the options that it would be made with."""
    monkeypatch.chdir(script.ROOT)
    monkeypatch.setattr(script, "make_reference", lambda folder, *_: folder)
    monkeypatch.setattr(script, "save_smollm2", lambda folder: folder)
    monkeypatch.setattr(sys, "argv", ["run.py", "--tasks", task, "--seeds", "1", "--out", str(tmp_path)])
    args = script._arguments()
    monkeypatch.setattr(sys, "argv", ["xpo"])
    runs = script._runs(args, {task: replace(script.TASKS[task], seeds=1)})
    assert [run.arm for run in runs] == list(script.TASKS[task].arms)
    for run in runs:
        model: Any = parse("fit", *run.options).model
        assert model.beta == script.TASKS[task].beta
        by_policy = bool(model.sampler) and model.sampler.class_path.endswith(".PolicySampler")
        assert by_policy == (run.arm in WITH_POLICY or task == "behind")
        assert (model.alpha == 0) == (run.arm in WITHOUT_BONUS)
        if run.arm in {"selm", "sepopo", "geb", "copo"}:
            assert model.reference_refresh.every == (8 if task == "sums" else 21)
        assert run.arm in sys.modules["tasks"].ARMS
        assert str(model.policy.path).startswith("package:" if task == "covered" else str(tmp_path))


def test_a_bare_number_scores_half_and_the_right_one_scores_one(script):
    import sums

    texts = [" 15", "15.", " 15\nand", "-15", "15 apples", "", "9" * 5000, "15.0", " 015", "\\frac{15}{1}", "x15"]
    scores = sums.reward([""] * len(texts), texts, {"answer": ["15"] * len(texts)})
    assert scores == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]


def test_tables_of_the_page_are_those_of_the_kept_results(script):
    import comparing
    import results

    page = (script.ROOT / "docs" / "exploration_language_models.md").read_text()
    found = results.read(results.Result, HERE / "results" / "runs.csv")
    assert comparing.with_tables(page, found) == page
    assert page.count("<!-- table: ") == len({one.task for one in found})
    assert page.count("<!-- differences: ") >= 1


@pytest.mark.slow
def test_small_sweep_goes_through_all_stages_and_is_not_made_again(script, tmp_path, monkeypatch, capsys):
    """The whole of the command, in two minutes: a reference, two arms of two seeds, CSV files, tables and figures."""
    small = ["--trainer.max_steps", "2", "--data.batch_size", "8"]
    words = ["run.py", "--tasks", "rare", "--arms", "online_dpo", "xpo", "--seeds", "2", "--reference-steps", "3",
             "--out", str(tmp_path)]  # fmt: skip
    monkeypatch.chdir(script.ROOT)
    monkeypatch.setattr(sys, "argv", [*words, "--", *small])
    assert script.main() == 0
    said = capsys.readouterr().out
    assert "0 of 4 runs are finished" in said
    assert "| online DPO (π, π) | " in said
    assert {file.name for file in (tmp_path / "results").iterdir()} == {
        "curves.csv",
        "runs.csv",
        "exploration_rare.png",
    }
    _, runs = script.collect(tmp_path, ["rare"])
    assert [(run.arm, run.seed, run.labels) for run in runs] == [
        ("online_dpo", 1, 16),
        ("online_dpo", 2, 16),
        ("xpo", 1, 16),
        ("xpo", 2, 16),
    ]
    assert all(run.kl != 0 for run in runs)
    assert script.main() == 0
    assert "4 of 4 runs are finished" in capsys.readouterr().out
