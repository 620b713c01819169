"""The explorer as a page of this machine: loopback only, and only for those who have the token in the address.

    serve(engine, listening())              # until Ctrl-C; application(engine, ...) is the app alone

Any other page open in the same browser can send requests to a port of this machine, even under a host name of its own
(DNS rebinding). So a request is answered only if it names this host and port, carries the token in its path and, where
the browser says which page it is from, comes from this one. The page may load nothing from elsewhere.
"""

import secrets
import socket
from typing import TYPE_CHECKING

from mech.errors import OutputError
from mech.explorer.assets import needs, static
from mech.explorer.engine import MOST_BYTES, Engine
from mech.files import parse_json

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from uvicorn import Server

HOST = "127.0.0.1"
MOST_BODY = MOST_BYTES * 4 // 3 + 10_000  # a picture in base64, and some text
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # it would contain the token
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
KINDS = {"page.html": "text/html", "page.js": "text/javascript", "explorer.js": "text/javascript",
         "explorer.css": "text/css"}  # fmt: skip


def listening(port: int = 0) -> socket.socket:
    """A socket on a port of the loopback interface; 0 is a free one.

    Raises:
        OutputError: the port is taken or not allowed, or the packages of the extra are not installed.
    """
    needs("starlette", "uvicorn")
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"port {port} cannot be used ({reason})", "a free port of this machine",
                          "leave --port out, and one is found") from error  # fmt: skip


def serve(engine: Engine, place: socket.socket, token: str, fragment: str = "") -> None:
    """Print the address, and answer requests until Ctrl-C."""
    print(address(place.getsockname()[1], token, fragment), flush=True)
    server_of(engine, place, token).run(sockets=[place])


def server_of(engine: Engine, place: socket.socket, token: str) -> "Server":
    """The server, which ``run(sockets=[place])`` starts; requests wait at the socket until then."""
    import uvicorn

    app = application(engine, token, place.getsockname()[1])
    # A log would contain the token.
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, ws="none", lifespan="off"))


def address(port: int, token: str, fragment: str = "") -> str:
    """The address of the page."""
    return f"http://{HOST}:{port}/{token}/{f'#{fragment}' if fragment else ''}"


def application(engine: Engine, token: str, port: int) -> "Starlette":
    """The app: a page, its script and style, and one address that answers requests."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    def refused(request: Request) -> Response | None:
        given = request.path_params["token"].encode()
        origin = request.headers.get("origin")
        if request.headers.get("host") not in hosts or (origin and origin.partition("://")[2] not in hosts):
            return PlainTextResponse("This page is for this machine only.", 403, HEADERS)
        if not secrets.compare_digest(given, token.encode()):
            return PlainTextResponse("The token in the address does not belong to this session.", 403, HEADERS)
        return None

    async def asset(request: Request) -> Response:
        if (no := refused(request)) is not None:
            return no
        name = request.path_params.get("name", "page.html")
        if name not in KINDS:
            return await nothing(request)
        return Response(static(name), media_type=KINDS[name], headers=HEADERS)

    async def ask(request: Request) -> Response:
        if (no := refused(request)) is not None:
            return no
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return PlainTextResponse("Requests must be JSON.", 415, HEADERS)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MOST_BODY:
                return PlainTextResponse("The request is too large.", 413, HEADERS)
        try:
            asked = parse_json(bytes(body))
        except ValueError:
            return PlainTextResponse("The request is not JSON.", 400, HEADERS)
        return JSONResponse(await run_in_threadpool(engine.ask, asked), headers=HEADERS)

    async def nothing(request: Request, error: Exception | None = None) -> Response:
        return PlainTextResponse("There is nothing here: use the address that mech printed.", 403, HEADERS)

    routes = [
        Route("/{token}/ask", ask, methods=["POST"]),
        Route("/{token}/", asset, methods=["GET"]),
        Route("/{token}/{name}", asset, methods=["GET"]),
    ]
    app = Starlette(routes=routes, exception_handlers={404: nothing, 405: nothing})
    app.router.redirect_slashes = False  # it would answer whatever host is named
    return app
