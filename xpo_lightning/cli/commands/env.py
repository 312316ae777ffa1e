"""`xpo env`: prints the versions and the hardware that a bug report needs."""

from xpo_lightning.core.versions import surroundings, versions


def env() -> None:
    """Print the versions and the hardware that a bug report needs, and nothing about you or your files."""
    lines = {**surroundings(), **versions()}
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:{width}}  {text}")
