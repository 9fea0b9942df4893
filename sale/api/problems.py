"""The answer of each refusal: status, words in Chinese and English, when to retry (RFC 9457).

Members, many of them older, read these on a phone in the middle of a rush: one short sentence says
what happened, a second one what to do next. Chinese is in ``title`` and ``detail``, English in
``title_en`` and ``detail_en``. Figures come from the members of the refusal ("仅剩 1 张"). Codes
that only developers and operators meet add the text given where they were raised.

A rush is mostly refusals, and most of them are the same few, so those bodies are kept encoded: a
memo with a bound, filled only by codes whose members are few (never by what a client sent).
"""

import math
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec
from aiohttp import hdrs, web

from sale.domain.clock import LOCAL_ZONE
from sale.domain.problem import Problem, Refused
from sale.domain.text import Text
from sale.members.rate import TooFast

CONTENT_TYPE: Final = "application/problem+json"
RETRY_AFTER_MAX_S: Final = 86_400
"""A member who comes days too early comes back after a day, because plans may have changed."""

_MEMO_BODIES: Final = 2_048


class Wording(NamedTuple):
    """The words of one problem; ``retry_after_s`` if it passes by itself."""

    status: int
    title: Text
    happened: Text
    next_step: Text
    retry_after_s: int | None = None


WORDINGS: Final[Mapping[Problem, Wording]] = {
    Problem.INVALID_REQUEST: Wording(
        400,
        Text("请求有误", "Invalid request"),
        Text("提交的内容有一处不对。", "Something in the request is wrong."),
        Text("请按提示改好后再试。", "Please correct what is named and try again."),
    ),
    Problem.MISSING_IDEMPOTENCY_KEY: Wording(
        400,
        Text("缺少请求编号", "Idempotency-Key is missing"),
        Text(
            "请求没有带编号（Idempotency-Key）。",
            "Purchases and cancellations need the header Idempotency-Key (1 to 64 of A-Z, a-z, "
            "0-9, _ and -).",
        ),
        Text(
            "每次操作用一个新编号，重试时用原来的编号，就不会重复。",
            "Use a new key for each, and the same key for its retries: nothing is done twice.",
        ),
    ),
    Problem.UNAUTHENTICATED: Wording(
        401,
        Text("请先登录", "Please sign in"),
        Text(
            "您还没有登录，或者登录已过期。", "You are not signed in, or your sign-in has expired."
        ),
        Text("请登录后再试一次。", "Please sign in and try again."),
    ),
    Problem.NOT_ELIGIBLE: Wording(
        403,
        Text("不在本活动范围", "Not open to your union"),
        Text(
            "本活动只面向指定工会的会员，您的卡不在其中。",
            "This is for members of certain unions, and your card is not among them.",
        ),
        Text(
            "请看看其他活动，或问一问您的工会服务站。",
            "Please look at the others, or ask your union's service station.",
        ),
    ),
    Problem.CARD_REVOKED: Wording(
        403,
        Text("这张卡暂不能购票", "This card cannot buy"),
        Text(
            "您的卡已停用或注销，现在不能购票。",
            "Your card is suspended or cancelled and cannot buy now.",
        ),
        Text(
            "请带上卡，到您的街道工会服务站办理。",
            "Please take the card to your subdistrict union's service station.",
        ),
    ),
    Problem.FORBIDDEN: Wording(
        403,
        Text("没有权限", "Not allowed"),
        Text("您的账号不能做这项操作。", "Your account may not do this."),
        Text("如有需要，请找管理员开通。", "If you need to, ask an administrator."),
    ),
    Problem.NOT_FOUND: Wording(
        404,
        Text("没有找到", "Not found"),
        Text("这里没有您要找的内容。", "There is nothing here under this name."),
        Text("请检查地址，或回到首页。", "Please check the address, or go to the first page."),
    ),
    Problem.METHOD_NOT_ALLOWED: Wording(
        405,
        Text("请求方式不对", "Method not allowed"),
        Text("这个地址不接受这种请求方式。", "This address does not take this method."),
        Text("可用的方式见 Allow。", "The header Allow names those it takes."),
    ),
    Problem.NOT_OPEN: Wording(
        409,
        Text("尚未开始", "Not open yet"),
        Text("尚未开始。", "It has not opened yet."),
        Text("请等到开抢时间再来。", "Please come back when it opens."),
        retry_after_s=5,
    ),
    Problem.PAUSED: Wording(
        409,
        Text("暂停售票", "Paused"),
        Text(
            "暂停售票，已买到的票不受影响。", "Sales are paused. Tickets already bought are safe."
        ),
        Text("请过一会儿再试。", "Please try again in a little while."),
        retry_after_s=10,
    ),
    Problem.CLOSED: Wording(
        409,
        Text("已结束", "Closed"),
        Text("本活动已结束。", "This sale has ended."),
        Text("欢迎看看其他活动。", "Please have a look at the others."),
    ),
    Problem.SOLD_OUT: Wording(
        409,
        Text("已售完", "Sold out"),
        Text("已售完，现在没有余票。", "No tickets are left."),
        Text(
            "加票和退票会马上放出，您可以过一会儿再来看看。",
            "Tickets that are added or given back go on sale at once: do look in again.",
        ),
    ),
    Problem.LIMIT_EXCEEDED: Wording(
        409,
        Text("超过每卡限购", "Over the limit per card"),
        Text(
            "您的卡在本活动中不能再买这么多张。",
            "Your card may not have that many more in this campaign.",
        ),
        Text(
            "请减少张数；已买到的票不受影响。",
            "Ask for fewer; the tickets you have are safe.",
        ),
    ),
    Problem.TOO_MANY_ORDERS: Wording(
        409,
        Text("订单太多", "Too many orders"),
        Text(
            "您在本活动中的订单已达 50 个（含已取消和已过期的）。",
            "You have 50 orders in this campaign, those that have ended included.",
        ),
        Text("如需帮助，请致电服务热线。", "Please call the hotline if you need help."),
    ),
    Problem.WRONG_STATE: Wording(
        409,
        Text("当前状态不能这样做", "Not possible in this state"),
        Text("现在的状态不允许这项操作。", "It is not in a state that allows this."),
        Text(
            "请先查看现在的状态。已领取或已过期的票不能退，过了退票截止时间也不能退。",
            "Please look at its state first. Tickets that are collected or expired cannot be given "
            "back, nor can any after the campaign's time for it.",
        ),
    ),
    Problem.IDEMPOTENCY_MISMATCH: Wording(
        422,
        Text("请求编号已用过", "Key already used"),
        Text(
            "这个请求编号已用于另一份内容。",
            "This Idempotency-Key was used before with other content.",
        ),
        Text("新的购票请换一个新编号。", "Please use a new key for a new purchase."),
    ),
    Problem.PAYLOAD_TOO_LARGE: Wording(
        413,
        Text("内容太大", "Too large"),
        Text("提交的内容超过 16 KiB。", "The body is over 16 KiB."),
        Text("请缩短后再试。", "Please send less."),
    ),
    Problem.UNSUPPORTED_MEDIA_TYPE: Wording(
        415,
        Text("内容格式不支持", "Unsupported media type"),
        Text("这里只接受 JSON。", "Only JSON is taken here."),
        Text("请使用 application/json。", "Please send application/json."),
    ),
    Problem.RATE_LIMITED: Wording(
        429,
        Text("操作太快", "Too fast"),
        Text("您点得太快了。", "That was a little too fast."),
        Text("请等几秒再试。", "Please wait a few seconds and try again."),
        retry_after_s=2,
    ),
    Problem.OVERLOADED: Wording(
        503,
        Text("现在人很多", "Very busy"),
        Text("现在人很多，这次没有买成。", "It is very busy, and this attempt bought nothing."),
        Text(
            "请等几秒，按原请求再试一次，不会多买。",
            "Please retry in a few seconds with the same request: nothing is bought twice.",
        ),
        retry_after_s=1,
    ),
    Problem.UNAVAILABLE: Wording(
        503,
        Text("暂时无法确认", "Cannot say just now"),
        Text("系统暂时无法确认结果。", "The outcome is not certain just now."),
        Text(
            "请等几秒，按原请求再试一次，不会多买。",
            "Please retry in a few seconds with the same request: nothing is bought twice.",
        ),
        retry_after_s=2,
    ),
}

MEMBER_FACING: Final = frozenset(
    {
        Problem.UNAUTHENTICATED,
        Problem.NOT_ELIGIBLE,
        Problem.CARD_REVOKED,
        Problem.NOT_OPEN,
        Problem.PAUSED,
        Problem.CLOSED,
        Problem.SOLD_OUT,
        Problem.LIMIT_EXCEEDED,
        Problem.TOO_MANY_ORDERS,
        Problem.RATE_LIMITED,
        Problem.OVERLOADED,
        Problem.UNAVAILABLE,
    }
)
"""Codes that members read: the words above are shown, and not the detail that the engine gave."""


def problem_body(
    problem: Problem, detail: str = "", detail_zh: str = "", /, **members: object
) -> bytes:
    """Encode the problem document. ``members`` are its extra fields, as the contract names them.

    ``detail`` replaces the default sentence, except for codes that members read. The default
    Chinese sentence quotes ``detail_zh``, or ``detail`` where it is ''; a ``detail_zh`` that is a
    sentence of its own stands alone. Members of the codes that members read must be hashable
    (numbers and texts): equal members give the same bytes object.
    """
    if problem in MEMBER_FACING:
        return _memoised(problem, **members)
    # A detail may quote the client's text, which need not be well-formed.
    given = detail.encode(errors="replace").decode()
    if not given:
        return _encode(problem, _default(problem), members)
    quoted = detail_zh.encode(errors="replace").decode() or given
    if quoted.endswith("。"):
        return _encode(problem, Text(quoted, given), members)
    happened = WORDINGS[problem].happened.zh
    return _encode(problem, Text(f"{happened}（{quoted}）", given), members)


def problem_response(refused: Refused) -> web.Response:
    """Answer a refusal as ``application/problem+json``; see ``problem_answer``."""
    status, body, headers = problem_answer(refused)
    return web.Response(status=status, body=body, headers=headers)


Worded = tuple[int, bytes, dict[str, str]]
"""Status, body and headers of an answer."""


def problem_answer(refused: Refused) -> Worded:
    """Word a refusal with the headers that its code calls for.

    A member ``allow`` (a text, or method names) becomes the header ``Allow`` and is not shown.
    """
    problem = refused.problem
    if problem in MEMBER_FACING:
        answer = _member_answer(problem, retry_after_s(refused), tuple(refused.members.items()))
        if isinstance(refused, TooFast):
            status, body, headers = answer
            return status, body, {**headers, **dict(refused.limited.headers())}
        return answer
    members = {name: value for name, value in refused.members.items() if name != "allow"}
    body = problem_body(problem, refused.detail, refused.detail_zh, **members)
    return WORDINGS[problem].status, body, problem_headers(refused)


@lru_cache(maxsize=_MEMO_BODIES, typed=True)
def _member_answer(
    problem: Problem, wait_s: int | None, members: tuple[tuple[str, object], ...]
) -> Worded:
    """Give status, body and headers of what a rush refuses by the hundred thousand."""
    refused = Refused(problem, "", retry_after_s=wait_s, **dict(members))
    body = problem_body(problem, **dict(members))
    return WORDINGS[problem].status, body, problem_headers(refused)


def problem_headers(refused: Refused) -> dict[str, str]:
    """Headers of a refusal: its type, Retry-After, Allow, WWW-Authenticate."""
    headers: dict[str, str] = {hdrs.CONTENT_TYPE: CONTENT_TYPE, hdrs.CACHE_CONTROL: "no-store"}
    wait_s = retry_after_s(refused)
    if wait_s is not None:
        headers[hdrs.RETRY_AFTER] = str(wait_s)
    if refused.problem is Problem.UNAUTHENTICATED:
        headers["WWW-Authenticate"] = "Bearer"
    allow = refused.members.get("allow")
    if isinstance(allow, str):
        headers["Allow"] = allow
    elif isinstance(allow, Iterable):
        headers["Allow"] = ", ".join(sorted(str(method) for method in allow))
    return headers


def retry_after_s(refused: Refused) -> int | None:
    """Whole seconds until trying again makes sense, or None where it never does.

    Where the engine gave none, the seconds to ``opens_at`` by this host's clock, else the default
    of the code. The host's clock decides nothing but this hint.
    """
    wait_s = refused.retry_after_s
    if wait_s is None and refused.problem is Problem.NOT_OPEN:
        opens_at = _moment(refused.members.get("opens_at"))
        if opens_at is not None:
            wait_s = math.ceil(opens_at.timestamp() - time.time())
    if wait_s is None:
        wait_s = WORDINGS[refused.problem].retry_after_s
    return None if wait_s is None else min(max(wait_s, 1), RETRY_AFTER_MAX_S)


# typed: 1 and True are equal, and would otherwise share an entry.
@lru_cache(maxsize=_MEMO_BODIES, typed=True)
def _memoised(problem: Problem, **members: object) -> bytes:
    return _encode(problem, _in_figures(problem, members) or _default(problem), members)


def _encode(problem: Problem, detail: Text, members: Mapping[str, object]) -> bytes:
    wording = WORDINGS[problem]
    document: dict[str, Any] = {
        "type": f"/problems/{problem.value}",
        "title": wording.title.zh,
        "status": wording.status,
        "detail": detail.zh,
        "code": problem.value,
        "title_en": wording.title.en,
        "detail_en": detail.en,
    }
    # Twice, so that the standard fields come first and no member overrides them.
    return msgspec.json.encode({**document, **members, **document})


def _default(problem: Problem) -> Text:
    wording = WORDINGS[problem]
    return Text(
        wording.happened.zh + wording.next_step.zh,
        f"{wording.happened.en} {wording.next_step.en}",
    )


def _in_figures(problem: Problem, members: Mapping[str, object]) -> Text | None:
    """Give the sentence with the figures of this refusal, or None if it has none."""
    if problem is Problem.SOLD_OUT:
        return _only_so_many_left(members.get("remaining")) or _some_may_come_back(
            members.get("held"), _moment(members.get("pay_before"))
        )
    if problem is Problem.LIMIT_EXCEEDED:
        return _card_may_have(members.get("card_remaining"), members.get("card_limit"))
    if problem is Problem.NOT_OPEN:
        return _opens_at(_moment(members.get("opens_at")))
    return None


def _only_so_many_left(remaining: object) -> Text | None:
    if not isinstance(remaining, int) or remaining < 1:
        return None
    return Text(
        f"仅剩 {remaining} 张，不够您要的张数。请减少张数再试。",
        f"Only {remaining} left, fewer than you asked for. Please ask for fewer.",
    )


def _some_may_come_back(held: object, pay_before: datetime | None) -> Text | None:
    if not isinstance(held, int) or pay_before is None:
        return None
    clock = f"{pay_before.astimezone(LOCAL_ZONE):%H:%M:%S}"
    return Text(
        f"暂无余票，还有 {held} 张等待付款，最早 {clock} 可能放出。请到时再试。",
        f"None left just now. {held} are waiting for payment; some may come back at {clock} "
        "(Beijing time) or later. Please try again then.",
    )


def _card_may_have(card_remaining: object, card_limit: object) -> Text | None:
    if isinstance(card_remaining, int) and card_remaining > 0:
        return Text(
            f"您的卡还可以买 {card_remaining} 张。请减少张数再试。",
            f"Your card may have {card_remaining} more. Please ask for fewer.",
        )
    if not isinstance(card_limit, int):
        return None
    next_step = WORDINGS[Problem.LIMIT_EXCEEDED].next_step
    return Text(
        f"您的卡已买满 {card_limit} 张。{next_step.zh}",
        f"Your card has all {card_limit} tickets it may have. {next_step.en}",
    )


def _opens_at(opens_at: datetime | None) -> Text | None:
    if opens_at is None:
        return None
    local = opens_at.astimezone(LOCAL_ZONE)
    clock = local.strftime("%H:%M:%S" if local.second else "%H:%M")
    return Text(
        f"尚未开始，{local.month}月{local.day}日 {clock} 开抢。请到时再来。",
        f"Not open yet. It opens on {local.day} {local:%B} at {clock} (Beijing time).",
    )


def _moment(value: object) -> datetime | None:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    return value if isinstance(value, datetime) and value.tzinfo is not None else None
