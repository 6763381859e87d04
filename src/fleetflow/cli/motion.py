"""The command `fleetflow motion`."""

from pathlib import Path
from typing import Annotated

import tyro

from fleetflow.cli.console import bar
from fleetflow.cli.options import Positional, Precision
from fleetflow.cli.outputs import make_room
from fleetflow.types import FleetflowError


def motion(
    clips: Positional[tuple[Path, ...]],
    /,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("motion.csv"),
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "fastflownet",
    sheet: Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    threads: int = 0,
) -> None:
    """Score how clips move: how much, by the camera or by objects, shake, cuts, periods, sharpness.

    Each clip becomes a row; docs/guides/motion.md says what each column means. A clip that cannot be read becomes a row
    with its problem, and the others go on.

    Args:
        clips: videos, and folders of videos (looked through to the bottom).
        output: motion.csv, motion.json or motion.parquet (needs the extra "batch").
        model: a network, NETWORK:CHECKPOINT, or a file that `fleetflow export` wrote; or dis, the classical method of
            OpenCV: quicker, and less exact where pictures are noisy.
        sheet: also a picture .png or .jpg with a thumbnail of each clip under its figures.
        device: auto, cpu, cuda, cuda:1, mps, ...
        precision: of the convolutions; auto takes bf16 where the processor is faster in it.
        threads: on the processor as many clips are scored at a time; 0 takes all.

    Examples:
        fleetflow motion clip.mp4 -o motion.csv
        fleetflow motion clip.mp4 -o motion.json --sheet motion.png
    """
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial

    from fleetflow.inference.device import use_threads
    from fleetflow.inference.predictor import Predictor
    from fleetflow.io.images import check_suffix, write_image
    from fleetflow.io.table import check_table, write_table
    from fleetflow.motion import scores
    from fleetflow.visualise import contact_sheet

    check_table(output)
    if sheet is not None:
        check_suffix(sheet)
    videos = _videos(clips)
    make_room(output, sheet, inputs=videos)
    use_threads(threads)
    network = _classical(model) if model == "dis" else Predictor(model, device=device, precision=precision)
    rows, thumbnails = [], []
    with bar("motion", unit="clips") as progress, ThreadPoolExecutor(_at_a_time(network, len(videos))) as pool:
        for number, (row, picture) in enumerate(pool.map(partial(scores.row_of, network=network), videos), 1):
            rows.append(row)
            thumbnails.append(picture if sheet is not None else None)
            progress((number, len(videos)))
    write_table(output, rows)
    if sheet is not None:
        write_image(sheet, contact_sheet(thumbnails, [scores.caption(row) for row in rows]))
    print(output, *([sheet] if sheet else []), sep="\n")
    bad = [row for row in rows if row["problem"]]
    if bad:
        raise FleetflowError(f"{len(bad)} of {len(rows)} clips could not be scored, the first: {bad[0]['problem']}")


def _videos(clips: tuple[Path, ...]) -> list[Path]:
    """The videos given, and those below the folders given."""
    from fleetflow.batch.manifest import VIDEO_SUFFIXES, clips_in

    videos = []
    if not clips:
        raise FleetflowError("no clip was given; give videos, or a folder of videos")
    for clip in clips:
        if not clip.exists():
            raise FleetflowError(f"{clip} does not exist; give videos, or a folder of videos")
        below = [Path(item.input) for item in clips_in(clip)] if clip.is_dir() else [clip]
        videos += [path for path in below if clip.is_file() or path.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        raise FleetflowError(f"{clips[0]} holds no video; give videos, or a folder of videos")
    return videos


def _at_a_time(network, clips: int) -> int:
    """How many clips are scored side by side. Their pictures are too small for threads to share one."""
    import torch

    from fleetflow.inference.exported import ExportedModel
    from fleetflow.inference.predictor import Predictor

    if not isinstance(network, Predictor) or network.device.type != "cpu" or isinstance(network.model, ExportedModel):
        return 1  # OpenCV's object, a GPU or another runtime is one for all
    threads = torch.get_num_threads()
    count = min(threads, clips)
    torch.set_num_threads(threads // count)
    return count


def _classical(name: str):
    from fleetflow.evaluation.baselines import classical

    return classical(name)
