"""The numbers of PostgreSQL's advisory locks have one home."""

import re
from pathlib import Path

from sale.db import locks

SALE = Path(locks.__file__).parents[1]
HOME = {
    name: value.lock if isinstance(value, locks.LeaderLock) else value
    for name, value in vars(locks).items()
    if name.isupper()
    and isinstance(value, int | locks.LeaderLock)
    and name not in {"NAME_MAX_BYTES", "TYPE_CHECKING"}
}


def test_each_number_is_another_and_stands_in_one_module() -> None:
    assert len(set(HOME.values())) == len(HOME) == 9
    elsewhere = {
        path.name
        for path in SALE.rglob("*.py")
        if path != Path(locks.__file__) and re.search("0x5341_?4C4", path.read_text("utf-8"))
    }
    assert elsewhere == set()


def test_numbers_in_sql_are_those_of_the_roster() -> None:
    """SQL cannot import: a trigger and a query spell the numbers that ``locks.py`` names."""
    spelled = {
        int(number, 16)
        for path in SALE.rglob("*.sql")
        for number in re.findall(r"advisory\w*\(\s*x'([0-9A-F]+)'", path.read_text("utf-8"))
    }
    assert spelled == {locks.ROSTER_CHANGES, locks.ROSTER_IMPORT}
