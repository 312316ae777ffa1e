"""The help of `xpo fit` and the other verbs of a run: one screen of options, and where the others are."""

OPTIONS = {
    "model.policy.path": "the model to train: a folder or a hub id",
    "model.reward": "the class of the reward or the judge",
    "model.lora": "train adapters alone: --model.lora.r 16",
    "model.alpha": "weight of the exploration term; 0: online DPO",
    "model.beta": "strength of the KL constraint",
    "model.learning_rate": "peak learning rate of AdamW",
    "model.lr_schedule": "how it falls: linear, cosine or constant",
    "model.warmup_ratio": "share of the run in which it rises",
    "model.sampling.max_new_tokens": "most tokens of a completion",
    "model.sampling.temperature": "temperature of the samples",
    "model.missing_eos_penalty": "taken from the score of a completion cut off",
    "model.micro_batch_size": "pairs a pass: memory, not the result",
    "data.source": "the prompts: a file, a folder, a hub id",
    "data.validation_size": "rows to hold out; or data.validation_source",
    "data.batch_size": "prompts a step",
    "data.max_prompt_tokens": "most tokens of a prompt",
    "trainer.max_steps": "optimizer steps; or trainer.max_epochs",
    "trainer.val_check_interval": "batches from one validation to the next",
    "trainer.default_root_dir": "folder of the run",
    "ckpt_path": "checkpoint to go on from; last is the newest",
}
"""The options that most runs set, each with its meaning."""


def run_help(verb: str, purpose: str) -> str:
    """Return the text of `xpo VERB --help`.

    Args:
        verb: The verb.
        purpose: What it does.
    """
    width = max(map(len, OPTIONS))
    options = "\n".join(f"  --{key:{width}}  {meaning}" for key, meaning in OPTIONS.items())
    return (
        f"xpo {verb}: {purpose}\n\n"
        f"  xpo {verb} --config quickstart          one of `xpo recipes`\n"
        f"  xpo {verb} --config A.yaml              one of your own\n"
        f"  xpo {verb} --config A --config B        B lies over A\n"
        f"  xpo {verb} --config A --data.source X   an option over both\n\n"
        f"The options that matter most; each is a key of the YAML too:\n{options}\n\n"
        f"All of them:           xpo {verb} --help_all, or docs/reference.md\n"
        f"Those of a class:      xpo {verb} --model.reward.help PythonReward\n"
        f"With their values:     xpo {verb} --config quickstart --print_config"
    )
