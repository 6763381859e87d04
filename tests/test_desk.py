"""The desk's server: jobs, results, limits, and who may call it. The page itself is tested in test_desk_browser.py."""

import io as streams
import json
import tempfile
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from conftest import SLOW
from PIL import Image
from test_io_fuzz import damaged

import fleetflow
from fleetflow.inference.files import predict_pair
from fleetflow.inference.results import known_formats
from fleetflow.io.video import VideoWriter
from fleetflow.types import FleetflowError

starlette = pytest.importorskip("starlette")
pytest.importorskip("httpx2")
from starlette.testclient import TestClient  # noqa: E402

from fleetflow.desk.jobs import CANCELLED, Job, Queue, Request  # noqa: E402
from fleetflow.desk.server import EXAMPLE, create_app  # noqa: E402
from fleetflow.desk.sessions import Limits  # noqa: E402

HERE = "http://127.0.0.1:7860"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(), base_url=HERE) as client:
        yield client


@pytest.fixture
def session(client) -> str:
    return begin(client)


def begin(client: TestClient) -> str:
    return f"/sessions/{client.post('/sessions', json={}).json()['session']}"


def wait(client: TestClient, path: str) -> dict:
    """The last event of a job."""
    lines = client.get(f"{path}/events").text.splitlines()
    return json.loads([line for line in lines if line][-1].removeprefix("data: "))


def start(client: TestClient, session: str, **asked) -> str:
    answer = client.post(f"{session}/jobs", json={"files": ["example"], "network": "fastflownet", **asked})
    assert answer.status_code == 200, answer.text
    return f"{session}/jobs/{answer.json()['job']}"


def png(width: int = 64, height: int = 48, seed: int = 0) -> bytes:
    stream = streams.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


def test_a_pair_has_the_flow_of_the_predictor(client, session, tmp_path):
    path = start(client, session)
    assert wait(client, path)["state"] == "done"
    result = client.get(path).json()
    flow = fleetflow.Predictor("fastflownet")(EXAMPLE / "frame1.png", EXAMPLE / "frame2.png")
    content = client.get(f"{path}/pairs/0").content
    count = result["height"] * result["width"]
    assert len(content) == count * (8 + 4 * result["uncertainty"] + result["occlusion"])
    found = np.frombuffer(content, "<f4", 2 * count).reshape(flow.shape)
    np.testing.assert_allclose(found, flow, atol=1e-3)
    assert result["motion"] == pytest.approx([float(np.linalg.norm(flow, axis=-1).mean())], abs=1e-3)
    frame = client.get(f"{path}/frames/1").content
    (tmp_path / "frame.png").write_bytes(frame)
    np.testing.assert_array_equal(
        fleetflow.read_image(tmp_path / "frame.png"), fleetflow.read_image(EXAMPLE / "frame2.png")
    )


def test_downloads_are_the_bytes_that_predict_writes(client, session, tmp_path):
    path = start(client, session)
    wait(client, path)
    kinds = [entry["format"] for entry in client.get(path).json()["formats"]]
    assert {"flo", "kitti", "color", "backward", "occlusion", "uncertainty"} <= set(known_formats(kinds, None))
    frames = [EXAMPLE / f"frame{k}.png" for k in (1, 2)]
    written = predict_pair(fleetflow.Predictor("fastflownet"), *frames, tmp_path, kinds)
    for file, kind in zip(written, kinds, strict=True):
        answer = client.get(f"{path}/download/{kind}")
        assert answer.status_code == 200 and answer.content == file.read_bytes(), kind
    other = start(client, session, occlusion=False)
    wait(client, other)
    assert client.get(f"{other}/download/flo").status_code == 200
    assert client.get(f"{other}/download/backward").status_code == 404
    assert client.get(f"{path}/download/exe").status_code == 404
    assert client.get(f"{path}/download/flo?pair=1").status_code == 404


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> bytes:
    """Five frames of a pattern that moves by 3 pixels to the right from frame to frame."""
    path = tmp_path_factory.mktemp("clip") / "pattern.mp4"
    y, x = np.mgrid[:96, :160]
    with VideoWriter(path, 10) as writer:
        for k in range(5):
            waves = np.sin((x - 3 * k) / 5) * np.sin(y / 6) + np.sin((x - 3 * k + 2 * y) / 9)
            writer.write(np.repeat((128 + 60 * waves)[..., None], 3, -1).astype(np.uint8))
    return path.read_bytes()


def test_a_clip_has_times_motion_and_tracks(client, session, clip):
    upload = client.post(f"{session}/files?name=pattern.mp4", content=clip).json()
    assert (upload["kind"], upload["width"], upload["height"]) == ("clip", 160, 96)
    path = start(client, session, files=[upload["id"]])
    assert wait(client, path)["state"] == "done"
    result = client.get(path).json()
    assert result["pairs"] == 4 and len(result["motion"]) == 4
    np.testing.assert_allclose(np.diff(result["times"]), 0.1, atol=1e-3)
    points = [{"frame": 1, "x": 60, "y": 40}, {"frame": 0, "x": 80.5, "y": 50}]
    tracks = np.array(client.post(f"{path}/tracks", json={"points": points}).json()["tracks"])
    assert tracks.shape == (2, 5, 3)
    assert tracks[0, 0, 2] == 0 and tracks[:, 1:, 2].all()
    np.testing.assert_allclose(tracks[0, :, 0], [60, 60, 63, 66, 69], atol=1.0)
    np.testing.assert_allclose(tracks[1, :, 0], 80.5 + 3 * np.arange(5), atol=1.0)
    assert "pattern.mp4" in result["command"]
    bad = client.post(f"{path}/tracks", json={"points": [{"frame": 9, "x": 0, "y": 0}]})
    assert bad.status_code == 400


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"host": "localhost:7860"}, True),
        ({"host": "evil.example"}, False),  # a DNS entry of theirs that leads to 127.0.0.1
        ({"host": "127.0.0.1.evil.example:7860"}, False),
        ({"origin": "http://127.0.0.1:7860"}, True),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "http://127.0.0.1:8000"}, False),
        ({"origin": "null"}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
    ],
)
def test_only_its_own_page_may_use_it(client, headers, allowed):
    for method, path in (("GET", "/"), ("POST", "/sessions")):
        answer = client.request(method, path, headers=headers, **({"json": {}} if method == "POST" else {}))
        assert (answer.status_code == 200) == allowed, answer.text
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers


def test_other_machines_need_the_token():
    with pytest.raises(FleetflowError, match="needs a token"):
        create_app(hosts=None)
    with TestClient(create_app(hosts=None, token="secret"), base_url="http://box:7860") as client:
        assert client.post("/sessions", json={}).status_code == 403
        assert client.post("/sessions", json={"token": "secre"}).status_code == 403
        assert client.post("/sessions", json={"token": "secret"}).status_code == 200


def test_sessions_keep_apart_and_leave_nothing(client):
    one, other = begin(client), begin(client)
    key = client.post(f"{one}/files?name=a.png", content=png()).json()["id"]
    answer = client.post(f"{other}/jobs", json={"files": [key, key], "network": "fastflownet"})
    assert answer.status_code == 400 and "two pictures or one clip" in answer.json()["error"]
    path = start(client, one)
    assert client.get(f"{other}/jobs/{path.rpartition('/')[2]}").status_code == 404
    folder = client.app.state.desk.sessions.get(one.rpartition("/")[2]).folder
    assert list(folder.iterdir())
    wait(client, path)
    assert client.post(f"{one}/end").status_code == 204
    assert not folder.exists()
    assert client.get(path).status_code == 404


def test_all_is_gone_at_the_end():
    with TestClient(create_app(), base_url=HERE) as client:
        client.post(f"{begin(client)}/files?name=a.png", content=png())
        folder = client.app.state.desk.sessions.folder
        assert len(list(folder.glob("*/*.png"))) == 1
    assert not folder.exists()


def test_limits_are_enforced_while_the_upload_arrives():
    limits = Limits(upload_mb=1, pixels=10_000, jobs=1, sessions=2)
    with TestClient(create_app(limits=limits), base_url=HERE) as client:
        session, sent = begin(client), []

        def body() -> Iterator[bytes]:
            for k in range(64):
                sent.append(k)
                yield bytes(2**18)

        answer = client.post(f"{session}/files?name=a.png", content=body())
        assert answer.status_code == 400 and "1 MB" in answer.json()["error"]
        answer = client.post(f"{session}/files?name=large.png", content=png(128, 100))
        assert answer.status_code == 400 and "128x100" in answer.json()["error"]
        folder = client.app.state.desk.sessions.folder
        assert not list(folder.glob("*/*")), "refused files stay on the disk"
        begin(client)
        assert "close one" in client.post("/sessions", json={}).json()["error"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.exe", b"MZ", "suffix"),
        ("../../etc/passwd", b"x", "suffix"),
        ("a.png", b"", "a.png"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "a.png"),
        ("a.mp4", b"\0" * 4096, "a.mp4"),
        ("a.svg", b"<svg onload='alert(1)'/>", "suffix"),
        ("a.jpg", b"GIF89a" + b"\xff" * 64, "a.jpg"),
    ],
)
def test_files_that_are_no_pictures_are_refused_in_a_line(client, session, name, content, says):
    answer = client.post(f"{session}/files", params={"name": name}, content=content)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert says in error and "\n" not in error and "fleetflow-desk" not in error


@pytest.mark.parametrize(
    "asked",
    [
        {"network": "../weights"},
        {"network": None},
        {"files": ["/etc/passwd", "/etc/passwd"]},
        {"files": [{}]},
        {"files": "example"},
        {"iterations": 0},
        {"iterations": "3"},
        {"iterations": True},
        {"size": [1, 1]},
        {"size": [10**6, 10**6]},
        {"size": [64.5, 64]},
        {"size": "64x64"},
    ],
)
def test_requests_that_cannot_be_are_refused_in_a_line(client, session, asked):
    answer = client.post(f"{session}/jobs", json={"files": ["example"], "network": "fastflownet", **asked})
    assert answer.status_code == 400 and "\n" not in answer.json()["error"]


def test_bodies_that_are_no_requests(client, session):
    for content in (b"", b"[]", b"{", b"\xff\xfe", b"1" * (2 << 20), b'{"a":' * 5000):
        assert client.post(f"{session}/jobs", content=content).status_code == 400
    for method in ("PUT", "PATCH", "DELETE"):
        assert client.request(method, f"{session}/jobs").status_code == 405
    assert client.get("/static/../server.py").status_code == 404
    assert client.get("/static/%2e%2e/server.py").status_code == 404


def test_two_sizes_fail_in_a_line(client, session):
    keys = [client.post(f"{session}/files?name={k}.png", content=png(64 + k)).json()["id"] for k in range(2)]
    end = wait(client, start(client, session, files=keys))
    assert end["state"] == "failed" and "0.png is 64x48 and 1.png is 65x48" in end["problem"]


def jobs_of(tmp_path, owners: str) -> list[Job]:
    request = Request((), ("a",), "fastflownet")
    return [Job(request, tmp_path, owner) for owner in owners]


def test_sessions_take_turns(tmp_path):
    ran, gate = [], threading.Event()

    def run(job: Job) -> None:
        gate.wait(10)
        ran.append(job)

    queue = Queue(run)
    jobs = jobs_of(tmp_path, "aaabc")
    for job in jobs:
        queue.add(job)
    while queue.waiting() == 5:
        time.sleep(0.01)
    assert queue.ahead(jobs[4]) == 3  # the running one, one of a, that of b
    cancelled = jobs[2]
    queue.cancel(cancelled)
    gate.set()
    while len(ran) < 4:
        time.sleep(0.01)
    queue.close()
    assert "".join(job.owner for job in ran) == "aabc" or "".join(job.owner for job in ran) == "abca"
    assert cancelled.state == CANCELLED and cancelled not in ran


def test_cancel_stops_a_clip_behind_its_pair(client, session, clip):
    key = client.post(f"{session}/files?name=pattern.mp4", content=clip).json()["id"]
    blocker = start(client, session)
    path = start(client, session, files=[key])
    assert client.delete(path).status_code == 204
    assert wait(client, path)["state"] == "cancelled"
    assert client.get(path).status_code == 409
    assert wait(client, blocker)["state"] == "done"


def test_a_clip_that_is_too_long_ends_where_the_room_does(clip):
    with TestClient(create_app(limits=Limits(frames=3)), base_url=HERE) as client:
        session = begin(client)
        key = client.post(f"{session}/files?name=pattern.mp4", content=clip).json()["id"]
        path = start(client, session, files=[key])
        wait(client, path)
        assert client.get(path).json()["pairs"] == 2


def test_the_viewer_is_one_page_without_a_server(tmp_path):
    flow = np.zeros((20, 30, 2), np.float32)
    frame = np.zeros((20, 30, 3), np.uint8)
    shown = fleetflow.show(flow, frame, frame, occlusion=np.ones((20, 30), bool), title="</script><b>")
    assert "</script><b>" not in shown.html and "http://" not in shown.html and "https://" not in shown.html
    assert "import " not in shown.html.replace("important", "") and "srcdoc" in shown._repr_html_()
    shown.save(tmp_path / "flow.html")
    assert (tmp_path / "flow.html").read_text() == shown.html
    with pytest.raises(FleetflowError, match="expected one size"):
        fleetflow.show(flow, frame[:10], frame)


def test_twenty_at_once_lose_and_mix_nothing():
    """Each client sees its own frames and a flow of its own; what waits too long is told so, and tries again."""
    with TestClient(create_app(), base_url=HERE) as client:
        wrong: list[object] = []

        def visit(k: int) -> None:
            session = begin(client)
            keys = []
            for seed in (k, k + 100):
                keys.append(client.post(f"{session}/files?name={k}.png", content=png(48 + k, seed=seed)).json()["id"])
            for _ in range(2 if SLOW else 1):
                path = start(client, session, files=keys)
                end, result = wait(client, path), client.get(path).json()
                frame = np.asarray(Image.open(streams.BytesIO(client.get(f"{path}/frames/0").content)))
                same = np.array_equal(frame, np.asarray(Image.open(streams.BytesIO(png(48 + k, seed=k)))))
                if end["state"] != "done" or result["width"] != 48 + k or not same:
                    wrong.append((k, end, result["width"], same))
            client.post(f"{session}/end")

        threads = [threading.Thread(target=visit, args=(k,)) for k in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert not list(client.app.state.desk.sessions.folder.iterdir())


def test_damaged_uploads_are_refused_in_a_line(client, clip):
    """Two seconds of damaged pictures and clips (ten if slow), from a fixed seed."""
    random, until, tried = np.random.default_rng(0), time.monotonic() + (10 if SLOW else 2), 0
    wholes = {"a.png": png(), "a.mp4": clip}
    session = begin(client)
    while time.monotonic() < until:
        for name, whole in wholes.items():
            answer = client.post(f"{session}/files?name={name}", content=damaged(whole, random))
            tried += 1
            assert answer.status_code in (200, 400), answer.text
            if answer.status_code == 400:
                assert "\n" not in answer.json()["error"] and str(tempfile.gettempdir()) not in answer.json()["error"]
    assert tried > 10


def test_headers_are_read_one_at_a_time(tmp_path, monkeypatch):
    """Python 3.11 raises a SystemError where two threads parse one at once: a frame of a clip was not shown."""
    np.save(tmp_path / "frame_0.npy", np.zeros((2, 3, 3), np.uint8))
    job, inside, most = Job(Request((tmp_path / "clip.mp4",), ("clip.mp4",), "fastflownet"), tmp_path, "one"), [], []
    load = np.load

    def slowly(*args, **named):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        try:
            return load(*args, **named)
        finally:
            inside.pop()

    monkeypatch.setattr(np, "load", slowly)
    threads = [threading.Thread(target=job.array, args=("frame", 0)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8
