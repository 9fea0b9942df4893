"""Pages for browsers: the first page, its files, the problem pages, and the API's description.

Everything is read, filled in, compressed and hashed once, when the process starts, because at an
opening every phone of the district loads this page in the same minute. The page names its files
with their hash, so they may be kept for a year; the page itself is requested again each time and
mostly answered 304. No script, style or font comes from elsewhere, and the policy header says so.
"""

import gzip
import hashlib
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Final, NamedTuple

from aiohttp import hdrs, web

from sale.api.calls import Call
from sale.api.problems import WORDINGS
from sale.domain.problem import Problem, Refused
from sale.http.request import NO_STORE, accepts_gzip, is_current
from sale.http.routes import Route

HTML: Final = "text/html"
SECURITY_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_ASSETS: Final = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "test-payment.js": "text/javascript",
    "favicon.svg": "image/svg+xml",
}
_ASK_AGAIN: Final = "no-cache"
_KEEP: Final = "public, max-age=31536000, immutable"


class _Static(NamedTuple):
    """A body that never changes while the process lives."""

    body: bytes
    gzipped: bytes
    etag: str
    content_type: str

    def answer(self, request: web.Request, cache_control: str = _ASK_AGAIN) -> web.Response:
        headers = {
            **SECURITY_HEADERS,
            hdrs.CACHE_CONTROL: cache_control,
            # Weak, because both encodings share it.
            hdrs.ETAG: f'W/"{self.etag}"',
            hdrs.VARY: hdrs.ACCEPT_ENCODING,
        }
        if is_current(request, f'"{self.etag}"'):
            return web.Response(status=304, headers=headers)
        body = self.body
        if accepts_gzip(",".join(request.headers.getall(hdrs.ACCEPT_ENCODING, ()))):
            headers[hdrs.CONTENT_ENCODING] = "gzip"
            body = self.gzipped
        charset = None if self.content_type.startswith("application/") else "utf-8"
        return web.Response(
            body=body, headers=headers, content_type=self.content_type, charset=charset
        )


class Pages:
    """All that never changes while the process lives: made once, as the module says."""

    def __init__(self, api_document: bytes) -> None:
        self.assets = {name: _static(_read(name), kind) for name, kind in _ASSETS.items()}
        self.places = places = {
            name.replace(".", "_").replace("-", "_"): f"/assets/{name}?v={asset.etag}"
            for name, asset in self.assets.items()
        }
        self.index = _static(_fill("index.html", places), HTML)
        self.problems = {problem.value: _problem_page(problem, places) for problem in Problem}
        self.all_problems = _problems_page(places)
        self.api = _static(api_document, "application/json")


PAGES: Final = web.AppKey("pages", Pages)


async def get_index(call: Call[None]) -> web.Response:
    """GET /."""
    return call.request.app[PAGES].index.answer(call.request)


async def get_asset(call: Call[None]) -> web.Response:
    """GET /assets/{name}: kept for a year where the address has its hash."""
    asset = call.request.app[PAGES].assets.get(call.path["name"])
    if asset is None:
        raise Refused(Problem.NOT_FOUND)
    current = call.request.query.get("v") == asset.etag
    return asset.answer(call.request, _KEEP if current else _ASK_AGAIN)


async def get_favicon(call: Call[None]) -> web.Response:
    """GET /favicon.ico."""
    return call.request.app[PAGES].assets["favicon.svg"].answer(call.request)


async def get_problem(call: Call[None]) -> web.Response:
    """GET /problems/{code}."""
    page = call.request.app[PAGES].problems.get(call.path["code"])
    if page is None:
        raise Refused(Problem.NOT_FOUND)
    return page.answer(call.request)


async def get_problems(call: Call[None]) -> web.Response:
    """GET /problems/."""
    return call.request.app[PAGES].all_problems.answer(call.request)


async def get_api(call: Call[None]) -> web.Response:
    """GET /openapi.json."""
    return call.request.app[PAGES].api.answer(call.request)


def filled_page(name: str, places: Mapping[str, str], values: Mapping[str, str]) -> web.Response:
    """Answer with a page of one moment, which nobody keeps."""
    return web.Response(
        body=_fill(name, {**places, **values}),
        headers={**SECURITY_HEADERS, **NO_STORE},
        content_type=HTML,
        charset="utf-8",
    )


def _problem_page(problem: Problem, places: Mapping[str, str]) -> _Static:
    return _static(_fill("problem.html", {**places, **_problem_words(problem)}), HTML)


def _problems_page(places: Mapping[str, str]) -> _Static:
    rows = b"".join(_fill("problems-row.html", _problem_words(problem)) for problem in Problem)
    return _static(_fill("problems.html", places, rows=rows.decode()), HTML)


def _problem_words(problem: Problem) -> dict[str, str]:
    wording = WORDINGS[problem]
    return {
        "code": problem.value,
        "status": str(wording.status),
        "title": wording.title.zh,
        "title_en": wording.title.en,
        "happened": wording.happened.zh,
        "happened_en": wording.happened.en,
        "next_step": wording.next_step.zh,
        "next_step_en": wording.next_step.en,
    }


def _fill(name: str, values: Mapping[str, str], **markup: str) -> bytes:
    """Fill in a template; ``markup`` stands as it is."""
    escaped = {key: escape(value) for key, value in values.items()}
    return Template(_read(name).decode()).substitute(escaped, **markup).encode()


def _static(body: bytes, content_type: str) -> _Static:
    etag = hashlib.sha256(body).hexdigest()[:16]
    return _Static(body, gzip.compress(body, mtime=0), etag, content_type)


def _read(name: str) -> bytes:
    return files("sale.api").joinpath("web", name).read_bytes()


ROUTES: Final = tuple(
    Route(method="GET", path=path, handler=handler)
    for path, handler in (
        ("/", get_index),
        ("/assets/{name}", get_asset),
        ("/favicon.ico", get_favicon),
        ("/problems", get_problems),
        ("/problems/", get_problems),
        ("/problems/{code}", get_problem),
        ("/openapi.json", get_api),
    )
)
