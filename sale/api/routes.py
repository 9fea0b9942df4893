"""The table of routes: all that the API answers."""

from typing import Final

from sale.api import member, operator, pages, payments, public
from sale.http.routes import Route

ROUTES: Final[tuple[Route, ...]] = (
    *public.ROUTES,
    *member.ROUTES,
    *operator.ROUTES,
    *payments.ROUTES,
    *pages.ROUTES,
)
