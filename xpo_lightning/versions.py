"""Which versions are installed."""

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str:
    """Return the version of a package, or that it is not installed: code may also be run from where it lies."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
