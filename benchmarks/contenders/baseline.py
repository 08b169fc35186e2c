"""The baseline: the same SQL through pgbench, prepared, with nothing of Python in the way."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..executor import Assignment, ContenderFailed, Executor
from ..place import Place
from ..work import Outcome, Payload
from . import sql
from .base import ORDER
from .ours import Ours, items_text

__all__ = ["Baseline", "find_pgbench"]

_KNOWN = Path("/usr/lib/postgresql/15/bin/pgbench")
_WARM = 6  # transactions of each client that are left out, where there are enough: its first times
_FAILED = re.compile(r"number of failed transactions: (\d+)")

_TAKE = (
    "WITH bench AS ({dequeue}) SELECT coalesce(array_agg(id), '{{}}') AS ids,"
    " coalesce(array_agg(fencing_token), '{{}}') AS tokens,"
    " count(*) AS required, sum(length(payload)) AS read FROM bench \\gset\n{archive};\n"
)
_BATCH = (
    "\\if :loaded = 0\nSELECT items FROM bench_items \\gset\n\\set loaded 1\n\\endif\n{insert};\n"
)


def find_pgbench(place: Place) -> str | None:
    """Return the path of pgbench: the server's own, a known one, or that of the search path."""
    for candidate in (Path(place.bin_dir) / "pgbench", _KNOWN):
        if candidate.is_file():
            return str(candidate)
    return shutil.which("pgbench")


class Baseline(Ours):
    """pgbench; its clients are threads of one process, and its numbers its own."""

    name = "pgbench"
    title = "pgbench, same SQL (baseline)"
    family = "baseline"
    packages = ()
    works: ClassVar[frozenset[str]] = frozenset(
        ("singles", "in_transaction", "batches", "business", "drain", "consume")
    )

    @classmethod
    def missing(cls, place: Place) -> str | None:
        """See `Contender`."""
        if find_pgbench(place) is None:
            return "there is no pgbench: install postgresql-contrib, or put it on the PATH"
        return None

    @classmethod
    def offers(cls, work: str) -> bool:
        """See `Contender`."""
        return work in cls.works

    @classmethod
    def run(
        cls,
        executor: Executor,
        place: Place,
        work: str,
        arguments: Sequence[dict[str, Any]],
        *,
        warm_up: dict[str, Any] | None = None,
        beside: Sequence[Assignment] = (),
    ) -> Outcome:
        """See `Contender`: as many clients as other contenders have processes."""
        del executor, warm_up
        if beside:
            raise ContenderFailed("pgbench works alone")
        argument = arguments[0]
        script, units = getattr(cls, f"_{work}")(**argument)
        transactions = (
            argument["backlog"] // argument["batch"] if work == "drain" else argument["count"]
        )
        warm = _WARM
        if work == "in_transaction":
            # The script is one transaction, and each command in it is prepared when it is met
            # first: it runs twice, and the second time counts.
            warm, transactions = 1, 1
        elif work == "drain":
            # They would be missing from the backlog.
            warm, transactions = 0, transactions // len(arguments)
        elif work == "batches":
            cls._load(place, argument["payload"], argument["size"])
        return _measured(place, script, len(arguments), (warm, transactions), units)

    @classmethod
    def _singles(cls, count: int, payload: Payload) -> tuple[str, int]:
        del count
        return f"{_insert(payload)};\n", 1

    @classmethod
    def _in_transaction(cls, count: int, payload: Payload) -> tuple[str, int]:
        return f"BEGIN;\n{_insert(payload)};\n" + f"{_insert(payload)};\n" * (
            count - 1
        ) + "COMMIT;\n", count

    @classmethod
    def _business(cls, count: int, payload: Payload) -> tuple[str, int]:
        del count
        return f"BEGIN;\n{ORDER};\n{_insert(payload)};\nCOMMIT;\n", 1

    @classmethod
    def _batches(cls, count: int, size: int, payload: Payload) -> tuple[str, int]:
        del count
        given = {"size": str(items_text(payload, 1)[1])}
        insert = sql.enqueue_many().inlined(given, ["items"])
        return _BATCH.format(insert=insert), size

    @classmethod
    def _drain(cls, batch: int, **_: Any) -> tuple[str, int]:
        lease = sql.dequeue().inlined({"limit": str(batch)}, [])
        free = ["ids", "tokens", "required"]
        archive = sql.archive().inlined({}, free)
        return _TAKE.format(dequeue=lease, archive=archive), batch

    @classmethod
    def _load(cls, place: Place, payload: Payload, size: int) -> None:
        """Put the batch where each client reads it once: no argument may be that long."""
        import psycopg  # noqa: PLC0415

        with psycopg.connect(place.conninfo, autocommit=True) as connection:
            connection.execute("CREATE TABLE bench_items (items text)")
            items = items_text(payload, size)[0]
            connection.execute("INSERT INTO bench_items VALUES (%s)", [items])


def _insert(payload: Payload) -> str:
    text = json.dumps(payload)
    given = {"payload": f"'{text}'", "size": str(len(text))}
    return sql.enqueue_one().inlined(given, [])


def _measured(
    place: Place, script: str, clients: int, transactions: tuple[int, int], units: int
) -> Outcome:
    """Run a script; the first transactions of each client are not counted."""
    program = find_pgbench(place)
    if program is None:
        raise ContenderFailed("there is no pgbench")
    warm, counted = transactions
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "script.sql"
        file.write_text(script, encoding="utf-8")
        command = [program, "-n", "-M", "prepared", "-D", "loaded=0", "-f", str(file)]
        command += ["-l", f"--log-prefix={folder}/log"]
        command += ["-c", str(clients), "-j", str(clients), "-t", str(warm + counted)]
        command += ["-h", place.host, "-p", str(place.port), "-U", place.user, place.database]
        done = subprocess.run(  # noqa: S603 - our own argument list, no shell
            command, capture_output=True, text=True, check=False
        )
        failed = _FAILED.search(done.stdout)
        if done.returncode or (failed and int(failed[1])):
            raise ContenderFailed(f"pgbench: {done.stderr.strip()[-500:]}")
        times = _times(Path(folder).glob("log.*"), warm)
    # Each client's own rate; a client that is done sooner does not wait for the others.
    # A clock that stood still has counted a microsecond, at least.
    rate = sum(units * len(time) / max(sum(time), 1e-6 * len(time)) for time in times if time)
    if not rate:
        raise ContenderFailed("pgbench has logged no transaction")
    count = units * sum(map(len, times))
    return Outcome(count, count / rate)


def _times(logs: Iterable[Path], warm: int) -> list[list[float]]:
    """Return the seconds of the transactions of each client, without its first ones."""
    found: dict[str, list[float]] = defaultdict(list)
    for log in logs:
        for line in log.read_text(encoding="utf-8").splitlines():
            client, _, microseconds, *_ = line.split()
            found[client].append(int(microseconds) / 1e6)
    return [times[warm:] for times in found.values()]
