"""The same pairs through TRL 1.13.0's XPOTrainer and through `XPOLightningModule`.

What TRL makes of them was recorded by
`python benchmarks/parity.py --record tests/assets/parity_trl_1.13.0.safetensors`.
The test that runs TRL itself is marked `trl` and runs only if asked for (`-m trl`); XPO_TRL_PYTHON names the
interpreter of an environment with TRL 1.13.0, peft and requests.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests" / "assets" / "parity_trl_1.13.0.safetensors"
TOLERANCE = 5e-5  # of the largest number in a tensor; both sides compute in float32


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def parity() -> Iterator[ModuleType]:
    import parity

    return parity


def recorded() -> dict[str, dict[str, Tensor]]:
    results: dict[str, dict[str, Tensor]] = {}
    with safe_open(RECORDED, "pt") as file:
        for key in file.keys():  # noqa: SIM118  (it is no mapping)
            case, name = key.rsplit("/", 1)
            results.setdefault(case, {})[name] = file.get_tensor(key)
    return results


def test_the_record_says_how_it_was_made(parity):
    with safe_open(RECORDED, "pt") as file:
        said = file.metadata()
    assert said["how"] == parity.HOW
    assert said["versions"].startswith("trl==1.13.0, torch ")
    assert set(recorded()) == set(parity.AGREE)


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "gemma2", "llama, IPO", "llama, LoRA"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("gpt_neox", "qwen2", "gpt2, prompts of one length")),
    ],
)
def test_losses_and_gradients_are_those_of_trl_where_it_is_right(parity, name):
    theirs, ours = recorded()[name], parity.parity_ours.run(parity.cases()[name])
    apart = parity.distance(theirs, ours)
    assert apart.loss < TOLERANCE
    assert apart.gradient < TOLERANCE
    assert apart.weights >= 20
    for side in ("scores.by_policy", "scores.by_sampler"):
        assert ours[side].tolist() == theirs[side].tolist()


def test_the_comparison_sees_a_small_difference(parity):
    """A hundredth more alpha is seen in the loss, a pair less in the gradients."""
    theirs, case = recorded()["llama"], parity.cases()["llama"]
    apart = parity.distance(theirs, parity.parity_ours.run(replace(case, alpha=1.01 * case.alpha)))
    assert apart.loss > 100 * TOLERANCE
    assert apart.gradient > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llama, 2 batches", "llama, 6 batches"])
def test_micro_batches_have_the_gradient_that_trl_has_for_the_batch_in_one_piece(parity, name):
    apart = parity.distance(recorded()["llama"], parity.parity_ours.run(parity.cases()[name]))
    assert max(apart.loss, apart.gradient) < TOLERANCE


def test_ours_is_right_where_trl_is_not(parity):
    """Against plain arithmetic: each row alone in float64, and counting; three completions were cut."""
    import parity_findings

    name = "gpt2, prompts of unequal length"
    case = parity.cases()[name]
    assert parity_findings.logp_error(case, parity.parity_ours.run(case)) < 1e-4
    for name in ("llama", "llama, pad is EOS", "llama, BOS is EOS", "llama, EOS in the prompt"):
        case = parity.cases()[name]
        assert parity_findings.penalized(case, parity.parity_ours.run(case)) == 3


@pytest.mark.trl
def test_parity_with_trl_itself(parity):
    """The record is what TRL makes of the cases now, and the table of differences has what it had."""
    python = os.environ.get("XPO_TRL_PYTHON")
    if not python:
        pytest.skip("XPO_TRL_PYTHON names no interpreter with TRL 1.13.0")
    theirs = parity.run_trl(Path(python))
    for name, record in recorded().items():
        apart = parity.distance(record, theirs[name])
        assert max(apart.loss, apart.gradient) < TOLERANCE, name
    ours = parity.run_ours()
    found = parity.findings(theirs, ours)
    assert [each.what for each in found if each.trl == each.ours] == [
        "missing-EOS penalty, pad, BOS and EOS differ: completions that lose it"
    ]
    assert ("2.000", "1.000") in [(each.trl, each.ours) for each in found]
    identical = parity.distance(theirs["llama, identical pairs"], ours["llama, identical pairs"])
    assert identical.gradient < TOLERANCE
