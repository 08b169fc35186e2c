"""Before anything is destroyed: what, how much of it, and where; and work in chunks.

::

    if not confirmed(app, "delete", count, "live messages of queue 'mail'", yes=yes,
                     dry_run=dry_run):
        return                                          # --dry-run: it has been said
    done = in_slices("purging", count, step, chunk)
    app.emit_one(views.done("purged", done, queue="mail"))

What was counted is remembered by its ids, and nothing else is touched: see `queries`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click

from .app import App
from .failures import INTERRUPTED, REFUSED, Failed

__all__ = ["confirmed", "in_chunks", "in_slices"]


def confirmed(
    app: App,
    verb: str,
    count: int,
    what: str,
    *,
    yes: bool,
    dry_run: bool = False,
    if_none: bool = False,
) -> bool:
    """Show what is about to happen, and ask; return False if nothing is to be done.

    That is so in a dry run, and when ``count`` is 0, which is no failure: a nightly job may have
    nothing to do. With ``if_none``, a count of 0 is confirmed too.

    Raises:
        Failed: the answer was no, or there is no terminal to ask at and no ``--yes``.
    """
    app.say(f"{'would ' if dry_run else ''}{verb} {count:,} {what}")
    app.say(f"in {app.target}")
    if not count and not if_none:
        app.say("nothing to do")
        return False
    if dry_run:
        return False
    if yes:
        return True
    if not _is_interactive():
        raise Failed(
            "refused: confirmation needs a terminal",
            hint="--yes does it without asking, --dry-run only says what it would do",
            code=REFUSED,
        )
    if not click.confirm("go on?", err=True):
        raise Failed("refused: nothing was changed", code=REFUSED)
    return True


def _is_interactive() -> bool:
    return sys.stdin.isatty()


def in_chunks(verb: str, total: int, step: Callable[[int], int], chunk: int) -> int:
    """Do a long job in steps that commit, with a progress bar; return how much was done.

    Args:
        verb: What is done, for the bar.
        total: The number of rows; rows that are added meanwhile are left alone.
        step: Does at most the given number in a transaction; returns how many, 0 at the end.
        chunk: The size of a step.

    Raises:
        Failed: interrupted; the message says how much had been done, and stays.
    """
    with _long_job(verb, total) as job:
        while job.done < total and (count := step(min(chunk, total - job.done))):
            job.done += count
            job.advance(count)
    return job.done


def in_slices(verb: str, total: int, step: Callable[[slice], int], chunk: int) -> int:
    """Work through a list in steps that commit, with a progress bar; return how much was done.

    Args:
        verb: What is done, for the bar.
        total: The length of the list.
        step: Works on a slice of it in a transaction of its own; returns on how many.
        chunk: The size of a slice.

    Raises:
        Failed: interrupted; the message says how much had been done, and stays.
    """
    with _long_job(verb, total) as job:
        for start in range(0, total, chunk):
            stop = min(start + chunk, total)
            job.done += step(slice(start, stop))
            job.advance(stop - start)
    return job.done


@dataclass
class _Job:
    advance: Callable[[int], None]
    done: int = 0


@contextmanager
def _long_job(verb: str, total: int) -> Iterator[_Job]:
    with _bar(verb, total) as advance:
        job = _Job(advance)
        try:
            yield job
        except KeyboardInterrupt:
            raise Failed(
                f"interrupted after {job.done:,} of {total:,}: these are committed",
                hint="run it again for the rest",
                code=INTERRUPTED,
            ) from None


@contextmanager
def _bar(verb: str, total: int) -> Iterator[Callable[[int], None]]:
    if not sys.stderr.isatty():
        yield lambda _count: None
        return
    from rich.console import Console  # noqa: PLC0415 - of the extra `cli`, and slow
    from rich.progress import MofNCompleteColumn, Progress  # noqa: PLC0415

    console = Console(stderr=True)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as bar:
        task = bar.add_task(verb, total=total)
        yield lambda count: bar.advance(task, count)
