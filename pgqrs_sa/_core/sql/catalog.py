"""PostgreSQL's catalog and statistics, as the doctor reads them.

Every statement here only reads, works from PostgreSQL 14 on, and needs no right beyond
connecting; without ``pg_read_all_stats`` the sessions of others are seen without their times.
Names and ids are bind parameters. What returns several rows says their order: the doctor reports
in it, and says the same thing twice in the same words.
"""

from __future__ import annotations

import sqlalchemy as sa

from .fragments import Elapsed

__all__ = [
    "clock",
    "columns",
    "constraints",
    "estimated_rows",
    "facts",
    "foreign_keys",
    "has_history",
    "indexes",
    "indexes_on",
    "prepared_transactions",
    "relations",
    "schemas_with",
    "sequences",
    "settings",
    "slots",
    "transactions",
    "triggers",
    "vacuum",
]

_OIDS = sa.bindparam("oids", type_=sa.ARRAY(sa.BigInteger))


def _about(sql: str) -> sa.TextClause:
    return sa.text(sql).bindparams(_OIDS)


def _lasting(sql: str) -> sa.TextualSelect:
    longest = sa.bindparam("longest", type_=sa.Interval)
    return sa.text(sql).bindparams(longest).columns(age=Elapsed)


relations = sa.text(
    "SELECT c.relname AS name, CAST(c.oid AS bigint) AS oid, n.nspname AS schema,"
    " CAST(c.relpersistence AS text) AS persistence, coalesce(c.reloptions, '{}') AS options"
    " FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
    " WHERE c.oid = ANY (ARRAY(SELECT CAST(to_regclass("
    "coalesce(quote_ident(:schema) || '.', '') || quote_ident(name)) AS oid)"
    " FROM unnest(:names) AS name))"
    " ORDER BY array_position(current_schemas(true), n.nspname), c.oid"
).bindparams(sa.bindparam("schema", type_=sa.Text), sa.bindparam("names", type_=sa.ARRAY(sa.Text)))
"""Tables by name, where the schema, or the search path if it is NULL, has them.

Binds: schema, names.
"""

has_history = sa.text(
    "SELECT coalesce(to_regclass(quote_ident(:schema) || '.alembic_version'),"
    " to_regclass('alembic_version')) IS NOT NULL"
).bindparams(sa.bindparam("schema", type_=sa.Text))
"""Whether Alembic keeps its revisions in the schema, or on the search path. Binds: schema."""

schemas_with = sa.text(
    "SELECT n.nspname FROM pg_catalog.pg_class AS c"
    " JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
    " WHERE c.relname = :name AND c.relkind IN ('r', 'p') ORDER BY n.nspname"
).bindparams(sa.bindparam("name", type_=sa.Text))
"""The schemas that have a table of this name. Binds: name."""

columns = _about(
    "SELECT CAST(a.attrelid AS bigint) AS oid, a.attname AS name,"
    " format_type(a.atttypid, a.atttypmod) AS type, NOT a.attnotnull AS nullable,"
    " pg_get_expr(d.adbin, d.adrelid) AS default, a.attidentity <> '' AS identity"
    " FROM pg_catalog.pg_attribute AS a LEFT JOIN pg_catalog.pg_attrdef AS d"
    " ON d.adrelid = a.attrelid AND d.adnum = a.attnum"
    " WHERE a.attrelid = ANY (CAST(:oids AS oid[]))"
    " AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum"
)
"""The columns of tables. Binds: oids."""

indexes = _about(
    "SELECT CAST(x.indrelid AS bigint) AS oid, i.relname AS name, x.indisunique AS unique,"
    " x.indisvalid AND x.indisready AS valid, x.indpred IS NOT NULL AS partial,"
    " ARRAY(SELECT pg_get_indexdef(x.indexrelid, n, true)"
    " FROM generate_series(1, x.indnatts) AS n ORDER BY n) AS keys,"
    " pg_get_indexdef(x.indexrelid) AS definition,"
    " EXISTS (SELECT FROM pg_catalog.pg_constraint AS k WHERE k.conindid = x.indexrelid"
    " AND k.conrelid = x.indrelid AND k.contype IN ('p', 'u', 'x')) AS of_constraint"
    " FROM pg_catalog.pg_index AS x JOIN pg_catalog.pg_class AS i ON i.oid = x.indexrelid"
    " WHERE x.indrelid = ANY (CAST(:oids AS oid[])) ORDER BY i.relname"
)
"""The indexes of tables. Binds: oids."""

indexes_on = _about(
    "SELECT i.relname AS name, array_agg(DISTINCT a.attname ORDER BY a.attname) AS columns,"
    " min(k.conname) AS constraint"
    " FROM pg_catalog.pg_index AS x JOIN pg_catalog.pg_class AS i ON i.oid = x.indexrelid"
    " JOIN pg_catalog.pg_am AS m ON m.oid = i.relam"
    " LEFT JOIN pg_catalog.pg_constraint AS k ON k.conindid = x.indexrelid"
    " AND k.conrelid = x.indrelid"
    " JOIN pg_catalog.pg_attribute AS a ON a.attrelid = x.indrelid"
    " AND (a.attnum = ANY (x.indkey) OR EXISTS (SELECT FROM pg_catalog.pg_depend AS d"
    " WHERE d.classid = CAST('pg_catalog.pg_class' AS regclass) AND d.objid = x.indexrelid"
    " AND d.refclassid = d.classid AND d.refobjid = x.indrelid AND d.refobjsubid = a.attnum))"
    " WHERE x.indrelid = ANY (CAST(:oids AS oid[])) AND a.attname = ANY (:columns)"
    # From PostgreSQL 16 on an index that only summarizes pages allows heap-only updates.
    " AND NOT (m.amname = 'brin'"
    " AND CAST(current_setting('server_version_num') AS integer) >= 160000)"
    " GROUP BY i.relname ORDER BY i.relname"
).bindparams(sa.bindparam("columns", type_=sa.ARRAY(sa.Text)))
"""The indexes of tables that name some columns, be it in an expression or a predicate.

``constraint`` is the constraint that an index belongs to, or NULL. Binds: oids, columns.
"""

constraints = _about(
    "SELECT CAST(conrelid AS bigint) AS oid, conname AS name, CAST(contype AS text) AS kind,"
    " pg_get_constraintdef(oid) AS body FROM pg_catalog.pg_constraint"
    " WHERE conrelid = ANY (CAST(:oids AS oid[])) AND contype IN ('p', 'u', 'c')"
    " ORDER BY conname"
)
"""The constraints of tables, but for foreign keys. Binds: oids."""

foreign_keys = _about(
    "SELECT k.conname AS name, CAST(k.conrelid AS bigint) AS oid,"
    " CAST(k.confrelid AS bigint) AS referred, format('%I.%I', n.nspname, c.relname) AS table,"
    " CAST(k.confdeltype AS text) AS on_delete, pg_get_constraintdef(k.oid) AS body,"
    " ARRAY(SELECT a.attname FROM pg_catalog.pg_attribute AS a"
    " WHERE a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey)) AS columns,"
    " EXISTS (SELECT FROM pg_catalog.pg_attribute AS a WHERE a.attrelid = k.conrelid"
    " AND a.attnum = ANY (k.conkey) AND a.attnotnull) AS required"
    " FROM pg_catalog.pg_constraint AS k JOIN pg_catalog.pg_class AS c ON c.oid = k.conrelid"
    " JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
    " WHERE k.contype = 'f' AND k.conparentid = 0"
    " AND CAST(:oids AS oid[]) && ARRAY[k.conrelid, k.confrelid] ORDER BY k.conname, k.oid"
)
"""The foreign keys of tables, and those to them. Binds: oids."""

triggers = _about(
    "SELECT t.tgname AS name, CAST(t.tgrelid AS bigint) AS oid FROM pg_catalog.pg_trigger AS t"
    " WHERE t.tgrelid = ANY (CAST(:oids AS oid[])) AND NOT t.tgisinternal AND t.tgparentid = 0"
    " ORDER BY t.tgname, t.oid"
)
"""The triggers of tables, but for those of constraints. Binds: oids."""

sequences = _about(
    "SELECT CAST(d.refobjid AS bigint) AS oid, a.attname AS column, c.relname AS short_name,"
    " format('%I.%I', n.nspname, c.relname) AS name, s.seqcycle AS cycle, s.seqcache AS cache,"
    " s.seqincrement AS increment, s.seqmax AS highest,"
    " CASE WHEN has_sequence_privilege(s.seqrelid, 'USAGE, SELECT')"
    " THEN coalesce(pg_sequence_last_value(s.seqrelid), s.seqstart - 1) END AS last"
    " FROM pg_catalog.pg_depend AS d JOIN pg_catalog.pg_sequence AS s ON s.seqrelid = d.objid"
    " JOIN pg_catalog.pg_class AS c ON c.oid = s.seqrelid"
    " JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
    " JOIN pg_catalog.pg_attribute AS a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid"
    " WHERE d.classid = CAST('pg_catalog.pg_class' AS regclass) AND d.refclassid = d.classid"
    " AND d.deptype IN ('a', 'i') AND d.refobjid = ANY (CAST(:oids AS oid[]))"
    " AND a.attname IN ('id', 'fencing_token') ORDER BY d.refobjid, d.refobjsubid"
)
"""The sequences behind ids and fencing tokens; NULL as last: not ours to see. Binds: oids."""

vacuum = _about(
    "SELECT CAST(relid AS bigint) AS oid, n_dead_tup AS dead,"
    " EXTRACT(epoch FROM statement_timestamp() - greatest(last_vacuum, last_autovacuum))"
    " AS age"
    " FROM pg_catalog.pg_stat_all_tables WHERE relid = ANY (CAST(:oids AS oid[]))"
).columns(age=Elapsed)
"""Dead rows of tables, and how long ago the last vacuum was (NULL: never). Binds: oids."""

estimated_rows = _about(
    "SELECT CAST(c.reltuples AS bigint) AS estimate FROM pg_catalog.pg_class AS c"
    " WHERE c.oid = ANY (CAST(:oids AS oid[])) ORDER BY c.oid"
)
"""How many rows tables have, as vacuum and analyze last estimated (-1: never). Binds: oids."""

transactions = _lasting(
    "SELECT pid, usename AS role, application_name AS application, state, backend_type AS kind,"
    " EXTRACT(epoch FROM clock_timestamp() - xact_start) AS age, query_start"
    " FROM pg_catalog.pg_stat_activity"
    " WHERE pid <> pg_backend_pid() AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)"
    " AND (datname = current_database() OR backend_type = 'walsender')"
    " AND backend_type <> 'autovacuum worker'"
    " AND xact_start < clock_timestamp() - :longest ORDER BY xact_start"
)
"""Transactions that hold back vacuum for longer than this, the oldest first. Binds: longest."""

prepared_transactions = _lasting(
    "SELECT gid AS name, owner AS role,"
    " EXTRACT(epoch FROM clock_timestamp() - prepared) AS age"
    " FROM pg_catalog.pg_prepared_xacts WHERE database = current_database()"
    " AND prepared < clock_timestamp() - :longest ORDER BY prepared"
)
"""Transactions that were prepared longer ago than this and never ended. Binds: longest."""

slots = sa.text(
    "SELECT slot_name AS name, slot_type AS kind, age(coalesce(xmin, catalog_xmin)) AS age"
    " FROM pg_catalog.pg_replication_slots"
    " WHERE NOT active AND age(coalesce(xmin, catalog_xmin)) > :most ORDER BY 3 DESC"
).bindparams(sa.bindparam("most", type_=sa.BigInteger))
"""Replication slots that nobody reads and that hold back vacuum. Binds: most (transactions)."""

clock = sa.text("SELECT clock_timestamp()").columns(sa.column("at", sa.DateTime(timezone=True)))
"""The database's clock."""

facts = sa.text(
    "SELECT pg_is_in_recovery() AS standby,"
    " current_setting('transaction_read_only') = 'on' AS read_only,"
    " has_database_privilege(current_database(), 'TEMPORARY') AS temporary,"
    " pg_has_role(CURRENT_USER, 'pg_read_all_stats', 'USAGE') AS sees_others,"
    " CAST(CURRENT_USER AS text) AS role, CAST(current_database() AS text) AS database,"
    " (SELECT sum(numbackends) FROM pg_catalog.pg_stat_database) AS connections,"
    " CAST(current_setting('max_connections') AS integer)"
    " - CAST(current_setting('superuser_reserved_connections') AS integer) AS most_connections,"
    " CASE WHEN NOT pg_is_in_recovery() THEN pg_notification_queue_usage() END AS notifications,"
    " EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'citus') AS citus"
)
"""What there is to know about the server and this connection, in one row."""

settings = sa.text(
    "SELECT name, setting, source FROM pg_catalog.pg_settings"
    " WHERE name IN ('autovacuum', 'track_counts', 'default_transaction_read_only')"
)
"""The settings that the doctor looks at, and where each was set."""
