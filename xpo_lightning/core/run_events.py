"""The events of a run: what a reader should know of it besides its metrics, in `events.jsonl` in its folder."""

import json
from pathlib import Path
from typing import Any

from xpo_lightning.core.atomic_files import appending, replacing_file

EVENTS = "events.jsonl"


def record_event(folder: Path, step: int, text: str, **details: Any) -> None:
    """Append an event.

    Args:
        folder: The run's folder.
        step: The optimizer step after which it happened.
        text: One sentence for the reader of the report.
        details: More fields, which JSON can hold.

    Raises:
        InputError: Writing failed.
    """
    with appending(folder / EVENTS) as file:
        file.write(json.dumps({"step": step, "text": text, **details}, ensure_ascii=False) + "\n")


def drop_events_after(folder: Path, step: int) -> None:
    """Remove the events of later steps, which a resumed run takes again.

    Raises:
        InputError: Writing failed; the file is as it was.
    """
    file = folder / EVENTS
    if not file.is_file():
        return
    lines = event_lines(file.read_text(encoding="utf-8"))
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        with replacing_file(file) as new:
            new.write("".join(f"{line}\n" for line in kept))


def event_lines(text: str) -> list[str]:
    """Return the lines of the file; a text in them may hold other characters that end a line."""
    return [line for line in text.split("\n") if line]
