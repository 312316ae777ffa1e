"""Errors as a person at the command line sees them: one line, and the option that it is about."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException

from xpo_lightning.errors import InputError, input_error_in

# Errors that these raise themselves, and nothing that they call, are about the options that they were given.
_CONNECTOR = "lightning.pytorch.trainer.connectors.checkpoint_connector"
TAKING_UP = {
    *((_CONNECTOR, "_restore_modules_and_callbacks"), (_CONNECTOR, "restore_training_state")),
    ("xpo_lightning.resume.state", "take_up"),
}
"""Where checkpoints are taken up."""
MISFITS = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, AssertionError, OverflowError)
"""What that raises of a checkpoint that has other things in it."""
REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EIO),
}
"""What a file system says that is full, or closed to this user, or has no such place."""
OPTIONS_OF = {"lightning": "trainer", "torch.optim": "model.optimizer or model.lr_scheduler"}


@contextmanager
def explaining_trainer_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn what Lightning says of its options into an `InputError`; other kinds of errors too, where they are given."""
    handled: tuple[type[Exception], ...] = (MisconfigurationException, *kinds)
    try:
        yield
    except handled as error:
        raise (input_error_in(error) or InputError(f"trainer: {error}")) from error


def refuse_nulls(parser: Any, config: Any) -> None:
    """Refuse null where an option has no meaning for it; jsonargparse takes it everywhere.

    Raises:
        InputError: An option is null.
    """
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint in (None, Any) or type(None) in get_args(hint) or action.default is None:
            continue
        if config.get(action.dest, 0) is None:
            raise InputError(f"{action.dest} must not be null; remove the line, to take the default")


def refuse_values_for_groups(parser: Any, config: Any, file: str = "") -> None:
    """Refuse a value where a group of options belongs; what sets one of its options would take its place unseen.

    Args:
        parser: The parser of a run.
        config: What it has parsed.
        file: The file that this is in, if any.

    Raises:
        InputError: There is such a value.
    """
    names = [action.dest for action in parser._actions]
    for action in parser._actions:
        group = action.dest
        if hasattr(action, "_typehint") or not any(name.startswith(f"{group}.") for name in names):
            continue
        value = config.get(group, {})
        if not hasattr(value, "get"):
            raise InputError(
                f"{group} must be a group of options, but is {value!r:.60}" + (f" (in {file})" if file else "")
            )


def explanation(error: BaseException) -> str | None:
    """Say what a person can do about an error; None where it is none of their making."""
    cause, key = input_error_in(error), _option_behind(error)
    if cause is not None:
        return str(cause)
    if isinstance(error, OSError) and error.errno in REFUSALS:
        what = "a file" if error.filename is None else f"'{error.filename}'"
        return (
            f"{what} could not be written or read: {error.strerror}; see that there is room and that the path is right"
        )
    if isinstance(error, MISFITS) and _is_of_a_checkpoint(error):
        return (
            f"ckpt_path: the checkpoint is whole, but not what a run of this config has written "
            f"({type(error).__name__}: {error!s:.200}); give another file"
        )
    return f"{key}: {type(error).__name__}: {error}" if key else None


def reason(error: Exception) -> str:
    """Say why a config cannot be built: of all that the parser tried, the class that was named and refused, if any."""
    problem = re.search(r"Problem with given class_path ('[^']+'):\s*(.+)", str(error))
    return f"{problem[1]}: {problem[2]}" if problem else str(error)


def _is_of_a_checkpoint(error: BaseException) -> bool:
    """Tell whether an error is from taking a checkpoint up, and not from a validation that is made up for then."""
    places = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame in _frames(error)]
    return any(place in TAKING_UP for place in places) and not any(name == "validate_now" for _, name in places)


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Yield the frames that an error came through, the innermost last."""
    link = error.__traceback__
    while link is not None:
        yield link.tb_frame
        link = link.tb_next


def _option_behind(error: BaseException) -> str | None:
    *_, innermost = [None, *_frames(error)]
    module = "" if innermost is None else f"{innermost.f_globals.get('__name__', '')}."
    return next((key for prefix, key in OPTIONS_OF.items() if module.startswith(f"{prefix}.")), None)
