"""What a run ran on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import psycopg

from .contenders.base import Contender
from .records import Header
from .scenarios import Sizes

__all__ = ["header"]

_GIB = 1024**3


def header(
    contenders: Iterable[type[Contender]],
    server: Mapping[str, str],
    sizes: Sizes,
    rounds: int,
    heavy_rounds: int,
) -> Header:
    """Return the first record of a run."""
    versions = {"Python": platform.python_version(), "libpq": _libpq()}
    for contender in contenders:
        versions |= contender.versions()
    return Header(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=_machine(),
        versions=versions,
        server=dict(server),
        sizes=asdict(sizes),
        rounds=rounds,
        heavy_rounds=heavy_rounds,
    )


def _libpq() -> str:
    version = psycopg.pq.version()
    return f"{version // 10000}.{version % 10000}"


def _machine() -> dict[str, str]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "CPUs": str(os.cpu_count()),
        "memory": f"{pages / _GIB:.0f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
