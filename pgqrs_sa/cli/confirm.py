"""Before anything is destroyed: what, how much of it, and where; and work in chunks.

::

    if not confirmed(app, "delete", count, "live messages of queue 'mail'", yes=yes,
                     dry_run=dry_run):
        return                                          # --dry-run: it has been said
    done = in_chunks("purging", count, step, chunk)
    app.emit_one(views.done("purged", done, queue="mail"))
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from .app import App
from .failures import INTERRUPTED, REFUSED, Failed

__all__ = ["confirmed", "in_chunks"]


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

    That is so in a dry run, and where there is nothing: a job that runs every night is no failure
    on a day when nothing matches. With ``if_none``, there is something to do all the same.

    Raises:
        Failed: the answer was no, or there is nobody to ask and ``--yes`` was not given.
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
    if not _somebody_is_there():
        raise Failed(
            "refused: nobody is there to ask",
            hint="--yes does it without asking, --dry-run only says what it would do",
            code=REFUSED,
        )
    if not click.confirm("go on?", err=True):
        raise Failed("refused: nothing was changed", code=REFUSED)
    return True


def _somebody_is_there() -> bool:
    return sys.stdin.isatty()


def in_chunks(verb: str, total: int, step: Callable[[int], int], chunk: int) -> int:
    """Do a long job in steps that commit, with a progress bar; return how much was done.

    Args:
        verb: What is done, for the bar.
        total: How much there is; what is added meanwhile is left alone.
        step: Does at most so many in a transaction of its own; returns how many, 0 at the end.
        chunk: The size of a step.

    Raises:
        Failed: interrupted; the message says how much had been done, and stays.
    """
    done = 0
    try:
        with _bar(verb, total) as advance:
            while done < total and (count := step(min(chunk, total - done))):
                done += count
                advance(count)
    except KeyboardInterrupt:
        raise Failed(
            f"interrupted after {done:,} of {total:,}: these are committed",
            hint="run it again for the rest",
            code=INTERRUPTED,
        ) from None
    return done


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
