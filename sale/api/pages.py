"""What a browser gets: the first page, its files, the problem pages, and the API's description.

Everything is read, filled in, compressed and hashed once, when the routes are added, because at an
opening every phone of the district loads this page in the same minute. The page names its files
with their hash, so they may be kept for a year; the page itself is asked for again each time and
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

from sale.api.openapi import build_document
from sale.api.problems import WORDINGS, problem_response
from sale.api.request import accepts_gzip, has_already
from sale.api.routing import guarded
from sale.domain.problem import Problem, Refused

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
        if has_already(request, f'"{self.etag}"'):
            return web.Response(status=304, headers=headers)
        body = self.body
        if accepts_gzip(",".join(request.headers.getall(hdrs.ACCEPT_ENCODING, ()))):
            headers[hdrs.CONTENT_ENCODING] = "gzip"
            body = self.gzipped
        charset = None if self.content_type.startswith("application/") else "utf-8"
        return web.Response(
            body=body, headers=headers, content_type=self.content_type, charset=charset
        )


def add_page_routes(app: web.Application) -> None:
    """Add ``/``, its files, ``/favicon.ico``, ``/problems/``, one of each, ``/openapi.json``."""
    assets = {name: _static(_read(name), kind) for name, kind in _ASSETS.items()}
    places = {name.replace(".", "_"): _versioned(name, assets[name]) for name in assets}
    index = _static(_fill("index.html", places), HTML)
    problems = {problem.value: _problem_page(problem, places) for problem in Problem}
    all_problems = _problems_page(places)
    openapi = _static(build_document(), "application/json")

    async def get_index(request: web.Request) -> web.Response:
        return index.answer(request)

    async def get_asset(request: web.Request) -> web.Response:
        asset = assets.get(request.match_info["name"])
        if asset is None:
            return problem_response(Refused(Problem.NOT_FOUND))
        current = request.query.get("v") == asset.etag
        return asset.answer(request, _KEEP if current else _ASK_AGAIN)

    async def get_favicon(request: web.Request) -> web.Response:
        return assets["favicon.svg"].answer(request)

    async def get_problem(request: web.Request) -> web.Response:
        page = problems.get(request.match_info["code"])
        return page.answer(request) if page else problem_response(Refused(Problem.NOT_FOUND))

    async def get_problems(request: web.Request) -> web.Response:
        return all_problems.answer(request)

    async def get_openapi(request: web.Request) -> web.Response:
        return openapi.answer(request)

    app.router.add_get("/", guarded(get_index))
    app.router.add_get("/assets/{name}", guarded(get_asset))
    app.router.add_get("/favicon.ico", guarded(get_favicon))
    app.router.add_get("/problems", guarded(get_problems))
    app.router.add_get("/problems/", guarded(get_problems))
    app.router.add_get("/problems/{code}", guarded(get_problem))
    app.router.add_get("/openapi.json", guarded(get_openapi))


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


def _versioned(name: str, asset: _Static) -> str:
    return f"/assets/{name}?v={asset.etag}"


def _static(body: bytes, content_type: str) -> _Static:
    etag = hashlib.sha256(body).hexdigest()[:16]
    return _Static(body, gzip.compress(body, mtime=0), etag, content_type)


def _read(name: str) -> bytes:
    return files("sale.api").joinpath("web", name).read_bytes()
