"""Every check of this repository.

``nox`` runs lint, types and tests; ``nox --list`` names the rest.

``nox -s tests -- tests/db`` passes arguments on. ``nox --no-venv`` uses the environment that is
active, which is quicker where ``pip install -e '.[dev]'`` was run.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True

PROJECT = nox.project.load_toml("pyproject.toml")
BENCH = nox.project.dependency_groups(PROJECT, "bench")
AUDIT = nox.project.dependency_groups(PROJECT, "audit")


def install_into(session: nox.Session, *arguments: str) -> None:
    """Install with pip, except with ``--no-venv``: the environment that is active is left alone."""
    if session.virtualenv.is_sandboxed:
        session.install(*arguments)


@nox.session
def lint(session: nox.Session) -> None:
    """Run ruff, import-linter on the directions of imports, and the check of words."""
    install_into(session, "-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    session.run("python", "-m", "tools.words")


@nox.session
def types(session: nox.Session) -> None:
    """Run mypy and pyright."""
    install_into(session, "-e", ".[dev]")
    session.run("mypy")
    session.run("pyright")


@nox.session
def tests(session: nox.Session) -> None:
    """Run pytest; give files, folders and options after ``--``."""
    install_into(session, "-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session
def compat(session: nox.Session) -> None:
    """Run the tests that depend on SQLAlchemy's behaviour on 2.0, or what is named after ``--``.

    ``nox -s compat -- pg14 oldest`` runs combinations of servers and packages; ``--list`` prints
    them.
    """
    if session.posargs:
        install_into(session, "-e", ".[dev]")
        session.run("python", "-m", "tools.compat", *session.posargs)
        return
    install_into(session, "-e", ".[dev]", "sqlalchemy[asyncio]==2.0.*")
    session.run("pytest", "@.ci/sqlalchemy20.txt")


@nox.session
def bench(session: nox.Session) -> None:
    """Run the quick benchmark and every scenario once, or the command given after ``--``."""
    install_into(session, "-e", ".[dev]")
    if session.posargs:
        install_into(session, *BENCH)
        session.run("python", "-m", "benchmarks", *session.posargs)
        return
    session.run("python", "-m", "benchmarks", "--quick")
    session.run("python", "-m", "benchmarks", "smoke")


@nox.session
def docs(session: nox.Session) -> None:
    """Execute the examples of the README, of the pages in docs, and of the folder examples."""
    install_into(session, "-e", ".[dev]")
    session.run(
        "pytest",
        "tests/test_docs.py",
        "tests/test_examples.py",
        "tests/guide",
        "tests/cli/test_documented.py",
        "tests/security/test_row_level_security.py",
    )


@nox.session
def proof(session: nox.Session) -> None:
    """Run the long suites, or parts such as ``-- run chaos --out results``. They take hours."""
    install_into(session, "-e", ".[dev]")
    session.run("python", "-m", "tools.proof", *(session.posargs or ["run", "--out", "results"]))


@nox.session
def mutation(session: nox.Session) -> None:
    """Change the code, and see a test fail: hours; ``-- cursor`` tries one group."""
    install_into(session, "-e", ".[dev]")
    session.run("python", "-m", "tools.mutation", *session.posargs)


@nox.session
def install(session: nox.Session) -> None:
    """Install each documented set of extras into an environment of its own, and use it."""
    install_into(session, "-e", ".[dev]")
    session.run("pytest", "-m", "long", "-n", "0", "tests/install", *session.posargs)


@nox.session
def audit(session: nox.Session) -> None:
    """Ask for known vulnerabilities of what is installed."""
    install_into(session, "--upgrade", "pip")
    install_into(session, "-e", ".[dev]", *AUDIT)
    session.run("python", str(Path(".ci", "audit")))
