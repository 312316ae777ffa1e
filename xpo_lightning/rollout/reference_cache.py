"""Caches the reference's completions for later epochs: it is frozen, so it need not complete a prompt twice."""

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xpo_lightning.core.batch import Completions, Prompts, stack_completions
from xpo_lightning.core.distributed import all_gather
from xpo_lightning.core.errors import InputError
from xpo_lightning.core.fault_tolerance.guard import Guard
from xpo_lightning.core.fingerprint import as_json, differences
from xpo_lightning.core.sqlite import opened
from xpo_lightning.rollout.local import gather

_TABLES = (
    "CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT)",
    # Earlier versions had `entries`, without a digest.
    "CREATE TABLE IF NOT EXISTS kept"
    " (key BLOB PRIMARY KEY, ids BLOB, token_logps BLOB, ended INTEGER, text TEXT, score REAL, digest TEXT)",
)
_INSERT = "INSERT OR IGNORE INTO kept VALUES (?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True)
class Entry:
    """The cached completion of one prompt, on the CPU.

    Args:
        ids: Token ids of the reference's completion. (T,)
        token_logps: The reference's log-probability of each token, float32. (T,)
        ended: Whether the completion ended by itself.
        text: The completion as text.
        score: The reward's score, before any missing-EOS penalty.
    """

    ids: Tensor
    token_logps: Tensor
    ended: bool
    text: str
    score: float


class ReferenceCache:
    """Keeps one completion of the reference for each prompt.

    The key of a prompt is made of its token ids, its raw form and its other columns, which the reward reads. New
    entries count once their batch is finished, and all processes then have them, because the next epoch gives prompts
    to other processes. In a folder each process has its own file, `reference-<rank>.sqlite`, which stays intact if the
    run is killed.

    Args:
        where: "memory", or a folder, which is created if it does not exist.
        identity: Everything that the entries depend on besides the prompt.
        rank: Rank of the process.

    Raises:
        InputError: The folder cannot be used, or holds the entries of another identity.
    """

    def __init__(self, where: str, identity: dict[str, Any], rank: int = 0) -> None:
        if not where:
            raise InputError("model.reference_cache must be 'memory', a folder or null, but is empty")
        self._store = _Memory() if where == "memory" else _File(Path(where), identity, rank)
        self._pending: dict[bytes, Entry] = {}

    def get(self, prompts: Prompts) -> list[Entry | None]:
        """Return the entry of each prompt, or None. Length B."""
        return self._store.get(_keys(prompts))

    def put(self, prompts: Prompts, completions: Completions, scores: Tensor) -> None:
        """Add the completions of B prompts, to be stored by `settle`; a prompt that has an entry keeps that one.

        Args:
            prompts: B prompts.
            completions: The reference's completions of them.
            scores: The reward's scores, before any missing-EOS penalty. (B,)
        """
        on_cpu, flags, numbers = completions.to("cpu"), completions.ended.tolist(), scores.tolist()
        for row, key in enumerate(_keys(prompts)):
            real = on_cpu.mask[row]
            ids, logps = on_cpu.ids[row][real], on_cpu.token_logps[row][real]
            entry = Entry(ids, logps, flags[row], completions.texts[row], numbers[row])
            self._pending.setdefault(key, entry)

    def settle(self, *, keep: bool) -> None:
        """Store or discard the new entries at the end of a batch (collective).

        Args:
            keep: Whether to store this process's new entries, on all processes; otherwise they are discarded.

        Raises:
            InputError: A process cannot write its file.
        """
        pending, self._pending = self._pending if keep else {}, {}
        new = [entries for entries in all_gather(pending) if entries]
        if new:
            with Guard().together():
                for entries in new:
                    self._store.put(entries)

    def state(self) -> dict[str, Any]:
        """Return the part of the state that belongs to this process: plain values."""
        return self._store.state()

    def shared_state(self) -> dict[str, Any]:
        """Return the part of the state that is the same in all processes: plain values and tensors."""
        return self._store.shared_state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore both parts of a state: a folder loses the entries that were added since."""
        self._pending = {}
        self._store.load_state(state)


def missing_rows(kept: Sequence[Entry | None]) -> list[int]:
    """Return the rows that have no entry."""
    return [row for row, entry in enumerate(kept) if entry is None]


def with_kept(fresh: Completions | None, kept: Sequence[Entry | None], device: torch.device) -> Completions:
    """Merge the reference's new completions with the cached ones, in prompt order.

    Args:
        fresh: Completions of the prompts without an entry, in their order; None if every prompt has one.
        kept: The entry of each prompt, or None. Length B.
        device: Device of the result.

    Returns:
        B completions.
    """
    known = [row for row, entry in enumerate(kept) if entry is not None]
    recalled = [entry for entry in kept if entry is not None]
    if fresh is None:
        return _stacked(recalled).to(device)
    return gather([fresh, _stacked(recalled).to(device)], [missing_rows(kept), known]) if recalled else fresh


def _stacked(entries: Sequence[Entry]) -> Completions:
    ids, ended = [entry.ids for entry in entries], [entry.ended for entry in entries]
    return stack_completions(ids, ended, [entry.text for entry in entries], [entry.token_logps for entry in entries])


def _keys(prompts: Prompts) -> list[bytes]:
    """Return the key of each prompt, a hash of its token ids, raw form and columns."""
    keys = []
    for row, (ids, mask) in enumerate(zip(prompts.ids.cpu(), prompts.mask.cpu(), strict=True)):
        columns = {name: values[row] for name, values in prompts.columns.items()}
        keys.append(hashlib.sha256(as_json([ids[mask].tolist(), prompts.raw[row], columns]).encode()).digest())
    return keys


class _Memory:
    """Keeps entries in a dict."""

    def __init__(self) -> None:
        self._entries: dict[bytes, Entry] = {}

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        return [self._entries.get(key) for key in keys]

    def put(self, entries: dict[bytes, Entry]) -> None:
        for key, entry in entries.items():
            self._entries.setdefault(key, entry)

    def state(self) -> dict[str, Any]:
        return {}

    def shared_state(self) -> dict[str, Any]:
        return {"entries": {key.hex(): asdict(entry) for key, entry in self._entries.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        self._entries = {bytes.fromhex(key): Entry(**entry) for key, entry in state.get("entries", {}).items()}


class _File:
    """Keeps entries in an SQLite file."""

    def __init__(self, folder: Path, identity: dict[str, Any], rank: int) -> None:
        self.path = folder / f"reference-{rank}.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"model.reference_cache: '{folder}' cannot be made a folder ({error})") from error
        current = as_json(identity)
        with self._open() as connection:
            for table in _TABLES:
                connection.execute(table)
            connection.execute("INSERT OR IGNORE INTO meta VALUES ('identity', ?)", (current,))
            (saved,) = connection.execute("SELECT value FROM meta WHERE name = 'identity'").fetchone()
        try:
            differing = differences(json.loads(saved), json.loads(current))
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise _unusable(self.path, error) from error
        if differing:
            raise InputError(
                f"model.reference_cache: the cache in '{folder}' was made with another {', '.join(differing)}; "
                f"delete that folder's reference-*.sqlite, or give another folder"
            )

        for other in sorted(folder.glob("reference-*.sqlite")):
            if other != self.path:
                self._take_over(other, saved)

    def _take_over(self, other: Path, identity: str) -> None:
        """Copy the entries of another process, also of a run with more or fewer, unless its identity differs."""
        with opened(other, lambda error: _unusable(other, error)) as source:
            if source.execute("SELECT 1 FROM sqlite_master WHERE name = 'kept'").fetchone() is None:
                return  # Its process has yet to create the table.
            if source.execute("SELECT value FROM meta WHERE name = 'identity'").fetchone() != (identity,):
                return
            with self._open() as connection:
                known = set(connection.execute("SELECT key FROM kept"))
                missing = [key for key in source.execute("SELECT key FROM kept") if key not in known]
                rows = (source.execute("SELECT * FROM kept WHERE key = ?", key).fetchone() for key in missing)
                connection.executemany(_INSERT, rows)

    def get(self, keys: Sequence[bytes]) -> list[Entry | None]:
        select = "SELECT * FROM kept WHERE key = ?"
        with self._open() as connection:
            rows = [connection.execute(select, (key,)).fetchone() for key in keys]
        for row in rows:
            if row is not None and _digest(*row[:-1]) != row[-1]:
                raise _unusable(self.path, ValueError("an entry is damaged"))
        return [None if row is None else _entry(*row[1:-1]) for row in rows]

    def put(self, entries: dict[bytes, Entry]) -> None:
        rows = [
            (
                key,
                entry.ids.numpy().tobytes(),
                entry.token_logps.numpy().tobytes(),
                entry.ended,
                entry.text,
                entry.score,
            )
            for key, entry in entries.items()
        ]
        with self._open() as connection:
            connection.executemany(_INSERT, [(*row, _digest(*row)) for row in rows])

    def state(self) -> dict[str, Any]:
        with self._open() as connection:
            (last,) = connection.execute("SELECT COALESCE(MAX(rowid), 0) FROM kept").fetchone()
        return {"last": last}

    def shared_state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        if "last" in state:
            with self._open() as connection:
                connection.execute("DELETE FROM kept WHERE rowid > ?", (state["last"],))

    def _open(self) -> AbstractContextManager[sqlite3.Connection]:
        return opened(self.path, lambda error: _unusable(self.path, error))


def _unusable(path: Path, error: Exception) -> InputError:
    return InputError(f"model.reference_cache: '{path}' cannot be used ({error}); delete it, or give another folder")


def _digest(key: Any, ids: Any, token_logps: Any, ended: Any, text: Any, score: Any) -> str:
    """Hash an entry as the file stores it."""
    return hashlib.sha256(repr((key, ids, token_logps, int(bool(ended)), text, score)).encode()).hexdigest()


def _entry(ids: bytes, token_logps: bytes, ended: int, text: str, score: float) -> Entry:
    tokens = torch.frombuffer(bytearray(ids), dtype=torch.long)
    logps = torch.frombuffer(bytearray(token_logps), dtype=torch.float32)
    return Entry(tokens, logps, bool(ended), text, score)
