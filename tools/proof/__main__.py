"""``python -m tools.proof``: run what the promises are tested by, and write the page about it.

::

    python -m tools.proof run --out results                # all parts: hours
    python -m tools.proof run chaos model --out results    # some
    python -m tools.proof report results --docs docs/explanation/reliability.md
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from .page import page
from .parts import PARTS
from .results import Outcome, read
from .running import ran

_NAMES = [part.name for part in PARTS]


@click.group(help=__doc__.split("\n\n")[0])
def main() -> None:
    pass


@main.command("run")
@click.argument("names", nargs=-1, type=click.Choice(_NAMES))
@click.option("--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
def run(names: tuple[str, ...], out: Path) -> None:
    """Run PARTs, all of them unless named; exit with 1 if one fails."""
    chosen = [part for part in PARTS if not names or part.name in names]
    for part in chosen:
        click.secho(f"== {part.name}: {part.typed}", bold=True)
        ran(part, out / part.name)
    sys.exit(_told(read(out, chosen)))


@main.command("report")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--docs", type=click.Path(path_type=Path), help="Write it here; else to stdout.")
def report(folder: Path, docs: Path | None) -> None:
    """Write the page from the results in FOLDER; exit with 1 if a part has failed."""
    from tests.support.direct import DIRECT

    outcomes = read(folder)
    text = page(outcomes, DIRECT)
    if docs is None:
        click.echo(text)
    else:
        docs.write_text(text)
    sys.exit(_told(outcomes))


def _told(outcomes: list[Outcome]) -> bool:
    """Print a line for each part; return whether one has failed."""
    shown = Table("part", "tests", "passed", "failed", "skipped", "seconds", "state")
    for outcome in outcomes:
        counts = outcome.counts
        numbers = (
            [counts.tests, counts.passed, counts.failed, counts.skipped, round(outcome.seconds)]
            if counts
            else ["-"] * 5
        )
        shown.add_row(outcome.part.name, *map(str, numbers), outcome.state)
    Console(stderr=True).print(shown)
    return any(outcome.failed for outcome in outcomes)


if __name__ == "__main__":
    main(prog_name="python -m tools.proof")
