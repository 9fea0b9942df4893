"""Rate limits: a bucket for each member in each campaign, for each member, and for each address.

A bucket is a GCRA: one number a key, the moment at which the bucket will be full again (its
"theoretical arrival time"). A request that finds that moment too far ahead is refused and changes
nothing, so a client that sends too fast still gets through at the bucket's own pace, and costs the
others nothing (HOLES.md row 22). A full bucket equals an unknown key; so keys are in two
generations of dictionaries that change places once every bucket of the older one is full again.
There is no sweep. Only beyond ``KEYS_MAX`` keys in one generation do the generations change places
early; then some keys get a full bucket too soon.

**An address is charged only for faulty requests without a valid card**: bad or missing tokens,
wrong operator tokens, malformed requests, unknown paths. Hundreds of members of a company share one
address, and each of them is limited by their own card. Public reads (the page, the campaigns, the
remaining tickets) are not charged: at an opening a whole office reloads them, they are answered
from memory, and ``http/overload.py`` refuses them beyond capacity.

The limits hold for one process: a card whose connections reach several API processes has the same
limit in each. Counting in Redis was rejected, because each excess request would cost a call.
"""

import math
from collections import Counter
from typing import Final, NamedTuple

from sale.domain.problem import Problem, Refused

KEYS_MAX: Final = 250_000
CAMPAIGNS_MAX: Final = 1_024
TOKENS_MAX: Final = 1_024
VOUCHED_S: Final = 60.0

CARD_CAMPAIGN, CARD, ADDRESS = "card-campaign", "card", "address"
SCOPES: Final = (CARD_CAMPAIGN, CARD, ADDRESS)


class Rate(NamedTuple):
    """So many a second, and ``burst`` at once after a rest. ``per_s`` 0: no limit."""

    per_s: int
    burst: int


class Limited(NamedTuple):
    """A limit that was passed: its scope and rate, and seconds until one more may come."""

    scope: str
    rate: Rate
    wait_s: float

    @property
    def retry_after_s(self) -> int:
        """Whole seconds, at least one."""
        return max(1, math.ceil(self.wait_s))

    def headers(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """``RateLimit-Policy`` and ``RateLimit``, as draft-ietf-httpapi-ratelimit-headers-10 has.

        The quota is the burst, its window the time in which an empty bucket fills.
        """
        window_s = math.ceil(self.rate.burst / self.rate.per_s)
        return (
            ("RateLimit-Policy", f'"{self.scope}";q={self.rate.burst};w={window_s}'),
            ("RateLimit", f'"{self.scope}";r=0;t={self.retry_after_s}'),
        )


class TooFast(Refused):
    """A request beyond a limit: 429, with the limit's headers."""

    def __init__(self, limited: Limited) -> None:
        super().__init__(Problem.RATE_LIMITED, retry_after_s=limited.retry_after_s)
        self.limited = limited


class RateLimits:
    """The limits of one process. ``now`` is seconds of the monotonic clock."""

    def __init__(self, *, card_campaign: Rate, card: Rate, address: Rate) -> None:
        self._per_campaign = card_campaign
        self._campaigns: dict[str, _Buckets] = {}
        self._cards = _Buckets(card)
        self._addresses = _Buckets(address)
        self._limits_cards = card_campaign.per_s > 0 or card.per_s > 0
        self._known: dict[bytes, float] = {}
        """Operators' tokens that were good, and when they were looked up last."""
        self.limited: Counter[str] = Counter(dict.fromkeys(SCOPES, 0))
        """Refused so far, by scope."""

    def spend(self, member_no: int, campaign_id: str, now: float) -> Limited | None:
        """Charge a purchase to a member; None where it may go on. The campaign must be a known one.

        Both buckets are charged, or none.
        """
        # No calls within: with them it took 1.4 times as long.
        if not self._limits_cards:
            return None
        here = self._campaigns.get(campaign_id)
        if here is None:
            here = self._of_campaign(campaign_id)
        if now >= here.change_at or len(here.young) >= KEYS_MAX:
            here.change(now)
        cards = self._cards
        if now >= cards.change_at or len(cards.young) >= KEYS_MAX:
            cards.change(now)
        full_here = here.young.get(member_no) or here.old.get(member_no, now)
        if full_here < now:
            full_here = now
        elif full_here - now > here.slack_s:
            return self._limited(CARD_CAMPAIGN, here, full_here - now)
        full = cards.young.get(member_no) or cards.old.get(member_no, now)
        if full < now:
            full = now
        elif full - now > cards.slack_s:
            return self._limited(CARD, cards, full - now)
        here.young[member_no] = full_here + here.per_request_s
        cards.young[member_no] = full + cards.per_request_s
        return None

    def spend_card(self, member_no: int, now: float) -> Limited | None:
        """Charge a member's request that is no purchase, or one that went wrong."""
        return self._spend(CARD, self._cards, member_no, now)

    def spend_address(self, address: str, now: float) -> Limited | None:
        """Charge an address for a faulty request without a valid card."""
        return self._spend(ADDRESS, self._addresses, address, now)

    def address_is_out(self, address: str, now: float) -> Limited | None:
        """Look, without charging, whether an address has nothing left."""
        return self._spend(ADDRESS, self._addresses, address, now, look_only=True)

    def card_is_out(self, member_no: int, now: float) -> Limited | None:
        """Look, without charging, whether a member has nothing left."""
        return self._spend(CARD, self._cards, member_no, now, look_only=True)

    def remember(self, token_hash: bytes, now: float) -> None:
        """Note a valid operator's token, so that a guesser at its address does not shut it out.

        The token itself is looked up each time.
        """
        self._known.pop(token_hash, None)
        self._known[token_hash] = now
        if len(self._known) > TOKENS_MAX:
            del self._known[next(iter(self._known))]

    def forget(self, token_hash: bytes) -> None:
        """Note that a token is not valid any more."""
        self._known.pop(token_hash, None)

    def remembers(self, token_hash: bytes) -> bool:
        """Whether this token was good when it was looked up last."""
        return token_hash in self._known

    def vouches(self, token_hash: bytes, now: float) -> bool:
        """Whether this token was good a moment ago, so that its address pays nothing for it.

        Requests that no operator's handler sees are not looked up, and would never be forgotten.
        """
        return now - self._known.get(token_hash, -math.inf) < VOUCHED_S

    def _of_campaign(self, campaign_id: str) -> "_Buckets":
        if len(self._campaigns) >= CAMPAIGNS_MAX:
            self._campaigns.clear()
        buckets = self._campaigns[campaign_id] = _Buckets(self._per_campaign)
        return buckets

    def _spend(
        self,
        scope: str,
        buckets: "_Buckets",
        key: int | str,
        now: float,
        *,
        look_only: bool = False,
    ) -> Limited | None:
        if not buckets.rate.per_s:
            return None
        if now >= buckets.change_at or len(buckets.young) >= KEYS_MAX:
            buckets.change(now)
        full = max(buckets.young.get(key) or buckets.old.get(key, now), now)
        if full - now > buckets.slack_s:
            return self._limited(scope, buckets, full - now)
        if not look_only:
            buckets.young[key] = full + buckets.per_request_s
        return None

    def _limited(self, scope: str, buckets: "_Buckets", fills_in_s: float) -> Limited:
        self.limited[scope] += 1
        return Limited(scope, buckets.rate, fills_in_s - buckets.slack_s)


class _Buckets:
    """Buckets of one rate: when each key's is full again, in two generations.

    ``slack_s`` is how far ahead that may be for one more request: for ever where there is no limit.
    """

    __slots__ = ("_fills_s", "change_at", "old", "per_request_s", "rate", "slack_s", "young")

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self.per_request_s = 1.0 / rate.per_s if rate.per_s else 0.0
        self._fills_s = self.per_request_s * rate.burst or 1.0
        # Sums of fractions of a second are not exact.
        spare_s = self._fills_s - self.per_request_s + _A_MOMENT_S
        self.slack_s = spare_s if rate.per_s else math.inf
        self.young: dict[int | str, float] = {}
        self.old: dict[int | str, float] = {}
        self.change_at = 0.0

    def change(self, now: float) -> None:
        """Forget the old generation: all its buckets are full, unless memory forces it.

        A key of the old one was last written before the last change, and is full ``_fills_s`` after
        that at the latest.
        """
        self.old, self.young = self.young, {}
        if now >= self.change_at + self._fills_s:
            self.old = {}  # no request for that long: these are full as well
        self.change_at = now + self._fills_s


_A_MOMENT_S: Final = 1e-9
