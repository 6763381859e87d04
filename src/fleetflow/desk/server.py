"""The desk's server: starlette routes over sessions and jobs. Who may call them is decided in `Guard`, once.

The page, the API and every file come from this one origin, and the page asks no other. No path comes from the client:
files and jobs have keys that the server made.
"""

import asyncio
import json
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import anyio
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from fleetflow.desk.downloads import clip_name, offered, pair_name, write_clip, write_pair
from fleetflow.desk.folder import temporary_folder
from fleetflow.desk.guard import LOOPBACK, Guard
from fleetflow.desk.jobs import CANCELLED, DONE, ENDED, Job, Queue, compute, event
from fleetflow.desk.jobs import Request as JobRequest
from fleetflow.desk.sessions import Limits, Session, Sessions, cleaned, looked_at, receive
from fleetflow.desk.tracks import follow
from fleetflow.evaluation.calls import has_weights
from fleetflow.io.atomic import reason
from fleetflow.models.catalog import row
from fleetflow.registry import models, unknown
from fleetflow.types import FleetflowError

STATIC = Path(str(resources.files("fleetflow.desk") / "static"))
EXAMPLE = Path(str(resources.files("fleetflow") / "example"))
BODY = 1 << 20  # bytes of a JSON body
POINTS = 256  # that are followed at once
CHUNK = 1 << 20  # bytes that are sent at once
AT_ONCE = 4  # pictures and results that are held in memory at once, however many pages ask
LONGEST = 300  # characters of what was wrong
Result = TypeVar("Result")


class Desk:
    """The routes, and what they share: sessions, queue, limits."""

    def __init__(self, folder: Path, limits: Limits, token: str | None):
        self.folder, self.limits, self.token = folder, limits, token
        self.sessions = Sessions(folder, limits)
        self.queue = Queue(self._compute)
        self.networks = [row(name) for name in models if has_weights(name)]
        self._at_once = anyio.CapacityLimiter(AT_ONCE)

    def _compute(self, job: Job) -> None:
        try:
            compute(job, self.limits.frames, self.limits.result_mb << 20)
        finally:
            self.sessions.clear_up(job)

    async def _run(self, function: Callable[..., Result], *values: Any) -> Result:
        """Runs what takes memory in a thread, only a few at once."""
        return await anyio.to_thread.run_sync(function, *values, limiter=self._at_once)

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
            Route(job + "/frames/{k}", self.frame),
            Route(job + "/pairs/{k}", self.pair),
            Route(f"{job}/tracks", self.tracks, methods=["POST"]),
            Route(job + "/download/{format}", self.download),
            Route(job + "/clip/{format}", self.clip),
        ]

    async def page(self, request: Request) -> Response:
        """The page itself."""
        return FileResponse(STATIC / "index.html")

    async def begin(self, request: Request) -> Response:
        """A new session: {"token"} -> {"session", "limits", "networks"}."""
        given = str((await _json(request)).get("token", ""))
        if self.token is not None and not secrets.compare_digest(given.encode("utf-8", "replace"), self.token.encode()):
            raise HTTPException(403, "the token is missing or wrong; open the address that `fleetflow desk` printed")
        for idle in self.sessions.end_idle():
            self._cancel_all(idle)
        session = self.sessions.begin()
        limits = {"upload_mb": self.limits.upload_mb, "frames": self.limits.frames, "pixels": self.limits.pixels}
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
        session, name = self._session(request), cleaned(request.query_params.get("name", ""))
        path = await receive(session, name, request.stream(), self.limits)
        try:
            upload = await self._run(looked_at, path, name, self.limits)
        finally:
            del session.arriving[path]
        key = secrets.token_hex(8)
        session.files[key] = upload
        return JSONResponse(upload.described(key))

    async def start(self, request: Request) -> Response:
        """Queues a job: {"files", "network", "iterations", "size", "occlusion"} -> {"job"}."""
        asked = await _json(request)
        session = self._session(request)
        wanted = self._wanted(session, asked)
        if self.queue.waiting(session.key) >= self.limits.jobs:
            raise FleetflowError(f"{self.limits.jobs} jobs of this page wait already; cancel one, or wait")
        for key, job in list(session.jobs.items()):
            if job.state in ENDED and job.state != DONE:
                del session.jobs[key]
        done = [key for key, job in session.jobs.items() if job.state == DONE]
        old = [session.jobs.pop(key) for key in done[: max(len(done) - self.limits.kept + 1, 0)]]
        key = secrets.token_hex(8)
        job = Job(wanted, session.folder / key, session.key)
        job.folder.mkdir()
        session.jobs[key] = job
        self.queue.add(job)
        for job in old:  # only now: another request may come in between
            await run_in_threadpool(_remove, job.folder)
        return JSONResponse({"job": key})

    def _wanted(self, session: Session, asked: dict[str, Any]) -> JobRequest:
        """The request that a browser's JSON means; raises FleetflowError for what cannot be."""
        network = asked.get("network")
        if network not in [row.name for row in self.networks]:
            raise unknown("network", str(network), [row.name for row in self.networks])
        files = asked.get("files")
        if files == ["example"]:
            sources = (EXAMPLE / "frame1.png", EXAMPLE / "frame2.png")
            names = tuple(str(path) for path in sources)  # so that the command line finds them
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
        occlusion = asked.get("occlusion") is not False
        return JobRequest(sources, names, network, iterations, size, occlusion, self.limits.memory)

    async def result(self, request: Request) -> Response:
        """What a finished job found."""
        job = self._done(request)
        kinds = offered(job)
        clip = [{"format": kind, "name": clip_name(job, kind)} for kind in kinds if job.is_clip]
        formats = [{"format": kind, "name": pair_name(job, kind, 0)} for kind in kinds]
        return JSONResponse({**job.result(), "formats": formats, "clip": clip})

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
        job = self._done(request)
        k = _number(request.path_params["k"], "frame", job.done + 1)
        return Response(await self._run(_png, job, k), media_type="image/png")

    async def pair(self, request: Request) -> Response:
        """Pair k as numbers, little-endian: float32 flow [H, W, 2], float32 uncertainty [H, W], uint8 occlusion [H, W]."""
        job = self._done(request)
        k = _number(request.path_params["k"], "pair", job.done)
        kinds = [kind for kind in ("flow", "uncertainty", "occlusion") if kind == "flow" or kind in job.planes]
        arrays = [job.array(kind, k, mapped=True) for kind in kinds]
        size = {"content-length": str(sum(array.nbytes for array in arrays))}
        return StreamingResponse(_numbers(arrays), media_type="application/octet-stream", headers=size)

    async def tracks(self, request: Request) -> Response:
        """Follows points: {"points": [{"frame", "x", "y"}]} -> {"tracks"}, for each [x, y, visible] of all frames."""
        job, asked = self._done(request), (await _json(request)).get("points")
        points = []
        for point in asked if isinstance(asked, list) else []:
            values: list[Any] = [point.get(name) for name in ("frame", "x", "y")] if isinstance(point, dict) else []
            sides = (job.done + 1, job.size[1], job.size[0])
            whole = len(values) == 3 and type(values[0]) is int
            if not whole or not all(
                type(value) in (int, float) and 0 <= value < side for value, side in zip(values, sides)
            ):
                raise FleetflowError("a point lies outside the clip; expected frame, x and y inside it")
            points.append((values[0], values[1], values[2]))
        if len(points) > POINTS:
            raise FleetflowError(f"{len(points)} points were given; expected at most {POINTS}")
        return JSONResponse({"tracks": await self._run(follow, job, points)})

    async def download(self, request: Request) -> Response:
        """One pair in one of the formats of `predict`: ?pair=k."""
        job = self._done(request)
        kind = _format(request, job)
        k = _number(request.query_params.get("pair", "0"), "pair", job.done)
        return await self._sent(pair_name(job, kind, k), write_pair, job, kind, k)

    async def clip(self, request: Request) -> Response:
        """All pairs in one of the formats of `predict`: an mp4, or a zip of numbered files."""
        job = self._done(request)
        kind = _format(request, job)
        if not job.is_clip:
            raise HTTPException(404, "two pictures are no clip; download the pair")
        return await self._sent(clip_name(job, kind), write_clip, job, kind)

    async def _sent(self, name: str, write: Callable[..., None], *values: Any) -> Response:
        """A file of that name, which `write(*values, path)` has written; it is on the disk until it is sent."""

        def written() -> Any:
            with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
                path = Path(folder) / f"result{Path(name).suffix}"
                write(*values, path)
                file = open(path, "rb")  # outlives its name
            return file, file.seek(0, 2)

        def content() -> Iterator[bytes]:
            with file:
                file.seek(0)
                while chunk := file.read(CHUNK):
                    yield chunk

        file, size = await self._run(written)
        headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}
        headers["content-length"] = str(size)
        return StreamingResponse(content(), media_type="application/octet-stream", headers=headers)

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


def _format(request: Request, job: Job) -> str:
    kind, kinds = request.path_params["format"], offered(job)
    if kind not in kinds:
        raise HTTPException(404, str(unknown("format", kind, sorted(kinds))))
    return kind


def _number(text: str, what: str, count: int) -> int:
    """The number that a text says, from 0 up to `count`, which is left out; else there is nothing of that name."""
    k = int(text) if text.isdecimal() and len(text) < 9 else count
    if k >= count:
        raise HTTPException(404, f"there is no {what} {text[:20]}")
    return k


def _png(job: Job, k: int) -> bytes:
    stream = BytesIO()
    Image.fromarray(job.array("frame", k)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _numbers(arrays: list[Any]) -> Iterator[bytes]:
    for array in arrays:
        content = memoryview(array.astype(array.dtype.newbyteorder("<"), copy=False)).cast("B")
        for start in range(0, len(content), CHUNK):
            yield bytes(content[start : start + CHUNK])


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
    return JSONResponse({"error": _line(str(error))}, status_code=400)


async def _gone(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "this is no longer there; reload the page"}, status_code=404)


async def _full(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"temporary files cannot be written ({reason(error)})"}, status_code=507)


def _line(text: str) -> str:
    """A text as one line that is not endless and can be encoded."""
    return " ".join(text[:LONGEST].encode("utf-8", "replace").decode().split())


async def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": _line(error.detail)}, status_code=error.status_code)


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
    held = ExitStack()
    desk = Desk(held.enter_context(temporary_folder()), limits or Limits(), token)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(desk.queue.close)
        held.close()

    handlers: dict[Any, Any] = {FleetflowError: _refused, HTTPException: _http_error, ClientDisconnect: _left}
    handlers |= {FileNotFoundError: _gone, OSError: _full}
    app = Starlette(routes=desk.routes(), lifespan=lifespan, exception_handlers=handlers)
    app.state.desk = desk
    app.add_middleware(Guard, hosts=hosts)
    return app
