"""The same pairs through TRL 1.13.0's XPOTrainer and through `XPOLightningModule`.

What TRL makes of them was recorded by
`python -m benchmarks.parity.check --record tests/assets/parity_trl_1.13.0.safetensors`.
The test that runs TRL itself is marked `trl` and runs only if asked for (`-m trl`); XPO_TRL_PYTHON names the
interpreter of an environment with TRL 1.13.0, peft and requests.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

from benchmarks.parity import check, findings, our_side

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests" / "assets" / "parity_trl_1.13.0.safetensors"
TOLERANCE = 5e-5  # of the largest number in a tensor; both sides compute in float32


def recorded() -> dict[str, dict[str, Tensor]]:
    results: dict[str, dict[str, Tensor]] = {}
    with safe_open(RECORDED, "pt") as file:
        for key in file.keys():  # noqa: SIM118  (it is no mapping)
            case, name = key.rsplit("/", 1)
            results.setdefault(case, {})[name] = file.get_tensor(key)
    return results


def test_the_record_says_how_it_was_made():
    with safe_open(RECORDED, "pt") as file:
        said = file.metadata()
    assert said["how"] == check.HOW
    assert said["versions"].startswith("trl==1.13.0, torch ")
    assert set(recorded()) == set(check.AGREE)


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "gemma2", "llama, IPO", "llama, LoRA"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("gpt_neox", "qwen2", "gpt2, prompts of one length")),
    ],
)
def test_losses_and_gradients_are_those_of_trl_where_it_is_right(name):
    theirs, ours = recorded()[name], our_side.run(check.cases()[name])
    apart = check.distance(theirs, ours)
    assert apart.loss < TOLERANCE
    assert apart.gradient < TOLERANCE
    assert apart.weights >= 20
    for side in ("scores.by_policy", "scores.by_sampler"):
        assert ours[side].tolist() == theirs[side].tolist()


def test_the_comparison_sees_a_small_difference():
    """A hundredth more alpha is seen in the loss, a pair less in the gradients."""
    theirs, case = recorded()["llama"], check.cases()["llama"]
    apart = check.distance(theirs, our_side.run(replace(case, alpha=1.01 * case.alpha)))
    assert apart.loss > 100 * TOLERANCE
    assert apart.gradient > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llama, 2 batches", "llama, 6 batches"])
def test_micro_batches_have_the_gradient_that_trl_has_for_the_batch_in_one_piece(name):
    apart = check.distance(recorded()["llama"], our_side.run(check.cases()[name]))
    assert max(apart.loss, apart.gradient) < TOLERANCE


def test_ours_is_right_where_trl_is_not():
    """Against plain arithmetic: each row alone in float64, and counting; three completions were cut."""
    name = "gpt2, prompts of unequal length"
    case = check.cases()[name]
    assert findings.logp_error(case, our_side.run(case)) < 1e-4
    for name in ("llama", "llama, pad is EOS", "llama, BOS is EOS", "llama, EOS in the prompt"):
        case = check.cases()[name]
        assert findings.penalized(case, our_side.run(case)) == 3


@pytest.mark.trl
def test_parity_with_trl_itself():
    """The record is what TRL makes of the cases now, and the table of differences has what it had."""
    python = os.environ.get("XPO_TRL_PYTHON")
    if not python:
        pytest.skip("XPO_TRL_PYTHON names no interpreter with TRL 1.13.0")
    theirs = check.run_trl(Path(python))
    for name, record in recorded().items():
        apart = check.distance(record, theirs[name])
        assert max(apart.loss, apart.gradient) < TOLERANCE, name
    ours = check.run_ours()
    found = findings.findings(theirs, ours)
    assert [each.what for each in found if each.trl == each.ours] == [
        "missing-EOS penalty, pad, BOS and EOS differ: completions that lose it"
    ]
    assert ("2.000", "1.000") in [(each.trl, each.ours) for each in found]
    identical = check.distance(theirs["llama, identical pairs"], ours["llama, identical pairs"])
    assert identical.gradient < TOLERANCE
