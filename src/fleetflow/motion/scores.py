"""How a clip moves, in a row of numbers: to sort and choose clips by, without looking at them.

Lengths are counted at a width of 256 pixels, whatever the clip's own: `256 px/s` is one width of the picture a second.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter

from fleetflow.io.table import Value
from fleetflow.io.video import VideoReader
from fleetflow.motion.camera import affine_flows
from fleetflow.motion.cuts import START, Look, is_cut
from fleetflow.motion.evidence import NOISE, contrasts, fit_cameras, moved_beside
from fleetflow.motion.tracks import Network
from fleetflow.types import FleetflowError

WIDTH = 256  # pixels at which clips are looked at
RATE = 12.0  # looked-at frames a second
RUNS, RUN = 4, 16  # parts of a clip whose flow is predicted, and pairs of each
WHOLE = 12.0  # seconds up to which all of a clip is looked through for cuts and periods; of a longer one its runs alone

MOVES = 6.0  # px/s from which a pixel, or a part of the motion, counts as moving
PERIODIC = 0.5  # strength from which a clip counts as periodic
SHORTEST = 0.33  # seconds of a period
STILL = 0.05  # mean difference of small pictures, in deviations, that noise alone may make


@dataclass(frozen=True)
class ClipMotion:
    """How a clip moves. px are pixels at a width of 256; per second means of the clip's own time."""

    seconds: float  # length of the clip
    looked: float  # seconds of it that were looked through for cuts and periods
    pairs: int  # pairs of frames whose flow was predicted
    kind: str  # "static", "camera", "objects" or "camera and objects": what moves by 6 px/s or more
    motion: float  # px/s: mean length of the flow
    moving_share: float  # 0 to 1: of the picture that moves by 6 px/s or more
    camera: float  # px/s: mean length of the part that a pan, zoom and roll of the whole picture explain
    objects: float  # px/s: mean length of what is left
    pan_x: float  # px/s to the right: that of the picture; a camera that turns to the right moves it to the left
    pan_y: float  # px/s downwards
    zoom: float  # percent a second; over 0: things grow
    roll: float  # degrees a second; over 0: the picture turns clockwise
    shake: float  # px: how far the picture is off an even path, seen 12 times a second
    cuts: int  # other shots that begin in what was looked through
    period: float  # seconds after which the picture comes back; not a number where it does not
    periodic: float  # 0 to 1: how well it does
    sharpness: float  # 0 to 1: fine detail of what moves, beside coarse; not a number where nothing does


COLUMNS = tuple(field.name for field in fields(ClipMotion))


def score(source: str | Path | Sequence[np.ndarray], network: Network, fps: float | None = None) -> ClipMotion:
    """Returns how a clip moves.

        fleetflow.motion.score("clip.mp4", fleetflow.Predictor("fastflownet")).camera

    At most 64 pairs are predicted, in four runs spread over the clip, each frame 256 pixels wide. A video is sought, not
    decoded from its beginning, where it is longer than 12 seconds and its file allows that.

    Args:
        source: a video, or its frames, uint8 [H, W, 3] RGB.
        network: from two pictures to the flow [H, W, 2] between them: a `fleetflow.Predictor`, or any function.
        fps: frames a second, for frames that know no time; None takes 25.

    Raises:
        FleetflowError: if there is no video, it is damaged, or it has fewer than two frames.
    """
    return measure(source, network, fps)[0]


def measure(
    source: str | Path | Sequence[np.ndarray], network: Network, fps: float | None = None
) -> tuple[ClipMotion, np.ndarray]:
    """Returns what `score` does, and the looked-at frame in the middle, uint8 [h, 256, 3]."""
    if not callable(network):
        raise FleetflowError(
            f"network is a {type(network).__name__}; expected a Predictor, or a function of two pictures"
        )
    if fps is not None and not (isinstance(fps, Real) and 0 < fps < math.inf):
        raise FleetflowError(f"fps is {fps!r}; expected frames a second, more than 0")
    parts, rate, seconds = _of_video(source) if isinstance(source, str | Path) else _of_frames(source, fps)
    found = [_shots(part, 1 / rate) for part in parts]
    if damaged := [part.problem for part in parts if isinstance(part, VideoReader) and part.problem]:
        raise FleetflowError(damaged[0])
    shots = [shot for each in found for shot in each]
    looked = sum(map(len, shots))
    if looked < 2:
        name = source if isinstance(source, str | Path) else "the clip"
        raise FleetflowError(f"{name} has one frame; a motion needs two: give a longer clip")
    runs = [_measured(run, network) for run in _runs(shots)]
    pairs = [pair for run in runs for pair in run]
    period, strength = _period(max(shots, key=len))
    lasted = sum(pair.seconds for pair in pairs)
    means = {name: sum(getattr(pair, name) for pair in pairs) / (lasted or 1.0) for name in _Pair._fields[:7]}
    kinds = [name for name in ("camera", "objects") if means[name] >= MOVES]
    clip = ClipMotion(
        seconds=round(seconds, 3),
        looked=round(min(looked * _interval(shots, 1 / rate), seconds), 3),
        pairs=len(pairs),
        kind=" and ".join(kinds) or "static",
        moving_share=sum(pair.seconds * float(_moving(pair).mean()) for pair in pairs) / (lasted or 1.0),
        shake=_shake(runs),
        cuts=len(shots) - len(found),
        period=period,
        periodic=strength,
        sharpness=_sharpness(pairs),
        **means,
    )
    frames = [frame.picture for shot in shots for frame in shot]
    return clip, frames[len(frames) // 2]


def row_of(path: Path, network: Network) -> tuple[dict[str, Value], np.ndarray | None]:
    """Returns a row of a table for a clip, and a picture of it; of a clip that cannot be read the row says why."""
    try:
        clip, picture = measure(path, network)
    except FleetflowError as error:
        return {"clip": str(path), **dict.fromkeys(COLUMNS), "problem": str(error)}, None
    return {"clip": str(path), **asdict(clip), "problem": None}, picture


def caption(row: dict[str, Value]) -> str:
    """Returns two lines on a clip, for a sheet: its name, and its main figures."""
    name = Path(str(row["clip"])).name
    if row["problem"]:
        return f"{name}\ncannot be read"
    figures = f"camera {row['camera']:.0f}  objects {row['objects']:.0f}  shake {row['shake']:.1f}"
    return f"{name}\n{figures}" + f"  cuts {row['cuts']}" * bool(row["cuts"])


class _Frame(NamedTuple):
    """What is kept of a looked-at frame."""

    picture: np.ndarray  # uint8 [h, 256, 3]
    look: Look
    time: float  # seconds at which it is shown


class _Pair(NamedTuple):
    """What is measured of two looked-at frames, in pixels, percent and degrees from one to the other."""

    motion: float
    camera: float
    objects: float
    pan_x: float
    pan_y: float
    zoom: float
    roll: float
    seconds: float  # from one to the other
    lengths: np.ndarray  # [h, w] of the flow
    detail: np.ndarray  # [2, h, w] fine and coarse detail of the first frame


def _of_video(path: str | Path) -> tuple[list[Iterable[np.ndarray]], float, float]:
    """The parts of a video to look through, looked-at frames a second, and the length in seconds."""
    reader = VideoReader(path)
    fps = reader.mean_rate
    frames = reader.counted()
    step = _step(fps, frames)
    length = RUN * step + 1
    end = math.ceil(max(WHOLE * fps, RUNS * length))  # up to which the runs would be all of the clip
    if frames is None or frames <= end:
        return [reader.part(0, end, step)], fps / step, (frames or end) / fps
    starts = np.linspace(0, frames - length, RUNS).astype(int).tolist()
    return [reader.part(start, start + length, step) for start in starts], fps / step, frames / fps


def _step(fps: float, frames: int | None) -> int:
    """Every how manyth frame is looked at; of a clip of a few frames still two."""
    step = max(1, round(fps / RATE))
    return step if frames is None else max(1, min(step, frames - 1))


def _of_frames(frames: Sequence[np.ndarray], fps: float | None) -> tuple[list[Iterable[np.ndarray]], float, float]:
    if not isinstance(frames, Sequence | np.ndarray):
        raise FleetflowError(
            f"the clip is a {type(frames).__name__}; expected the path of a video, or a list of frames"
        )
    steps = np.diff([_time(frame) for frame in frames])
    steps = steps[steps > 0]  # of clips one after the other, each with a clock of its own, without those in between
    fps = 1 / float(steps.mean()) if len(steps) else fps or 25.0
    step = _step(fps, len(frames))
    return [frames[::step]], fps / step, len(frames) / fps


def _time(frame: np.ndarray) -> float:
    """Seconds at which a frame is shown; not a number where it does not know."""
    return getattr(frame, "time", math.nan)


def _shots(frames: Iterable[np.ndarray], interval: float) -> list[list[_Frame]]:
    """The looked-at frames, told apart by shots; at least one, which may be empty.

    interval: seconds to the frame before, for frames that know no time.
    """
    shots, state, time = [[]], START, -math.inf
    for frame in frames:
        now = _time(frame)
        time = now if now > time else max(time + interval, 0.0)
        cut, state = is_cut(frame, state)
        if cut:
            shots.append([])
        assert state.last is not None  # of this frame
        height = max(round(frame.shape[0] * WIDTH / frame.shape[1]), 8)
        picture = Image.fromarray(np.asarray(frame)).resize((WIDTH, height), Image.Resampling.BOX)
        shots[-1].append(_Frame(np.asarray(picture), state.last, time))
    return shots


def _interval(shots: list[list[_Frame]], otherwise: float) -> float:
    """Mean seconds from a looked-at frame to the next one of its shot; `otherwise` where no shot has two."""
    spans = [shot[-1].time - shot[0].time for shot in shots if len(shot) > 1]
    return sum(spans) / sum(len(shot) - 1 for shot in shots if shot) if spans else otherwise


def _runs(shots: list[list[_Frame]]) -> list[list[_Frame]]:
    """RUNS parts of the shots, evenly taken, of up to RUN + 1 frames each."""
    parts = [shot[start : start + RUN + 1] for shot in shots for start in range(0, len(shot) - 1, RUN)]
    chosen = sorted({round(place) for place in np.linspace(0, len(parts) - 1, RUNS)}) if parts else []
    return [parts[place] for place in chosen]


def _measured(run: list[_Frame], network: Network) -> list[_Pair]:
    """What is measured of each two frames, in their order, of one shot."""
    pictures, seconds = [frame.picture for frame in run], np.diff([frame.time for frame in run])
    found = np.stack([np.nan_to_num(network(*pair)) for pair in zip(pictures, pictures[1:])])
    flows = torch.from_numpy(found.astype(np.float32)).permute(0, 3, 1, 2)
    planes = contrasts(pictures)
    fits = fit_cameras(flows, planes)
    cameras, objects = affine_flows(fits, flows.shape[2:]), moved_beside(flows, fits, planes)
    return [_pair(*each) for each in zip(pictures, seconds, fits, cameras.numpy(), objects.numpy())]


def _pair(first: np.ndarray, seconds: float, matrix: np.ndarray, camera: np.ndarray, objects: np.ndarray) -> _Pair:
    lengths = np.linalg.norm(camera + objects, axis=0)
    middle = camera[:, camera.shape[1] // 2, camera.shape[2] // 2]
    return _Pair(
        motion=_over_noise(lengths),
        camera=float(np.linalg.norm(camera, axis=0).mean()),
        objects=float(np.linalg.norm(objects, axis=0).mean()),
        pan_x=float(middle[0]),
        pan_y=float(middle[1]),
        zoom=50 * float(np.log(np.linalg.det(matrix[:2, :2]))),
        roll=math.degrees(math.atan2(matrix[1, 0], matrix[0, 0])),
        seconds=float(seconds),
        lengths=lengths,
        detail=_detail(first),
    )


def _over_noise(lengths: np.ndarray, noise: float = NOISE) -> float:
    return float(np.where(lengths > noise, lengths, 0).mean())


def _moving(pair: _Pair) -> np.ndarray:
    """bool [h, w] where a pair moves."""
    return pair.lengths >= MOVES * pair.seconds


def _shake(runs: list[list[_Pair]]) -> float:
    """Root mean square distance of the picture from an even path.

    A pan is compared with the mean speed over the pans before and after; of places that each are off by a variance of 1
    that has a variance of 5.
    """
    apart = []
    for run in runs:
        seconds = np.array([pair.seconds for pair in run])[:, None]
        pans = np.array([(pair.pan_x, pair.pan_y) for pair in run]).reshape(-1, 2)
        apart.append(pans[1:-1] - (pans[:-2] + pans[2:]) / (seconds[:-2] + seconds[2:]) * seconds[1:-1])
    jumps = np.concatenate(apart) if apart else np.zeros((0, 2))
    return float(np.sqrt(np.square(jumps).sum(1).mean() / 5)) if len(jumps) else 0.0


def _period(shot: list[_Frame]) -> tuple[float, float]:
    """After how many seconds the pictures of a shot come back, and how well: 1 when they are the same as before.

    The mean difference of pictures some time apart falls to 0 where that time is a period. It is compared with the
    largest difference at a shorter time.
    """
    times, interval = np.array([frame.time for frame in shot]), _interval([shot], 1.0)
    shown = np.searchsorted(times, times[0] + (np.arange(len(shot)) + 0.5) * interval, "right") - 1  # at even times
    pictures = np.stack([shot[k].look.pixels for k in shown])
    first, last = math.ceil(SHORTEST / interval), len(pictures) // 2
    apart = np.array([np.abs(pictures[lag:] - pictures[: len(pictures) - lag]).mean() for lag in range(last + 1)])
    best, strength = math.nan, 0.0
    for lag in range(max(first, 2), last):
        highest = apart[:lag].max()
        dip = 1 - apart[lag] / highest if highest > STILL else 0.0
        if apart[lag] <= min(apart[lag - 1], apart[lag + 1]) and dip > strength + 0.05:
            best, strength = float(lag * interval), float(dip)
    return (best if strength >= PERIODIC else math.nan), strength


def _detail(picture: np.ndarray) -> np.ndarray:
    """[2, h, w] how much a picture differs from itself smoothed a little, and smoothed a lot."""
    gray = Image.fromarray(picture).convert("L")
    plain = np.asarray(gray, np.float32)
    smooth = [np.asarray(gray.filter(ImageFilter.BoxBlur(radius)), np.float32) for radius in (1, 4)]
    return np.abs(plain - np.stack(smooth))


def _sharpness(pairs: list[_Pair]) -> float:
    """Fine detail over coarse detail where something moves."""
    moving = [_moving(pair) for pair in pairs]
    fine, coarse = (sum(float(pair.detail[k][mask].sum()) for pair, mask in zip(pairs, moving)) for k in (0, 1))
    return min(fine / coarse, 1.0) if coarse > sum(map(np.sum, moving)) else math.nan  # by a level of gray at least
