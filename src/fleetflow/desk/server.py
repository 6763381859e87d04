"""The desk's server: starlette routes over sessions and jobs. Who may call them is decided in `Guard`, once.

The page, the API and every file come from this one origin, and the page asks no other. No path comes from the client:
files and jobs have keys that the server made.
"""

import asyncio
import json
import secrets
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from fleetflow.desk.jobs import CANCELLED, DONE, ENDED, Job, Queue, compute, event
from fleetflow.desk.jobs import Request as JobRequest
from fleetflow.desk.sessions import Limits, Session, Sessions, looked_at, receive
from fleetflow.desk.tracks import follow
from fleetflow.inference.files import FORMATS
from fleetflow.models.catalog import rows
from fleetflow.registry import unknown
from fleetflow.types import FleetflowError

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
STATIC = Path(str(resources.files("fleetflow.desk") / "static"))
EXAMPLE = Path(str(resources.files("fleetflow") / "example"))
BODY = 1 << 20  # bytes of a JSON body
POINTS = 256  # that are followed at once
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

        problem = self.problem({name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]})
        if problem:
            answer = JSONResponse({"error": problem}, status_code=403)
            return await answer(scope, receive, send_guarded)
        await self.app(scope, receive, send_guarded)

    def problem(self, headers: dict[str, str]) -> str | None:
        """Returns why a request is refused, or None."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts is not None and host.rpartition(":")[0] not in self.hosts and host not in self.hosts:
            return f"this is not {host}"
        if origin is not None and origin.partition("://")[2] != host:
            return f"pages of {origin} may not use the desk"
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return "another page may not use the desk"
        return None


class Desk:
    """The routes, and what they share: sessions, queue, limits."""

    def __init__(self, folder: Path, limits: Limits, token: str | None):
        self.limits, self.token = limits, token
        self.sessions = Sessions(folder, limits)
        self.queue = Queue(partial(compute, frame_limit=limits.frames, byte_limit=limits.result_mb << 20))
        self.networks = [row for row in rows() if row.weights]

    def routes(self) -> list[Route | Mount]:
        """Returns all routes."""
        session, job = "/sessions/{session}", "/sessions/{session}/jobs/{job}"
        return [
            Route("/", self.page),
            Mount("/static", StaticFiles(directory=STATIC)),
            Route("/sessions", self.begin, methods=["POST"]),
            Route(f"{session}/end", self.end, methods=["POST"]),
            Route(f"{session}/example", self.example),
            Route(f"{session}/files", self.upload, methods=["POST"]),
            Route(f"{session}/jobs", self.start, methods=["POST"]),
            Route(job, self.result, methods=["GET"]),
            Route(job, self.cancel, methods=["DELETE"]),
            Route(f"{job}/events", self.events),
            Route(job + "/frames/{k:int}", self.frame),
            Route(job + "/pairs/{k:int}", self.pair),
            Route(f"{job}/tracks", self.tracks, methods=["POST"]),
            Route(job + "/download/{format}", self.download),
        ]

    async def page(self, request: Request) -> Response:
        """The page itself."""
        return FileResponse(STATIC / "index.html")

    async def begin(self, request: Request) -> Response:
        """A new session: {"token"} -> {"session", "limits", "networks"}."""
        given = str((await _json(request)).get("token", ""))
        if self.token is not None and not secrets.compare_digest(given.encode(), self.token.encode()):
            raise HTTPException(403, "the token is missing or wrong; open the address that `fleetflow desk` printed")
        for idle in self.sessions.end_idle():
            self._cancel_all(idle)
        session = self.sessions.begin()
        limits = {"upload_mb": self.limits.upload_mb, "frames": self.limits.frames}
        networks = [{"name": row.name, "about": f"{row.parameters / 1e6:.1f} M weights"} for row in self.networks]
        networks.sort(key=lambda network: network["name"] != "fastflownet")
        return JSONResponse({"session": session.key, "limits": limits, "networks": networks})

    async def end(self, request: Request) -> Response:
        """The page was closed."""
        session = self._session(request)
        self._cancel_all(session)
        await run_in_threadpool(self.sessions.end, session)
        return Response(status_code=204)

    def _cancel_all(self, session: Session) -> None:
        for job in session.jobs.values():
            self.queue.cancel(job)

    async def example(self, request: Request) -> Response:
        """What the example of the package is."""
        self._session(request)
        with Image.open(EXAMPLE / "frame1.png") as image:
            return JSONResponse({"name": "frame1.png, frame2.png", "width": image.width, "height": image.height})

    async def upload(self, request: Request) -> Response:
        """Receives one file, as the body, while limits are watched: ?name=... -> the file."""
        session, name = self._session(request), request.query_params.get("name", "")[-200:]
        while len(session.files) >= self.limits.files:
            oldest = session.files.pop(next(iter(session.files)))
            oldest.path.unlink(missing_ok=True)
        path = await receive(session, name, request.stream(), self.limits)
        upload = await run_in_threadpool(looked_at, path, name, self.limits)
        key = secrets.token_hex(8)
        session.files[key] = upload
        return JSONResponse(upload.described(key))

    async def start(self, request: Request) -> Response:
        """Queues a job: {"files", "network", "iterations", "size", "occlusion"} -> {"job"}."""
        session, wanted = self._session(request), self._wanted(self._session(request), await _json(request))
        if self.queue.waiting(session.key) >= self.limits.jobs:
            raise FleetflowError(f"{self.limits.jobs} jobs of this page wait already; cancel one, or wait")
        ended = [key for key, job in session.jobs.items() if job.state in ENDED]
        for key in ended[: max(len(ended) - self.limits.kept + 1, 0)]:
            await run_in_threadpool(_remove, session.jobs.pop(key).folder)
        key = secrets.token_hex(8)
        job = Job(wanted, session.folder / key, session.key)
        job.folder.mkdir()
        session.jobs[key] = job
        self.queue.add(job)
        return JSONResponse({"job": key})

    def _wanted(self, session: Session, asked: dict[str, Any]) -> JobRequest:
        """The request that a browser's JSON means; raises FleetflowError for what cannot be."""
        network = asked.get("network")
        if network not in [row.name for row in self.networks]:
            raise unknown("network", str(network), [row.name for row in self.networks])
        files = asked.get("files")
        if files == ["example"]:
            sources = (EXAMPLE / "frame1.png", EXAMPLE / "frame2.png")
            names = tuple(path.name for path in sources)
        else:
            keys = files if isinstance(files, list) else []
            known = all(isinstance(key, str) and key in session.files for key in keys)
            uploads = [session.files[key] for key in keys] if known else []
            kinds = [upload.kind for upload in uploads]
            if kinds not in (["picture", "picture"], ["clip"]):
                raise FleetflowError("expected two pictures or one clip; choose them again")
            sources, names = tuple(upload.path for upload in uploads), tuple(upload.name for upload in uploads)
        iterations, size = asked.get("iterations"), asked.get("size")
        if iterations is not None and (type(iterations) is not int or not 1 <= iterations <= 64):
            raise FleetflowError(f"iterations is {iterations}; expected 1 to 64")
        if size is not None:
            whole = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
            if not whole or min(size) < 16 or size[0] * size[1] > self.limits.pixels:
                raise FleetflowError(f"size is {size}; expected height and width from 16 pixels on")
            size = (size[0], size[1])
        return JobRequest(sources, names, network, iterations, size, asked.get("occlusion") is not False)

    async def result(self, request: Request) -> Response:
        """What a finished job found."""
        return JSONResponse(self._done(request).result())

    async def cancel(self, request: Request) -> Response:
        """Ends a job."""
        self.queue.cancel(self._job(request))
        return Response(status_code=204)

    async def events(self, request: Request) -> Response:
        """The progress of a job as server-sent events, until it has ended."""
        job = self._job(request)

        async def told() -> AsyncIterator[bytes]:
            before = None
            while True:
                facts = job.progress(self.queue.ahead(job))
                if facts != before or facts["state"] in ENDED:
                    yield event(facts)
                before = facts
                if facts["state"] in ENDED:
                    return
                await asyncio.sleep(0.1)

        return StreamingResponse(told(), media_type="text/event-stream")

    async def frame(self, request: Request) -> Response:
        """Frame k as PNG."""
        job, k = self._done(request), request.path_params["k"]
        if not 0 <= k <= job.done:
            raise HTTPException(404, f"there is no frame {k}")
        return Response(await run_in_threadpool(_png, job, k), media_type="image/png")

    async def pair(self, request: Request) -> Response:
        """Pair k as numbers, little-endian: float32 flow [H, W, 2], float32 uncertainty [H, W], uint8 occlusion [H, W]."""
        job, k = self._done(request), self._pair(request, request.path_params["k"])
        return Response(await run_in_threadpool(_numbers, job, k), media_type="application/octet-stream")

    async def tracks(self, request: Request) -> Response:
        """Follows points: {"points": [{"frame", "x", "y"}]} -> {"tracks"}, for each [x, y, visible] of all frames."""
        job, asked = self._done(request), (await _json(request)).get("points")
        points = []
        for point in asked if isinstance(asked, list) else []:
            values: list[Any] = [point.get(name) for name in ("frame", "x", "y")] if isinstance(point, dict) else []
            sides = (job.done + 1, job.size[1], job.size[0])
            if len(values) != 3 or not all(
                type(value) in (int, float) and 0 <= value < side for value, side in zip(values, sides)
            ):
                raise FleetflowError("a point lies outside the clip; expected frame, x and y inside it")
            points.append((int(values[0]), values[1], values[2]))
        if len(points) > POINTS:
            raise FleetflowError(f"{len(points)} points were given; expected at most {POINTS}")
        return JSONResponse({"tracks": await run_in_threadpool(follow, job, points)})

    async def download(self, request: Request) -> Response:
        """One pair in one of the formats of `predict`: ?pair=k."""
        job, kind = self._done(request), request.path_params["format"]
        if kind not in FORMATS:
            raise HTTPException(404, str(unknown("format", kind, sorted(FORMATS))))
        text = request.query_params.get("pair", "0")
        k = self._pair(request, int(text) if text.isdecimal() and len(text) < 9 else -1)
        stem = Path(job.request.names[0]).stem
        if job.done > 1:
            stem += f"_{k:06d}"
        name = FORMATS[kind].format(stem)
        path = job.folder / f"download_{k}_{secrets.token_hex(4)}{Path(name).suffix}"
        try:
            await run_in_threadpool(job.write, kind, k, path)
            content = await run_in_threadpool(path.read_bytes)
        finally:
            path.unlink(missing_ok=True)
        plain = name.encode("ascii", "replace").decode().replace('"', "_").replace("\\", "_")
        headers = {"content-disposition": f'attachment; filename="{plain}"'}
        return Response(content, media_type="application/octet-stream", headers=headers)

    def _session(self, request: Request) -> Session:
        session = self.sessions.get(request.path_params["session"])
        if session is None:
            raise HTTPException(404, "this page is no longer known; reload it")
        return session

    def _job(self, request: Request) -> Job:
        job = self._session(request).jobs.get(request.path_params["job"])
        if job is None:
            raise HTTPException(404, "this job is no longer known")
        return job

    def _done(self, request: Request) -> Job:
        job = self._job(request)
        if job.state != DONE:
            raise HTTPException(409, "the job was cancelled" if job.state == CANCELLED else "the job is not done")
        return job

    def _pair(self, request: Request, k: int) -> int:
        if not 0 <= k < self._done(request).done:
            raise HTTPException(404, f"there is no pair {k}")
        return k


def _png(job: Job, k: int) -> bytes:
    stream = BytesIO()
    Image.fromarray(job.array("frame", k)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _numbers(job: Job, k: int) -> bytes:
    kinds = [kind for kind in ("flow", "uncertainty", "occlusion") if kind == "flow" or kind in job.planes]
    arrays = (job.array(kind, k) for kind in kinds)
    return b"".join(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes() for array in arrays)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


async def _json(request: Request) -> dict[str, Any]:
    """The body as a JSON object; raises FleetflowError for any other and one over BODY bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY:
            raise FleetflowError(f"the request is over {BODY >> 20} MB")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise FleetflowError("the request is no JSON object")
    return value


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


async def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, status_code=error.status_code)


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


def create_app(
    *, hosts: tuple[str, ...] | None = LOOPBACK, token: str | None = None, limits: Limits | None = None
) -> Starlette:
    """Returns the desk as an ASGI application.

    Args:
        hosts: names that the Host header may have, without port; None takes any, which needs a token.
        token: what a page must know to begin a session; None asks for none.
        limits: of uploads, results and jobs.

    Raises:
        FleetflowError: for any host without a token.
    """
    if hosts is None and token is None:
        raise FleetflowError("a desk that others can reach needs a token")
    folder = tempfile.TemporaryDirectory(prefix="fleetflow-desk-", ignore_cleanup_errors=True)
    desk = Desk(Path(folder.name), limits or Limits(), token)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(desk.queue.close)
        folder.cleanup()

    handlers: dict[Any, Any] = {FleetflowError: _refused, HTTPException: _http_error, ClientDisconnect: _left}
    app = Starlette(routes=desk.routes(), lifespan=lifespan, exception_handlers=handlers)
    app.state.desk = desk
    app.add_middleware(Guard, hosts=hosts)
    return app
