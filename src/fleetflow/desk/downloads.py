"""Results of the desk as files, as `fleetflow predict` writes them: one pair, or a whole clip."""

import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from fleetflow.desk.jobs import Job
from fleetflow.inference.files import PART_FRAMES
from fleetflow.inference.results import BOTH_WAYS, FORMATS, PICTURES, Result, known_formats, picture, write
from fleetflow.io.video import VideoWriter, join_videos
from fleetflow.types import FleetflowError


def offered(job: Job) -> list[str]:
    """Returns the formats that a finished job can be written in: it has what they need, and so has this machine."""
    found = []
    for kind in FORMATS:
        if kind not in BOTH_WAYS or kind in job.planes:
            with suppress(FleetflowError):  # OpenEXR is missing
                found += known_formats([kind], None)
    return found


def pair_name(job: Job, kind: str, k: int) -> str:
    """Returns the name of pair k in one of FORMATS; those of a clip are numbered."""
    stem = Path(job.request.names[0]).stem
    return FORMATS[kind].format(f"{stem}_{k:06d}" if job.is_clip else stem)


def write_pair(job: Job, kind: str, k: int, path: Path) -> None:
    """Writes pair k in one of the formats that are offered."""
    write(path, kind, _result(job, k), job.scale)


def clip_name(job: Job, kind: str) -> str:
    """Returns the name of a whole clip in one of FORMATS: a film of pictures, or a zip of numbered files."""
    return f"{Path(job.request.names[0]).stem}_{kind}.{'mp4' if kind in PICTURES else 'zip'}"


def write_clip(job: Job, kind: str, path: Path) -> None:
    """Writes a whole clip in one of the formats that are offered.

    Args:
        job: finished, of a clip.
        kind: a format; those in PICTURES become one mp4 with the times and the sound of the clip, others a zip of the
            files that `predict` numbers.
        path: the file, alone in its folder.
    """
    if kind in PICTURES:
        films = []
        for start in range(0, job.done, PART_FRAMES):  # parts as those of `predict`, so that the bytes are the same
            films.append(path.with_name(f"part_{start}.mp4"))
            with VideoWriter(films[-1], job.rate, time_base=job.time_base) as writer:
                for k in range(start, min(start + PART_FRAMES, job.done)):
                    image = picture(kind, _result(job, k), job.scale)
                    writer.write(image, job.times[k], job.times[k + 1] - job.times[k])
        source = job.request.sources[0]
        join_videos(films, path, audio=source if source.exists() else None)
        return
    with zipfile.ZipFile(path, "w") as archive:  # stored: flow hardly gets smaller
        for k in range(job.done):
            part = path.with_name(pair_name(job, kind, k))
            write_pair(job, kind, k, part)
            archive.write(part, part.name)
            part.unlink()


def _result(job: Job, k: int) -> Result:
    planes = {name: job.array(name, k) for name in job.planes}
    if "occlusion" in planes:
        planes["occlusion"] = planes["occlusion"] / np.float32(255)
    return Result(job.array("frame", k), job.array("flow", k), **planes)
