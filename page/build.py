"""Builds the static page into page/dist: `make page`. Any web host can serve that folder; fleetflow.html in it is the same
page as one file, which a browser opens without any host.

It needs npm, which fetches the pinned runtime; the network is exported, and proved equal, by `fleetflow export`.
"""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "src" / "fleetflow"
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
GPU = ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm")


def main() -> None:
    dist = HERE / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    (dist / "ort").mkdir(parents=True)
    subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=HERE, check=True)
    for name in (*RUNTIME, *GPU):
        shutil.copy(HERE / "node_modules" / "onnxruntime-web" / "dist" / name, dist / "ort" / name)
    for name in ("viewer.js", "paint.js", "viewer.css", "desk.css"):
        shutil.copy(PACKAGE / "desk" / "static" / name, dist)
    for name in ("frame1.png", "frame2.png"):
        shutil.copy(PACKAGE / "example" / name, dist)
    for name in ("index.html", "page.js"):
        shutil.copy(HERE / name, dist)
    export = [sys.executable, "-m", "fleetflow", "export", "fastflownet", "-o", str(dist / "fastflownet.onnx")]
    subprocess.run(export, check=True)
    (dist / "fastflownet.parity.json").unlink(missing_ok=True)
    write_offline(dist)
    write_single(dist)
    size = sum(
        path.stat().st_size for path in dist.rglob("*") if path.is_file() and path.name not in (*GPU, "fleetflow.html")
    )
    print(f"{dist}: {size / 2**20:.1f} MB to load, the same again where WebGPU is asked for")


def write_offline(dist: Path) -> None:
    """Writes the service worker, which names the files that it keeps."""
    files = sorted(
        path.relative_to(dist).as_posix() for path in dist.rglob("*") if path.is_file() and path.name not in GPU
    )
    digest = hashlib.sha256(b"".join((dist / name).read_bytes() for name in files)).hexdigest()[:12]
    text = (HERE / "offline.js").read_text()
    text = text.replace("VERSION", digest).replace("FILES", json.dumps(["./", *files]))
    (dist / "offline.js").write_text(text)


def write_single(dist: Path) -> None:
    """Writes fleetflow.html, which holds the runtime, the network and the example in itself."""
    from fleetflow.desk.page import script

    runtime = HERE / "node_modules" / "onnxruntime-web" / "dist" / "ort.wasm.bundle.min.mjs"
    kinds = {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".png": "image/png",
        ".onnx": "application/octet-stream",
    }
    inside = {"ort/ort.wasm.min.mjs": runtime}
    inside |= {
        name: dist / name
        for name in ("ort/ort-wasm-simd-threaded.wasm", "fastflownet.onnx", "frame1.png", "frame2.png")
    }
    embedded = {
        name: f"data:{kinds[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
        for name, path in inside.items()
    }
    page = (dist / "index.html").read_text()
    page = re.sub(r"\s*<meta http-equiv[^>]*>", "", page)
    for style in ("viewer.css", "desk.css"):
        page = page.replace(f'<link rel="stylesheet" href="{style}">', f"<style>{(dist / style).read_text()}</style>")
    code = script() + (dist / "page.js").read_text().replace('import { Viewer } from "./viewer.js";', "")
    scripts = f'<script>globalThis.EMBEDDED = {json.dumps(embedded)};</script>\n<script type="module">{code}</script>'
    page = page.replace('<script type="module" src="page.js"></script>', scripts)
    (dist / "fleetflow.html").write_text(page)


if __name__ == "__main__":
    main()
