"""``python -m benchmarks``: run, report, and the quick mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from . import measure, page, quick, records, report, smoke
from .contenders import CONTENDERS
from .contenders import by_name as contender
from .contenders.peer_pgmq import pgmq_sql
from .executor import Executor
from .machine import header
from .scenarios import SCENARIOS, Bench, Sizes
from .scenarios import by_name as scenario
from .server import running

__all__ = ["main"]

F = TypeVar("F", bound=Callable[..., Any])

_RESULTS = Path("benchmarks/results")
_NUMBERS = {
    "singles": "messages enqueued one by one",
    "batches": "batches enqueued",
    "backlog": "messages of a drain",
    "longest": "seconds after which a drain counts as it is",
    "payload": "bytes of a payload",
    "waking": "processes that enqueue where wake-ups are compared",
    "pause": "seconds between the messages of a latency measurement",
    "cost": "messages whose cost is measured one by one",
    "cost_backlog": "messages whose cost is measured in batches, at most",
    "effects": "messages whose handler writes a business row",
    "latencies": "messages of a latency measurement",
    "rows": "rows of a backlog shape",
    "hold": "seconds for which a snapshot is held",
    "held_backlog": "messages drained meanwhile, at most",
    "memory": "messages drained while memory is watched",
}
_LISTS = {
    "producers": "processes that enqueue",
    "consumers": "processes that drain",
    "takes": "messages taken at a time",
    "payloads": "bytes of a payload, where they are compared",
}


class _Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """``1,4,8``."""

    name = "n,n,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < 1:
            self.fail(f"{value!r} is no list of positive numbers, such as 1,4,8", param, ctx)
        return numbers


def _size_options(command: F) -> F:
    for name, text in reversed((_NUMBERS | _LISTS).items()):
        default = getattr(Sizes(), name)
        kind: Any = _Numbers()
        if name in _NUMBERS:
            lowest = click.IntRange(min=1) if isinstance(default, int) else click.FloatRange(0.001)
            kind = lowest
        option = f"--{name.replace('_', '-')}"
        shown = ",".join(map(str, default)) if name in _LISTS else True
        command = click.option(option, type=kind, default=default, help=text, show_default=shown)(
            command
        )
    return command


def _server_options(command: F) -> F:
    path = click.Path(exists=True, path_type=Path)
    options = (
        click.option("--rounds", type=click.IntRange(1), default=None, help="5, quick: 3"),
        click.option("--pg-bin", type=path, help="the folder of another PostgreSQL's binaries"),
        click.option("--pgmq-sql", type=path, help="pgmq.sql; else that of the package pgmq"),
        click.option("--set", "settings", multiple=True, help="NAME=VALUE, for the server"),
        click.option("--limit", type=float, default=900, help="seconds of one measurement"),
        click.option("--out", type=click.Path(path_type=Path), help="the JSON lines go there"),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(invoke_without_command=True)
@click.option("--quick", "quick_mode", is_flag=True, help="The same as the command quick.")
@click.pass_context
def main(context: click.Context, *, quick_mode: bool) -> None:
    """Measure pgqrs_sa, its baseline and its peers on a server of their own."""
    if context.invoked_subcommand is not None:
        return
    if quick_mode:
        context.invoke(quick_command)
    else:
        click.echo(context.get_help())


@main.command("list")
def list_command() -> None:
    """List scenarios and contenders."""
    for listed in SCENARIOS:
        click.echo(f"{listed.name:24}{listed.title}")
    click.echo()
    for who in CONTENDERS:
        click.echo(f"{who.name:24}{who.title}")


@main.command("run")
@click.option("-s", "--scenario", "scenarios", multiple=True, help="Only this; see list.")
@click.option("-c", "--contender", "contenders", multiple=True, help="Only this; see list.")
@click.option("--heavy-rounds", type=click.IntRange(1), default=1, help="of what takes long")
@_size_options
@_server_options
def run_command(
    scenarios: tuple[str, ...],
    contenders: tuple[str, ...],
    heavy_rounds: int,
    rounds: int | None,
    **options: Any,
) -> None:
    """Measure, and write JSON lines, pictures and a page."""
    sizes = replace(Sizes(), **{name: options.pop(name) for name in (*_NUMBERS, *_LISTS)})
    wanted = measure.Plan(
        _named(scenario, scenarios, SCENARIOS),
        _named(contender, contenders, CONTENDERS),
        rounds or 5,
        heavy_rounds,
        named=bool(contenders),
    )
    file = _made(wanted, sizes, **options)
    console = Console()
    found = records.read(file)
    report.show(console, found)
    _pages(console, found, file.parent)


@main.command("quick")
@_server_options
def quick_command(rounds: int | None = None, **options: Any) -> None:
    """Take a few minutes; exit with 1 when ours falls below a ratio."""
    file = _made(quick.plan(rounds or quick.ROUNDS), quick.SIZES, thrifty=True, **options)
    found = records.read(file)
    report.show(Console(), found, targets=False)
    results = list(quick.checks(found))
    for result in results:
        click.echo(str(result))
    if not results or not all(result.passed for result in results):
        raise click.exceptions.Exit(1)


@main.command("smoke")
@click.option("--limit", type=float, default=60, help="seconds of one measurement")
def smoke_command(limit: float) -> None:
    """Run every scenario on tiny sizes; exit with 1 when one does not do what it measures."""
    failed = False
    with Executor(limit) as executor, running(executor, thrifty=True) as server:
        for name, found in smoke.problems(server, executor):
            click.echo("\n  ".join([f"{'FAIL' if found else 'ok  '} {name}", *found]))
            failed = failed or bool(found)
    if failed:
        raise click.exceptions.Exit(1)


@main.command("report")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--docs", type=click.Path(path_type=Path), help="write this Markdown file as well")
def report_command(file: Path, docs: Path | None) -> None:
    """Make the report of a run from its JSON lines."""
    try:
        found = records.read(file)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    console = Console()
    report.show(console, found)
    _pages(console, found, file.parent)
    if docs is not None:
        docs.write_text(page.markdown(found), encoding="utf-8")
        console.print(f"wrote {docs}")


def _named(find: Callable[[str], Any], names: Iterable[str], everything: tuple[Any, ...]) -> Any:
    try:
        return tuple(find(name) for name in names) or everything
    except KeyError as error:
        raise click.UsageError(str(error.args[0])) from error


def _made(
    wanted: measure.Plan,
    sizes: Sizes,
    *,
    pg_bin: Path | None = None,
    pgmq_sql: Path | None = None,
    settings: tuple[str, ...] = (),
    limit: float = 900,
    out: Path | None = None,
    thrifty: bool = False,
) -> Path:
    """Measure, and return the file of JSON lines."""
    file = out or _RESULTS / f"{datetime.now(UTC):%Y%m%d-%H%M%S}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with (
        Executor(limit) as executor,
        running(
            executor,
            bin_dir=pg_bin,
            settings=_settings(settings),
            pgmq_sql=_pgmq(pgmq_sql),
            thrifty=thrifty,
        ) as server,
        file.open("w", encoding="utf-8") as lines,
    ):
        bench = Bench(executor, sizes)
        present, missing = measure.absent(wanted.contenders, server)
        wanted = replace(wanted, contenders=present)
        records.write(
            lines, header(present, server.versions(), sizes, wanted.rounds, wanted.heavy_rounds)
        )
        for name in missing:
            console.print(f"missing: {name.contender}: {name.reason}", markup=False)
            records.write(lines, name)
        with report.Bar(console, len(measure.turns(wanted, bench))) as bar:
            for record in measure.run(wanted, bench, server, bar):
                records.write(lines, record)
    console.print(f"wrote {file}")
    return file


def _pgmq(given: Path | None) -> Path | None:
    found = pgmq_sql(None if given is None else str(given))
    return None if found is None else Path(found)


def _settings(given: Iterable[str]) -> dict[str, str]:
    pairs = [item.partition("=") for item in given]
    wrong = [name for name, equals, _ in pairs if not equals]
    if wrong:
        raise click.UsageError(f"--set {wrong[0]}: give it as NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _pages(console: Console, run: records.Run, folder: Path) -> None:
    from . import plots  # noqa: PLC0415 - needs matplotlib, which a run does not

    try:
        pictures = plots.draw(run, folder)
    except ModuleNotFoundError as error:
        console.print(f"no pictures: {error}; pip install --group bench", markup=False)
        pictures = []
    (folder / "report.html").write_text(page.html(run, pictures), encoding="utf-8")
    console.print(f"wrote {folder / 'report.html'}")
