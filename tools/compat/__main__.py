"""``python -m tools.compat``: the tests, with each version of PostgreSQL and of the packages.

A combination is a server and its clients; ``--list`` prints them. Servers that are not here are
fetched from npm, packages into fresh virtual environments. Each combination leaves a row in
``versions.jsonl``, and exits with 1 if a test failed::

    python -m tools.compat --out results pg14 oldest
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from .combinations import COMBINATIONS, SELECTION, row

_NAMES = [combination.name for combination in COMBINATIONS]


@click.command(help=__doc__.split("\n\n")[1])
@click.argument("names", nargs=-1, type=click.Choice(_NAMES))
@click.option("--out", type=click.Path(path_type=Path), default=Path("compat-results"))
@click.option("--tests", multiple=True, help="Files and folders of tests; a selection by default.")
@click.option("--list", "listing", is_flag=True, help="Print the combinations, and end.")
def main(names: tuple[str, ...], out: Path, tests: tuple[str, ...], listing: bool) -> None:
    chosen = [combination for combination in COMBINATIONS if not names or combination.name in names]
    if listing:
        for item in chosen:
            pins = "this environment" if item.pins is None else " ".join(item.pins) or "the newest"
            click.echo(
                f"{item.name}: PostgreSQL {item.major}, {item.python or 'this Python'}, {pins}"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    failed = False
    for item in chosen:
        found = row(item, tests or SELECTION, out)
        with (out / "versions.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        click.echo(_said(found))
        failed = failed or bool(found.get("exit_code", 1))
    sys.exit(failed)


def _said(row: dict[str, object]) -> str:
    if "not_run" in row:
        return f"{row['combination']}: not run: {row['not_run']}"
    counts = ", ".join(f"{row[name]} {name}" for name in ("passed", "failed", "skipped"))
    return f"{row['combination']}: PostgreSQL {row['postgresql']}: {counts} in {row['seconds']} s"


if __name__ == "__main__":
    main()
