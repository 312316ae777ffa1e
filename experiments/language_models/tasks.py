"""What is run: the tasks, the arms on each, and their seeds."""

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Task:
    """A task: a reference, rewards, and how many labels a run has.

    Args:
        base: The config that its arms are overlays of, in this folder.
        about: What it is, in a line.
        arms: Its arms.
        seeds: How many seeds each arm has.
        rarity: How likely a bad end is to be made under the reference; None for a reference that is taken as it is.
        beta: That of its config.
    """

    base: str
    about: str
    arms: tuple[str, ...]
    seeds: int
    rarity: float | None = None
    beta: float = 0.05


ARMS = {
    "online_dpo": "online DPO (π, π)",
    "dpo_reference": "DPO (π, ref)",
    "xpo": "XPO, alpha 0.05 beta",
    "xpo_small": "XPO, alpha 1e-5",
    "xpo_both": "XPO on both, (π, π)",
    "xpo_wrong_sign": "XPO, wrong sign",
    "selm": "SELM",
    "sepopo": "SE-POPO",
    "geb": "GEB",
    "copo": "COPO",
    "entropy": "online DPO, entropy bonus",
    "hot": "online DPO, temperature 1.5",
    "best_of_n": "online DPO, best and worst of 4",
    "xpo_alpha_0.005": "XPO, alpha 0.005 beta",
    "xpo_alpha_0.5": "XPO, alpha 0.5 beta",
    "xpo_eps": "XPO, Adam eps 1e-16",
    "xpo_passes": "XPO, four steps a batch",
}
BASELINE = "online_dpo"
MAIN = tuple(arm for arm in ARMS if not arm.startswith(("xpo_alpha", "xpo_eps", "xpo_passes")))
TRAP = ("xpo_alpha_0.005", "xpo_alpha_0.5", "xpo_eps", "xpo_passes")

TASKS = {
    "rare": Task(
        "stories.yaml", "a bad end, 1e-4 under the reference, scores twice what a good one does", MAIN, 5, 1e-4
    ),
    "trap": Task("stories.yaml", "the task `rare`, with other optimizers and alphas", TRAP, 5, 1e-4),
    "covered": Task(
        "stories.yaml",
        "a control: the same scores where the reference, the embedded policy, ends a third of its stories badly",
        ("online_dpo", "dpo_reference", "xpo", "entropy", "hot"),
        5,
    ),
}
