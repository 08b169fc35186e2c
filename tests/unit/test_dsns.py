"""DSNs: the forms of libpq and of SQLAlchemy, with one host or several, for each driver."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace
from urllib.parse import quote

import asyncpg
import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

from pgqrs_sa import InvalidArgument
from pgqrs_sa._core import sessions
from pgqrs_sa.dsns import connect_args, servers, shown
from pgqrs_sa.settings import Settings, database_url
from support.cases import each_case
from support.properties import at_least

TWO = {"host": "a,b", "port": "1,2"}
SEVERAL = {
    "postgresql://u:p@a:1,b:2/db?target_session_attrs=read-write": TWO,
    "postgres://u:p@a:1,b:2/db?target_session_attrs=read-write": TWO,
    "host=a,b port=1,2 user=u password=p dbname=db target_session_attrs=read-write": TWO,
    " host = 'a,b'  port=1,2 user=u password='p'\ndbname=db target_session_attrs=read-write ": TWO,
    "postgresql://u:p@/db?host=a,b&port=1,2&target_session_attrs=read-write": TWO,
    "postgresql://u:p@a,b/db?port=7": {"host": "a,b", "port": "7,7"},
    "host=a,b port=7 user=u": {"host": "a,b", "port": "7,7"},
    "postgresql://a,b:2/db": {"host": "a,b", "port": "5432,2"},
    "postgresql://a:1,b/db": {"host": "a,b", "port": "1,5432"},
    "postgresql://a:1,b:/db": {"host": "a,b", "port": "1,5432"},
    "host=a,b port=,2": {"host": "a,b", "port": "5432,2"},
    "postgresql://a,b": {"host": "a,b"},
    "postgresql://[::1]:1,[fe80::2]:2/db": {"host": "::1,fe80::2", "port": "1,2"},
    "postgresql://[::1],b:2/db": {"host": "::1,b", "port": "5432,2"},
    "host=::1,b port=1,2": {"host": "::1,b", "port": "1,2"},
    "postgresql://%2Frun:1,b:2/db": {"host": "/run,b", "port": "1,2"},
    "postgresql://b:1,%2Frun%2Fpg/db": {"host": "b,/run/pg", "port": "1,5432"},
    "host=/run,b port=1,2": {"host": "/run,b", "port": "1,2"},
    "postgresql://u:p@a:1,b:2/db?host=c,d": {"host": "c,d", "port": "1,2"},
    "postgresql://u:p@a:1/db?host=c,d&port=3,4": {"host": "c,d", "port": "3,4"},
    "host=a,b hostaddr=10.0.0.1,10.0.0.2": {"host": "a,b", "hostaddr": "10.0.0.1,10.0.0.2"},
}
"""What libpq reads as several hosts."""

SINGLE = {
    "postgresql://u:p@h:1/db": {"host": "h", "port": "1"},
    "postgresql://h": {"host": "h"},
    "postgresql:///db": {},
    "postgresql://": {},
    "postgresql://:7/db": {"port": "7"},
    "postgresql://[::1]:5432/db": {"host": "::1", "port": "5432"},
    "postgresql://%2Frun:5432/db": {"host": "/run", "port": "5432"},
    "postgresql://h/db?application_name=a@b": {"host": "h", "application_name": "a@b"},
    "postgresql:///db?host=/run": {"host": "/run"},
    "host=/run port=5 dbname=db": {"host": "/run", "port": "5"},
    "dbname=db": {},
    "port=7": {"port": "7"},
    r"host=h user='Ada \'L\'' password=a\ b\\": {"host": "h"},
    "host='' user=u": {},
    "host=h application_name=a=b": {"host": "h"},
}

ONLY_OURS = {
    "postgresql+psycopg://u@/db?host=a:1&host=b:2": TWO,
    "postgresql+psycopg://u@/db?host=a&host=b:2": {"host": "a,b", "port": "5432,2"},
    "postgresql+psycopg://u@/db?host=a&host=b": {"host": "a,b"},
    "postgresql+psycopg://u@/db?host=[::1]:1&host=b:2": {"host": "::1,b", "port": "1,2"},
    "postgresql+psycopg://u@/db?host=/run:1&host=b:2": {"host": "/run,b", "port": "1,2"},
    "postgresql+psycopg://u@/db?host=a:1": {"host": "a", "port": "1"},
    "postgresql://bob:x/y:z@a:1,b:2/db": TWO,
    "postgresql://u:p@a,b/db?host=c": {"host": "c"},
    "postgresql://u:p@a:1,b:2/db?host=c:3&host=d:4": {"host": "c,d", "port": "3,4"},
}


@pytest.fixture(autouse=True, scope="module")
def without_a_port_in_the_environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PGPORT", raising=False)
        yield


def given_to_the_driver(dsn: str, driver: str = "psycopg") -> dict[str, object]:
    url = database_url(dsn, driver)
    return url.get_dialect()().create_connect_args(url)[1]


def as_libpq_writes_it(arguments: dict[str, object]) -> dict[str, str]:
    """Fill in the ports of several hosts, which libpq leaves open, and leave out what is empty."""
    found = {name: str(value) for name, value in arguments.items() if value not in {"", None}}
    if "," in found.get("host", ""):
        ports = found.get("port", "").split(",")
        ports *= len(found["host"].split(",")) if len(ports) == 1 else 1
        found["port"] = ",".join(port or "5432" for port in ports)
    if not found.get("port", "x").strip(","):
        del found["port"]
    return found


@each_case("dsn", [*SEVERAL, *SINGLE])
def test_a_dsn_means_what_libpq_reads_in_it(dsn):
    ours = as_libpq_writes_it(given_to_the_driver(dsn))
    theirs = as_libpq_writes_it(conninfo_to_dict(dsn))
    assert ours == theirs


@each_case(("dsn", "wanted"), [*(SEVERAL | SINGLE | ONLY_OURS).items()])
def test_each_form_names_the_same_servers(dsn, wanted):
    arguments = given_to_the_driver(dsn)
    assert {name: str(arguments[name]) for name in wanted} == wanted


@each_case("dsn", [*SEVERAL, *SINGLE, *ONLY_OURS])
def test_a_url_that_was_read_reads_the_same_again(dsn):
    url = database_url(dsn)
    assert database_url(url.render_as_string(hide_password=False)) == url


@each_case(
    "url",
    [
        sa.URL.create("postgresql", host="a,b", port=7),
        sa.URL.create("postgresql", host="a", port=7, query={"host": ("a", "b"), "port": "7"}),
        sa.URL.create("postgresql", query={"host": ("a:7", "b:7")}),
    ],
)
def test_a_url_is_read_like_its_text(url):
    assert servers(database_url(url)) == [("a", "7"), ("b", "7")]


@each_case("dsn", [dsn for dsn in SEVERAL if "hostaddr" not in dsn])
def test_asyncpg_gets_lists_of_hosts_and_ports(dsn):
    arguments = given_to_the_driver(dsn, "asyncpg")
    hosts = SEVERAL[dsn]["host"].split(",")
    ports = SEVERAL[dsn].get("port", "5432,5432")
    assert (arguments["host"], arguments["port"]) == (hosts, [int(n) for n in ports.split(",")])
    if "target_session_attrs" in dsn:
        assert arguments["target_session_attrs"] == "read-write"
    assert not {"dbname", "hostaddr"} & set(arguments)


@each_case("dsn", ["postgresql://u:p@h:1/db", "host=h port=1 user=u password=p dbname=db"])
def test_asyncpg_gets_its_own_names(dsn):
    wanted = {"host": "h", "port": 1, "user": "u", "password": "p", "database": "db"}
    found = given_to_the_driver(dsn, "asyncpg")
    assert {name: found[name] for name in wanted} == wanted


@each_case(("driver", "ports"), [("psycopg", "7,7"), ("asyncpg", [7, 7])])
def test_the_default_port_is_that_of_the_environment(monkeypatch, driver, ports):
    monkeypatch.setenv("PGPORT", "7")
    assert given_to_the_driver("host=a,b", driver)["port"] == ports


def test_each_driver_gets_its_own_word_for_tls():
    assert given_to_the_driver("host=a sslmode=require", "asyncpg")["ssl"] == "require"
    url = database_url("postgresql+asyncpg://a,b/d?ssl=require", without_asyncio=True)
    assert (url.drivername, url.query["sslmode"]) == ("postgresql+psycopg", "require")


@each_case(
    ("options", "wanted"),
    [
        ("connect_timeout=5", {"timeout": 5.0}),
        ("connect_timeout=0", {"timeout": None}),
        ("timeout=2.5&command_timeout=9", {"timeout": 2.5, "command_timeout": 9.0}),
        ("statement_cache_size=0", {"statement_cache_size": 0}),
        ("application_name=shop", {"server_settings": {"application_name": "shop"}}),
        (
            "application_name=a%40b&options=-c%20work_mem%3D9MB&sslmode=require",
            {"server_settings": {"application_name": "a@b", "options": "-c work_mem=9MB"}},
        ),
    ],
)
def test_asyncpg_gets_what_libpq_calls_by_another_name(options, wanted):
    url, found = connect_args(database_url(f"postgresql+asyncpg://u@h/d?{options}"))
    assert found == wanted
    arguments = url.get_dialect()().create_connect_args(url)[1] | found
    inspect.signature(asyncpg.connect).bind(**arguments)


@each_case("name", ["keepalives", "sslrootcert", "hostaddr", "nonsense"])
def test_an_option_that_asyncpg_does_not_have_is_refused(name, refusing):
    dsn = f"postgresql+asyncpg://u:s3cret@h/d?{name}=cret"
    for read in (database_url, Settings):
        with pytest.raises(InvalidArgument, match=f"asyncpg has no option {name}") as caught:
            read(dsn)
        assert "cret" not in str(caught.value)
    assert database_url(dsn, without_asyncio=True).query == {name: "cret"}


def test_a_number_for_asyncpg_is_checked():
    with pytest.raises(InvalidArgument, match="timeout in the DSN is no number"):
        database_url("postgresql+asyncpg://u@h/d?connect_timeout=soon")


def test_libpq_gets_its_own_word_for_the_timeout():
    url = database_url("postgresql+asyncpg://h/d?timeout=5", without_asyncio=True)
    assert url.query == {"connect_timeout": "5"}
    assert connect_args(url) == (url, {})


@each_case("secret", ["password=s3cret", "sslpassword=s3cret"])
def test_no_password_in_a_query_is_shown(secret):
    engine = sa.create_engine(f"postgresql+psycopg://u:s3cret@h/d?{secret}&sslkey=k")
    place = sessions._place(SimpleNamespace(engine=engine))
    assert "s3cret" not in place
    assert "sslkey=k" in place
    assert shown(sa.make_url("postgresql://u@h/d")) == "postgresql://u@h/d"


@each_case("driver", ["psycopg2", "psycopg_async"])
def test_the_other_drivers_of_libpq_take_several_hosts(driver):
    assert servers(database_url("postgresql://a:1,b:2/db", driver)) == [("a", "1"), ("b", "2")]


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
NAME = st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True)
HOST = st.one_of(NAME, st.ip_addresses(v=6).map(str), NAME.map(lambda name: f"/run/{name}"))
SERVERS = st.lists(st.tuples(HOST, st.none() | st.integers(1, 65535)), min_size=1, max_size=4)


def in_front(host: str, port: int | None) -> str:
    place = f"[{host}]" if ":" in host else quote(host, safe="")
    return place if port is None else f"{place}:{port}"


def in_quotes(value: object) -> str:
    return "'" + str(value).replace("\\", r"\\").replace("'", r"\'") + "'"


@at_least(50)
@given(places=SERVERS, user=TEXT, password=TEXT, database=TEXT, application=TEXT)
def test_whatever_stands_in_a_dsn_means_what_libpq_reads(
    places, user, password, database, application
):
    as_url = (
        f"postgresql://{quote(user, safe='')}:{quote(password, safe='')}@"
        f"{','.join(in_front(*place) for place in places)}/{quote(database, safe='')}"
        f"?application_name={quote(application, safe='')}"
    )
    words = {
        "host": ",".join(host for host, _ in places),
        "port": ",".join(str(port or "") for _, port in places),
        "user": user, "password": password, "dbname": database, "application_name": application,
    }  # fmt: skip
    as_keywords = " ".join(f"{name} = {in_quotes(value)}" for name, value in words.items())
    wanted = as_libpq_writes_it(conninfo_to_dict(as_url))
    assert as_libpq_writes_it(conninfo_to_dict(as_keywords)) == wanted
    for dsn in (as_url, as_keywords):
        assert as_libpq_writes_it(given_to_the_driver(dsn)) == wanted


@at_least(100)
@given(text=st.text(st.sampled_from("ab1:,@/?[]=&% '\\#+"), max_size=30))
def test_any_text_behind_the_user_is_read_or_refused(text):
    for dsn in (f"postgresql://{text}", f"postgresql://u:s3cret@{text}", text):
        try:
            url = database_url(dsn)
        except InvalidArgument as error:
            shown = str(error)
        else:
            shown = repr(url)
            assert database_url(url) == url
        assert "s3cret" not in shown


WRONG = {
    "postgresql://u:s3cret@a:1,b:2/d?port=1,2,3": "has 3 ports for 2 hosts",
    "postgresql://u:s3cret@a:1,b:2/d?host=c": "has 2 ports for 1 host:",
    "host=a,b,c port=1,2 password=s3cret": "has 2 ports for 3 hosts",
    "port=1,2 password=s3cret": "has 2 ports for 1 host:",
    "postgresql://u:s3cret@a:1,b:x/d": "the port of host 2 of the DSN is no number",
    "postgresql://u:s3cret@a:1,b:99999/d": "the port of host 2 of the DSN is no number",
    "postgresql://u:s3cret@a:0/d": "the port of host 1 of the DSN is no number",
    "host=a,b port=1,x password=s3cret": "port 2 of the DSN is no number",
    "postgresql://u:s3cret@a,::1/d": r"host 2 of the DSN cannot be read.*\[::1\]:5432",
    "postgresql://u:s3cret@[::1/d": "host 1 of the DSN cannot be read",
    "postgresql://u:s3cret@a,b/d?target_session_attrs=writable": "target_session_attrs .* none of",
    "host=a,b hostaddr=1.1.1.1 password=s3cret": "has 1 values in hostaddr for 2 in host",
    "host=a password=my s3cret": "cannot be read after password",
    "host=a password='my s3cret": "cannot be read after host",
    "s3cret host=a": "cannot be read: it is a list",
    "postgresql+asyncpg://u:s3cret@a:1,:2/d": "host 2 of the DSN is empty: asyncpg needs",
    "postgresql+pg8000://u:s3cret@a:1,b:2/d": "2 hosts, and the driver 'pg8000' connects to one",
    "postgresql://u:s3@cret,b@a:1,b:2/d": "the DSN cannot be read",
    "postgresql://a:1,b:2/d?user=u&password=s3cret@x": "the DSN cannot be read",
    "postgresql://?host=h&password=s3@cret": "the DSN cannot be read",
    "postgresql://u:s3cret,b:2/d": "the port of host 1 of the DSN is no number",
    "mysql://u:s3cret@a,b/d": "the DSN is for 'mysql'",
}


@each_case(("dsn", "says"), [*WRONG.items()])
def test_an_error_says_what_is_wrong_and_repeats_nothing(dsn, says):
    with pytest.raises(InvalidArgument, match=says) as caught:
        Settings(dsn)
    assert "s3" not in str(caught.value)
    assert "cret" not in str(caught.value)


@each_case("dsn", [*SEVERAL])
def test_the_password_is_not_shown(dsn):
    url = database_url(dsn.replace("u:p@", "u:s3cret@").replace("password=p", "password=s3cret"))
    shown = f"{Settings(dsn)!r} {url!r} {url}"
    assert "s3cret" not in shown
    if url.password:
        assert url.password in {"s3cret", "p"}


@pytest.fixture
def refusing(monkeypatch):
    """Fail if anything opens a connection."""
    opened = []
    monkeypatch.setattr(psycopg, "connect", lambda *a, **k: opened.append((a, k)))
    monkeypatch.setattr(asyncio, "open_connection", lambda *a, **k: opened.append((a, k)))
    yield
    assert not opened


@each_case("dsn", [*WRONG])
def test_a_wrong_dsn_is_refused_by_pgqrs_names_and_the_listener(dsn, refusing):
    from pgqrs_sa.pgqrs import Config
    from pgqrs_sa.wakeup import Listener

    engine = sa.create_engine("postgresql+psycopg:///x")
    with pytest.raises(InvalidArgument):
        Config(dsn)
    with pytest.raises(InvalidArgument):
        Listener(engine, lambda _: None, listen_dsn=dsn)
