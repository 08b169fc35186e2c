"""Run the template of ``docs/how-to/row-level-security.md``, and fall into its traps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from pgqrs_sa import DuplicateMessage, Item, LeaseLost, MessageNotFound, QueueService
from pgqrs_sa._core.scope import Context
from pgqrs_sa.doctor import diagnose
from pgqrs_sa.grants import grants

DOCUMENT = Path(__file__).parents[2] / "docs/how-to/row-level-security.md"
FENCE = re.compile(
    r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
ROLES = {
    "app": "LOGIN PASSWORD 'for-a-test'",
    "owner": "LOGIN PASSWORD 'for-a-test'",
    "everybodys": "LOGIN PASSWORD 'for-a-test' BYPASSRLS",
}


def block(title: str) -> str:
    (code,) = (
        match["code"]
        for match in FENCE.finditer(DOCUMENT.read_text())
        if title in (match["title"], match["language"])
    )
    return code


def protect(connection: sa.Connection) -> None:
    """Run the SQL of the document."""
    for statement in block("sql").split(";\n"):
        if statement.strip():
            connection.exec_driver_sql(statement)


def prepare(connection: sa.Connection, names: dict[str, Any]) -> None:
    """Make the roles, the tables and the policies, and give the roles their rights."""
    for role, options in ROLES.items():
        connection.exec_driver_sql(f"DROP ROLE IF EXISTS rls_{role}")
        connection.exec_driver_sql(f"CREATE ROLE rls_{role} {options}")
    names["QueueBase"].metadata.create_all(connection)
    for table in names["QueueBase"].metadata.sorted_tables:
        connection.exec_driver_sql(f"ALTER TABLE {table.name} OWNER TO rls_owner")
    protect(connection)
    for role, kind in (("app", "producer"), ("app", "consumer"), ("everybodys", "operator")):
        for line in grants(kind, f"rls_{role}", models=names["models"]):
            connection.exec_driver_sql(line)


@pytest.fixture(scope="module")
def template(kept_empty: Any) -> Iterator[SimpleNamespace]:
    """The tables of the document, its policies, and its roles; ``work(tenant)`` is a session."""
    names: dict[str, Any] = {"__name__": "a_host"}
    for title in ("models", "session"):
        exec(compile(block(title), str(DOCUMENT), "exec", dont_inherit=True), names)  # noqa: S102
    root = sa.create_engine(kept_empty.url, poolclass=sa.NullPool)
    with root.begin() as connection:
        prepare(connection, names)
    url = sa.make_url(kept_empty.url)
    engines = {
        # One connection: what one session leaves on it, the next one gets.
        role: sa.create_engine(
            url.set(username=f"rls_{role}", password="for-a-test"),  # noqa: S106
            pool_size=1,
            max_overflow=0,
        )
        for role in ROLES
    }

    def work(tenant: str | None = None, role: str = "app") -> Session:
        return names["TenantSession"](engines[role], info={"tenant": tenant})

    with Session(engines["everybodys"]) as session, session.begin():
        QueueService(session, models=names["models"]).queues.create("mail")
    yield SimpleNamespace(work=work, models=names["models"], engines=engines, root=root)
    for engine in engines.values():
        engine.dispose()
    with root.begin() as connection:
        names["QueueBase"].metadata.drop_all(connection)
        for role in ROLES:
            connection.exec_driver_sql(f"DROP OWNED BY rls_{role}")
            connection.exec_driver_sql(f"DROP ROLE rls_{role}")


@pytest.fixture
def act(template) -> Iterator[Callable[..., Any]]:
    """``act(tenant, step)`` runs a step with a service, in a transaction of a tenant."""

    def run(tenant: str | None, step: Callable[[QueueService], Any], role: str = "app") -> Any:
        with template.work(tenant, role) as session, session.begin():
            return step(QueueService(session, models=template.models))

    yield run
    with template.root.begin() as connection:
        connection.exec_driver_sql("DELETE FROM pgqrs_messages")
        connection.exec_driver_sql("DELETE FROM pgqrs_archive")


def denied(call: Callable[[], Any]) -> None:
    """Refused by a policy; NOT NULL has no say before it."""
    with pytest.raises(sa.exc.DBAPIError) as refused:
        call()
    assert refused.value.orig.sqlstate in ("42501", "23502")


def tenants(template, table: str = "pgqrs_messages") -> list[str]:
    with template.root.connect() as connection:
        return [*connection.scalars(sa.text(f"SELECT tenant FROM {table} ORDER BY id"))]  # noqa: S608


def test_every_way_of_enqueueing_gives_the_message_its_tenant(template, act) -> None:
    def enqueue(service: QueueService) -> None:
        service.enqueue("mail", 1)
        service.enqueue("mail", 2, key="acme:k")
        service.enqueue_many("mail", [3, Item(4, key="acme:l")])
        service.enqueue_from("mail", sa.select(sa.literal(5)))
        service.session.add(template.models.message(queue_name="mail", payload=6))

    act("acme", enqueue)
    assert tenants(template) == ["acme"] * 6


def test_a_tenant_with_a_key_goes_on_from_its_own_place(template, act) -> None:
    sent: list[bool] = []

    @sa.event.listens_for(template.engines["app"], "before_cursor_execute")
    def note(_c: Any, _cur: Any, sql: str, values: Any, *_rest: Any) -> None:
        if "to_regclass" in sql:
            sent.append(bool(values["cursor"]))

    for tenant in ("acme", "bolt"):
        act(tenant, lambda service: service.enqueue_many("mail", [1, 2, 3]))
    names: dict[str, Any] = {
        "TenantSession": lambda _engine, info: template.work(info["tenant"]),
        "models": template.models,
        "engine": None,
    }
    for expected in (1, 2):
        exec(compile(block("key"), str(DOCUMENT), "exec", dont_inherit=True), names)  # noqa: S102
        assert [name.payload for name in names["deliveries"]] == [expected]
        (theirs,) = act("bolt", lambda service: service.dequeue("mail"))
        assert theirs.payload == expected
    assert sent == [False, False, True, False]


def test_a_tenant_sees_and_takes_only_its_own(template, act) -> None:
    for tenant in ("acme", "bolt"):
        act(tenant, lambda service, tenant=tenant: service.enqueue_many("mail", [tenant] * 3))
    seen = act("acme", lambda service: service.messages.find("mail"))
    assert [item.payload for item in seen] == ["acme"] * 3
    taken = act("bolt", lambda service: service.dequeue("mail", 9))
    assert [delivery.payload for delivery in taken] == ["bolt"] * 3
    # Not even by their ids, and with what only their holder can know.
    with pytest.raises(LeaseLost):
        act("acme", lambda service: service.archive_many(taken))
    with pytest.raises(LeaseLost):
        act("acme", lambda service: service.extend(taken[0], 9))
    assert act("acme", lambda service: service.try_delete_many(taken)) == [False] * 3
    with pytest.raises(MessageNotFound):
        act("acme", lambda service: service.messages.cancel(taken[0].id))
    act("bolt", lambda service: service.archive_many(taken))
    assert tenants(template) == ["acme"] * 3
    assert tenants(template, "pgqrs_archive") == ["bolt"] * 3


def test_a_tenant_purges_only_its_own(template, act) -> None:
    for tenant in ("acme", "bolt"):
        act(tenant, lambda service: service.enqueue_many("mail", [1, 2]))
    assert act("acme", lambda service: service.queues.purge("mail")) == 2
    assert tenants(template) == ["bolt"] * 2


def test_no_row_can_be_written_for_somebody_else(template, act) -> None:
    message = template.models.message

    def forge(service: QueueService) -> None:
        service.session.execute(
            sa.insert(message.__table__).values(queue_id=1, payload=1, tenant="bolt")
        )

    with template.root.begin() as connection:
        connection.exec_driver_sql("GRANT INSERT (tenant) ON pgqrs_messages TO rls_app")
    denied(lambda: act("acme", forge))
    denied(lambda: act(None, forge))
    with template.root.begin() as connection:
        connection.exec_driver_sql("REVOKE INSERT (tenant) ON pgqrs_messages FROM rls_app")
    assert tenants(template) == []


@pytest.mark.parametrize("tenant", ["", None])
def test_a_session_without_a_tenant_sees_nothing_and_writes_nothing(
    template, act, tenant: str | None
) -> None:
    act("acme", lambda service: service.enqueue("mail", 1))
    assert act(tenant, lambda service: service.messages.find("mail")) == []
    assert act(tenant, lambda service: service.dequeue("mail", 9)) == []
    denied(lambda: act(tenant, lambda service: service.enqueue("mail", 2)))
    denied(lambda: act(tenant, lambda service: service.enqueue_many("mail", [2, 3])))
    assert tenants(template) == ["acme"]


def setting(session: Session) -> Any:
    return session.scalar(sa.select(sa.func.current_setting("app.tenant", True)))


def test_the_trap_is_there_a_pooled_connection_remembers_an_empty_tenant(template, act) -> None:
    """What NULLIF is for: with plain current_setting() the tenant '' slips in and shares rows."""
    act("acme", lambda service: service.enqueue("mail", 1))
    with template.work() as session:
        assert setting(session) == ""  # not NULL: this connection has served acme before
    plain = "tenant = current_setting('app.tenant', true)"
    with template.root.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE pgqrs_messages DROP CONSTRAINT app_tenant_check")
        connection.exec_driver_sql(
            "ALTER TABLE pgqrs_messages ALTER tenant"
            " SET DEFAULT current_setting('app.tenant', true)"
        )
        connection.exec_driver_sql(
            f"ALTER POLICY tenant ON pgqrs_messages USING ({plain}) WITH CHECK ({plain})"
        )
    try:
        act(None, lambda service: service.enqueue("mail", "of somebody who forgot"))
        assert tenants(template) == ["acme", ""]
        (leaked,) = act(None, lambda service: service.messages.find("mail"))
        assert leaked.payload == "of somebody who forgot"
    finally:
        with template.root.begin() as connection:
            connection.exec_driver_sql("DELETE FROM pgqrs_messages")
            connection.exec_driver_sql("DROP POLICY tenant ON pgqrs_messages")
            connection.exec_driver_sql("DROP POLICY tenant ON pgqrs_archive")
            connection.exec_driver_sql(
                "ALTER TABLE pgqrs_messages ALTER tenant"
                " SET DEFAULT NULLIF(current_setting('app.tenant', true), '')"
            )
            protect(connection)
    denied(lambda: act(None, lambda service: service.enqueue("mail", 1)))


def test_a_tenant_ends_with_its_transaction_also_when_that_is_rolled_back(template, act) -> None:
    act("acme", lambda service: service.enqueue("mail", 1))
    with template.work("acme") as session:
        assert setting(session) == "acme"
        session.rollback()
        assert setting(session) == "acme"  # every transaction of the session begins with it
        with session.begin_nested() as savepoint:
            savepoint.rollback()
        assert setting(session) == "acme"
    with template.work("bolt") as session:
        assert setting(session) == "bolt"
        assert QueueService(session, models=template.models).messages.find("mail") == []


def test_the_owner_of_the_tables_is_not_exempt(template, act) -> None:
    """What FORCE is for."""
    act("acme", lambda service: service.enqueue("mail", 1))
    see = lambda service: service.messages.find("mail")  # noqa: E731
    assert act(None, see, role="owner") == []
    assert act("bolt", see, role="owner") == []
    assert len(act("acme", see, role="owner")) == 1
    with template.root.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE pgqrs_messages NO FORCE ROW LEVEL SECURITY")
    try:
        assert len(act(None, see, role="owner")) == 1
    finally:
        with template.root.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE pgqrs_messages FORCE ROW LEVEL SECURITY")


def test_the_keys_of_tenants_do_not_meet(template, act) -> None:
    for tenant in ("acme", "bolt"):
        receipt = act(tenant, lambda service, t=tenant: service.enqueue("mail", 1, key=f"{t}:k"))
        assert not receipt.duplicate
    assert act("acme", lambda service: service.enqueue("mail", 2, key="acme:k")).duplicate
    for key in ("k", "bolt:k", "bolt:new"):
        denied(lambda key=key: act("acme", lambda service: service.enqueue("mail", 2, key=key)))
        denied(
            lambda key=key: act(
                "acme", lambda service: service.enqueue_many("mail", [Item(2, key=key)])
            )
        )

    def add(service: QueueService) -> None:
        cls = template.models.message
        service.session.add(cls(queue_name="mail", payload=1, dedup_key="acme:k"))
        service.session.flush()

    with pytest.raises(DuplicateMessage):
        act("acme", add)
    with pytest.raises(sa.exc.IntegrityError, match="app_tenant_check"):
        act("acme:sub", lambda service: service.enqueue("mail", 1))


def test_a_consumer_of_everybody_takes_all_and_keeps_their_tenants(template, act) -> None:
    for tenant in ("acme", "bolt"):
        act(tenant, lambda service: service.enqueue("mail", 1))
    taken = act(None, lambda service: service.dequeue("mail", 9), role="everybodys")
    assert len(taken) == 2
    act(None, lambda service: service.fail_many(taken, "no", dead=True), role="everybodys")
    assert tenants(template, "pgqrs_archive") == ["acme", "bolt"]
    letters = act(None, lambda service: service.archived.find("mail"), role="everybodys")
    ids = [letter.id for letter in letters]
    act(None, lambda service: service.archived.requeue_many(ids), role="everybodys")
    assert tenants(template) == ["acme", "bolt"]
    assert len(act("acme", lambda service: service.dequeue("mail", 9))) == 1


def test_the_doctor_has_nothing_against_it(template, act) -> None:
    context = Context.of(template.models, None, None, allow_autocommit=True)
    with Session(template.root) as session:
        assert diagnose(session, context, only=("schema", "drift")) == []
