"""The process that verifies answers: started when it is needed, and ended when it takes too long."""

import json
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from xpo_lightning.core.errors import InputError

_STARTING = 120.0  # seconds until the first reply, in which libraries are imported


class VerifierProcess:
    """Asks a process of its own to verify answers, and starts another one after a timeout.

    Args:
        verifier: `math`, `reasoning_gym` or `exact`.
        timeout: How many seconds one answer may take.
    """

    def __init__(self, verifier: str, timeout: float) -> None:
        self.verifier, self.timeout = verifier, timeout
        self._process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copy without the process; a copy starts its own."""
        return {**vars(self), "_process": None}

    def score(self, given: str, answer: Any, metadata: Any, check: Callable[[], None]) -> float | None:
        """Verify an answer.

        Args:
            given: The answer to verify.
            answer: The right one.
            metadata: What else the verifier needs to know; JSON can hold it.
            check: Called about once a second; may raise to stop waiting.

        Returns:
            A score from 0 to 1; None if the answer took too long, or broke the verifier.

        Raises:
            InputError: The verifier cannot start.
        """
        if self._process is None:
            self._start(check)
        reply = self._ask([given, answer, metadata], self.timeout, check)
        return None if reply is None else reply.get("score")

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __del__(self) -> None:
        """End the process with its owner."""
        self.stop()

    def _start(self, check: Callable[[], None]) -> None:
        command = [sys.executable, "-u", str(Path(__file__).with_name("worker.py")), self.verifier]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(  # noqa: S603  (our own script)
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
        )
        if self._ask(["", "", {}], _STARTING, check) is None:
            raise InputError(
                f"model.reward: the process that verifies answers ({self.verifier}) ended or did not start within "
                f"{_STARTING:g} seconds; try {' '.join(command)}"
            )

    def _ask(self, question: list[Any], seconds: float, check: Callable[[], None]) -> dict[str, Any] | None:
        """Send a line and wait for the reply; None, and no process, if it ends or takes too long."""
        process = cast("subprocess.Popen[bytes]", self._process)
        requests, replies = cast("IO[bytes]", process.stdin), cast("IO[bytes]", process.stdout)
        end = time.monotonic() + seconds
        try:
            requests.write(json.dumps(question).encode() + b"\n")
            requests.flush()
            while (left := end - time.monotonic()) > 0:
                if select.select([replies], [], [], min(left, 1.0))[0]:
                    line = replies.readline()
                    if line.endswith(b"\n"):
                        reply: dict[str, Any] = json.loads(line)
                        return reply
                    break  # it has ended
                check()
        except BrokenPipeError:
            pass
        except BaseException:
            self.stop()
            raise
        self.stop()
        return None
