"""Find words that this repository does not use: ``python -m tools.words``.

Each part has one name, and the glossary (docs/glossary.md) lists it. These are the names that parts
had before, or that mean something else in a message queue. A line that has to say one, such as the
alias of a field that was renamed, is in `ALLOWED`; one that no longer says it is an error too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["ALLOWED", "FOLDERS", "WORDS", "found"]

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "examples", "pgqrs_sa", "tests", "tools")
WORDS = re.compile(
    r"\b(crew|desk|dismiss|facets?|floor|hire|keeper|lament|mend(s|ed)?|nudge|plug|seat|toil|verdict"
    r"|wires)\b",
    re.IGNORECASE,
)
ALLOWED = {
    # Finding.fix was called so; the attribute and the key of the output keep the name as an alias.
    ("docs/reference/cli.md", "mend"),
    ("pgqrs_sa/cli/admin.py", "mend"),
    ("pgqrs_sa/doctor/findings.py", "mend"),
    ("tests/cli/test_documented.py", "mend"),
    ("tests/cli/test_what_is_said_is_done.py", "mend"),
    ("tests/doctor/test_cli.py", "mend"),
    # The function of SQL.
    ("pgqrs_sa/_core/sql/health.py", "floor"),
}
"""Files, and the words that each may say."""

_HERE = "tools/words.py"
_COPIES = "docs/guide/"  # a verbatim copy of somebody else's text
_KINDS = {".md", ".py", ".toml", ".yaml"}


def found(root: Path = ROOT) -> Iterator[tuple[str, int, str, str]]:
    """Yield file, number and text of each line with such a word, and the word."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.suffix not in _KINDS or name == _HERE or name.startswith(_COPIES):
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                for match in WORDS.finditer(line):
                    yield name, number, line.strip(), match[0].lower()


def main() -> int:
    """Print what is found; return 1 if there is anything."""
    unused, failed = set(ALLOWED), False
    for name, number, line, word in found():
        if (name, word) in ALLOWED:
            unused.discard((name, word))
            continue
        failed = True
        print(f"{name}:{number}: {word!r} is not a word of this repository: {line}")
    for name, word in sorted(unused):
        print(f"{name} does not say {word!r} any more: remove it from ALLOWED in {_HERE}")
    return int(failed or bool(unused))


if __name__ == "__main__":
    sys.exit(main())
