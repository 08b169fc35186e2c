"""A pytest that has collected everything, and forks for each mutant: a plugin.

The child puts the mutant's code in the place of what was imported, runs the tests that it is told,
and ends with the first that fails. So that a mutant costs the time of its tests alone: nothing is
imported, collected or migrated again.

It reads a request of JSON in each line and writes an answer, on the descriptors that ``FDS`` names.
A request has ``tests``; and ``module`` and ``source``, the mutant; or ``notes``, true to be told
which test runs which lines. The answer to a mutant is null, or the test that failed and how; that
to notes is what `pgqrs_sa` lines each test has run, and its seconds, by the test's name.

Processes that tests start run the package as it is in the folder: without the mutant.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import _lru_cache_wrapper
from itertools import chain
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, Self

import pytest

FDS = "PGQRS_MUTATION_FDS"
"""The environment variable that names the descriptors to read from and to write to."""

TARGETS = "PGQRS_MUTATION_MODULES"
"""Names the modules below ``pgqrs_sa`` that have mutants."""

_OPTIMIZED = 1  # a flag of the code of functions, which that of classes does not have


class _Session:
    """What children inherit: the items by name, and the functions by their code."""

    def __init__(self, session: pytest.Session) -> None:
        self.session: Any = session  # as the next of the last test: what is the session's stays
        self.items = {entry.nodeid: entry for entry in session.items}
        modules = [_module(name) for name in os.environ[TARGETS].split(",")]
        self.files = {str(module.__file__): _name(module) for module in modules}
        self.functions: dict[tuple[str, str, int], list[FunctionType]] = defaultdict(list)
        self.caches: list[_lru_cache_wrapper[Any]] = []
        for item in gc.get_objects():
            if isinstance(item, FunctionType) and item.__code__.co_filename in self.files:
                self.functions[_key(item.__code__)].append(item)
            elif isinstance(item, _lru_cache_wrapper) and (item.__module__ or "").startswith(
                "pgqrs"
            ):
                self.caches.append(item)

    def forget(self) -> None:
        """Have every statement built again."""
        for cache in self.caches:
            cache.cache_clear()

    def swap(self, module: str, source: str) -> None:
        """Put other code in the place of that of a module's functions."""
        path = str(_module(module).__file__)
        before = compile(Path(path).read_text(), path, "exec")
        after = compile(source, path, "exec")
        changed = [
            (old, new)
            for old, new in zip(_functions(before), _functions(after), strict=True)
            if old.replace(co_linetable=b"") != new.replace(co_linetable=b"")
            if old.co_firstlineno == new.co_firstlineno
        ]
        for old, new in changed[:1]:
            functions = self.functions[_key(old)]
            assert functions, f"{old.co_qualname} is not to be found"
            for function in functions:
                function.__code__ = new
        assert changed, "nothing is changed"

    def run(self, names: Sequence[str]) -> Iterator[str]:
        """Run tests, each of which is told before."""
        items = [self.items[name] for name in names]
        for item, following in zip(items, [*items[1:], self.session], strict=True):
            self.forget()
            yield item.nodeid
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"pgqrs_sa.{name.replace('/', '.')}")


def _name(module: ModuleType) -> str:
    return module.__name__.partition(".")[2].replace(".", "/")


def _key(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def _functions(code: CodeType) -> Iterator[CodeType]:
    """Yield the functions of a module and of its classes."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_flags & _OPTIMIZED:
                yield constant
            else:
                yield from _functions(constant)


class _Notes:
    """Which lines a test runs, in whatever thread."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = files
        self.lines: set[tuple[str, int]] = set()

    def __enter__(self) -> Self:
        threading.settrace(self._called)
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def _called(self, frame: FrameType, _event: str, _argument: object) -> Any:
        return self._ran if frame.f_code.co_filename in self._files else None

    def _ran(self, frame: FrameType, event: str, _argument: object) -> Any:
        if event == "line":
            self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._ran

    def taken(self) -> dict[str, list[int]]:
        """Return what was noted since the last time, by module."""
        lines, self.lines = self.lines, set()
        found: dict[str, list[int]] = defaultdict(list)
        for path, line in sorted(lines):
            found[self._files[path]].append(line)
        return found


class _Reports:
    """What the test that runs has come to."""

    def __init__(self) -> None:
        self.failed = ""
        self.passed = False
        self.seconds = 0.0

    def begin(self) -> None:
        self.__init__()  # type: ignore[misc]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        self.passed = self.passed or (report.when == "call" and report.passed)
        if report.failed:
            self.failed = self.failed or str(report.longrepr)[-1000:] or "failed"


_reports = _Reports()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_reports)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    reading, writing = map(int, os.environ[FDS].split(","))
    for fixture in ("pg_empty", "pg_migrated"):
        item = next(
            entry for entry in session.items if fixture in getattr(entry, "fixturenames", ())
        )
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=session)  # type: ignore[arg-type]
    inherited = _Session(session)
    gc.collect()
    gc.freeze()
    with os.fdopen(reading) as requests, os.fdopen(writing, "w") as answers:
        print(json.dumps(sorted(inherited.items)), file=answers, flush=True)
        for line in requests:
            request = json.loads(line)
            do = _noted if request.get("notes") else _tried
            answer = _forked(inherited, do, request)
            print(json.dumps(answer), file=answers, flush=True)
    return True


def _tried(inherited: _Session, request: Mapping[str, Any], tell: Any) -> Any:
    if request["source"] is not None:
        inherited.swap(request["module"], request["source"])
    for name in inherited.run(request["tests"]):
        if _reports.failed:
            break
        _reports.begin()
        tell(["runs", name])
        running = name
    return [running, _reports.failed] if _reports.failed else None


def _noted(inherited: _Session, request: Mapping[str, Any], tell: Any) -> Any:
    """Note the lines of tests that pass; those of others do not count."""
    found: dict[str, Any] = {}
    before = None
    with _Notes(inherited.files) as notes:
        for name in chain(inherited.run(request["tests"]), [None]):
            lines = notes.taken()
            if before is not None and _reports.passed and not _reports.failed:
                found[before] = {"seconds": _reports.seconds, "lines": lines}
            _reports.begin()
            tell(["runs", name])
            before = name
    return found


def _forked(inherited: _Session, do: Any, request: Mapping[str, Any]) -> Any:
    """Return what a child says, which is ended when a test takes much longer than it should."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(reading)
        _in_child(inherited, do, request, writing)
    os.close(writing)
    try:
        return _heard(reading, request)
    finally:
        os.close(reading)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _in_child(inherited: _Session, do: Any, request: Mapping[str, Any], writing: int) -> None:
    os.setsid()

    def tell(what: Any) -> None:
        os.write(writing, f"{json.dumps(what)}\n".encode())

    try:
        tell(["begun", ""])
        tell(["ended", do(inherited, request, tell)])
    except BaseException as error:  # noqa: BLE001 - the parent hears of it
        tell(["broken", f"{type(error).__name__}: {error}"])
    finally:
        os._exit(0)


def _heard(reading: int, request: Mapping[str, Any]) -> Any:
    limits, running, text = request["limits"], "", b""
    limit = time.monotonic() + 60
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, limit - time.monotonic()))
        if not ready:
            return [running, "TIMEOUT"]
        if not (some := os.read(reading, 65536)):
            return [running, "the process ended"]
        text += some
        *lines, text = text.split(b"\n")
        for line in lines:
            word, told = json.loads(line)
            if word == "ended":
                return told
            if word == "broken":
                return ["broken", told]
            if word == "runs":
                running = told
                limit = time.monotonic() + limits.get(told, 120)
