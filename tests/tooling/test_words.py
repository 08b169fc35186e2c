"""Words that the repository does not use are found, and those that it must say are not."""

from __future__ import annotations

from tools import words

FORMER = ("kee" + "per", "men" + "ds")  # in two parts, so that they are not found here


def test_a_word_is_found_with_its_line(tmp_path):
    for folder in words.FOLDERS:
        (tmp_path / folder).mkdir()
    line = "The {} of deskwork {} it.".format(*FORMER)
    (tmp_path / "docs" / "page.md").write_text(f"A lease.\n{line}\n")
    assert [*words.found(tmp_path)] == [("docs/page.md", 2, line, word) for word in FORMER]


def test_the_repository_has_none_but_the_aliases(capsys):
    assert words.main() == 0, capsys.readouterr().out
