"""How far the package has moved on since a result was measured, as git knows it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "pgqrs_sa"
_DIRTY = "-dirty"  # what `git describe --dirty` appends when files were changed but not committed


def head(root: Path = ROOT) -> str | None:
    """The commit that is checked out, or None where there is no repository."""
    lines = _git(root, ["describe", "--always", "--dirty"])
    return lines[0] if lines else None


def changed_files(commit: str, root: Path = ROOT) -> int | None:
    """How many files of the package differ between a commit and the files that are there now.

    Args:
        commit: As `git describe --always --dirty` prints it.
        root: The repository.

    Returns:
        The number; None if git does not know the commit.
    """
    lines = _git(root, ["diff", "--name-only", commit.removesuffix(_DIRTY), "--", PACKAGE])
    return None if lines is None else len(lines)


def _git(root: Path, arguments: Sequence[str]) -> list[str] | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError:  # there is no git
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None
