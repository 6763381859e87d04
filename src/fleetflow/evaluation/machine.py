"""The machine behind numbers: processor, system, threads and versions."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch


def machine() -> dict[str, str]:
    """Returns processor, system, threads and versions behind numbers; those of OpenCV and CUDA if they took part."""
    cv2, cuda = sys.modules.get("cv2"), torch.cuda.is_initialized()
    processor, listed = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if listed.exists():
        names = [line for line in listed.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "processor": processor,
        "system": platform.platform(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"cuda": f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"} if cuda else {}),
        "numpy": np.__version__,
        **({"opencv": f"{cv2.__version__}, {cv2.getNumThreads()} threads"} if cv2 else {}),
        "fleetflow": version("fleetflow"),
    }


def in_line(parts: dict[str, str]) -> str:
    """Returns the parts of a protocol, or of a machine, as one line."""
    return "; ".join(f"{key}: {value}" for key, value in parts.items())
