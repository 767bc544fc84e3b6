"""mutants.py is not run with the tests: its texts would go out of date unseen."""

from mutants import MUTANTS, ROOT


def test_every_mutant_finds_its_text_once():
    files = {m.file: (ROOT / m.file).read_text() for m in MUTANTS}
    assert [m.name for m in MUTANTS if files[m.file].count(m.text) != 1] == []
