"""From a prompt and a completion to the text that a reward model reads."""

from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from xpo_lightning.batch import Messages, RawPrompt
from xpo_lightning.errors import InputError

PromptFormat = Literal["auto", "text", "chat"]


def render(
    prompt: RawPrompt, completion: str, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat
) -> tuple[str, bool]:
    """Put one prompt and its completion together.

    Args:
        prompt: Text or chat messages.
        completion: The completion.
        tokenizer: The reward model's tokenizer, which has the chat template.
        prompt_format: "auto" joins text and renders chat messages; "chat" renders both; "text" only takes text.

    Returns:
        The text, and whether it went through the chat template, which writes its own special tokens.

    Raises:
        InputError: The format does not suit the prompt, or there is no chat template, or it refuses the conversation.
    """
    if isinstance(prompt, str) and prompt_format != "chat":
        return prompt + completion, False
    if prompt_format == "text":
        raise InputError(
            "model.reward.init_args.prompt_format: 'text' cannot score chat messages; set it to auto, "
            "or give prompts as text"
        )
    if tokenizer.chat_template is None:
        raise InputError(
            f"model.reward: the reward model's tokenizer '{tokenizer.name_or_path}' has no chat template to score a "
            f"conversation with; set model.reward.init_args.tokenizer to one that has, or give prompts as text"
        )
    try:
        text = tokenizer.apply_chat_template(
            conversation(prompt, completion), tokenize=False, add_generation_prompt=False
        )
    except TemplateError as error:
        raise InputError(f"model.reward: the reward model's chat template refuses a conversation ({error})") from error
    return str(text), True


def conversation(prompt: RawPrompt, completion: str) -> Messages:
    """Write a completion into its conversation.

    Args:
        prompt: Text, which becomes one user message, or chat messages.
        completion: The assistant's message; where the assistant spoke last, the rest of that message.

    Returns:
        A new list of messages that ends with the assistant's.
    """
    messages: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if messages and messages[-1]["role"] == "assistant":
        begun = messages.pop()
        return [*messages, {**begun, "content": begun["content"] + completion}]
    return [*messages, {"role": "assistant", "content": completion}]
