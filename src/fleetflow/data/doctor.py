"""Doctor: is a data set on disk complete and readable, and does its flow point the way we read it."""

import typing
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fleetflow.data.dataset import Files, datasets
from fleetflow.ops.warp import inside, warp
from fleetflow.types import FleetflowError, Sample, size_of

# Pairs of the complete set under the reader's own options, as its authors or users of the official archives state.
COMPLETE = {
    "autoflow": 40_000,
    "flyingchairs": 22_232,
    "flyingchairs2": 22_232,
    "flyingthings3d": 40_302,
    "hd1k": 1_047,
    "kitti2012": 194,
    "kitti2015": 200,
    "middlebury": 8,
    "sintel": 1_041,
    "spring": 4_963,  # 5,000 frames in 37 scenes
}
# Masks of a complete set -> where they lie, and what an evaluation lacks without them.
BY_OCCLUSION = "the errors of visible and of occluded pixels"
MASKS = {
    "kitti2012": {"noc": ("training/flow_noc", BY_OCCLUSION)},
    "kitti2015": {"noc": ("training/flow_noc", BY_OCCLUSION), "foreground": ("training/obj_map", "Fl-bg and Fl-fg")},
    "sintel": {
        "occluded": ("training/occlusions", f"{BY_OCCLUSION}, and Sintel's own boundaries"),
        "invalid": ("training/invalid", "the pixels to leave out (published scores count them)"),
    },
}
CLIP = 0.2  # of a color difference in [0, 1]: beyond it a pixel does not match, however much
MARGIN = 0.75  # another reading is suspected when its error is below this share of ours; a sound pair can reach 0.82
ENOUGH = 200  # pixels that the readings must differ on

# How a flow [2, H, W] may have been stored other than we read it. "frame2 to frame1" also exchanges the frames.
READINGS = {
    "negated": lambda flow: -flow,
    "with u and v exchanged": lambda flow: flow.flip(0),
    "with v upwards": lambda flow: flow * flow.new_tensor([1.0, -1.0]).view(2, 1, 1),
    "upside down": lambda flow: flow.flip(1),
    "half as long": lambda flow: flow / 2,
    "twice as long": lambda flow: flow * 2,
    "from frame2 to frame1": lambda flow: flow,
}


class Part(NamedTuple):
    """One way to call the reader, and what came of it."""

    options: str
    pairs: int
    problem: str | None


class Opened(NamedTuple):
    """One pair that was read."""

    name: str
    height: int
    width: int
    unknown: float  # share of pixels whose flow is not known (not-a-number, marked, or kept back)
    length: float  # mean length of the known vectors, pixels
    longest: float
    extras: str  # what the set knows besides: masks, backward flow


class Report(NamedTuple):
    """What was found. problems make the set unfit for use; remarks need not."""

    parts: list[Part]
    opened: list[Opened]
    readings: dict[str, float]  # another reading -> its photometric error over that of ours; below 1 it fits better
    problems: list[str]
    remarks: list[str]


def check(name: str, root: Path, *, samples: int = 8) -> Report:
    """Returns what is on disk of a data set: pairs of every part, `samples` opened pairs, other readings of the flow.

    Parts are the values of the reader's options, one changed at a time.

    Raises:
        FleetflowError: For an unknown name and for fewer samples than one.
    """
    reader = datasets[name]
    if samples < 1:
        raise FleetflowError(f"--samples is {samples}; a data set is judged by pairs that are opened: give 1 or more")
    parts, problems, remarks = [], [], []
    files = None
    for option in ({}, *_options(reader)):
        words = ", ".join(f"{key}={value}" for key, value in option.items()) or "as read by default"
        try:
            found = reader(root, **option)
        except FleetflowError as error:
            parts.append(Part(words, 0, str(error)))
            continue
        files = found if files is None else files
        parts.append(Part(words, len(found), None))
    if files is None:
        return Report(parts, [], {}, [str(parts[0].problem)], remarks)
    if parts[0].problem:
        problems.append(parts[0].problem)
    remarks += [f"{part.options}: {part.problem}" for part in parts[1:] if part.problem]
    expected = COMPLETE.get(name)
    if expected and 0 < parts[0].pairs < expected:
        remarks.append(f"{parts[0].pairs:,} of {expected:,} pairs are there: archives are missing or not unpacked")
    opened, readings, unreadable, unfit = _open(files, samples, MASKS.get(name, {}))
    return Report(parts, opened, readings, problems + unreadable + _judge(opened, readings), remarks + unfit)


def _options(reader) -> list[dict[str, str]]:
    """Returns every value of every Literal option of the reader that is not its default."""
    defaults = reader.__kwdefaults__ or {}
    kinds = {key: kind for key, kind in typing.get_type_hints(reader).items() if typing.get_origin(kind) is Literal}
    return [{key: value} for key, kind in kinds.items() for value in typing.get_args(kind) if value != defaults[key]]


def _open(
    files: Files, samples: int, expected: dict[str, tuple[str, str]]
) -> tuple[list[Opened], dict[str, float], list[str], list[str]]:
    """Returns the opened pairs, the readings, problems, and remarks on masks; expected: a row of MASKS."""
    opened, problems, remarks, absent = [], [], [], Counter()
    sums = {reading: torch.zeros(3, dtype=torch.float64) for reading in READINGS}
    count = min(samples, len(files))
    for k in (round(place * (len(files) - 1) / max(count - 1, 1)) for place in range(count)):
        try:
            sample, masks = files.complete(k), files.masks(k)
        except FleetflowError as error:
            problems.append(str(error))
            continue
        pair, size = files.pairs[k], size_of(sample.valid)
        for key, mask in masks.items():
            if mask.shape != size:
                sizes = f"{mask.shape[0]}x{mask.shape[1]} and its frames are {size[0]}x{size[1]}"
                remarks.append(f'the mask "{key}" of {pair.group}/{pair.name} is {sizes}: it cannot be used')
        if sample.occluded is not None and size_of(sample.occluded) != size:
            sample = sample._replace(occluded=None)
        absent.update(expected.keys() - masks.keys() if pair.truth else ())  # test sets have none
        extras = [*masks, *(["backward flow"] if sample.backward is not None else [])]
        length = sample.flow.square().sum(0).sqrt()[sample.valid]
        known = len(length) > 0
        opened.append(
            Opened(
                f"{pair.group}/{pair.name}", *size, 1 - sample.valid.float().mean().item(),
                length.mean().item() if known else 0.0, length.max().item() if known else 0.0, ", ".join(extras),
            )
        )  # fmt: skip
        if known:
            for reading, numbers in photometric(sample).items():
                sums[reading] += numbers
    remarks += [
        f'{absent[key]} of {len(opened)} opened pairs have no mask "{key}" ({place}): archives are missing or not '
        f"unpacked; measures will lack {lost}"
        for key, (place, lost) in expected.items()
        if absent[key]
    ]
    tiny = 1e-5  # of a color difference: frames that do not change fit every reading alike
    readings = {key: (other + tiny * n) / (ours + tiny * n) for key, (ours, other, n) in sums.items() if n >= ENOUGH}
    return opened, {key: ratio.item() for key, ratio in readings.items()}, problems, remarks


def photometric(sample: Sample) -> dict[str, Tensor]:
    """Returns for each reading [3]: the photometric error of the flow as it is, that of the reading, and the pixels.

    The errors are sums over the pixels where both are known, differ by over one pixel, and stay in the picture.
    """
    frames, flow = (sample.frame1[None], sample.frame2[None]), sample.flow
    known = sample.valid if sample.occluded is None else sample.valid & ~sample.occluded
    ours = _difference(frames[0], frames[1], flow)
    found = {}
    for reading, change in READINGS.items():
        other, exchanged = change(flow), reading == "from frame2 to frame1"
        differ = (flow if exchanged else other - flow).square().sum(0) > 1
        mask = known & differ & inside(torch.stack((flow, other))).all(0)
        if reading == "upside down":
            mask &= sample.valid.flip(0)
        theirs = _difference(frames[exchanged], frames[not exchanged], other)
        found[reading] = torch.stack((ours[mask].sum(), theirs[mask].sum(), mask.sum())).double()
    return found


def _difference(frame1: Tensor, frame2: Tensor, flow: Tensor) -> Tensor:
    """Returns [H, W], how far frame1(x) is from frame2(x + flow(x)), at most CLIP."""
    return (frame1 - warp(frame2, flow[None]))[0].abs().mean(0).clamp(max=CLIP)


def _judge(opened: list[Opened], readings: dict[str, float]) -> list[str]:
    problems = []
    if opened and all(pair.unknown == 1 for pair in opened):
        problems.append("no opened pair has a known pixel; the truth is missing, or kept back as in test sets")
    reading = min(readings, key=lambda reading: readings[reading], default=None)
    if reading and readings[reading] < MARGIN:
        share = 100 * (1 - readings[reading])
        problems.append(f"the flow fits the frames {share:.0f} % better {reading}; check how the files were made")
    return problems
