"""Makes an OpenAPI 3.1 document from a table of routes.

Schemas come from the types that are decoded and encoded, parameters and answers from the entries
that are dispatched, so the document cannot differ from what is served.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from sale.http.request_ids import HEADER, PATTERN
from sale.http.routes import PUBLIC, Key, Load, Query, Route

Json = dict[str, Any]


class ProblemText(NamedTuple):
    """How one problem code is described. ``headers`` are those that its answer may have."""

    status: int
    title: str
    headers: Mapping[str, Json]


class About(NamedTuple):
    """The document without its routes.

    ``schemes``: each scheme of access and its OpenAPI security scheme. ``path_patterns``: the
    regular expression of each path parameter. ``every``: the codes that any admitted route may
    answer. ``problem`` gives the text of a code; ``problem_form`` is the type of a problem
    document, sent as ``problem_media_type``.
    """

    info: Json
    schemes: Mapping[str, Json]
    path_patterns: Mapping[str, str]
    key_pattern: str
    every: Sequence[str]
    problem: Callable[[str], ProblemText]
    problem_form: type[Any]
    problem_media_type: str


def build_document(routes: Iterable[Route], about: About) -> bytes:
    """Give the document as JSON. Routes without a summary are left out."""
    described = [route for route in routes if route.summary]
    forms: list[Any] = [about.problem_form]
    for route in described:
        forms += [form for form in (route.answer, route.body) if form is not None]
    unique = list(dict.fromkeys(forms))
    refs, components = msgspec.json.schema_components(
        unique, ref_template="#/components/schemas/{name}"
    )
    writer = _Writer(about, dict(zip(unique, refs, strict=True)))
    paths: dict[str, Json] = {}
    for route in described:
        paths.setdefault(route.path, {})[route.method.lower()] = writer.operation(route)
    document = {
        "openapi": "3.1.0",
        "info": about.info,
        "servers": [{"url": "/"}],
        "tags": [{"name": "public"}, *({"name": scheme} for scheme in about.schemes)],
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": about.schemes},
    }
    return msgspec.json.encode(document)


def header(description: str, **schema: object) -> Json:
    """Describe a header whose value is a text."""
    return {"description": description, "schema": {"type": "string", **schema}}


class _Writer:
    """Writes operation objects."""

    def __init__(self, about: About, ref_of: Mapping[Any, Any]) -> None:
        self._about = about
        self._ref_of = ref_of

    def operation(self, route: Route) -> Json:
        operation: Json = {
            "operationId": _operation_id(route),
            "summary": route.summary,
            "tags": [route.access.scheme or "public"],
            "parameters": self._parameters(route),
            "responses": self._responses(route),
        }
        if route.description:
            operation["description"] = route.description
        if route.body is not None:
            operation["requestBody"] = {
                "required": route.body_needed,
                "content": {"application/json": {"schema": self._ref_of[route.body]}},
            }
        if route.access.scheme != PUBLIC:
            operation["security"] = [{route.access.scheme: []}]
        if route.access.roles:
            operation["x-roles"] = sorted(route.access.roles)
        return operation

    def _parameters(self, route: Route) -> list[Json]:
        parameters = [
            _path_parameter(segment[1:-1], self._about.path_patterns[segment[1:-1]])
            for segment in route.path.split("/")
            if segment.startswith("{")
        ]
        parameters += [_query_parameter(query) for query in route.queries]
        if route.cached_s is not None:
            parameters.append(_IF_NONE_MATCH)
        if route.key is not Key.NONE:
            parameters.append(_key_parameter(route.key, self._about.key_pattern))
        return [*parameters, _REQUEST_ID]

    def _responses(self, route: Route) -> Json:
        done = self._done(route)
        responses: Json = {str(route.status): done}
        if route.cached_s is not None:
            responses["304"] = {
                "description": "The client's copy is current.",
                "headers": done["headers"],
            }
        for status, description in route.also.items():
            responses[str(status)] = {
                **done,
                "description": description,
                "headers": {**done["headers"], **(RETRY_AFTER if status == 503 else {})},
            }
        if route.load is not Load.EXEMPT:
            codes = dict.fromkeys((*route.problems, *self._about.every))
            responses |= self._problems(codes)
        for response in responses.values():
            response["headers"] = {**response["headers"], **_REQUEST_ID_TOLD}
        return responses

    def _done(self, route: Route) -> Json:
        headers = dict(_CACHE_HEADERS) if route.cached_s is not None else {}
        headers |= {name: header(told) for name, told in route.headers.items()}
        done: Json = {"description": "Done.", "headers": headers}
        if route.answer is not None:
            done["content"] = {"application/json": {"schema": self._ref_of[route.answer]}}
        return done

    def _problems(self, codes: Iterable[str]) -> Json:
        by_status: dict[int, dict[str, ProblemText]] = {}
        for code in codes:
            text = self._about.problem(code)
            by_status.setdefault(text.status, {})[code] = text
        form = {"schema": self._ref_of[self._about.problem_form]}
        return {
            str(status): {
                "description": "; ".join(f"`{code}`: {text.title}" for code, text in told.items()),
                "content": {self._about.problem_media_type: form},
                "headers": {
                    name: each for text in told.values() for name, each in text.headers.items()
                },
            }
            for status, told in sorted(by_status.items())
        }


def _operation_id(route: Route) -> str:
    path = route.path.removeprefix("/api/v1").replace("{", "by-").replace("}", "")
    return route.method.lower() + "-" + "-".join(part for part in path.split("/") if part)


def _path_parameter(name: str, pattern: str) -> Json:
    schema = {"type": "string", "pattern": f"^{pattern}$"}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _query_parameter(query: Query[Any]) -> Json:
    return {
        "name": query.name,
        "in": "query",
        "description": query.description,
        "schema": query.schema,
    }


def _key_parameter(key: Key, pattern: str) -> Json:
    return {
        "name": "Idempotency-Key",
        "in": "header",
        "required": key is Key.REQUIRED,
        "description": "New for each wish, the same for its retries: it is done once.",
        "schema": {"type": "string", "pattern": f"^{pattern}$"},
    }


_IF_NONE_MATCH: Final[Json] = {
    "name": "If-None-Match",
    "in": "header",
    "description": "ETags of the client's copies: 304 where one of them is current.",
    "schema": {"type": "string"},
}
_REQUEST_ID: Final[Json] = {
    "name": str(HEADER),
    "in": "header",
    "description": "A name for the request. One of another form, or given twice, is replaced.",
    "schema": {"type": "string", "pattern": f"^{PATTERN.pattern}$"},
}
_REQUEST_ID_TOLD: Final = {
    str(HEADER): header("The request's name: the one that was given, or a new one.")
}
_CACHE_HEADERS: Final = {
    "ETag": header("Identifies this version of the answer."),
    "Cache-Control": header("How long it may be kept."),
}
RETRY_AFTER: Final[dict[str, Json]] = {
    "Retry-After": {
        "description": "Seconds; where waiting helps.",
        "schema": {"type": "integer"},
    }
}
