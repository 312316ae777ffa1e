"""`xpo env`: prints the versions and the hardware that a bug report needs."""

from xpo_lightning.core.printable import aligned
from xpo_lightning.core.versions import surroundings, versions


def env() -> None:
    """Print the versions and the hardware that a bug report needs, and nothing about you or your files."""
    print(*aligned({**surroundings(), **versions()}.items()), sep="\n")
