"""Pictures of flow: the Middlebury color wheel with a legend, arrows, error maps, occlusion, side by side.

Everything takes and returns numpy arrays: flow [H, W, 2] pixels (u to the right, v downwards), pictures
[H, W, 3] uint8 RGB, masks [H, W] bool. Nothing changes its arguments. The wheel is that of Baker et al., "A Database
and Evaluation Methodology for Optical Flow", IJCV 2011; the error colors are those of the KITTI 2015 development kit.

For a clip, choose one scale and give it to every frame, so that one color means one motion throughout:

    scale = clip_scale([robust_scale(flow) for flow in flows])
    pictures = [with_legend(flow_to_color(flow, scale), scale) for flow in flows]
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fleetflow.types import FleetflowError

Background = Literal["light", "dark"]

SMALLEST_SCALE = 1.0  # pixels: no automatic scale goes below, so that two identical frames do not look like noise
SCALES = (1e-6, 1e12)  # pixels: what a scale may be; squares of flow over scale stay within float32
UNKNOWN_FLOW = 1e9  # pixels: the value in .flo files from which a component means "unknown"
READABLE_STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0)  # times a power of ten: what `robust_scale` returns
SMALLEST_LEGEND_PICTURE = 96  # pixels: a picture with a shorter side gets no legend

# Corners of the wheel and the number of colors from each to the next (fewer where the eye tells fewer apart).
WHEEL_CORNERS = ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255))
WHEEL_STEPS = (15, 6, 4, 11, 13, 6)
UNKNOWN_COLOR = {"light": (0, 0, 0), "dark": (64, 64, 64)}

# KITTI 2015: the error of a pixel counts as its length or, if that is less, as this many pixels for 5 % of the truth;
# below 3 px (five blues) the benchmark calls it right, above (five reds) wrong.
ERROR_BOUNDS = (0.1875, 0.375, 0.75, 1.5, 3.0, 6.0, 12.0, 24.0, 48.0)  # pixels, upper bounds; the last has none
ERROR_COLORS = (
    (49, 54, 149), (69, 117, 180), (116, 173, 209), (171, 217, 233), (224, 243, 248),
    (254, 224, 144), (253, 174, 97), (244, 109, 67), (215, 48, 39), (165, 0, 38),
)  # fmt: skip
ERROR_LIMIT, ERROR_FRACTION = 3.0, 0.05

SLOW = 0.05  # of the scale: where the field is slower a streamline ends
ARROW_COLOR, ARROW_OUTLINE = (255, 236, 110), (20, 20, 25)
OCCLUDED_COLOR, OCCLUDED_MIX = (235, 45, 95), 0.6
GAP_COLOR, TITLE_COLOR = (255, 255, 255), (40, 40, 45)
_CHUNK = 1 << 14  # pixels colored at a time: the intermediate values stay in the processor's cache
_FINER = 3  # arrows and legends are drawn this many times larger and reduced, which smooths their edges


def color_wheel() -> np.ndarray:
    """Returns the Middlebury wheel, [55, 3] uint8 RGB, red (right), yellow, green, ... clockwise on screen."""
    rows = []
    for start, end, steps in zip(WHEEL_CORNERS, WHEEL_CORNERS[1:] + WHEEL_CORNERS[:1], WHEEL_STEPS, strict=True):
        ramp = 255 * np.arange(steps)[:, None] // steps
        rows.append(np.array(start) + np.sign(np.subtract(end, start)) * ramp)
    return np.concatenate(rows).astype(np.uint8)


def full_scale(flow: np.ndarray, valid: np.ndarray | None = None) -> float:
    """Returns the scale in pixels that `flow_to_color` takes by itself: the largest motion, at least SMALLEST_SCALE.

    Args:
        flow: [H, W, 2] pixels; unknown and invalid pixels do not count. The 1e-5 px on top, as in the usual
            implementations, keeps the largest motion itself within the scale.
    """
    flow, known = _known(flow, valid)
    return float(max(_length(flow)[known].max(initial=0), SMALLEST_SCALE) + np.float32(1e-5))


def robust_scale(flow: np.ndarray, valid: np.ndarray | None = None) -> float:
    """Returns a scale in pixels for a picture: what 99 % of the pixels stay under, rounded up to a readable number.

    Args:
        flow: [H, W, 2] pixels, or a whole clip [T, H, W, 2]; unknown and invalid pixels do not count. The numbers are
            1, 1.5, 2, 3, 5, 7, 10, 15, ... pixels and never under SMALLEST_SCALE. For a clip that does not fit into
            memory give the scales of its frames to `clip_scale`.
    """
    flow, known = _known(flow, valid, clip=True)
    lengths = _length(flow)[known]
    bound = max(float(np.percentile(lengths, 99)) if lengths.size else 0.0, SMALLEST_SCALE)
    decade = 10.0 ** np.floor(np.log10(bound))
    return float(next(step * decade for step in READABLE_STEPS if step * decade >= bound * (1 - 1e-5)))


def clip_scale(scales: Sequence[float]) -> float:
    """Returns one scale in pixels for a clip, from those of some of its frames.

    It is the largest that one frame in five exceeds, or one frame if there are fewer than five: a frame whose flow is
    wrong, or one cut, does not make all the others pale. Of one or two frames it is the larger one.

    Args:
        scales: pixels, one or more, as `robust_scale` gives them.
    """
    if not len(scales):
        raise FleetflowError("clip_scale got no scale; expected one or more, in pixels")
    left_out = max(1, len(scales) // 5) if len(scales) > 2 else 0
    return sorted(map(checked_scale, scales))[-1 - left_out]


def flow_to_color(
    flow: np.ndarray,
    scale: float | None = None,
    *,
    valid: np.ndarray | None = None,
    background: Background = "light",
) -> np.ndarray:
    """Colors a flow: the hue is the direction, the saturation the length.

    Args:
        flow: [H, W, 2] pixels.
        scale: the motion in pixels shown at full saturation, as is all that is faster; None takes `full_scale(flow)`,
            which never blows up motion under 1 px.
        valid: [H, W] bool. Unknown pixels (not valid, not finite, or over 1e9) are black, dark gray on the dark
            background.
        background: what no motion looks like, "light" white or "dark" black.

    Returns:
        A picture [H, W, 3] uint8 RGB.
    """
    flow, known = _known(flow, valid)
    if not isinstance(background, str) or background not in UNKNOWN_COLOR:
        raise FleetflowError(f'background is {background!r}; expected "light" or "dark"; pass one of the two')
    scale = full_scale(flow, known) if scale is None else checked_scale(scale)
    wheel = color_wheel() / 255.0
    picture = np.empty(flow.shape[:2] + (3,), np.uint8)
    pixels, vectors = picture.reshape(-1, 3), flow.reshape(-1, 2)
    for start in range(0, len(vectors), _CHUNK):
        _paint(vectors[start : start + _CHUNK], scale, wheel, background == "dark", pixels[start : start + _CHUNK])
    picture[~known] = UNKNOWN_COLOR[background]
    return picture


def _paint(vectors: np.ndarray, scale: float, wheel: np.ndarray, dark: bool, out: np.ndarray) -> None:
    # The order and the precision (float32 up to the position on the wheel, then float64) decide the last bit.
    u, v = vectors[:, 0] / scale, vectors[:, 1] / scale
    length = np.minimum(np.sqrt(u * u + v * v), 1)
    position = (np.arctan2(-v, -u) / np.pi + 1) / 2 * (len(wheel) - 1)
    before = position.astype(np.int32)
    after = (before + 1) % len(wheel)
    share = (position - before).astype(np.float64)
    rest = 1 - share
    for channel in range(3):
        ramp = np.ascontiguousarray(wheel[:, channel])
        pure = rest * ramp.take(before) + share * ramp.take(after)
        shade = length * pure if dark else 1 - length * (1 - pure)
        out[:, channel] = 255 * shade  # the cast rounds down


def with_legend(picture: np.ndarray, scale: float, *, background: Background = "light") -> np.ndarray:
    """Returns the picture with a small color wheel in its bottom right corner and the scale in pixels under it.

    Args:
        picture: [H, W, 3] uint8, usually from `flow_to_color`.
        scale: pixels at the rim of the wheel, the number given to `flow_to_color`.
        background: the one given there. A picture with a side under 96 pixels is returned as it is.
    """
    picture = _checked_picture(picture).copy()
    scale = checked_scale(scale)
    side = min(picture.shape[:2])
    if side < SMALLEST_LEGEND_PICTURE:
        return picture
    diameter = min(max(side // 6, 28), 160)
    legend, opacity = _legend(diameter, scale, background)
    margin = max(side // 50, 3)
    height, width = min(legend.shape[0], picture.shape[0]), min(legend.shape[1], picture.shape[1])
    bottom, right = max(picture.shape[0] - margin, height), max(picture.shape[1] - margin, width)
    corner = picture[bottom - height : bottom, right - width : right]
    corner[:] = _mix(corner, legend[:height, :width], opacity[:height, :width])
    return picture


@lru_cache(maxsize=16)
def _legend(diameter: int, scale: float, background: Background) -> tuple[np.ndarray, np.ndarray]:
    """Returns the legend [h, w, 3] uint8 and its opacity [h, w, 1] in 0..1: a plate, the wheel on it, the number."""
    number = f"{scale:.3g}" if scale < 100 else f"{scale:.0f}"
    text, font = f"{number} px", ImageFont.load_default(max(diameter / 4.2, 10))
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    border = max(diameter // 10, 4)
    width = max(diameter, right - left) + 2 * border
    height = diameter + (bottom - top) + 3 * border
    plate, ink = ((255, 255, 255), (40, 40, 45)) if background == "light" else ((24, 24, 28), (235, 235, 235))

    fine = diameter * _FINER
    axis = (np.arange(fine, dtype=np.float32) + 0.5) * 2 / fine - 1
    vectors = np.stack(np.meshgrid(axis, axis), axis=-1)
    inside = np.hypot(vectors[..., 0], vectors[..., 1]) <= 1
    disc = np.where(inside[..., None], flow_to_color(vectors, 1.0, background=background), np.array(plate, np.uint8))
    wheel = Image.fromarray(disc).reduce(_FINER)

    shape = Image.new("L", (width * _FINER, height * _FINER))
    ImageDraw.Draw(shape).rounded_rectangle((0, 0, shape.width - 1, shape.height - 1), border * _FINER, fill=255)
    opacity = np.asarray(shape.reduce(_FINER))[..., None] / 255 * 0.85
    legend = Image.new("RGB", (width, height), plate)
    x, y = (width - diameter) // 2, border
    legend.paste(wheel, (x, y))
    opacity[y : y + diameter, x : x + diameter][inside[1::_FINER, 1::_FINER]] = 1
    baseline = ((width - (right - left)) // 2 - left, diameter + 2 * border - top)
    ImageDraw.Draw(legend).text(baseline, text, fill=ink, font=font)
    return np.asarray(legend), opacity


def arrows(image: np.ndarray, flow: np.ndarray, *, every: int | None = None, scale: float = 1.0) -> np.ndarray:
    """Returns the image [H, W, 3] uint8 with an arrow of flow [H, W, 2] pixels on every `every`-th pixel.

    Args:
        every: pixels between arrows; None gives about 24 along the longer side.
        scale: length of an arrow in pixels of the image per pixel of motion; at 1 the tip is where the point goes. A
            point that does not move gets a dot, an unknown one (not finite or over 1e9) nothing.
    """
    image = _checked_picture(image)
    height, width = image.shape[:2]
    flow, known = _known(flow)
    _same_size("flow", flow, "image", image)
    apart = _spacing(every, height, width)
    scale = checked_scale(scale)
    ys = np.arange((height - 1) % apart // 2, height, apart)
    xs = np.arange((width - 1) % apart // 2, width, apart)
    stroke = max(min(apart / 12, max(height, width) / 500), 1.0)  # pixels
    canvas = Image.new("L", (width * _FINER, height * _FINER))  # 0 nothing, 1 outline, 2 arrow
    draw = ImageDraw.Draw(canvas)
    shapes = [_arrow(x, y, flow[y, x] * scale, stroke, height + width) for y in ys for x in xs if known[y, x]]
    border = max(stroke, 1.5)
    for ink, extra in ((1, border), (2, 0.0)):  # all outlines first, then all arrows
        for line, head, line_width in shapes:
            _stroke(draw, line, line_width + extra, ink)
            if head is not None:
                draw.polygon([tuple(point) for point in head * _FINER], fill=ink)
                _stroke(draw, head[[0, 1, 2, 0]], max(extra, 0.4), ink)
    masks = [canvas.point([255 * (ink >= level) for ink in range(256)]).reduce(_FINER) for level in (1, 2)]
    outline, core = (np.asarray(mask, np.float32)[..., None] / 255 for mask in masks)
    return _mix(_mix(image, ARROW_OUTLINE, outline * 0.75), ARROW_COLOR, core)


def streamlines(
    image: np.ndarray, flow: np.ndarray, *, every: int | None = None, scale: float | None = None
) -> np.ndarray:
    """Returns the image [H, W, 3] uint8, dimmed, with lines along the flow [H, W, 2] pixels in the colors of the flow.

    A line starts on every `every`-th pixel and follows the field as it is now, there and back (midpoint rule), for as
    long as 3 `every`; where nothing moves (under 5 % of the scale) or the flow is unknown it ends.

    Args:
        every: pixels between the starts; None gives about 24 along the longer side.
        scale: pixels of motion at full color; None takes `robust_scale(flow)`.
    """
    image = _checked_picture(image)
    flow, known = _known(flow)
    _same_size("flow", flow, "image", image)
    height, width = image.shape[:2]
    apart = _spacing(every, height, width)
    full = robust_scale(flow, known) if scale is None else checked_scale(scale)
    y, x = np.mgrid[apart // 2 : height : apart, apart // 2 : width : apart]
    moves = _length(flow[y, x]) > SLOW * full
    starts = np.stack((x[moves], y[moves]), -1).astype(np.float32)
    paths = np.stack([*_streamed(starts, -flow, full, apart)[:0:-1], *_streamed(starts, flow, full, apart)], 1)
    colors = flow_to_color(flow, full)[starts[:, 1].astype(int), starts[:, 0].astype(int)]
    dimmed = np.rint(image * 0.45).astype(np.uint8)
    fine = Image.fromarray(dimmed).resize((2 * width, 2 * height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(fine)
    for path, color in zip(paths, colors):
        draw.line(
            [tuple(point) for point in 2 * path + 1], fill=tuple(int(part) for part in color), width=3, joint="curve"
        )
    return np.asarray(fine.reduce(2))


def _streamed(starts: np.ndarray, flow: np.ndarray, scale: float, every: int) -> list[np.ndarray]:
    """Points along the field from the starts [P, 2]: a list of [P, 2], 12 steps long; they stay where the field is slow."""
    height, width = flow.shape[:2]

    def along(points: np.ndarray) -> np.ndarray:
        column = np.clip(np.rint(points[:, 0]), 0, width - 1).astype(int)
        row = np.clip(np.rint(points[:, 1]), 0, height - 1).astype(int)
        vectors = flow[row, column]
        length = _length(vectors)
        return vectors * (np.where(length > SLOW * scale, every / 8, 0) / np.maximum(length, 1e-9))[:, None]

    paths = [starts]
    for _ in range(12):
        middle = paths[-1] + along(paths[-1]) / 2
        paths.append(paths[-1] + along(middle))
    return paths


def trails(image: np.ndarray, points: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Returns the image [H, W, 3] uint8 with tracked points and where they came from.

    Each point keeps one color, which tells its place in the first of the frames given. A trail is thin and fades
    backwards; a point that is hidden now is an empty ring.

    Args:
        image: the frame that is shown, the last one of those given.
        points: [N, T, 2] x and y in pixels, in the last T frames up to this one.
        visible: bool [N, T].
    """
    image = _checked_picture(image)
    points, visible = np.asarray(points, np.float32), np.asarray(visible, bool)
    if points.ndim != 3 or points.shape[2] != 2 or visible.shape != points.shape[:2] or not points.shape[1]:
        raise FleetflowError(
            f"points is {_seen(points)} and visible {_seen(visible)}; expected [N, T, 2] and [N, T], T of 1 or more"
        )
    height, width = image.shape[:2]
    fine = Image.fromarray(image).resize((2 * width, 2 * height), Image.Resampling.BILINEAR)
    draw, radius = ImageDraw.Draw(fine, "RGBA"), max(height, width) / 200 + 2.5
    places = points[:, 0] / np.array((max(width - 1, 1), max(height - 1, 1)), np.float32)
    frames = points.shape[1]
    for path, seen, (x, y) in zip(2 * points + 1, visible, np.clip(places, 0, 1)):
        color = tuple(int(part) for part in (255 * x, 255 * (1 - x) * (1 - 0.6 * y) + 60 * y, 255 * y))
        for k in range(frames - 1):
            if seen[k] and seen[k + 1]:
                opacity = round(40 + 190 * (k + 1) / frames)
                draw.line(
                    [tuple(path[k]), tuple(path[k + 1])], fill=(*color, opacity), width=max(round(radius * 0.8), 2)
                )
        x, y = path[-1]
        box = (x - radius, y - radius, x + radius, y + radius)
        if seen[-1]:
            draw.ellipse(box, fill=(*color, 255), outline=(255, 255, 255, 200))
        else:
            draw.ellipse(box, outline=(*color, 130), width=2)
    return np.asarray(fine.reduce(2))


def _arrow(x: int, y: int, motion: np.ndarray, stroke: float, longest: float) -> tuple:
    """Returns an arrow in pixels of the image: line [2, 2], head [3, 2] (None for a dot), and width of the line."""
    start, length = np.array([x + 0.5, y + 0.5]), float(np.hypot(*motion))
    if length < max(stroke, 1.0):
        return np.stack([start, start]), None, stroke
    along = motion.astype(np.float64) / length
    across = np.array([-along[1], along[0]])
    length = min(length, longest)
    tip, head = start + along * length, min(5.0 * stroke + 1, 0.6 * length)
    neck = tip - along * head
    corners = np.stack([tip, neck + across * head * 0.45, neck - across * head * 0.45])
    return np.stack([start, neck]), corners, min(stroke, 0.35 * head)


def _spacing(every: int | None, height: int, width: int) -> int:
    """Pixels between arrows or lines; None gives about 24 along the longer side."""
    every = max(round(max(height, width) / 24), 8) if every is None else every
    if every < 1:
        raise FleetflowError(f"every is {every}; expected at least 1 pixel between arrows; use None for a good one")
    return every


def _stroke(draw: ImageDraw.ImageDraw, line: np.ndarray, width: float, ink: int) -> None:
    """Draws a line [n, 2] in pixels with round ends, on a canvas _FINER times larger."""
    line, radius = line * _FINER, width * _FINER / 2
    draw.line([tuple(point) for point in line], fill=ink, width=max(round(2 * radius), 1))
    for px, py in line:
        draw.ellipse((px - radius, py - radius, px + radius, py + radius), fill=ink)


def error_map(flow: np.ndarray, truth: np.ndarray, *, valid: np.ndarray | None = None) -> np.ndarray:
    """Returns the errors of flow against truth, both [H, W, 2] pixels, in the logarithmic colors of KITTI 2015.

    Blue is small, red large, the steps are ERROR_BOUNDS. An error counts as its length in pixels or, where that is
    less, as 3 px for every 5 % of the true length: the blue pixels are those that KITTI's Fl counts as right.

    Args:
        valid: [H, W] bool. Where the truth is unknown the picture is black; an unknown flow there is the largest error.
    """
    truth, judged = _known(truth, valid, name="truth")
    flow, known = _known(flow)
    _same_size("flow", flow, "truth", truth)
    error, length = _length(flow - truth), _length(truth)
    relative = np.divide(error, length, out=np.full_like(error, np.inf), where=length > 0)
    error = np.minimum(error, relative * np.float32(ERROR_LIMIT / ERROR_FRACTION))
    error[~known] = np.inf
    picture = np.array(ERROR_COLORS, np.uint8)[np.searchsorted(ERROR_BOUNDS, error, side="right")]
    picture[~judged] = 0
    return picture


def occlusion_picture(image: np.ndarray, occluded: np.ndarray) -> np.ndarray:
    """Returns the image [H, W, 3] uint8 in gray, with the pixels where occluded [H, W] bool is True in red."""
    image = _checked_picture(image)
    occluded = _checked_mask("occluded", occluded, image.shape[:2])
    picture = np.array(Image.fromarray(image).convert("L").convert("RGB"))
    picture[occluded] = _mix(picture[occluded], OCCLUDED_COLOR, OCCLUDED_MIX)
    return picture


def side_by_side(*pictures: np.ndarray, titles: tuple[str, ...] = ()) -> np.ndarray:
    """Returns pictures [H, W, 3] uint8 in one row with small white gaps, each under its title if titles are given.

    All get the height of the tallest; their proportions stay. A title too long for its picture is cut.
    """
    if not pictures:
        raise FleetflowError("side_by_side got no picture; expected one or more; pass arrays [H, W, 3]")
    if titles and len(titles) != len(pictures):
        raise FleetflowError(f"{len(titles)} titles for {len(pictures)} pictures; give one title for each, or none")
    height = max(_checked_picture(picture).shape[0] for picture in pictures)
    gap = min(max(height // 40, 2), 16)
    font = ImageFont.load_default(min(max(height / 18, 11), 32))
    strip = sum(font.getmetrics()) + gap if titles else 0  # pyright: ignore[reportAttributeAccessIssue]
    widths = [max(round(picture.shape[1] * height / picture.shape[0]), 1) for picture in pictures]
    row = Image.new("RGB", (sum(widths) + gap * (len(pictures) - 1), height + strip), GAP_COLOR)
    draw, left = ImageDraw.Draw(row), 0
    for place, (picture, width) in enumerate(zip(pictures, widths, strict=True)):
        tile = Image.fromarray(picture)
        if picture.shape[0] != height:
            tile = tile.resize((width, height), Image.Resampling.BICUBIC)
        row.paste(tile, (left, strip))
        if titles:
            title = _cut(titles[place], font, width)
            draw.text((left + (width - font.getlength(title)) // 2, gap // 2), title, fill=TITLE_COLOR, font=font)
        left += width + gap
    return np.array(row)


def contact_sheet(pictures: Sequence[np.ndarray | None], captions: Sequence[str], width: int = 256) -> np.ndarray:
    """Returns pictures [H, W, 3] uint8 in rows of up to six, each `width` pixels wide, with its caption of one or two lines.

    Args:
        pictures: one or more; None is an empty gray field.
        captions: one for each.
        width: pixels of each picture.
    """
    if not pictures or len(pictures) != len(captions):
        raise FleetflowError(f"{len(pictures)} pictures and {len(captions)} captions were given; expected one for each")
    empty = np.full((9, 16, 3), 128, np.uint8)
    tiles = [Image.fromarray(_checked_picture(empty if picture is None else picture)) for picture in pictures]
    tiles = [tile.resize((width, max(round(tile.height * width / tile.width), 1))) for tile in tiles]
    font = ImageFont.load_default(max(width / 20, 10))
    line = sum(font.getmetrics()) + 2  # pyright: ignore[reportAttributeAccessIssue]
    gap, columns = 8, min(len(tiles), 6)
    cell = max(tile.height for tile in tiles) + 2 * line + gap
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * cell + gap), GAP_COLOR)
    draw = ImageDraw.Draw(sheet)
    for place, (tile, caption) in enumerate(zip(tiles, captions)):
        left, top = gap + place % columns * (width + gap), gap + place // columns * cell
        sheet.paste(tile, (left, top))
        for number, text in enumerate(caption.split("\n")[:2]):
            at = (left, top + cell - 2 * line - gap + number * line)
            draw.text(at, _cut(text, font, width), fill=TITLE_COLOR, font=font)
    return np.array(sheet)


def _cut(title: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Returns the title, or as much of it with "..." as fits into `width` pixels ("" if nothing does)."""
    shorter = [title] + [title[:end].rstrip() + "..." for end in range(len(title) - 1, 0, -1)] + [""]
    return next(text for text in shorter if font.getlength(text) <= width)


def _mix(below: np.ndarray, above: np.ndarray | tuple[int, int, int], opacity: np.ndarray | float) -> np.ndarray:
    """Returns `above` (a picture, or one color) laid over `below`, uint8 rounded; opacity in 0..1."""
    return np.rint(below + (np.asarray(above, np.float32) - below) * opacity).astype(np.uint8)


def _length(flow: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(flow).sum(-1))


def _known(
    flow: np.ndarray, valid: np.ndarray | None = None, *, name: str = "flow", clip: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the flow as float32 with 0 at unknown pixels, and a mask of the known ones."""
    sizes = (3, 4) if clip else (3,)
    number = isinstance(flow, np.ndarray) and flow.dtype.kind in "fiu"
    if not number or flow.ndim not in sizes or flow.shape[-1] != 2 or not flow.size:
        fix = "for a tensor [2, H, W] use flow.permute(1, 2, 0).cpu().numpy()"
        raise FleetflowError(f"{name} is {_seen(flow)}; expected a numpy array [H, W, 2] of pixels; {fix}")
    flow = flow.astype(np.float32)
    with np.errstate(invalid="ignore"):
        known = np.asarray((np.abs(flow) < UNKNOWN_FLOW).all(-1))  # False for NaN
    if valid is not None:
        known &= _checked_mask("valid", valid, flow.shape[:-1])
    flow[~known] = 0
    return flow, known


def _checked_mask(name: str, mask: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != size:
        wanted = ",".join(map(str, size))
        raise FleetflowError(f"{name} is {_seen(mask)}; expected a numpy array [{wanted}] of bool; compare it with 0")
    return mask


def _checked_picture(picture: np.ndarray) -> np.ndarray:
    good = isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3
    if not good or picture.shape[-1] != 3 or not picture.size:
        fix = "multiply by 255 and convert, or repeat a gray channel"
        raise FleetflowError(f"the picture is {_seen(picture)}; expected a numpy array [H, W, 3] of uint8 RGB; {fix}")
    return picture


def checked_scale(scale: float) -> float:
    """Returns the scale in pixels; raises FleetflowError for one that no color can show."""
    low, high = SCALES
    try:
        number = math.nan if isinstance(scale, str) else float(scale)  # of an array or a tensor that holds one, too
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not low <= number <= high:
        wanted = f"pixels over 0 ({low:g} to {high:g})"
        raise FleetflowError(f"scale is {scale!r}; expected {wanted}; use robust_scale(flow) for a good one")
    return number


def _same_size(name: str, one: np.ndarray, other_name: str, other: np.ndarray) -> None:
    if one.shape[:2] != other.shape[:2]:
        sizes = f"{name} is {_seen(one)} and {other_name} {_seen(other)}"
        raise FleetflowError(f"{sizes}; both must have the same height and width; resize one of them")


def _seen(value: Any) -> str:
    """Returns what a value is, for an error message: [436,1024,2] float32."""
    if not hasattr(value, "shape"):
        return f"a {type(value).__name__}"
    kind = "" if isinstance(value, np.ndarray) else f"{type(value).__name__} "
    return f"{kind}[{','.join(map(str, value.shape))}] {value.dtype}"
