"""The runs of the sweep, the most telling first."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from problems import PROBLEMS

ALPHAS = ("1e-4", "1e-3", "3e-3", "1e-2", "3e-2")
CONTROLS = ("xpo_wrong_sign", "xpo_sgd", "dpo_hot", "dpo_entropy", "xpo_both", "xpo_small", "xpo_eps")
SHORT = 4_000
"""Labels of E1's arms that have either found the arm after a fifth of them, or do not find it at all."""
EXPERIMENTS = ("E1", "E2", "E3", "controls")


@dataclass(frozen=True)
class Run:
    """One training run, of all seeds together.

    Args:
        experiment: E1, E2, E3 or controls.
        problem: A key of `PROBLEMS`.
        arm: A config in `arms/`.
        variant: What sets it apart from the arm itself, for its name.
        labels: Labels a seed; None is the problem's own number.
        model: Options of the model that the arm does not have, by their key under `model`.
    """

    experiment: str
    problem: str
    arm: str
    variant: str = ""
    labels: int | None = None
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run, and of its folder."""
        return f"{self.experiment}/{self.problem}/{self.arm}{self.variant and '_' + self.variant}"

    @property
    def most_labels(self) -> int:
        """Labels a seed."""
        return self.labels or PROBLEMS[self.problem].labels

    @property
    def steps(self) -> int:
        """Optimizer steps, at least one."""
        return max(1, self.most_labels // PROBLEMS[self.problem].pairs)


def _with_entropy(experiment: str, problem: str, arm: str, labels: int | None = None) -> Run:
    """Give the entropy bonus the weight that XPO's bonus has."""
    model = {"entropy_bonus": 0.05 * PROBLEMS[problem].beta} if arm == "dpo_entropy" else {}
    return Run(experiment, problem, arm, labels=labels, model=model)


def _xpo(experiment: str, problem: str, alpha: str, arm: str = "xpo") -> Run:
    """Give XPO an alpha that is not in units of beta."""
    return Run(experiment, problem, arm, alpha, model={"alpha": float(alpha), "alpha_in_beta": False})


def _slow(problem: str, arm: str, **model: Any) -> Run:
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02, "eps": 1e-12}}
    return Run("E2", problem, arm, "lr_0.02", model={"optimizer": adam, **model})


def runs() -> Iterator[Run]:
    """Yield all runs."""
    for problem in ("beta_0.0125", "beta_0.015", "beta_0.02"):
        yield Run("E1", problem, "dpo")
        yield Run("E1", problem, "xpo", labels=None if problem == "beta_0.0125" else SHORT)
        yield Run("E1", problem, "dpo_reference", labels=SHORT)
    for arm in CONTROLS:
        yield _with_entropy("E1", "beta_0.0125", arm, SHORT)
    for arm in ("dpo", "dpo_reference"):
        yield Run("E2", "rare_best", arm)
    for alpha in ALPHAS:
        yield _xpo("E2", "rare_best", alpha)
    for arm in ("dpo", "dpo_reference", "xpo"):
        yield Run("E3", "rare_mode", arm)
    yield _xpo("E3", "rare_mode", "1e-3")
    for problem in ("blind_32", "blind_256"):
        yield Run("E2", problem, "dpo")
        yield _xpo("E2", problem, "1e-3")
    for arm in ("dpo", "dpo_reference"):
        yield Run("controls", "lock", arm)
        yield Run("controls", "good_coverage", arm)
    yield _xpo("controls", "lock", "1e-3")
    yield _xpo("controls", "lock", "3e-2")
    yield _xpo("controls", "good_coverage", "1e-3")
    for arm in ("xpo_wrong_sign", "dpo_hot", "dpo_entropy"):
        yield _with_entropy("E2", "rare_best", arm)
        yield _with_entropy("E3", "rare_mode", arm)
    yield _xpo("E3", "rare_mode", "1e-3", arm="xpo_both")
    yield _xpo("E3", "rare_mode", "2e-2")
    yield _xpo("E2", "rare_best", "1e-3", arm="xpo_both")
    for arm in ("dpo", "dpo_reference", "xpo"):
        yield Run("E3", "less_rare_mode", arm)
    yield _xpo("E3", "less_rare_mode", "1e-3")
    yield _slow("rare_best", "dpo")
    yield _slow("rare_best", "xpo", alpha=1e-3, alpha_in_beta=False)
