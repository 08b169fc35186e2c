"""Alembic loads the entry point while it is half imported: no order of imports may break it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

REGISTERED = (
    "from alembic.operations import Operations as o; from alembic.runtime import plugins as p;"
    "assert o.pgqrs_upgrade and o.pgqrs_downgrade; assert 'pgqrs_sa' in p._all_plugins;"
    "import alembic; assert 'site-packages' in alembic.__file__"
)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "code",
    [
        "import alembic",
        "import alembic, pgqrs_sa.migrations",
        "import pgqrs_sa.migrations, alembic",
        "import pgqrs_sa.migrations.ops",
        "import pgqrs_sa.migrations.autogen",
        "import pgqrs_sa.alembic_plugin, alembic",
        "import pgqrs_sa, pgqrs_sa.models, alembic.command",
        "from alembic.operations import Operations",
        "from alembic.autogenerate import renderers",
        "import alembic.runtime.plugins",
    ],
)
def test_every_order_of_imports_registers_the_operations(code):
    done = python(f"{code}; {REGISTERED}")
    assert done.returncode == 0, done.stderr


def test_a_version_check_does_not_import_alembic():
    done = python(
        "import sys, pgqrs_sa.migrations as m; m.check, m.current_version, m.lock;"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'alembic']"
    )
    assert done.returncode == 0, done.stderr


def test_a_version_check_does_without_alembic():
    done = python("import sys; sys.modules['alembic'] = None; import pgqrs_sa.migrations")
    assert done.returncode == 0, done.stderr


def test_importing_alembic_does_not_import_the_comparison():
    done = python(
        "import alembic, sys; assert 'pgqrs_sa.migrations.ops' in sys.modules;"
        "assert 'pgqrs_sa.migrations.autogen' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_the_entry_point_suits_the_alembic_releases_that_iterate_over_it():
    plugin = importlib.metadata.entry_points(group="alembic.plugins")["pgqrs_sa"].load()
    assert [module.setup for module in plugin] == [plugin.setup]
