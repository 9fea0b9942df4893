"""An application that serves the pages alone, without an engine."""

from aiohttp import web

from sale.api import pages
from sale.api.dispatch import add_routes
from sale.api.openapi import build_document
from sale.api.pages import PAGES, Pages
from sale.api.routes import ROUTES


def with_pages(app: web.Application) -> web.Application:
    """Add the pages to an application."""
    app[PAGES] = Pages(build_document(ROUTES))
    add_routes(app, pages.ROUTES)
    return app
