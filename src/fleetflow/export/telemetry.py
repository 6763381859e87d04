"""OpenVINO and NNCF without the statistics that they send to Intel unless somebody tells them not to."""

import sys


def turn_off_telemetry() -> None:
    """Has `import openvino` and `import nncf` send nothing and write nothing into the home folder, in this process.

    They take a missing package openvino_telemetry for a no. Where it was imported before, it is the user's own choice.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType]
