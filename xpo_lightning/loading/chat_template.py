"""Chat templates given in place of the tokenizer's own."""

from xpo_lightning.errors import InputError
from xpo_lightning.loading.sources import existing_path


def read_chat_template(given: str, key: str) -> str:
    """Return a Jinja chat template.

    Args:
        given: The template itself, or the name of a file that holds it.
        key: The configuration key that holds it, for errors.

    Raises:
        InputError: There is no such file, or it holds no text.
    """
    if len(given) >= 256 or "{" in given:
        return given
    file = existing_path(given)
    if file is None or not given.strip():
        raise InputError(f"{key}: there is no file '{given}', and a template as text would hold a '{{'")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{key}: the file '{given}' cannot be read ({error})") from error
