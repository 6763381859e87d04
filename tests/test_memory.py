"""Memory that is kept between predictions, each case in a process of its own: malloc's settings stay."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import SLOW

from fleetflow.inference import memory

SCRIPT = """
import resource, numpy as np
from fleetflow.inference.memory import keep_freed
from fleetflow.models.lightflow import LightFlow
from fleetflow.inference.predictor import Predictor
predict = Predictor(LightFlow(), device="cpu")
image = np.zeros((224, 1024, 3), np.uint8)
for _ in range(3):
    predict(image, image)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    predict(image, image)
print(keep_freed(), (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
"""


def predicted(**environment):
    """Whether memory is kept, and the new pages that a prediction touches."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=own | environment)
    assert not run.returncode, run.stderr
    kept, pages = run.stdout.split()
    return kept == "True", int(pages)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_prediction_touches_no_new_memory_unless_the_user_says_so():
    kept, pages = predicted()
    assert kept and pages < 1_000  # 4 KB each; frames and flow alone are 1,800
    kept, pages = predicted(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept and pages > 1_000


VARIED = """
import numpy as np
from fleetflow.inference.predictor import Predictor
from fleetflow.registry import models
predict = Predictor(models["raft_small"](iterations=1), device="cpu", precision="fp32")
random, used = np.random.default_rng(0), []
for k in range(85):
    image = np.zeros((*random.integers(128, 260, 2), 3), np.uint8)
    predict(image, image)
    used.append(int(open("/proc/self/statm").read().split()[1]) * 4 // 1024)
print(min(used[17:34]), min(used[-17:]))  # memory is handed back after every 16 sizes
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_pictures_of_varying_sizes_do_not_leak():
    run = subprocess.run([sys.executable, "-c", VARIED], capture_output=True, text=True)
    assert not run.returncode, run.stderr
    early, late = (int(number) for number in run.stdout.split())  # MB
    assert late < early + 50, (early, late)  # 75 where nothing is handed back


@pytest.mark.parametrize(
    ("sizes", "limited", "times"),
    [
        ([720, 1080] * 4, False, 1),  # once, and then no more
        ([720, 1080] * 4, True, 7),
        ([370, 375, 374, 376] * 4, False, 0),
        ([360 + 8 * k for k in range(12)], False, 2),
        ([720] * 4, True, 0),
    ],
)
def test_when_memory_is_handed_back(sizes, limited, times, monkeypatch):
    trimmed = []
    monkeypatch.setattr(memory, "_sizes", {})
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=trimmed.append))
    for height in sizes:
        memory.hand_back_if_varied((1, 3, height, 1920 if height >= 720 else 1024), limited=limited)
    assert len(trimmed) == times


GROWING = """
import sys, numpy as np
from fleetflow.inference.predictor import Predictor
from fleetflow.registry import models
memory = int(sys.argv[1]) << 20
predict = Predictor(models["raft_small"](iterations=1), device="cpu", precision="fp32", memory=memory or None)
for k in range(8):
    image = np.zeros((360 + 8 * k, 1024, 3), np.uint8)
    predict(image, image)
status = dict(line.split(":") for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) // 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
@pytest.mark.skipif(not SLOW, reason="eight large frames twice; FLEETFLOW_SLOW=1 runs it")
@pytest.mark.parametrize(("limit", "most"), [(1400, 1400), (0, 1800)])
def test_large_frames_of_growing_sizes(limit, most):
    run = subprocess.run([sys.executable, "-c", GROWING, str(limit)], capture_output=True, text=True)
    assert not run.returncode, run.stderr
    assert int(run.stdout) < most, "MB; 2,300 and 2,100 where only the number of sizes counted"


LIMITED = """
import sys, numpy as np
from fleetflow.inference.memory import parse_bytes
from fleetflow.inference.predictor import Predictor
from fleetflow.registry import models
memory = None if sys.argv[1] == "0" else parse_bytes(sys.argv[1])
predict = Predictor(models["fastflownet"](), device="cpu", precision="fp32", memory=memory)
image = np.zeros((1120, 1400, 3), np.uint8)
predict(image, image)
status = dict(line.split(":") for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) // 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_a_limit_of_memory_is_kept():
    def peak(limit):
        run = subprocess.run([sys.executable, "-c", LIMITED, limit], capture_output=True, text=True)
        assert not run.returncode, run.stderr
        return int(run.stdout)

    assert peak("720M") < 720
    assert not SLOW or peak("0") > 720
