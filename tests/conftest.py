"""What several test files need: the reference data beside the repository, and small generated inputs."""

import gc
import os
import shutil
import signal
import sys
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from fleetflow.data import generate
from fleetflow.data.datasets import footage
from fleetflow.data.generate import photographs, textures
from fleetflow.evaluation import video_reuse
from fleetflow.inference.fused import available
from fleetflow.io.atomic import write_atomically
from fleetflow.training import loop
from fleetflow.types import FleetflowError

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = Path(__file__).parent / "golden"  # reference outputs that every clone has
SLOW = os.environ.get("FLEETFLOW_SLOW") == "1"  # `make test-all`: every case of what otherwise runs in a few


# Files that take ten seconds and more: they begin first, so that the workers end together.
FIRST = (
    *("train", "export", "adapt", "deq_flow", "train_faults", "triton", "models", "batch_ray", "capture", "recipes"),
    *("desk_browser", "nothing_loses_to_dis", "docs", "memory", "predictor", "raft", "batch", "desk_faults"),
    *("flownet", "benchmark"),
)


def skip_without(dtype: torch.dtype) -> None:
    """Skips a test of a large network in a precision that this processor lacks, where it takes a hundred times as long."""
    if dtype != torch.float32 and not SLOW and not available(dtype):
        pytest.skip(f"this processor has no convolutions in {dtype}: minutes; make test-all runs it")


def hear_signals() -> None:
    """For `preexec_fn`, where a test sends signals: what `nohup` starts is deaf to some, and so is what that starts."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference outputs and real pairs; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference data in ../shared")
    return SHARED


@pytest.fixture(scope="session")
def fill():
    """The module that makes the deterministic weights of the reference outputs."""
    sys.path.insert(0, str(GOLDEN))
    import fill

    return fill


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Two uint8 RGB pictures 40x56; the second is the first moved 2 px to the right."""
    generator = np.random.default_rng(3)
    coarse = generator.integers(0, 256, (10, 15, 3))
    image = np.kron(coarse, np.ones((4, 4, 1))).astype(np.uint8)
    return np.ascontiguousarray(image[:, 2:58]), np.ascontiguousarray(image[:, :56])


def lay_out_example(folder: Path) -> None:
    """Puts into a folder what README and guides speak of: two frames, a folder of frames, a clip, pairs with truth."""
    from fleetflow.io.images import read_image, write_image
    from fleetflow.io.video import VideoWriter

    example = Path(str(resources.files("fleetflow") / "example"))
    for k in (1, 2):
        shutil.copy(example / f"frame{k}.png", folder)
        small = read_image(example / f"frame{k}.png")[:96, :160]
        for name in (f"frames/{k}.png", f"frames/{k + 2}.png"):
            write_image(folder / name, small)
    with VideoWriter(folder / "clip.mp4", 10) as writer:
        for _ in range(3):
            writer.write(small)
    pair = folder / "pairs" / "generated" / "example"
    pair.mkdir(parents=True)
    for source, name in (("frame1", "img1"), ("frame2", "img2"), ("flow", "flow")):
        shutil.copy(example / f"{source}.png", pair / f"{name}.png")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _surfaces_are_drawn_once(request, tmp_path_factory):
    """Procedural surfaces, seconds of drawing, come from a file of the session, which the workers of pytest share.

    Three of each kind, all of them if slow.
    """
    draw, draw_plain, place = textures.procedural, textures.plain_surfaces, tmp_path_factory.getbasetemp()
    place = place.parent if hasattr(request.config, "workerinput") else place

    def procedural(count: int = 48, seed: int = 0) -> textures.Textures:
        path = place / f"surfaces-{count}-{seed}.pt"
        if not path.exists():
            write_atomically(path, lambda temporary: torch.save(tuple(draw(few(count, 12), seed)), temporary))
        return textures.Textures(*torch.load(path, mmap=True))

    def few(count: int, most: int) -> int:
        return count if SLOW else min(count, most)

    once = lru_cache(maxsize=1)(procedural)
    plain = lru_cache(maxsize=1)(lambda count=24, seed=0: draw_plain(few(count, 9), seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footage, "procedural", procedural)
        patch.setattr(textures, "plain_surfaces", plain)
        patch.setattr(photographs, "plain_surfaces", plain)
        for module in (generate, loop, video_reuse):
            patch.setattr(module, "default_textures", once)
        yield


PATIENCE = 120  # seconds


def in_child(action) -> tuple[int, str]:
    """Runs `action` in a forked process; returns its exit code, below 0 for a signal, and the line that it ended with.

    A lock that another thread held at the fork can stop the child for good: after two minutes SIGALRM ends it.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        gc.disable()  # garbage of the parent with threads of its own, such as FFmpeg's coders, cannot be freed here
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE)
        try:
            action()
            code = 0
        except FleetflowError as error:
            os.write(writer, str(error).encode())
        except KeyboardInterrupt:
            code = 130
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
            code = 99
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def kill_points(renames: int) -> list[tuple[int, str]]:
    """Where a run is killed: before or after two of three of its renames in turn; if slow, before and after each."""
    both = [(number, when) for number in range(1, renames + 1) for when in ("before", "after")]
    return both if SLOW else [both[k] for k in range(len(both)) if k % 6 in (0, 3)]


def killed_at(rename: int, when: str, action) -> bool:
    """Runs `action` in a child that is killed before or after so many renames; False where it made fewer."""

    def run():
        count, real = 0, os.replace

        def replace(*args, **named):
            nonlocal count
            count += 1
            if count == rename and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args, **named)
            if count == rename:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        action()

    code, text = in_child(run)
    assert code in (0, -signal.SIGKILL, -signal.SIGALRM), text  # a child that hung was killed at another point
    return code != 0
