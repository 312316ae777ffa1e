"""`xpo export`: a checkpoint as a folder that transformers loads."""

from pathlib import Path

from peft import PeftModel

from xpo_lightning.callbacks.card import model_card, training_facts
from xpo_lightning.callbacks.policy_folder import check_exportable, check_replaceable, save_policy
from xpo_lightning.callbacks.run import say
from xpo_lightning.errors import InputError
from xpo_lightning.saved.hub import check_push, push
from xpo_lightning.saved.run import saved_run
from xpo_lightning.saved.writers import trained_policy


def export(
    checkpoint: str,
    /,
    *,
    config: str,
    out: str,
    merge: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Turn a checkpoint into a folder that transformers loads: weights, tokenizer, generation config and a model card.

    The folder appears, or is replaced, once all of it is written.

    Args:
        checkpoint: The checkpoint's file.
        config: The config of its run.
        out: The folder to write.
        merge: With LoRA, save a full model with the adapters merged in, not the adapters alone for `peft`.
        push_to_hub: Push the folder to this repository of the Hugging Face hub as well, `owner/name`. The token is that
            of `hf auth login` or of HF_TOKEN.
        private: If that repository is new, make it a private one.
    """
    if private and push_to_hub is None:
        raise InputError("--private is for --push_to_hub; leave it out")
    if push_to_hub is not None:
        check_push(push_to_hub)
    target = Path(out)
    check_replaceable(target, "--out")
    run = saved_run(config)
    if merge and run.module.lora is None:
        raise InputError("--merge is for adapters, and the run has none (model.lora); leave it out")
    policy, content = trained_policy(Path(checkpoint), run.module)
    check_exportable(policy, merge, "xpo export", "leave --merge out")
    states = content.get("optimizer_states") or [{}]
    facts = training_facts(content.get("global_step", 0), states[0].get("param_groups", []), run.data)
    is_adapter = isinstance(policy, PeftModel) and not merge
    save_policy(policy, run.module.tokenizer, target, merge, model_card(run.module, facts, {}, is_adapter))
    say(f"{'adapter' if is_adapter else 'policy'}  {target}")
    if push_to_hub is not None:
        say(f"pushed   {push(target, push_to_hub, private)}")
