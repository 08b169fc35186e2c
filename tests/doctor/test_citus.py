"""A database with the extension ``citus``: no advice there that Citus refuses, or that breaks it.

Citus is not installed for the tests. The row by which the doctor knows it is.
"""

from __future__ import annotations

from datetime import timedelta

import pytest

from pgqrs_sa.doctor.catalog import TABLES
from pgqrs_sa.doctor.fixes import TableRepairs

EXTENSION = (
    "INSERT INTO pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)"
    " VALUES (4294967290, 'citus', 10, 'pg_catalog'::regnamespace, false, '13.2-2')"
)


@pytest.fixture
def citus(sql) -> None:
    sql(EXTENSION)


def statements(fix: str) -> list[str]:
    return [line for line in fix.splitlines() if line]


def alone(fix: str) -> bool:
    """Return whether each ADD CONSTRAINT is the only part of its statement."""
    return all("DROP CONSTRAINT" not in line for line in statements(fix) if "ADD CONST" in line)


def test_a_sound_database_has_no_finding(citus, doctor):
    assert doctor() == []


def test_ids_of_another_nodes_range_are_not_taken_for_a_lost_sequence(sql, doctor, fixed):
    high = "INSERT INTO pgqrs_queues (id, queue_name) VALUES (281474976710657, 'mail')"
    sql(high)
    assert "setval" in doctor()[0].fix
    sql(EXTENSION)
    assert doctor() == []


def test_a_sequence_is_left_alone(sql, doctor, citus):
    sql("ALTER TABLE pgqrs_workers ALTER id DROP IDENTITY")
    (finding,) = doctor()
    assert "identity column" in finding.problem
    assert "setval" not in finding.fix
    assert "ALTER TABLE" not in finding.fix


DAMAGES = {
    "another CHECK": (
        "ALTER TABLE pgqrs_archive DROP CONSTRAINT pgqrs_archive_outcome_check,"
        " ADD CONSTRAINT pgqrs_archive_outcome_check CHECK (outcome <> '')"
    ),
    "a unique constraint on something else": (
        "ALTER TABLE pgqrs_queues DROP CONSTRAINT pgqrs_queues_queue_name_key,"
        " ADD CONSTRAINT pgqrs_queues_queue_name_key UNIQUE (id, queue_name)"
    ),
    "another name": (
        "ALTER TABLE pgqrs_archive RENAME CONSTRAINT pgqrs_archive_outcome_check TO mine"
    ),
    "another name of a key": (
        "ALTER TABLE pgqrs_queues RENAME CONSTRAINT pgqrs_queues_queue_name_key TO mine"
    ),
    "a foreign key that keeps messages": (
        "CREATE TABLE receipt (m bigint REFERENCES pgqrs_messages)"
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_constraints_are_changed_one_at_a_time_and_not_renamed(citus, sql, fixed, damage):
    sql(damage)
    finding = fixed("drift", "promises")
    assert "ADD CONSTRAINT" in finding.fix
    assert alone(finding.fix)
    assert "RENAME CONSTRAINT" not in finding.fix


def test_every_constraint_of_ours():
    for name, table in TABLES.items():
        repairs = TableRepairs(name, "public", citus=True)
        for constraint in table.constraints:
            assert alone(repairs.constraint(str(constraint.name), replaces=True))
            assert "RENAME" not in repairs.rename_constraint("mine", str(constraint.name))


@pytest.mark.parametrize("prefix", ["citus_0_", "mine_"])
def test_a_part_of_a_distributed_transaction_is_for_citus_to_end(prefix):
    """A rollback here, where another node has committed, would tear it apart."""
    from types import SimpleNamespace

    from pgqrs_sa.doctor import Thresholds
    from pgqrs_sa.doctor.checks import prepared

    row = SimpleNamespace(name=f"{prefix}1", role="r", age=timedelta(days=2))
    visit = SimpleNamespace(
        facts=SimpleNamespace(citus=True), thresholds=Thresholds(), rows=lambda *_, **__: [row]
    )
    (finding,) = prepared(visit)
    rolls_back = "ROLLBACK PREPARED" in finding.fix
    assert rolls_back == (prefix == "mine_")
