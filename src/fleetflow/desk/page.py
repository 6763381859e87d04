"""The viewer as one self-contained page, without a server: `fleetflow.show` in a notebook, or a file to send."""

import base64
import html
import json
import re
from dataclasses import dataclass
from importlib import resources
from io import BytesIO
from os import PathLike

import numpy as np
from PIL import Image

from fleetflow.io.arrays import as_array
from fleetflow.io.atomic import write_atomically
from fleetflow.io.images import checked_picture, read_image
from fleetflow.types import FleetflowError
from fleetflow.visualise import robust_scale

_STATIC = resources.files("fleetflow.desk") / "static"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="content-security-policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title><style>body {{ margin: .6rem; background: #fff; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #20252b; }} }}
{style}</style></head>
<body><div id="viewer"></div>
<script id="data" type="application/json">{data}</script>
<script type="module">
{script}
const given = JSON.parse(document.getElementById("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
async function pixels(text) {{
  const picture = new Image();
  picture.src = `data:image/png;base64,${{text}}`;
  await picture.decode();
  const canvas = new OffscreenCanvas(picture.naturalWidth, picture.naturalHeight);
  const context = canvas.getContext("2d", {{ willReadFrequently: true }});
  context.drawImage(picture, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height).data;
}}
const viewer = new Viewer(document.getElementById("viewer"), {{ title: given.title }});
viewer.setData({{
  width: given.width, height: given.height, scale: given.scale,
  frame1: await pixels(given.frame1), frame2: await pixels(given.frame2),
  flow: new Float32Array(bytes(given.flow).buffer),
  occlusion: given.occlusion && bytes(given.occlusion),
  uncertainty: given.uncertainty && new Float32Array(bytes(given.uncertainty).buffer),
}});
</script></body></html>
"""


@dataclass(frozen=True)
class Shown:
    """The viewer of one flow; a notebook displays it, `save` makes a file of it."""

    html: str
    height: int  # of the viewer on a page, in pixels

    def _repr_html_(self) -> str:
        page = html.escape(self.html, quote=True)
        style = f"width: 100%; height: {self.height}px; border: 0"
        return f'<iframe srcdoc="{page}" style="{style}" title="flow viewer"></iframe>'

    def save(self, path: str | PathLike) -> None:
        """Writes one .html file that shows the flow in any browser, without a network."""
        write_atomically(path, lambda temporary: temporary.write_text(self.html, encoding="utf-8"))


def show(
    flow: np.ndarray,
    frame1: np.ndarray | str | PathLike,
    frame2: np.ndarray | str | PathLike,
    *,
    occlusion: np.ndarray | None = None,
    uncertainty: np.ndarray | None = None,
    title: str = "",
) -> Shown:
    """Returns a viewer: two layers with a wipe, zoom, and the vector under the pointer.

    Args:
        flow: [H, W, 2] pixels.
        frame1: uint8 [H, W, 3] RGB, or the path of a picture.
        frame2: likewise.
        occlusion: [H, W] bool, or a probability in [0, 1].
        uncertainty: [H, W] pixels.
        title: text above it.

    Raises:
        FleetflowError: if sizes differ or something is no picture.
    """
    images = [
        read_image(frame) if isinstance(frame, str | PathLike) else checked_picture(frame) for frame in (frame1, frame2)
    ]
    flow = as_array(flow, "flow", "[H, W, 2] pixels")
    if flow.ndim != 3:
        raise FleetflowError(f"flow is {list(flow.shape)}; expected [H, W, 2] pixels")
    if occlusion is not None:
        occlusion = as_array(occlusion, "occlusion", "[H, W]")
    if uncertainty is not None:
        uncertainty = as_array(uncertainty, "uncertainty", "[H, W] pixels")
    shapes = {"flow": flow[..., 0], "frame1": images[0][..., 0], "frame2": images[1][..., 0]}
    shapes |= {
        name: plane for name, plane in (("occlusion", occlusion), ("uncertainty", uncertainty)) if plane is not None
    }
    for name, plane in shapes.items():
        if plane.shape != flow.shape[:2] or flow.shape[2:] != (2,):
            raise FleetflowError(f"{name} is {list(plane.shape)} and the flow {list(flow.shape)}; expected one size")
    data = {
        "width": flow.shape[1],
        "height": flow.shape[0],
        "scale": robust_scale(flow),
        "title": title,
        "flow": _base64(flow.astype("<f4").tobytes()),
        "frame1": _base64(_png(images[0])),
        "frame2": _base64(_png(images[1])),
        "occlusion": None if occlusion is None else _base64((np.asarray(occlusion) * 255.0).astype(np.uint8).tobytes()),
        "uncertainty": None if uncertainty is None else _base64(uncertainty.astype("<f4").tobytes()),
    }
    text = json.dumps(data).replace("<", "\\u003c")
    page = _PAGE.format(title=html.escape(title or "flow"), style=_text("viewer.css"), script=script(), data=text)
    return Shown(page, round(min(900 * flow.shape[0] / flow.shape[1], 640)) + 170)


def script() -> str:
    """Returns the viewer's modules as one script, for pages that cannot import."""
    both = _text("paint.js") + _text("viewer.js")
    without_imports = re.sub(r"^import \{[^}]*\} from [^;]*;$", "", both, flags=re.MULTILINE)
    return re.sub(r"^export ", "", without_imports, flags=re.MULTILINE)


def _text(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


def _png(image: np.ndarray) -> bytes:
    stream = BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
