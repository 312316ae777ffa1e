"""What is run: the tasks, the arms on each, and their seeds."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Task:
    """A task: a reference, rewards, and how many labels a run has.

    Args:
        configs: The configs that its arms are overlays of, in this folder.
        about: What it is, in a line.
        arms: Its arms.
        seeds: How many seeds each arm has.
        reference: `sharpened`, the story model in which bad ends have the probability `rarity`; `embedded`, that model
            as it is; or `smollm2`.
        rarity: How likely a bad end is under the sharpened reference.
        beta: That of its config.
        own_arms: Folder of further overlays that some of its arms have; None if there are none.
        best: What has the best score.
    """

    configs: tuple[str, ...]
    about: str
    arms: tuple[str, ...]
    seeds: int
    reference: Literal["sharpened", "embedded", "smollm2"]
    rarity: float = 1e-4
    beta: float = 0.05
    own_arms: str | None = None
    best: str = "a bad end"


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
    "xpo_both_every_10": "XPO on both, weights every 10 batches",
    "xpo_both_every_100": "XPO on both, weights every 100 batches",
    "xpo_both_ahead": "XPO on both, one batch ahead",
    "online_dpo_every_10": "online DPO, weights every 10 batches",
    "bonus_alone": "the bonus alone, (π, ref)",
    "bonus_alone_both": "the bonus alone on both, (π, π)",
}
BASELINE = "online_dpo"
TRAP = ("xpo_alpha_0.005", "xpo_alpha_0.5", "xpo_eps", "xpo_passes")
BEHIND = ("xpo_both_every_10", "xpo_both_every_100", "xpo_both_ahead", "online_dpo_every_10")
REASON = ("bonus_alone", "bonus_alone_both")
MAIN = tuple(arm for arm in ARMS if arm not in (*TRAP, *BEHIND, *REASON))
FEW = ("online_dpo", "dpo_reference", "xpo", "entropy", "hot")
LONG = ("online_dpo", "xpo_both", "sepopo", "entropy", "hot")

TASKS = {
    "rare": Task(
        ("stories.yaml",),
        "a bad end, 1e-4 under the reference, scores twice what a good one does",
        MAIN,
        5,
        "sharpened",
    ),
    "long": Task(("stories.yaml", "stories_long.yaml"), "the task `rare` with 8,192 labels", LONG, 5, "sharpened"),
    "trap": Task(("stories.yaml",), "the task `rare`, with other optimizers and alphas", TRAP, 5, "sharpened"),
    "behind": Task(
        ("stories.yaml",),
        "the task `rare` with a policy that is behind when it writes",
        BEHIND,
        5,
        "sharpened",
    ),
    "reason": Task(("stories.yaml",), "the task `rare` without preferences", REASON, 3, "sharpened"),
    "covered": Task(
        ("stories.yaml",),
        "a control: the same scores where the reference, the embedded policy, ends a third of its stories badly",
        FEW,
        5,
        "embedded",
    ),
    "sums": Task(
        ("sums.yaml",),
        "SmolLM2 adds three numbers: any number scores half, the right one, 4 % of the reference's answers, scores 1",
        MAIN,
        3,
        "smollm2",
        own_arms="arms_sums",
        best="the right answer",
    ),
    "sums_covered": Task(
        ("sums.yaml", "sums_covered.yaml"),
        "a control: two numbers, whose sum the reference writes in a quarter of its answers",
        FEW,
        3,
        "smollm2",
        own_arms="arms_sums",
        best="the right answer",
    ),
}
