"""What is looked at and made before the first user comes; whatever is wrong is said in one line.

It runs where the test is led (the master, or the one process). Of the engine it uses the HTTP API
alone, and the command line for what only that gives: tokens of members and of an operator.
"""

import http.client
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from loadtest.engine import engine_settings, environment
from loadtest.members import Member, read_members
from sale import config
from sale.files import UnreadableFile, read_text

CALL_S: Final = 10.0
COMMAND_S: Final = 60.0
OPENING_MAX_S: Final = 600.0
OPERATOR: Final = "loadtest"
EARLIEST_OPENING_S: Final = 1.0


class SetupError(Exception):
    """The test cannot be begun; the message is one line for people."""


ADMIN: Final = "/api/v1/admin/campaigns"


class Api:
    """A few calls of the engine's HTTP API, outside Locust's statistics.

    ``token`` is the operator's, where one is needed.
    """

    token = ""

    def __init__(self, host: str) -> None:
        parts = urlsplit(host)
        more = parts.path.strip("/") or parts.query or parts.fragment
        if parts.scheme not in ("http", "https") or not parts.hostname or more:
            raise SetupError(f"--host {host!r}: give the engine's address, http://host:port")
        self.host = f"{parts.scheme}://{parts.netloc}"
        self._https = parts.scheme == "https"
        self._address = (parts.hostname, parts.port)

    def call(
        self, method: str, path: str, *, body: object = None, key: str = ""
    ) -> tuple[int, Any]:
        """One request; status and JSON. Raises SetupError where nobody answers."""
        headers = {"Authorization": f"Bearer {self.token}"} if path.startswith(ADMIN) else {}
        if key:
            headers["Idempotency-Key"] = key
        if body is not None:
            headers["Content-Type"] = "application/json"
        make = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        connection = make(*self._address, timeout=CALL_S)
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, headers)
            answer = connection.getresponse()
            raw = answer.read()
            return answer.status, json.loads(raw) if raw else None
        except (OSError, http.client.HTTPException) as error:
            raise SetupError(f"no engine answers at {self.host}: {error}") from None
        except ValueError:
            raise SetupError(f"{self.host}{path}: the answer is not JSON: no engine?") from None
        finally:
            connection.close()

    def must(self, wanted: int, method: str, path: str, what: str, **more: Any) -> Any:  # noqa: ANN401
        """One request that must be answered so; its JSON. Raises SetupError with ``what``."""
        status, body = self.call(method, path, **more)
        if status != wanted:
            raise SetupError(f"{self.host}{path}: {what}: {_why(status, body)}")
        return body

    def now(self) -> datetime:
        """Time of the clock that decides openings. Raises SetupError."""
        return datetime.fromisoformat(self.must(200, "GET", "/api/v1/time", "no time")["now"])

    def close(self, campaign: str) -> None:
        """Close the campaign of a run that is over. Raises SetupError."""
        why = {"reason": "the load test is over"}
        path = f"{ADMIN}/{campaign}/close"
        self.must(200, "POST", path, "not closed", body=why, key="load-test-over")


def find_campaign(api: Api, campaign: str) -> dict[str, Any]:
    """Give a campaign that sells, or will within ``OPENING_MAX_S``. Raises SetupError."""
    status, found = api.call("GET", f"/api/v1/campaigns/{campaign}")
    if status == 404:
        _, listed = api.call("GET", "/api/v1/campaigns?limit=10")
        known = ", ".join(entry["id"] for entry in listed["items"]) or "none"
        raise SetupError(f"campaign {campaign!r} is not known at {api.host} (there: {known})")
    if status != 200:
        raise SetupError(f"campaign {campaign!r}: {_why(status, found)}")
    if found["state"] not in ("scheduled", "open", "paused"):
        raise SetupError(f"campaign {campaign!r} is {found['state']}: it will not sell")
    left_s = opens_in(api, found)
    if left_s > OPENING_MAX_S:
        raise SetupError(
            f"campaign {campaign!r} opens in {left_s:,.0f} s, users wait {OPENING_MAX_S:.0f} s:"
            f" sale campaign schedule {campaign} --at TIME"
        )
    return dict(found)


def opens_in(api: Api, campaign: dict[str, Any]) -> float:
    """Seconds until it opens, 0 where it has. Raises SetupError."""
    if campaign["state"] != "scheduled" or not campaign["opens_at"]:
        return 0.0
    left = datetime.fromisoformat(campaign["opens_at"]) - api.now()
    return max(left.total_seconds(), 0.0)


def operator_token(data_dir: str, token_file: str) -> str:
    """Give an operator's token: from a file, or a new one of the account ``loadtest``.

    Raises SetupError.
    """
    if token_file:
        try:
            return read_text(Path(token_file)).strip()
        except UnreadableFile as error:
            raise SetupError(f"--operator-token-file {error}") from None
    if not data_dir:
        raise SetupError("an operator is needed: give --operator-token-file, or --data-dir")
    _sale(data_dir, ["operator", "add", OPERATOR, "--role", "operator"], accept=(0, 1))
    return str(json.loads(_sale(data_dir, ["operator", "token", OPERATOR, "--json"]))["token"])


def find_cards(
    tokens: str, data_dir: str, number: int, *, unions: Sequence[str], own_share: float
) -> list[Member]:
    """Choose ``number`` cards: from the file, or the first of the engine's roster.

    Of a campaign for some unions only, ``own_share`` of the cards are theirs, if there are so many.
    Raises SetupError where there are too few.
    """
    try:
        if tokens:
            members, where = read_members(Path(tokens)), tokens
        elif data_dir:
            # The unions of a sample roster are mixed: some of many cards are of the one wanted.
            ask = number if "*" in unions else number * 20
            members, where = _roster(data_dir, ask), "the roster"
        else:
            raise SetupError("give --tokens FILE (of `sale tokens`), or --data-dir")
    except ValueError as error:
        raise SetupError(str(error)) from None
    distinct = list({member.member_no: member for member in members}.values())
    if len(distinct) < number:
        more = f"sale tokens --cards {number} --out FILE" if tokens else "import more cards"
        raise SetupError(
            f"{where} has {len(distinct):,} cards, {number:,} are needed:"
            f" {more}, or play fewer users (-u)"
        )
    return _chosen(distinct, number, unions, own_share)


def _chosen(
    members: list[Member], number: int, unions: Sequence[str], own_share: float
) -> list[Member]:
    if "*" in unions:
        return members[:number]
    own = [member for member in members if member.union in unions]
    others = [member for member in members if member.union not in unions]
    ours = min(len(own), max(round(number * own_share), number - len(others)))
    chosen = own[:ours] + others[: number - ours]
    random.shuffle(chosen)
    return chosen


def _roster(data_dir: str, number: int) -> list[Member]:
    with tempfile.TemporaryDirectory(prefix="sale-locust-") as folder:
        file = Path(folder) / "tokens.jsonl"
        _sale(data_dir, ["tokens", "--cards", str(number), "--out", str(file)])
        return read_members(file)


def _sale(data_dir: str, arguments: list[str], accept: tuple[int, ...] = (0,)) -> bytes:
    command = [sys.executable, "-m", "sale", *arguments]
    settings = environment(**config.as_environment(engine_settings(data_dir=data_dir)))
    try:
        done = subprocess.run(  # noqa: S603 - our own program
            command, env=settings, capture_output=True, timeout=COMMAND_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise SetupError(f"sale {arguments[0]}: not done in {COMMAND_S:.0f} s") from None
    if done.returncode not in accept:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise SetupError(f"sale {' '.join(arguments[:2])}: {said[-1] if said else 'failed'}")
    return done.stdout


def _why(status: int, body: object) -> str:
    told = body.get("detail") or body.get("title") if isinstance(body, dict) else None
    return f"{status} {told or ''}".strip()
