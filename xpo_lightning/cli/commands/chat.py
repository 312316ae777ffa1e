"""`xpo chat`: talks to a policy and its reference side by side in the terminal."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import rich
import torch
from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text

from xpo_lightning.core.batch import Prompts, RawPrompt, left_pad
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.printable import printable
from xpo_lightning.core.rng import RolloutRNG, Stream
from xpo_lightning.data.prompts import PromptTokenizer
from xpo_lightning.evaluation.policies import REFERENCE, LoadedPolicy, NamedPolicy, device_named, find_policy
from xpo_lightning.evaluation.run_config import override_sampling
from xpo_lightning.evaluation.saved_run import named_policies
from xpo_lightning.rollout.sampling import Sampling

NEW = "/new"


def chat(
    policy: str,
    reference: str | None = None,
    /,
    *,
    config: str | None = None,
    prompt: str | None = None,
    sampling: dict[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Talk to a policy and its reference side by side; Ctrl-D ends.

    Each model with a chat template remembers its own conversation; the line /new begins another. A model without one
    continues each line that you type.

    Args:
        policy: An exported folder, a hub id, `package:name/path`; a run's folder, of which the newest checkpoint is
            taken; or a checkpoint, which needs `config` unless it is in its run's folder.
        reference: A model given like `policy`, or `reference`, which is the default if the policy is that of a run.
        config: The config of the policy's run; its sampling is used.
        prompt: Answer only this prompt, then end.
        sampling: How both sample: `--sampling.temperature 0.7`, and so on for each option of `model.sampling`.
        seed: Seed of the random numbers.
        device: The device of the models; `auto` is a GPU if there is one.
    """
    (name, run), *others = named_policies([policy, *([] if reference is None else [reference])], config)
    how = override_sampling(Sampling() if run is None else run.module.sampling, sampling)
    beside = others or [(REFERENCE, run)] * (run is not None)
    where = device_named(device)
    writers = [find_policy(*named) for named in ((name, run), *beside)]
    speakers = [Speaker.seated(one, how, where, seed, place) for place, one in enumerate(writers)]
    if prompt is not None:
        _exchange(speakers, prompt)
        return
    for line in _lines():
        if line == NEW:
            for speaker in speakers:
                speaker.said.clear()
            continue
        try:
            _exchange(speakers, line)
        except InputError as error:  # For example, the line is too long; the conversation continues without it.
            rich.get_console().print(Text(f"{error}; {NEW} begins another conversation", style="red"))


@dataclass
class Speaker:
    """A policy in a conversation.

    Args:
        name: Name of the policy.
        writer: The loaded policy.
        encoder: Tokenizes its prompts.
        seed: Seed of its random numbers.
        place: 0 or 1: two policies draw different random numbers.
        said: The messages so far, if it is a chat model.
        answers: Number of its answers so far.
    """

    name: str
    writer: LoadedPolicy
    encoder: PromptTokenizer
    seed: int
    place: int
    said: list[dict[str, Any]] = field(default_factory=list)
    answers: int = 0

    @classmethod
    def seated(cls, writer: NamedPolicy, sampling: Sampling, device: torch.device, seed: int, place: int) -> "Speaker":
        """Load a policy."""
        return cls(writer.name, writer.seated(sampling, device), writer.encoder(sampling), seed, place)

    @property
    def is_chat_model(self) -> bool:
        """Whether it takes conversations."""
        return self.encoder.tokenizer.chat_template is not None

    def hear(self, text: str) -> Prompts:
        """Return the prompt for a line: the line, after the conversation so far if it is a chat model.

        Raises:
            InputError: The line cannot be used, or the conversation is too long.
        """
        asked: RawPrompt = [*self.said, {"role": "user", "content": text}] if self.is_chat_model else text
        tokens, limit = self.encoder(asked), self.encoder.limit
        if limit is not None and len(tokens) > limit:
            raise InputError(
                f"{len(tokens)} tokens to read and --sampling.max_new_tokens exceed the context of {self.name}, which "
                f"leaves {limit} tokens to read; lower that"
            )
        ids, mask = left_pad([tokens], next(self.writer.model.parameters()).device)
        return Prompts(ids, mask, (asked,))

    def answer(self, heard: Prompts) -> str:
        """Sample an answer, and add the prompt and the answer to the conversation."""
        noise = RolloutRNG(self.seed, Stream.CHAT + self.place, self.answers)
        (written,) = self.writer.write(heard, [self.writer.rollout.uniforms(heard, noise)])
        self.answers += 1
        if self.is_chat_model:
            self.said = [*heard.raw[0], {"role": "assistant", "content": written.texts[0]}]
        return written.texts[0] + ("" if bool(written.ended[0]) else " …")


def _exchange(speakers: list[Speaker], line: str) -> None:
    """Let all policies answer a line, and show the answers side by side."""
    heard = [speaker.hear(line) for speaker in speakers]  # If one refuses the line, no other may answer it.
    answers = [speaker.answer(prompts) for speaker, prompts in zip(speakers, heard, strict=True)]
    console = rich.get_console()
    width = max(20, (console.width - len(speakers)) // len(speakers))
    shown = zip(speakers, answers, strict=True)
    panels = [Panel(Text(printable(text)), title=_title(speaker.name, width), width=width) for speaker, text in shown]
    console.print(Columns(panels))


def _title(name: str, width: int) -> Text:
    most = width - 6
    return Text(name if len(name) <= most else "…" + name[1 - most :])


def _lines() -> Iterator[str]:
    """Yield the lines that are typed or come from a pipe, until the input ends; skip empty ones."""
    is_typed = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if is_typed else "")
        except EOFError:
            return
        if line.strip():
            yield line
