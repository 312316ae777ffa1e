"""From a question to the token row that a language model judges by, and which tokens are its verdict."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from xpo_lightning.errors import InputError
from xpo_lightning.prompts import PromptEncoder

_OPTIONS = "model.reward.init_args"


@dataclass(frozen=True)
class QuestionEncoder:
    """Tokenizes questions: as a chat's one user message where there is a chat template, as plain text otherwise.

    Args:
        tokenizer: The judge's tokenizer.
        limit: Most tokens that the judge can read; None where there is no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    limit: int | None = None

    def __call__(self, question: str) -> list[int]:
        """Tokenize a question, whatever its length.

        Returns:
            The token ids that the verdict follows, at least one.

        Raises:
            InputError: The chat template refuses it.
        """
        if self.tokenizer.chat_template is None:
            return PromptEncoder(self.tokenizer)(question, "model.reward: a question to the judge")
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # A template is a program, and may fail as programs do.
            raise InputError(
                f"model.reward: the judge's chat template refuses a question ({error}); set {_OPTIONS}.chat_template "
                f"to one that takes a single user message"
            ) from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def excess(self, question: str) -> int:
        """Count the tokens of a question beyond the limit."""
        return 0 if self.limit is None else max(len(self(question)) - self.limit, 0)

    def without_start(self, text: str, tokens: int) -> str:
        """Cut so many tokens from the start of a text, or more where the rest would begin within a character."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        rest = str(self.tokenizer.decode(ids[tokens:], clean_up_tokenization_spaces=False)).lstrip("\ufffd")
        return rest if len(rest) < len(text) else text[1:]


def tokens_that_read(letter: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Find the tokens that are decoded to a letter, with or without a space before.

    Raises:
        InputError: There are none.
    """
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    tokens = [token for token, text in enumerate(texts) if text in (letter, f" {letter}")]
    if not tokens:
        raise InputError(
            f"{_OPTIONS}.path: the tokenizer '{tokenizer.name_or_path}' has no token for the letter {letter}, which a "
            f"verdict is; take another judge"
        )
    return tokens
