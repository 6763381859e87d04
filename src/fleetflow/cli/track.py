"""The command `fleetflow track`."""

from pathlib import Path
from typing import Annotated

import tyro

from fleetflow.cli.console import bar
from fleetflow.cli.options import Positional, Precision
from fleetflow.cli.outputs import make_room
from fleetflow.types import FleetflowError

TRAIL = 12  # frames
COMMENT = "points of fleetflow track"  # in the overlay, by which it is known to be ours


def track(
    video: Positional[Path],
    /,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("tracks.npz"),
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "fastflownet",
    grid: int | None = None,
    points: Path | None = None,
    gaps: tuple[int, ...] = (1, 2, 4, 8),
    frames: str | None = None,
    every: int = 1,
    overlay: bool = True,
    size: tuple[int, int] | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    threads: int = 0,
) -> None:
    """Follow points through a video: through short occlusions, too.

    Args:
        video: the file.
        output: tracks.npz (tracks [N, T, 2] x and y in pixels, occluded [N, T], uncertainty [N, T], as TAP-Vid lays them
            out) or tracks.csv (a line for each point and frame); the overlay is a video of that name, .mp4.
        model: a network, NETWORK:CHECKPOINT, or a file that `fleetflow export` wrote.
        grid: follow points of the first frame, one on every so many pixels; 32 if no points are given.
        points: a file .csv or .npy with a line for each point: x y, or frame x y.
        gaps: frames that flows reach over; each costs two flows a frame.
        frames: A:B, from frame A (0 is the first) up to B, which is left out.
        every: take every second frame of these, and so on.
        overlay: also write a video with the points and their trails.
        size: height and width at which the network sees the frames.
        device: auto, cpu, cuda, cuda:1, mps, ...
        precision: of the convolutions; auto takes bf16 where the processor is faster in it.
        threads: 0 takes all.

    Examples:
        fleetflow track clip.mp4 --grid 16 -o tracks.npz
        fleetflow track clip.mp4 --grid 24 --gaps 1 4 -o tracks.csv --no-overlay
    """
    from fleetflow.inference.device import use_threads
    from fleetflow.inference.predictor import Predictor
    from fleetflow.io.tracks import SUFFIXES, read_points, write_tracks
    from fleetflow.io.video import VideoReader, comment_of, frame_slice
    from fleetflow.motion import tracks as job

    if output.suffix.lower() not in SUFFIXES:
        raise FleetflowError(f'{output} has the suffix "{output.suffix}"; expected {" or ".join(SUFFIXES)}')
    if grid is not None and points is not None:
        raise FleetflowError("both --grid and --points were given; give one of them")
    if points is not None and output.exists() and output.samefile(points):
        raise FleetflowError(f"{output} holds the points that are asked for; choose another output")
    use_threads(threads)
    wanted = frame_slice(frames, every)
    reader = VideoReader(video, start=wanted.start, stop=wanted.stop, every=wanted.step)
    begins = read_points(points) if points else job.grid((reader.height, reader.width), 32 if grid is None else grid)
    predictor = Predictor(model, device=device, precision=precision, size=size)
    film = output.with_suffix(".mp4") if overlay else None
    if film is not None and film.exists() and film.samefile(video):
        raise FleetflowError(f"the overlay would replace {video}; choose another output, or --no-overlay")
    if film is not None and film.exists() and comment_of(film) != COMMENT:
        raise FleetflowError(
            f"{film} is there and is not ours, and the overlay would replace it; choose another output, or --no-overlay"
        )
    make_room(output, film)
    total = None if reader.frames is None else len(range(reader.frames)[wanted])
    with bar(f"points of {video.name}") as progress, _Overlay(film, reader) as overlaid:
        moments = []
        for frame, moment in job.follow(reader, begins, predictor, gaps):
            moments.append(moment)
            overlaid.write(frame, moments)
            progress((len(moments), total))
        if not moments:
            raise FleetflowError(
                reader.problem or f"{video} has no frame in --frames {frames}; choose frames that it has"
            )
        write_tracks(output, *job.Tracks.of(moments))  # before the overlay, which stands beside them
    print(output, *([film] if film else []), sep="\n")
    if reader.problem:
        raise FleetflowError(f"{reader.problem} (what could be read was followed)")


class _Overlay:
    """The video with the points, or nothing where none is wanted."""

    def __init__(self, path: Path | None, reader):
        from fleetflow.io.video import VideoWriter

        clock = {"time_base": reader.time_base, "comment": COMMENT}
        self.writer = None if path is None else VideoWriter(path, reader.fps / reader.every, **clock)

    def write(self, frame, moments: list) -> None:
        from fleetflow.motion.tracks import Tracks
        from fleetflow.visualise import trails

        if self.writer is not None:
            recent = Tracks.of(moments[-TRAIL:])
            self.writer.write(trails(frame, recent.points, recent.visible), frame.time)

    def __enter__(self) -> "_Overlay":
        if self.writer is not None:
            self.writer.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self.writer is not None:
            self.writer.__exit__(*error)
