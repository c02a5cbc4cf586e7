"""The page as an ASGI application: routes, what every answer says to the browser, and errors as sentences.

Notable features
- Only GET, and only for a Host of this machine: a foreign site cannot read the page by a name that it lets point here.
- No script at all; styles, the icon and everything else come from here, and the policy in each answer forbids the rest.
- Whatever a folder holds ends in a page that says so. A bug ends in one line; its traceback is in the terminal.
"""

import traceback
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xmc_ray.errors import XmcError
from xmc_ray.reports.render import environment
from xmc_ray.show.pages import Missing, Page, Site

_POLICY = "default-src 'none'; style-src {style}; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
_HEADERS = {
    "content-security-policy": _POLICY.format(style="'self'"),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
_OF_REPORTS = _POLICY.format(style="'unsafe-inline'") + "; sandbox"  # whoever has written them
_ICON = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path fill="#4253d6" d="M1 1h7l7 7-7 7-7-7z"/></svg>'
_STYLES = (("xmc_ray.reports", "report.css"), ("xmc_ray.show", "show.css"))
_ERRORS = {404: "Not found", 405: "Only GET is answered"}


def application(root: str) -> Starlette:
    """The page over the runs and nights in ``root``, an address."""
    site = Site(root)
    pages = {
        "/": site.index,
        "/run": site.run,
        "/nights": site.nights,
        "/night": site.night,
        "/documents": site.documents,
        "/document": site.document,
        "/labels": site.labels,
        "/label": site.label,
        "/why": site.why,
    }
    styles = "".join((files(package) / "templates" / name).read_text() for package, name in _STYLES)
    routes = [Route(path, _answer(page), methods=["GET"]) for path, page in pages.items()]
    routes += [
        Route("/report", _report(site), methods=["GET"]),
        Route("/style.css", lambda request: Response(styles, media_type="text/css"), methods=["GET"]),
        Route("/icon.svg", lambda request: Response(_ICON, media_type="image/svg+xml"), methods=["GET"]),
    ]
    guards = [
        Middleware(_Headers),
        Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False),
    ]
    return Starlette(routes=routes, middleware=guards, exception_handlers={HTTPException: _refuse})


def address(path: str, *known: Mapping[str, object], **arguments: object) -> str:
    """A link within the page; arguments that are empty are left out."""
    every = [pair for part in (*known, arguments) for pair in part.items()]
    given = {name: str(value) for name, value in every if value not in (None, "", False)}
    return f"{path}?{urlencode(given, errors='surrogatepass')}" if given else path


def _answer(page: Callable[[dict[str, str]], Page]) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:  # not a coroutine: it runs in a thread
        try:
            return _html(page(dict(request.query_params)))
        except Missing as error:
            return _html(Page.message("Not found", str(error)), 404)
        except XmcError as error:
            return _html(Page.message("This cannot be shown", f"{error}."))
        except Exception as error:
            traceback.print_exc()
            words = f"{type(error).__name__}: a bug of the page. The terminal that serves it says more."
            return _html(Page.message("This cannot be shown", words), 500)

    return answer


def _report(site: Site) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:
        try:
            return HTMLResponse(site.report(dict(request.query_params)), headers={"content-security-policy": _OF_REPORTS})
        except (Missing, XmcError) as error:
            return _html(Page.message("Not found", str(error)), 404)

    return answer


def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _html(Page.message(_ERRORS.get(error.status_code, error.detail), ""), error.status_code)


def _html(page: Page, status: int = 200) -> Response:
    template = environment("xmc_ray.show").get_template(f"{page.template}.html.j2")
    content: dict[str, Any] = {"url": address, "title": page.title, "crumbs": page.crumbs, **page.content}
    return HTMLResponse(template.render(content), status)


class _Headers:
    """Adds `_HEADERS` to every answer, errors included, that does not have its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name for name, _ in message["headers"]}
                further = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in further if pair[0] not in known)]
            await send(message)

        await self.app(scope, receive, sending)
