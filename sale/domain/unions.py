"""The unions and their codes."""

from pathlib import Path
from typing import Final

from sale.domain.text import TITLE_MAX, shown_text
from sale.files import UnreadableFile, brief, read_toml, shown

DISTRICT: Final = "district"
REHEARSAL_UNION: Final = "rehearsal"
"""Union of made-up cards, and the only one that a rehearsal admits; no unions file may hold it."""


def load_unions(path: Path) -> dict[str, str]:
    """Read ``config/unions.toml``: code to name. Raises ValueError in words."""
    try:
        rows = read_toml(path)["unions"]
        unions = {str(row["code"]): shown_text(str(row["name"]), TITLE_MAX) for row in rows}
    except UnreadableFile as error:
        raise ValueError(f"unions file {error}") from None
    except ValueError as error:
        raise ValueError(f"unions file {shown(path)}: {error}") from None
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"unions file {shown(path)}: {brief(error)}") from None
    if DISTRICT not in unions:
        raise ValueError(f"unions file {path}: no union with the code {DISTRICT!r}")
    if REHEARSAL_UNION in unions:
        raise ValueError(f"unions file {path}: the code {REHEARSAL_UNION!r} is kept for rehearsals")
    return unions


def default_unions_path() -> Path:
    """Where the union codes stand: ``./config``, else the source tree's, else the package's own.

    Raises ValueError in words where there is none.
    """
    package = Path(__file__).resolve().parents[1]
    places = (
        Path("config/unions.toml"),
        package.parent / "config" / "unions.toml",
        package / "unions.toml",
    )
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"no unions file: looked for {', '.join(map(str, places))}")
