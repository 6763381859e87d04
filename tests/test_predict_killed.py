"""Runs of predict killed before and after every rename: the next run finishes, and leaves nothing but its results."""

import os
import signal
from functools import partial

import numpy as np
import pytest
from test_predict import Brightness

from fleetflow.inference import files as job
from fleetflow.inference.predictor import Predictor
from fleetflow.io.flow import read_flow
from fleetflow.io.images import write_image
from fleetflow.io.note import NAME


def killed(work, number: int, when: str) -> bool:
    """Runs `work` in a process that kills itself at its rename of that number; returns whether it came so far."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)  # a lock that another thread held at the fork can stop it for good
        real, count = os.replace, 0

        def replace(*paths):
            nonlocal count
            count += 1
            if count == number and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            real(*paths)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["folder", "pair"])
def test_the_next_run_finishes(kind, when, tmp_path):
    predictor = Predictor(Brightness(), device="cpu", precision="fp32")
    for k in range(4):
        write_image(tmp_path / "frames" / f"f{k}.png", np.full((20, 30, 3), 20 * k + 10, np.uint8))
    pair = tmp_path / "frames" / "f0.png", tmp_path / "frames" / "f1.png"

    def work(output):
        if kind == "folder":
            return job.predict_folder(predictor, tmp_path / "frames", output, ["flo", "color"])
        return job.predict_pair(predictor, *pair, output, ["flo", "color"])

    for number in range(1, 40):
        output = tmp_path / f"out{number}"
        came = killed(partial(work, output), number, when)
        written = work(output)
        assert {path.name for path in output.iterdir()} == {path.name for path in written} | {NAME}
        assert all(read_flow(path)[0].any() for path in written if path.suffix == ".flo")
        if not came:
            break
    assert number == {"folder": 8, "pair": 4}[kind]
