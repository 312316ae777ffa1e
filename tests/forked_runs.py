"""Forks runs of the command line from a process that has imported everything, which takes a process some ten seconds.

    python tests/forked_runs.py

reads one JSON object a line, `{"words": ["fit", "--config", FILE], "processes": 2, "output": FILE}`, runs it, and
prints its exit status. The processes of a run find each other as those that torchrun starts.
"""

import atexit
import json
import os
import signal
import socket
import sys
import traceback
from typing import NoReturn

from xpo_lightning.cli.lightning_cli import main


def run(words: list[str], processes: int, output: str) -> int:
    """Run a command line on so many processes; return 0, or the status of the first that fails, which ends the others.

    Args:
        words: The command line.
        processes: Number of processes.
        output: File for what they print.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running: set[int] = set()
    for rank in range(processes):
        place = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        child = os.fork()
        if child == 0:
            _be_one(words, output, place if processes > 1 else {})
        running.add(child)
    first = 0
    while running:
        child, state = os.wait()
        running.remove(child)
        if state and not first:
            first = os.waitstatus_to_exitcode(state)
            for other in running:
                os.kill(other, signal.SIGKILL)
    return first


def _be_one(words: list[str], output: str, environment: dict[str, str]) -> NoReturn:
    """Be one process of a run, to its end."""
    status = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environment)
        sys.argv = ["xpo", *words]
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    for line in sys.stdin:
        print(run(**json.loads(line)), flush=True)
