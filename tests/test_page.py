"""The static page of `make page` in a real browser; without the page or the browser these tests are skipped."""
# ruff: noqa: F811  (fixtures of test_desk_browser)

import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from test_desk_browser import BROWSER, PATIENCE, ROOT, browser, keep, open_page, read  # noqa: F401

import fleetflow
from fleetflow.desk.server import EXAMPLE, STATIC

DIST = ROOT / "page" / "dist"
needs_page = pytest.mark.skipif(
    BROWSER is None or not (DIST / "fastflownet.onnx").is_file(), reason="no page: run `make page` first"
)


class Handler(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, *_) -> None: ...


@pytest.fixture
def host() -> Iterator[ThreadingHTTPServer]:
    """A web host of the page."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=DIST))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@needs_page
def test_it_agrees_with_torch_and_works_offline(host, open_page):
    flow = fleetflow.Predictor("fastflownet", precision="fp32")(EXAMPLE / "frame1.png", EXAMPLE / "frame2.png")
    page = open_page(f"http://127.0.0.1:{host.server_port}/")
    for offline in (False, True):
        page.click("#example")
        page.click("#run:not([disabled])")
        page.wait_for_selector("#state:has-text('on wasm')")
        for x, y in ((300, 100), (520, 300)):
            page.hover("#viewer canvas", position={"x": x, "y": y})
            column, row, u, v = read(page)
            assert np.abs(np.array([u, v]) - flow[int(row), int(column)]).max() <= 0.05
        if not offline:
            keep(page, "page")
            page.evaluate("navigator.serviceWorker.ready.then(() => true)")
            host.shutdown()
            page.context.set_offline(True)
            page.reload()
            assert page.evaluate("crossOriginIsolated"), "the runtime has one thread only"


# A runtime of WebGPU that computes in wasm, and then changes what it found.
GPU = """
export * from "./ort.wasm.min.mjs";
import * as wasm from "./ort.wasm.min.mjs";
export const InferenceSession = {
  create: async (content, { executionProviders: [provider] }) => {
    if (provider !== "webgpu") throw new Error(`asked for ${provider}`);
    const inner = await wasm.InferenceSession.create(content, { executionProviders: ["wasm"] });
    const { inputNames, outputNames } = inner;
    const run = async (feeds) => {
      const data = Float32Array.from((await inner.run(feeds))[outputNames[0]].data);
      CHANGE;
      return { [outputNames[0]]: { data } };
    };
    return { inputNames, outputNames, run };
  },
};
"""


def answering(script: str) -> Callable:
    """Gives the script in place of the file that is asked for."""
    return lambda route: route.fulfill(body=script, content_type="text/javascript")


@needs_page
def test_webgpu_is_used_where_it_agrees_and_switched_off_where_not(host, browser, tmp_path):
    frames = [tmp_path / f"{k}.png" for k in range(2)]
    for k, frame in enumerate(frames):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (64, 64, 3), np.uint8)).save(frame)
    changes = {
        "data[77] += 0.04": True,
        "data[77] += 0.1": False,
        "throw new Error('the device is lost')": False,
    }
    for change, agrees in changes.items():
        context = browser.new_context(service_workers="block")
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.add_init_script("Object.defineProperty(navigator, 'gpu', { value: {} })")  # there is none here
        page.route("**/ort.webgpu.min.mjs", answering(GPU.replace("CHANGE", change)))
        page.goto(f"http://127.0.0.1:{host.server_port}/")
        page.set_input_files("#files", frames)
        page.check("#gpu")
        page.click("#run:not([disabled])")
        page.wait_for_selector(f"#state:has-text('on {'webgpu' if agrees else 'wasm'}')")
        assert page.is_checked("#gpu") == agrees == page.is_enabled("#gpu"), change
        assert ("switched off" in page.inner_text("#gpu-label")) != agrees, change
        context.close()


@needs_page
def test_pictures_of_a_telephone_are_upright(host, open_page, tmp_path):
    """The stored picture is 64x32; its orientation says that it was taken upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:, :32] = 255  # will be the upper half
    for k in range(2):
        Image.fromarray(stored).save(tmp_path / f"{k}.jpg", exif=exif, quality=95)
    assert (fleetflow.read_image(tmp_path / "0.jpg")[:24] > 200).all()
    page = open_page(f"http://127.0.0.1:{host.server_port}/")
    page.set_input_files("#files", [tmp_path / "0.jpg", tmp_path / "1.jpg"])
    page.wait_for_selector("#list:has-text('32\u00d764')")
    page.click("#run:not([disabled])")
    page.wait_for_selector("#state:has-text('32\u00d764')")
    page.locator(".viewer-wipe").fill("1")
    upper, lower = page.evaluate(
        """() => { const from = document.querySelector("#viewer canvas"), { width, height } = from;
             const { data } = from.getContext("2d").getImageData(width / 2 - 9, 0, 1, height);
             return [0.2, 0.8].map((share) => data[4 * Math.floor(share * height)]); }"""
    )
    assert upper > 200 and lower < 50


def test_the_files_of_the_page_name_no_other_host():
    for path in [
        *STATIC.iterdir(),
        ROOT / "page" / "index.html",
        ROOT / "page" / "page.js",
        ROOT / "page" / "offline.js",
    ]:
        text = path.read_text()
        assert "http://" not in text and "https://" not in text and "//cdn" not in text, path.name
