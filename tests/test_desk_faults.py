"""The desk where something goes wrong: tabs that close, disks that are full, strange names, requests that make no sense."""
# ruff: noqa: F811  (fixtures of test_desk)

import errno
import io as streams
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from urllib.request import Request as Asked
from urllib.request import urlopen

import av
import numpy as np
import pytest
import torch
from conftest import hear_signals
from PIL import Image

import fleetflow
from fleetflow.inference import files
from fleetflow.inference.files import predict_video
from fleetflow.io.atomic import lock_folder
from fleetflow.io.video import VideoReader, VideoWriter

pytest.importorskip("starlette")
pytest.importorskip("httpx2")
from starlette.testclient import TestClient  # noqa: E402
from test_desk import HERE, begin, client, clip, png, session, start, wait  # noqa: E402, F401

from fleetflow.desk import downloads, jobs, server  # noqa: E402
from fleetflow.desk.folder import PREFIX, remove_killed  # noqa: E402
from fleetflow.desk.jobs import FAILED, Job, Queue, Request  # noqa: E402
from fleetflow.desk.server import create_app  # noqa: E402
from fleetflow.desk.sessions import Limits, cleaned  # noqa: E402


def until(true, patience: float = 60) -> None:
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def upload(client: TestClient, session: str, name: str, content: bytes) -> dict:
    answer = client.post(f"{session}/files", params={"name": name}, content=content)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_tab_that_closes_ends_its_job_and_others_go_on(client, clip, monkeypatch):
    """The running job finds its folder gone; the next job runs all the same, and nothing is left on the disk."""
    at_work, gone = threading.Event(), threading.Event()

    def take(*values, whole=jobs._take):
        if not at_work.is_set():
            at_work.set()
            gone.wait(60)
        return whole(*values)

    monkeypatch.setattr(jobs, "_take", take)
    closing, other = begin(client), begin(client)
    start(client, closing, files=[upload(client, closing, "a.mp4", clip)["id"]])
    assert at_work.wait(60)
    folder = client.app.state.desk.sessions.get(closing.rpartition("/")[2]).folder
    assert client.post(f"{closing}/end").status_code == 204
    gone.set()
    assert wait(client, start(client, other))["state"] == "done"
    assert not folder.exists()


def test_a_bug_in_one_job_does_not_stop_the_queue(tmp_path, capsys):
    ran = []

    def run(job: Job) -> None:
        ran.append(job)
        if len(ran) == 1:
            raise ZeroDivisionError("a bug")

    queue = Queue(run)
    for _ in range(2):
        queue.add(Job(Request((), ("a",), "fastflownet"), tmp_path, "a"))
    until(lambda: len(ran) == 2)
    queue.close()
    assert "ZeroDivisionError" in capsys.readouterr().err, "our own bug shows no traceback"


def test_a_full_disk_is_said_in_a_line(client, session, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(jobs.np, "save", full)
        path = start(client, session)
        end = wait(client, path)
        assert end["state"] == FAILED and "No space left" in end["problem"] and "our fault" not in end["problem"]
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        answer = client.post(f"{session}/files?name=a.png", content=png())
    assert answer.status_code == 400 and "No space left" in answer.json()["error"]
    assert wait(client, start(client, session))["state"] == "done"


def test_a_clip_ends_where_the_disk_does(client, session, clip, monkeypatch):
    frame = 96 * 160 * 24  # bytes: 3 of the picture, 21 of what is found
    monkeypatch.setattr(jobs.shutil, "disk_usage", lambda _: type("", (), {"free": 2 * frame * 3}))
    path = start(client, session, files=[upload(client, session, "a.mp4", clip)["id"]])
    assert wait(client, path)["state"] == "done"
    result = client.get(path).json()
    assert result["pairs"] == 2 and "only the first 3 frames" in result["problem"]
    assert "--frames :3" in result["command"]


def test_a_session_holds_only_what_its_limits_say(clip):
    """Also by uploads at the same time; what a job needs stays."""
    limits = Limits(files=3, session_mb=1)
    with TestClient(create_app(limits=limits), base_url=HERE) as client:
        session = begin(client)
        small = [upload(client, session, f"{k}.png", png(seed=k))["id"] for k in range(2)]
        for k in range(4):
            upload(client, session, f"large{k}.png", png(400, 300, k))  # 360 kB each: noise
        folder = client.app.state.desk.sessions.get(session.rpartition("/")[2]).folder
        kept = list(folder.iterdir())
        assert 1 <= len(kept) <= 3 and sum(path.stat().st_size for path in kept) <= 1 << 20
        assert client.post(f"{session}/jobs", json={"files": small, "network": "fastflownet"}).status_code == 400


def test_who_is_idle_makes_room():
    limits = Limits(sessions=2, crowded_seconds=0)
    with TestClient(create_app(limits=limits), base_url=HERE) as client:
        first = begin(client)
        for _ in range(50):
            last = begin(client)
        sessions = client.app.state.desk.sessions
        assert len(list(sessions.folder.iterdir())) == 2
        assert client.get(f"{first}/example").status_code == 404
        assert client.get(f"{last}/example").status_code == 200


NAMES = [
    'a b\'s "c" $(touch x) `d`; e.png',
    "<img src=x onerror=alert(1)>.png",
    "line\nbreak\r\nset-cookie: a=b.png",
    "100% {} {0} %s.png",
    "-o.png",
    "Bild \u00e4\u00f6 \u65e5\u672c \U0001f600.png",
    "C:\\temp\\x.png",
    "../../etc/x.png",
    "evil\u202egnp.exe.png",
]


@pytest.mark.parametrize("name", NAMES)
def test_strange_names_are_text_everywhere(client, session, name):
    import shlex
    from urllib.parse import unquote

    keys = [upload(client, session, text, png(seed=k))["id"] for k, text in enumerate((name, "second.png"))]
    path = start(client, session, files=keys, occlusion=False)
    assert wait(client, path)["state"] == "done"
    words = shlex.split(client.get(path).json()["command"])
    known = cleaned(name)
    assert words[2:4] == [f"./{known}" if known.startswith("-") else known, "second.png"]
    header = client.get(f"{path}/download/flo").headers["content-disposition"]
    assert header.isascii() and header.isprintable() and '"' not in header
    assert unquote(header.partition("''")[2]) == f"{Path(known).stem}.flo"
    assert "/" not in known and "\\" not in known and "\n" not in known and "\u202e" not in known


@pytest.mark.parametrize(
    ("mode", "width", "height"),
    [("RGB", 1, 1), ("L", 40, 30), ("RGBA", 40, 30), ("I;16", 40, 30), ("P", 17, 400), ("RGB", 3000, 40)],
)
def test_pictures_of_all_kinds(client, session, mode, width, height):
    keys = []
    for k in range(2):
        stream = streams.BytesIO()
        Image.new(mode, (width, height), 40 + k if mode in ("L", "P", "I;16") else None).save(stream, "PNG")
        keys.append(upload(client, session, f"{k}.png", stream.getvalue())["id"])
    path = start(client, session, files=keys)
    assert wait(client, path)["state"] == "done"
    result = client.get(path).json()
    assert (result["width"], result["height"]) == (width, height)
    content = client.get(f"{path}/pairs/0").content
    assert len(content) == width * height * 13
    assert np.isfinite(np.frombuffer(content, "<f4", 3 * width * height)).all()


def test_gifs_and_clips_of_one_frame(client, session, tmp_path):
    def gif(count: int) -> bytes:
        stream = streams.BytesIO()
        frames = [Image.new("RGB", (48, 32), (60 * k, 90, 20)) for k in range(count)]
        frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=100)
        return stream.getvalue()

    assert upload(client, session, "a.gif", gif(3))["kind"] == "clip"
    stills = [upload(client, session, "a.gif", gif(1)) for _ in range(2)]
    assert [still["kind"] for still in stills] == ["picture", "picture"]
    path = start(client, session, files=[still["id"] for still in stills])
    assert wait(client, path)["state"] == "done"
    with VideoWriter(tmp_path / "one.mp4", 10) as writer:
        writer.write(np.zeros((32, 48, 3), np.uint8))
    answer = client.post(f"{session}/files?name=one.mp4", content=(tmp_path / "one.mp4").read_bytes())
    assert answer.status_code == 400 and answer.json()["error"] == "one.mp4 has one frame only; a flow needs two"


def test_a_picture_of_too_many_pixels_is_not_decoded(client, session, monkeypatch):
    stream = streams.BytesIO()
    Image.new("1", (8192, 2049)).save(stream, "PNG")
    monkeypatch.setattr("fleetflow.desk.sessions.read_image", None)
    answer = client.post(f"{session}/files?name=large.png", content=stream.getvalue())
    assert answer.status_code == 400 and "8192x2049" in answer.json()["error"]


def same_film(content: bytes, expected: Path) -> None:
    """Frames and times: now and then the encoder writes other bytes for the same frames."""
    path = expected.with_name("found.mp4")
    path.write_bytes(content)
    found, wanted = list(VideoReader(path)), list(VideoReader(expected))
    assert [frame.time for frame in found] == [frame.time for frame in wanted]
    for one, other in zip(found, wanted):
        assert np.abs(one.astype(int) - other).mean() < 1


def test_whole_clips_are_what_predict_writes(client, session, clip, tmp_path, monkeypatch):
    """In parts of two pairs, each of which begins with a key frame of its own."""
    for module in (files, downloads):
        monkeypatch.setattr(module, "PART_FRAMES", 2)
    (tmp_path / "pattern.mp4").write_bytes(clip)
    key = upload(client, session, "pattern.mp4", clip)["id"]
    path = start(client, session, files=[key], occlusion=False)
    wait(client, path)
    scale = client.get(path).json()["scale"]
    predictor = fleetflow.Predictor("fastflownet")
    predict_video(predictor, tmp_path / "pattern.mp4", tmp_path / "out", ["flo", "color"], scale=scale)
    answer = client.get(f"{path}/clip/flo")
    assert answer.headers["content-disposition"].endswith("pattern_flo.zip")
    with zipfile.ZipFile(streams.BytesIO(answer.content)) as archive:
        assert archive.namelist() == [f"pattern_{k:06d}.flo" for k in range(4)]
        for name in archive.namelist():
            assert archive.read(name) == (tmp_path / "out" / name).read_bytes(), name
    answer = client.get(f"{path}/clip/color")
    assert answer.headers["content-disposition"].endswith("pattern_color.mp4")
    same_film(answer.content, tmp_path / "out/pattern_color.mp4")
    assert client.get(f"{path}/clip/exe").status_code == 404
    pair = start(client, session)
    wait(client, pair)
    assert client.get(f"{pair}/clip/flo").status_code == 404


def test_the_command_line_of_a_clip_writes_its_downloads(client, session, tmp_path):
    """Run in a shell; three fast pairs of thirteen, of which `predict` alone would look at two."""
    texture = np.random.default_rng(0).integers(0, 256, (8, 40, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    places = np.cumsum([0, *(9 if k in (5, 6, 7) else 1 for k in range(13))])
    with VideoWriter(tmp_path / "it's one.mp4", 10) as writer:
        for place in places:
            writer.write(texture[:, place : place + 96])
    key = upload(client, session, "it's one.mp4", (tmp_path / "it's one.mp4").read_bytes())["id"]
    path = start(client, session, files=[key])
    wait(client, path)
    result = client.get(path).json()
    entries = [entry for entry in result["clip"] if entry["format"] not in ("side", "arrows", "streamlines")]
    kinds = [entry["format"] for entry in entries]
    command = f"{sys.executable} -m {result['command']} {' '.join(kinds)} --threads {torch.get_num_threads()}"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    written = tmp_path / "flow_fastflownet"
    for entry in entries:
        content = client.get(f"{path}/clip/{entry['format']}").content
        if entry["name"].endswith(".mp4"):
            same_film(content, written / entry["name"])
            continue
        with zipfile.ZipFile(streams.BytesIO(content)) as archive:
            assert len(archive.namelist()) == 13
            for name in archive.namelist():
                assert archive.read(name) == (written / name).read_bytes(), name


def test_a_session_that_asks_many_times_at_once_is_held_to_its_limits(monkeypatch):
    """While results of former jobs are being removed, which takes a while."""
    limits = Limits(kept=1, jobs=3)
    with TestClient(create_app(limits=limits), base_url=HERE) as client:
        desk = client.app.state.desk
        monkeypatch.setattr(desk.queue, "_run", lambda job: job.end("done"))
        session = begin(client)
        for _ in range(4):
            wait(client, start(client, session))
        at_work, gate = threading.Event(), threading.Event()
        monkeypatch.setattr(desk.queue, "_run", lambda job: (at_work.set(), gate.wait(60)))
        start(client, session)  # runs; the others wait
        assert at_work.wait(60)
        monkeypatch.setattr(server, "_remove", lambda folder: time.sleep(0.2))
        kept = desk.sessions.get(session.rpartition("/")[2])
        for k in range(3):
            kept.jobs[str(k)] = Job(Request((), ("a",), "fastflownet"), kept.folder / "none", kept.key, state="done")
        answers: list[int] = []

        def ask() -> None:
            asked = {"files": ["example"], "network": "fastflownet"}
            answers.append(client.post(f"{session}/jobs", json=asked).status_code)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gate.set()
        assert sorted(answers) == [200] * 3 + [400] * 5


def test_two_frames_of_one_name_are_not_one_file_in_the_command():
    request = Request((), ("a.png", "a.png"), "fastflownet")
    assert request.command().startswith("fleetflow predict FOLDER1/a.png FOLDER2/a.png -m")


ODD = [
    '{"network": "\\ud800", "files": ["example"]}',
    '{"network": "fastflownet", "files": ["\\udfff"]}',
    '{"network": "fastflownet", "files": ["example"], "iterations": NaN}',
    '{"network": "fastflownet", "files": ["example"], "iterations": "\\ud800"}',
    '{"network": "fastflownet", "files": ["example"], "size": [Infinity, 64]}',
    '{"network": "fastflownet", "files": ["example"], "size": [' + "9" * 5000 + ", 64]}",
    '{"network": "' + "x" * 500_000 + '", "files": ["example"]}',
    "[" * 100_000,
    '{"points": [{"frame": NaN, "x": NaN, "y": 1e999}]}',
    '{"points": [{"frame": 0.5, "x": 1, "y": 1}]}',
    '{"points": ' + json.dumps([{"frame": 0, "x": 1, "y": 1}] * 300) + "}",
]


def test_odd_requests_are_refused_in_a_line(client, session):
    path = start(client, session)
    wait(client, path)
    for body in ODD:
        for place in (f"{session}/jobs", f"{path}/tracks"):
            answer = client.post(place, content=body)
            if not (place.endswith("tracks") and "points" not in body):  # no points are no error
                assert answer.status_code == 400, (place, body[:80], answer.text)
                assert len(answer.json()["error"]) < 400 and "\n" not in answer.json()["error"]
    for number in ("-1", "1", "9" * 5000, "0x0", "\u0663", "nan", "%00"):
        assert client.get(f"{path}/pairs/{number}").status_code == 404, number
        assert client.get(f"{path}/download/flo", params={"pair": number}).status_code == 404, number
    for place in ("/static/%00", "/static/" + "x" * 5000, "/static/..%2f..%2fetc/passwd", "/sessions/%ff/example"):
        assert client.get(place).status_code in (400, 404, 405), place
    with TestClient(create_app(hosts=None, token="secret"), base_url="http://box:7860") as other:
        for body in ('{"token": "\\ud800"}', '{"token": null}', '{"token": ["secret"]}'):
            assert other.post("/sessions", content=body).status_code == 403


def test_nothing_that_is_asked_makes_the_server_fail(client, clip):
    """Three seconds of requests put together by chance, from a fixed seed: none is answered by 500 or more."""
    random = np.random.default_rng(1)
    session = begin(client)
    key = upload(client, session, "a.mp4", clip)["id"]
    path = start(client, session, files=[key])
    wait(client, path)
    known = [session.rpartition("/")[2], path.rpartition("/")[2], key]
    words = ["sessions", "jobs", "files", "events", "frames", "pairs", "tracks", "download", "clip", "example"]
    words += ["flo", "color", "0", "3", "4", "-1", "x", "%00", "..", "\u65e5", "static", "desk.js", "*", "%ff"]
    bodies = [*ODD, "{}", "", "\0", json.dumps({"files": [key], "network": "fastflownet", "size": [16, 16]})]
    statuses: dict[int, int] = {}
    for _ in range(300):
        parts = [session if random.random() < 0.3 else path] if random.random() < 0.8 else []
        parts += [str(random.choice([*words, *known])) for _ in range(random.integers(0, 4))]
        method = str(random.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]))
        if method == "DELETE" and random.random() < 0.9 or "events" in parts:
            continue
        answer = client.request(method, "/".join(parts), content=str(random.choice(bodies)).encode("utf-8", "replace"))
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, (method, parts, answer.text)
        assert "content-security-policy" in answer.headers
    assert {200, 400, 404, 405} <= set(statuses), statuses


def test_only_folders_of_killed_desks_are_removed(tmp_path):
    killed, living, young, link = (tmp_path / f"{PREFIX}{name}" for name in ("killed", "living", "young", "link"))
    other = tmp_path / "fleetflow-else"
    for folder in (killed, living, young, other):
        folder.mkdir()
        (folder / "a.png").touch()
    for folder in (killed, living, other):
        os.utime(folder, (0, 0))
    link.symlink_to(other)
    with lock_folder(living, "fleetflow desk"):
        assert remove_killed(tmp_path) == [killed]
    assert not killed.exists() and all((folder / "a.png").exists() for folder in (living, young, other))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_terminal_that_closes_ends_it_and_nothing_is_left(tmp_path):
    pytest.importorskip("uvicorn")
    command = [sys.executable, "-m", "fleetflow", "desk", "--port", "0", "--threads", "1"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ways = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **ways, preexec_fn=hear_signals) as desk:
        try:
            address = desk.stdout.readline().split()[2]
            key = json.load(urlopen(Asked(f"{address}sessions", b"{}")))["session"]
            urlopen(Asked(f"{address}sessions/{key}/files?name=a.png", png())).read()
            assert len(list(tmp_path.glob(f"{PREFIX}*/content/*/*.png"))) == 1
            desk.send_signal(signal.SIGHUP)
            errors = desk.communicate(timeout=60)[1]
        finally:
            desk.kill()
    assert not list(tmp_path.glob(f"{PREFIX}*")) and not errors, errors


def test_an_upload_that_stops_in_the_middle_leaves_nothing(tmp_path):
    """Over a real connection, which the client drops."""
    import socket

    uvicorn = pytest.importorskip("uvicorn")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        app = create_app()
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        address = listening.getsockname()
        key = json.load(urlopen(Asked(f"http://127.0.0.1:{address[1]}/sessions", b"{}")))["session"]
        folder = app.state.desk.sessions.get(key).folder
        head = f"POST /sessions/{key}/files?name=a.png HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 1000000\r\n\r\n"
        with socket.create_connection(address) as sending:
            sending.sendall(head.encode() + bytes(200_000))
            until(lambda: list(folder.iterdir()))
        until(lambda: not list(folder.iterdir()))
        assert not app.state.desk.sessions.get(key).arriving
        running.should_exit = True
        thread.join(20)
    assert not folder.exists()


def test_a_clip_of_a_telephone_is_upright(client, session, clip):
    """The film is stored lying; its display matrix says that it was taken upright."""
    content = bytearray(clip)
    place = content.index(b"tkhd") + 44  # ISO 14496-12, 8.3.2
    content[place : place + 24] = struct.pack(">6i", 0, 65536, 0, -65536, 0, 0)
    sent = upload(client, session, "turned.mp4", bytes(content))
    assert (sent["width"], sent["height"]) == (96, 160)
    path = start(client, session, files=[sent["id"]], occlusion=False)
    wait(client, path)
    flow = np.frombuffer(client.get(f"{path}/pairs/1").content, "<f4").reshape(160, 96, 2)
    np.testing.assert_allclose(np.median(flow, (0, 1)), (0, 3), atol=0.3)  # what went to the right goes down
    film = streams.BytesIO(client.get(f"{path}/clip/color").content)
    with av.open(film) as opened:
        assert (opened.streams.video[0].width, opened.streams.video[0].height) == (96, 160)


def test_a_limit_of_memory_holds_and_is_in_the_command(tmp_path):
    with TestClient(create_app(limits=Limits(memory=100 << 20)), base_url=HERE) as client:
        end = wait(client, start(client, begin(client)))
    assert end["state"] == FAILED and "too small for this network" in end["problem"] and "\n" not in end["problem"]
    assert "--memory 64G" in Request((), ("a.mp4",), "fastflownet", memory=64 << 30).command()
