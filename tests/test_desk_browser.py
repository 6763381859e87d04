"""The desk and the notebook's viewer in a real browser: Debian's chromium, driven by playwright.

Screenshots are left in runs/screenshots. Without a browser these tests are skipped.
"""

import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

import fleetflow
from fleetflow.io.images import write_image
from fleetflow.visualise import flow_to_color

sync_api = pytest.importorskip("playwright.sync_api")
uvicorn = pytest.importorskip("uvicorn")
from fleetflow.desk.server import EXAMPLE, STATIC, create_app  # noqa: E402

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")
SCREENSHOTS = ROOT / "runs" / "screenshots"
PATIENCE = 120_000  # milliseconds; the machine may be busy


@contextmanager
def serving(app) -> Iterator[int]:
    """A desk on a free port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(create_app()) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        words = ["--no-sandbox", "--host-resolver-rules=MAP box 127.0.0.1"]  # a name that is not loopback's
        browser = playwright.chromium.launch(executable_path=BROWSER, args=words)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable]:
    """Opens an address; at the end no script may have failed, and nothing but its own origin been asked."""
    wrong: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 720}, accept_downloads=True)
    context.set_default_timeout(PATIENCE)

    def open_page(address: str):
        page = context.new_page()
        origin = urlsplit(address).netloc
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: _foreign(asked.url, origin) and wrong.append(f"asked for {asked.url}"))
        page.goto(address)
        page.wait_for_selector("#example:not([disabled])")  # the script has begun its session
        return page

    yield open_page
    context.close()
    # an answer that the page shows to the user; a header that counts with TLS only
    fine = ("status of 400", "Cross-Origin-Opener-Policy header has been ignored")
    assert not [text for text in wrong if not any(part in text for part in fine)], wrong


def _foreign(url: str, origin: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme not in ("blob", "data", "file") and parts.netloc != origin


def compute(page) -> None:
    page.click("#run:not([disabled])")
    page.wait_for_selector("#state:has-text('s a pair')")
    page.wait_for_selector(".viewer canvas")
    page.wait_for_selector("#downloads a")


def read(page, viewer: int = 0) -> list[float]:
    """x, y, u, v of the pixel that is looked at."""
    readout = page.locator(".viewer-readout").nth(viewer)
    return [float(readout.get_attribute(f"data-{name}")) for name in "xyuv"]


def keep(page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def test_a_pair_is_uploaded_computed_and_read(address, open_page, tmp_path):
    page = open_page(address)
    page.set_input_files("#files", [EXAMPLE / "frame1.png", EXAMPLE / "frame2.png"])
    page.wait_for_selector("#list li >> nth=1")
    compute(page)
    flow = fleetflow.Predictor("fastflownet")(EXAMPLE / "frame1.png", EXAMPLE / "frame2.png")
    for x, y in ((300, 100), (120, 260), (500, 300)):
        page.hover(".viewer canvas", position={"x": x, "y": y})
        column, row, u, v = read(page)
        assert np.abs(np.array([u, v]) - flow[int(row), int(column)]).max() <= 0.01
    assert "uncertainty" in page.inner_text(".viewer-readout") and "frame 2" in page.inner_text(".viewer-readout")
    keep(page, "pair")

    with page.expect_download() as download:
        page.click("#downloads a:text-is('flo')")
    download.value.save_as(tmp_path / "found.flo")
    np.testing.assert_allclose(fleetflow.read_flow(tmp_path / "found.flo")[0], flow, atol=1e-3)
    assert page.inner_text("#command").startswith("fleetflow predict frame1.png frame2.png -m fastflownet")

    before = page.inner_text("[data-role=scale-value]")
    page.locator("[data-role=scale]").fill("1")
    assert page.inner_text("[data-role=scale-value]") != before
    pictures = set()
    for layer in ("flow", "arrows", "frame2", "warped", "error", "occlusion", "uncertainty"):
        page.select_option("[data-side=right]", layer)
        pictures.add(page.locator(".viewer canvas").screenshot())
    assert len(pictures) == 7
    page.locator(".viewer-wipe").fill("0.9")
    assert page.locator(".viewer canvas").screenshot() not in pictures


def test_the_keyboard_reaches_everything(address, open_page):
    page = open_page(address)
    page.focus("#example")
    page.keyboard.press("Enter")
    page.wait_for_selector("#run:not([disabled])")
    page.focus("#run")
    page.keyboard.press("Enter")
    page.wait_for_selector("#downloads a")
    page.focus(".viewer canvas")
    page.keyboard.press("ArrowRight")
    first = read(page)
    for key in ("ArrowRight", "Shift+ArrowDown", "+", "."):
        page.keyboard.press(key)
    second = read(page)
    assert (second[0] - first[0], second[1] - first[1]) == (1, 10)
    unlabelled = page.evaluate(
        """() => [...document.querySelectorAll("input, select, button, canvas")].filter((element) =>
             !element.labels?.length && !element.textContent.trim() && !element.getAttribute("aria-label")).length"""
    )
    assert unlabelled == 0
    order = tabbed(page)
    asked = ["files", "example", "network", "second", "iterations", "size", "both", "run"]
    seen = ["left", "right", "scale", "dark", "out", "fit", "one", "in", "CANVAS", "viewer-wipe"]
    assert order[: len(asked) + len(seen)] == asked + seen, order
    assert order.count("button") == page.locator("#downloads a").count() and order[-1] == "copy"
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    keep(page, "phone")


def tabbed(page) -> list[str]:
    """What the tab key reaches, in its order; each must be seen to have the focus."""
    page.evaluate("const top = document.querySelector('h1'); top.tabIndex = -1; top.focus()")
    found = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
              const at = document.activeElement, { side, role, zoom } = at.dataset;
              const shown = at.id === "files" ? document.querySelector("label[for=files]") : at;
              return [at.id || side || role || zoom || at.className || at.tagName, getComputedStyle(shown).outlineStyle];
            }"""
        )
        if name == "BODY":
            return found
        assert outline != "none", f"nobody sees that {name} has the focus"
        found.append(name)
    return found


def test_a_clip_with_two_networks_time_and_tracks(address, open_page, tmp_path):
    from fleetflow.io.video import VideoWriter

    y, x = np.mgrid[:96, :160]
    with VideoWriter(tmp_path / "pattern.mp4", 10) as writer:
        for k in range(4):
            waves = np.sin((x - 3 * k) / 5) * np.sin(y / 6) + np.sin((x - 3 * k + 2 * y) / 9)
            writer.write(np.repeat((128 + 60 * waves)[..., None], 3, -1).astype(np.uint8))
    page = open_page(address)
    page.set_input_files("#files", tmp_path / "pattern.mp4")
    page.select_option("#second", "liteflownet2")
    page.uncheck("#both")
    compute(page)
    assert page.locator(".viewer").count() == 2
    assert len(set(page.locator("[data-role=scale-value]").all_inner_texts())) == 1, "colors mean two things"
    commands = page.inner_text("#command").splitlines()
    assert ["-m fastflownet -o flow_fastflownet" in commands[0], "-o flow_liteflownet2" in commands[1]] == [True, True]
    page.locator(".viewer canvas").first.click(position={"x": 150, "y": 120})
    page.wait_for_timeout(500)
    start = read(page)
    assert read(page, 1)[:2] == start[:2], "the viewers are not linked"
    page.locator("#time").fill("2")
    page.wait_for_selector("#when:has-text('pair 3 of 3')")
    before = page.locator(".viewer canvas").first.screenshot()
    page.click("#forget")
    assert page.locator(".viewer canvas").first.screenshot() != before, "no track was drawn"
    page.click("#play")
    page.wait_for_selector("#play[aria-pressed=true]")
    page.wait_for_selector("#when:has-text('pair 2 of 3')")
    page.click("#play")
    keep(page, "clip")


def test_a_result_stays_alive_while_another_job_is_cancelled(address, open_page, tmp_path):
    """On a phone: frames in the order of their names, swapped, 16 pixels small; then a clip, whose result stays."""
    from fleetflow.io.video import VideoWriter

    with VideoWriter(tmp_path / "<b>x.mp4", 10) as writer:
        for k in range(4):
            writer.write(np.full((48, 64, 3), 60 * k, np.uint8))
    frames = [tmp_path / "b10.png", tmp_path / "b9.png"]
    for frame in frames:
        write_image(frame, np.zeros((16, 16, 3), np.uint8))
    page = open_page(address)
    page.set_viewport_size({"width": 390, "height": 844})
    page.click("#example")
    page.set_input_files("#files", frames)
    names = page.locator("#list li span:first-child")
    page.wait_for_selector("#list li:has-text('b10')")
    assert names.all_inner_texts() == ["b9.png", "b10.png"], "the example counts as a picture, or the order is lost"
    page.click("#swap")
    assert names.all_inner_texts() == ["b10.png", "b9.png"]
    compute(page)
    for kind in ("in", "in", "out", "one", "fit"):
        page.click(f"[data-zoom={kind}]")
    page.set_input_files("#files", tmp_path / "<b>x.mp4")
    page.wait_for_selector("#list li:has-text('<b>x')")
    page.click("#run:not([disabled])")
    page.wait_for_selector("#downloads div:has-text('whole clip')")

    page.click("#example")
    page.select_option("#network", "deq_flow_tiny")
    page.locator("#size").fill("640 x 896")
    page.click("#run:not([disabled])")
    page.click("#cancel")
    page.wait_for_selector("#state:not(.bad):has-text('Cancelled')")
    assert page.is_enabled("#run") and not page.is_visible("#cancel")
    page.locator("#time").fill("1")
    page.wait_for_selector("#when:has-text('pair 2 of 3')")
    with page.expect_response("**/tracks"):
        page.locator(".viewer canvas").click(position={"x": 60, "y": 60})
    with page.expect_download() as download:
        page.locator("#downloads a:text-is('color')").nth(1).click()
    assert download.value.suggested_filename.endswith("x_color.mp4")
    canvas = page.locator(".viewer canvas")
    canvas.hover(position={"x": 50, "y": 50})
    page.mouse.down()
    page.mouse.move(5000, 5000)
    page.mouse.up()
    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] - 10, "y": box["height"] - 10})
    assert max(read(page)[:2]) < 8, "the picture was dragged out of sight"


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: of two colors #rrggbb."""

    def luminance(color: str) -> float:
        values = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
        return float(np.dot((0.2126, 0.7152, 0.0722), linear))

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_in_light_and_dark():
    """WCAG AA asks for 4.5 to 1."""
    text = (STATIC / "desk.css").read_text().replace("#fff;", "#ffffff;")
    palettes = [dict(re.findall(r"--(\w+): (#\w{6});", line)) for line in text.splitlines() if ":root {" in line]
    assert len(palettes) == 2
    for palette in palettes:
        for ink in ("ink", "soft", "bad"):
            for ground in ("ground", "back"):
                assert contrast(palette[ink], palette[ground]) >= 4.5, (ink, ground)
    assert contrast("#ffffff", palettes[0]["accent"]) >= 4.5 and contrast("#0d1b2e", palettes[1]["accent"]) >= 4.5


def test_what_is_wrong_is_said_in_a_line(address, open_page, tmp_path):
    page = open_page(address)
    (tmp_path / "text.png").write_text("no picture")
    with page.expect_response("**/files?name=text.png"):
        page.set_input_files("#files", tmp_path / "text.png")
    page.wait_for_selector("#state.bad")
    assert "text.png" in page.inner_text("#state")
    assert page.is_disabled("#run")


def test_colors_are_those_of_visualise(address, open_page):
    page = open_page(address)
    rng = np.random.default_rng(0)
    flow = rng.normal(0, 8, (16, 16, 2)).astype(np.float32)
    flow[0, 0] = np.nan
    flow[0, 1] = 0
    script = """async ([flow, scale]) => {
      const paint = await import("./static/paint.js");
      const values = new Float32Array(flow.map((value) => value ?? NaN));
      return [[...paint.colorOfFlow(values, scale)], [...paint.colorOfFlow(values, scale, true)], paint.robustScale(values)];
    }"""
    given = [None if np.isnan(value) else float(value) for value in flow.ravel()]
    light, dark, scale = page.evaluate(script, [given, 20])
    for found, background in ((light, "light"), (dark, "dark")):
        expected = flow_to_color(flow, 20, background=background)
        difference = np.abs(np.reshape(found, (16, 16, 4))[..., :3] - expected.astype(int))
        assert difference.max() <= 1, background
    assert scale in (20, 30)


def test_the_viewer_of_a_notebook_needs_no_server(browser, tmp_path):
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    flow = np.full((60, 80, 2), (2.5, -1.25), np.float32)
    fleetflow.show(flow, frame, frame, uncertainty=flow[..., 0], title="a <flow>").save(tmp_path / "flow.html")
    page, wrong = browser.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: wrong.append(asked.url) if asked.url.startswith("http") else None)
    page.goto((tmp_path / "flow.html").as_uri())
    page.wait_for_selector("[data-role=scale-value]:has-text('px')")  # it has been drawn
    page.hover("canvas")
    assert read(page)[2:] == [2.5, -1.25] and page.inner_text(".viewer-title") == "a <flow>"
    colors = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for place, kind in ((".viewer-title", "color"), ("body", "backgroundColor")):
            color = page.evaluate(f"getComputedStyle(document.querySelector('{place}')).{kind}")
            colors.append("#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", color)[:3]))
    assert contrast(*colors[:2]) >= 4.5 and contrast(*colors[2:]) >= 4.5, colors
    assert colors[1] != colors[3], "a transparent page"
    page.close()
    assert not wrong


def test_unknown_flow_in_the_sandbox_of_a_notebook(browser):
    flow, frame = np.full((60, 80, 2), 2.5, np.float32), np.zeros((60, 80, 3), np.uint8)
    flow[:40] = np.nan
    shown = fleetflow.show(flow, frame, frame, uncertainty=flow[..., 0])
    page, wrong = browser.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.set_content(shown._repr_html_().replace("<iframe", '<iframe sandbox="allow-scripts"'))
    inside = page.frame_locator("iframe")
    inside.locator("[data-role=scale-value]:has-text('px')").wait_for()
    inside.locator("canvas").hover()
    inside.locator(".viewer-readout:has-text('frame 1')").wait_for()
    text = inside.locator(".viewer-readout").inner_text()
    page.close()
    assert "flow unknown" in text and "NaN" not in text and not wrong


def test_two_fingers_zoom_and_move(browser, tmp_path):
    """What is between the fingers stays there, three times as large; then one finger moves it."""
    flow, frame = np.full((60, 80, 2), 1, np.float32), np.zeros((60, 80, 3), np.uint8)
    fleetflow.show(flow, frame, frame).save(tmp_path / "flow.html")
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto((tmp_path / "flow.html").as_uri())
    page.wait_for_selector("[data-role=scale-value]:has-text('px')")
    box = page.locator("canvas").bounding_box()
    (x, y), step = (round(box["x"] + 150), round(box["y"] + 120)), 90

    def pixel(right: int = 0) -> float:
        page.mouse.move(x + right, y)
        return read(page)[0]

    touch = page.context.new_cdp_session(page)

    def touches(kind: str, *places: int) -> None:
        points = [{"x": x + place, "y": y, "id": k} for k, place in enumerate(places)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    before, width = pixel(), pixel(step) - pixel()
    touches("touchStart", -20)
    touches("touchStart", -20, 20)
    for reach in (30, 45, 60):
        touches("touchMove", -reach, reach)
    touches("touchEnd")
    assert abs(pixel() - before) <= 1 and pixel(step) - pixel() == pytest.approx(width / 3, abs=1.5)
    touches("touchStart", 0)
    touches("touchMove", 30)
    touches("touchMove", step)
    touches("touchEnd")
    assert abs(pixel(step) - before) <= 1
    page.close()


def test_another_machine_with_the_token(open_page, browser, tmp_path):
    """Its page has no TLS, so some of what browsers offer is missing; progress arrives, downloads work."""
    frames = [tmp_path / f"{k}.png" for k in range(2)]
    for frame in frames:
        write_image(frame, np.zeros((32, 32, 3), np.uint8))
    with serving(create_app(hosts=None, token="secret")) as port:
        page = open_page(f"http://box:{port}/#token=secret")
        assert not page.evaluate("isSecureContext") and "16.7 million pixels" in page.inner_text("#limits")
        page.set_input_files("#files", frames)
        compute(page)
        page.hover(".viewer canvas")
        assert read(page)[2:] == pytest.approx([0, 0], abs=0.5)
        with page.expect_download() as download:
            page.click("#downloads a:text-is('flo')")
        download.value.save_as(tmp_path / "found.flo")
        assert fleetflow.read_flow(tmp_path / "found.flo")[0].shape == (32, 32, 2)
        page.click("#copy")
        stranger = browser.new_page()
        stranger.goto(f"http://box:{port}/")
        stranger.wait_for_selector("#state.bad:has-text('token')")
        assert stranger.is_disabled("#example")
        stranger.close()
