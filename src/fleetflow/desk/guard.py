"""Who may call the desk: one check before all routes, and the headers that every answer gets."""

from starlette.responses import JSONResponse

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SECURITY = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Lets through only what the page itself asks: the right Host, no foreign Origin; adds the security headers.

    A page of another site cannot read answers (no CORS headers are sent), cannot send anything (its Origin differs),
    and cannot pose as this host by a DNS entry of its own (its Host differs).
    """

    def __init__(self, app, hosts: tuple[str, ...] | None):
        self.app, self.hosts = app, hosts  # None: any host, where a token is asked for

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_guarded(message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in SECURITY.items()]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        problem = self.problem(headers, opens_page=scope["path"] == "/" and scope["method"] in ("GET", "HEAD"))
        if problem:
            answer = JSONResponse({"error": problem}, status_code=403)
            return await answer(scope, receive, send_guarded)
        await self.app(scope, receive, send_guarded)

    def problem(self, headers: dict[str, str], opens_page: bool) -> str | None:
        """Returns why a request is refused, or None. opens_page: it asks for the page, which a link elsewhere may do."""
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if self.hosts is not None and host.rpartition(":")[0] not in self.hosts and host not in self.hosts:
            return f"this is not {host}"
        if origin is not None and origin.partition("://")[2] != host:
            return f"pages of {origin} may not use the desk"
        follows_link = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") and not (
            opens_page and follows_link
        ):
            return "another page may not use the desk"
        return None
