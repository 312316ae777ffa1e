"""A reward: the share of a story's words that it has not used before, less a point for each word above thirty."""


def fresh_and_short(prompts: list[str], completions: list[str], columns: dict[str, list]) -> list[float]:
    """Return one score a completion; higher is better."""
    scores = []
    for completion in completions:
        words = completion.lower().split()
        scores.append(len(set(words)) / max(len(words), 1) - max(len(words) - 30, 0))
    return scores
