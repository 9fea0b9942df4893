"""Reads of one campaign on the fast path, answered from memory.

Many members reload these at an opening. A campaign in the catalogue's memory is encoded once for
all requests before it is read again; an answer is then existing bytes with the request ID put in.
aiohttp serves a campaign that is not in memory, or too old there (``public.py``).
"""

from collections.abc import Callable
from typing import Final

import msgspec
import structlog

from sale.api.request import ENCODER
from sale.domain.campaign_view import CampaignNow
from sale.http.fast_routes import Exchange, FastHandler, Head
from sale.http.request import NO_STORE, entity_tag, names_tag, tagged_headers
from sale.http.wire import rendered, second
from sale.members.campaigns import PublicCampaigns

WORDED_MAX: Final = 1_024
JSON: Final = {"Content-Type": "application/json"}

log = structlog.get_logger()


class _Worded(msgspec.Struct, frozen=True, gc=False):
    """The answers about a campaign as it was read once, dated by a ``second``."""

    now: CampaignNow
    second: int
    wire: bytes
    tag: str = ""
    unchanged: bytes = b""


class FastReads(FastHandler):
    """GET of one campaign. ``max_age_s``: the answer has an ETag; None: it is never stored."""

    def __init__(
        self,
        campaigns: PublicCampaigns,
        view: Callable[[CampaignNow], object],
        *,
        max_age_s: int | None = None,
    ) -> None:
        self._campaigns = campaigns
        self._view = view
        self._max_age_s = max_age_s
        self._worded: dict[str, _Worded] = {}

    def find(self, name: str) -> _Worded | None:
        """Find the answers about a campaign that memory has and that is fresh enough."""
        now = self._campaigns.fresh(name)
        if now is None:
            return None
        worded = self._worded.get(name)
        if worded is not None and worded.now is now and worded.second == second():
            return worded
        try:
            return self._word(now)
        except Exception:  # aiohttp meets the same fault, and answers it
            log.exception("read.not_worded", campaign=name)
            return None

    def serve(
        self,
        exchange: Exchange,  # noqa: ARG002 - nothing is pending
        found: _Worded,
        head: Head,
        body: bytes,  # noqa: ARG002 - there is none
        asked_at: float,  # noqa: ARG002
        now: float,  # noqa: ARG002
    ) -> bytes:
        """Answer."""
        if found.tag and head.if_none_match and names_tag(head.if_none_match, found.tag):
            return found.unchanged
        return found.wire

    def _word(self, now: CampaignNow) -> _Worded:
        dated, body = second(), ENCODER.encode(self._view(now))
        if self._max_age_s is None:
            worded = _Worded(now, dated, rendered(200, body, {**NO_STORE, **JSON}))
        else:
            tag = entity_tag(body)
            headers = tagged_headers(tag, self._max_age_s)
            wire, unchanged = rendered(200, body, {**headers, **JSON}), rendered(304, b"", headers)
            worded = _Worded(now, dated, wire, tag, unchanged)
        if len(self._worded) >= WORDED_MAX:
            self._worded.clear()
        self._worded[now.campaign.id] = worded
        return worded
