"""Numbers for a flow: (flow, Sample) -> dict. The name of each number says its protocol."""

from torch import Tensor

from fleetflow.types import FleetflowError, Sample


def end_point_error(flow: Tensor, truth: Tensor) -> Tensor:
    """Returns [..., H, W] pixels, the length of flow - truth (both [..., 2, H, W] pixels)."""
    return (flow - truth).square().sum(-3).sqrt()


def pair_errors(flow: Tensor, sample: Sample) -> dict[str, float]:
    """Returns the errors of one pair: flow [2, H, W] pixels against sample.flow, over sample.valid.

    epe: mean end-point error, pixels. out1, out3, out5: percentage of pixels with an error over 1, 3, 5 pixels.
    fl: percentage with an error over 3 pixels and over 5 % of the true length (KITTI 2015). Over one image.
    Raises FleetflowError where no pixel is known.
    """
    if not bool(sample.valid.any()):
        raise FleetflowError("the truth of this pair has no known pixel; leave the pair out")
    error = end_point_error(flow, sample.flow)[sample.valid]
    length = sample.flow.square().sum(0).sqrt()[sample.valid]
    numbers = {"epe": error.mean().item()}
    for limit in (1, 3, 5):
        numbers[f"out{limit}"] = 100 * (error > limit).float().mean().item()
    numbers["fl"] = 100 * ((error > 3) & (error > 0.05 * length)).float().mean().item()
    return numbers


def mean_over_sets(rows: list[tuple[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Returns per set the mean over its pairs, and under "mean of sets" the mean of those: the house score."""
    sets: dict[str, list[dict[str, float]]] = {}
    for name, numbers in rows:
        sets.setdefault(name, []).append(numbers)
    table = {name: _mean(members) for name, members in sets.items()}
    return {**table, "mean of sets": _mean(list(table.values()))}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
