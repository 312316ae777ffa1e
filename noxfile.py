"""The checks of the project by name, in the environment that they are started in: `nox -l` lists them."""

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "spelling", "options"]
nox.options.error_on_external_run = False


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests that README's line runs; more words go to pytest."""
    session.run("python", "-m", "pytest", "-q", "-n", "2", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Run the slow tests, which the others leave out."""
    chosen = "slow and not vllm and not gpu and not trl"
    session.run("python", "-m", "pytest", "-q", "-n", "2", "-m", chosen, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Look for defects and for text that is not formatted."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package."""
    session.run("mypy")


@nox.session
def spelling(session: nox.Session) -> None:
    """Look for misspelled words."""
    session.run("codespell")


@nox.session
def options(session: nox.Session) -> None:
    """See that the page and the table of all options are up to date; the same command without --check writes them."""
    session.run("python", "docs/tools/reference.py", "--check")


@nox.session
def site(session: nox.Session) -> None:
    """Build the site, for which `.[docs]` must be installed; more words go to mkdocs."""
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})
