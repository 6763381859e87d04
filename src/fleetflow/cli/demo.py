"""The command `fleetflow demo`: the flow of the bundled pair with the bundled weights, beside its truth."""

from pathlib import Path


def demo(output: Path = Path("demo")) -> None:
    """Predict the flow of the example in the package, compare it with the truth, and draw it.

    Args:
        output: the folder for the picture.

    Examples:
        fleetflow demo
        fleetflow demo --output pictures
    """
    import time
    from importlib import resources

    import numpy as np

    from fleetflow.inference.predictor import Predictor
    from fleetflow.io.flow import read_flow
    from fleetflow.io.images import read_image, write_image
    from fleetflow.models.weights import load
    from fleetflow.visualise import error_map, flow_to_color, robust_scale, side_by_side, with_legend

    folder = Path(str(resources.files("fleetflow") / "example"))
    image1, image2 = (read_image(folder / f"frame{k}.png") for k in (1, 2))
    truth, valid = read_flow(folder / "flow.png")
    predictor = Predictor(load("fastflownet"), device="cpu")
    predictor(image1, image2)  # the first call chooses kernels
    start = time.perf_counter()
    flow = predictor(image1, image2)
    taken = 1000 * (time.perf_counter() - start)
    error = np.linalg.norm(flow - truth, axis=2)[valid]
    scale = max(robust_scale(truth), robust_scale(flow))
    picture = side_by_side(
        image1,
        with_legend(flow_to_color(truth, scale), scale),
        with_legend(flow_to_color(flow, scale), scale),
        error_map(flow, truth, valid=valid),
        titles=("frame 1", "true flow", "predicted flow", "error"),
    )
    path = output / "demo.png"
    write_image(path, picture)
    still = float(np.linalg.norm(truth, axis=2)[valid].mean())
    height, width = image1.shape[:2]
    print(f"fastflownet on a generated pair of {height}x{width} pixels: {taken:.0f} ms")
    print(f"mean error {error.mean():.2f} px (frames held still: {still:.2f} px)")
    print(path)
