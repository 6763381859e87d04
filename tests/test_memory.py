"""Memory that is kept between predictions, each case in a process of its own: malloc's settings stay."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, numpy as np
from fleetflow.inference.memory import keep_freed
from fleetflow.models.lightflow import LightFlow
from fleetflow.inference.predictor import Predictor
predict = Predictor(LightFlow(), device="cpu")
image = np.zeros((448, 1024, 3), np.uint8)
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
    assert kept and pages < 1_000  # 4 KB each; frames and flow alone are 3,600
    kept, pages = predicted(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept and pages > 2_000
