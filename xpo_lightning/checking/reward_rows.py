"""Whether prompts and completions fit what reward models read."""

from collections.abc import Sequence

from xpo_lightning.checking.findings import RewardRows
from xpo_lightning.data.encoding import Sample
from xpo_lightning.errors import InputError
from xpo_lightning.rewards import SequenceClassifierReward
from xpo_lightning.rewards.rendering import render


def reward_rows(reward: SequenceClassifierReward, samples: Sequence[Sample], new_tokens: int) -> RewardRows:
    """Count the prompts that leave a reward model too few tokens for a completion.

    Args:
        reward: A reward model that is loaded.
        samples: B prompts.
        new_tokens: Most tokens of a completion, as the policy counts; the reward model's tokenizer may differ.

    Raises:
        InputError: The chat template refuses a prompt, or a prompt alone is too long and must not be cut.
    """
    encoder = reward.encoder
    if encoder is None or encoder.max_tokens is None:
        return RewardRows(len(samples), 0, None)
    texts = [render(sample["prompt"], "", encoder.tokenizer, reward.prompt_format) for sample in samples]
    lengths = [
        len(encoder.tokenizer(text, add_special_tokens=not is_chat, verbose=False)["input_ids"])
        for text, is_chat in texts
    ]
    if reward.truncate == "error" and lengths and max(lengths) >= encoder.max_tokens:
        raise InputError(
            f"model.reward.init_args.truncate is error, but a prompt has {max(lengths)} tokens alone, and the reward "
            f"model takes {encoder.max_tokens}; set it to left or right, or lower data.max_prompt_tokens"
        )
    too_long = sum(length + new_tokens > encoder.max_tokens for length in lengths)
    return RewardRows(len(samples), too_long, encoder.max_tokens)
