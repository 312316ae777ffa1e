"""Explains errors of other libraries in one line, with the option that caused them."""

import errno
from collections.abc import Iterator
from types import FrameType

from xpo_lightning.core.errors import input_error_in

_CONNECTOR = "lightning.pytorch.trainer.connectors.checkpoint_connector"
TAKING_UP = {
    *((_CONNECTOR, "_restore_modules_and_callbacks"), (_CONNECTOR, "restore_training_state")),
    ("xpo_lightning.checkpointing.run_state", "take_up"),
}
"""Functions that load a checkpoint's state."""
MISFITS = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, AssertionError, OverflowError)
"""Errors that they raise for a checkpoint with other contents."""
REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EIO),
}
"""Error numbers of a file system that is full, forbids access, or has no such path."""
# Errors raised in these packages' own code (the innermost frame) are blamed on the options given to them.
OPTIONS_OF = {"lightning": "trainer", "torch.optim": "model.optimizer or model.lr_scheduler"}


def explanation(error: BaseException) -> str | None:
    """Return what the user can do about an error, or None if the user did not cause it."""
    cause, key = input_error_in(error), _option_behind(error)
    if cause is not None:
        return str(cause)
    if isinstance(error, OSError) and (error.errno in REFUSALS or _is_of_a_folder(error)):
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


def _is_of_a_folder(error: OSError) -> bool:
    """Tell whether a folder could not be made, as in /proc, where nobody may and the error is `no such file`."""
    return any(frame.f_code.co_name in ("mkdir", "makedirs") for frame in _frames(error))


def _is_of_a_checkpoint(error: BaseException) -> bool:
    """Tell whether an error comes from loading a checkpoint, and not from the overdue validation that then runs."""
    places = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame in _frames(error)]
    return any(place in TAKING_UP for place in places) and not any(name == "validate_now" for _, name in places)


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Yield the frames of an error's traceback, the innermost last."""
    link = error.__traceback__
    while link is not None:
        yield link.tb_frame
        link = link.tb_next


def _option_behind(error: BaseException) -> str | None:
    *_, innermost = [None, *_frames(error)]
    module = "" if innermost is None else f"{innermost.f_globals.get('__name__', '')}."
    return next((key for prefix, key in OPTIONS_OF.items() if module.startswith(f"{prefix}.")), None)
