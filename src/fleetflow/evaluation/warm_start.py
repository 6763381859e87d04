"""Pairs of a data set in order, each predicted from where the one before it in its scene ended."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fleetflow.data.dataset import to_images
from fleetflow.evaluation.baselines import Method
from fleetflow.inference.predictor import Predictor
from fleetflow.inference.stream import Stream
from fleetflow.io.images import read_image
from fleetflow.types import FleetflowError, Prediction


class Warm:
    """A network that begins each pair where it ended on the pair before, if that ends with the frame this begins with.

    Args:
        pairs: what has files `frame1` and `frame2`, in order. A result depends on no other call: what comes before a
            pair in its scene is predicted again if it was not the last call.

    Raises:
        FleetflowError: For a method, and where no pair continues the one before it.
    """

    def __init__(self, predict: object, pairs: Sequence):
        if not isinstance(predict, Predictor):
            name = predict.name if isinstance(predict, Method) else type(predict).__name__
            raise FleetflowError(f"{name} keeps nothing for the next pair; leave --warm-start out")
        self.predictor, self.pairs, self.stream = predict, pairs, Stream(predict)
        frames = [(pair.frame1, pair.frame2) for pair in pairs]
        moves = enumerate(pairwise(frames), 1)
        self.continued = {k for k, (old, new) in moves if new[0] == old[1] and new[1] != old[0]}  # forward, not back
        self.last: int | None = None  # the pair whose second frame the stream has seen last
        if not self.continued:
            raise FleetflowError("no pair here begins with the frame that ends the one before; leave --warm-start out")

    def pair(self, k: int, iterations: int | None = None) -> Prediction:
        """Returns the prediction of pair k; raises FleetflowError for a network without a state."""
        first = k
        while first in self.continued and self.last != first - 1:
            first -= 1
        for place in range(first, k + 1):
            image1, image2 = _frames(self.pairs[place])
            if place not in self.continued:
                self.stream.reset()
                self.stream(image1)
            step = self.stream(image2, iterations=iterations)
            assert step is not None  # the stream has seen `image1`
            found = step.prediction
            if found.state is None:
                network = type(self.predictor.model).__name__
                raise FleetflowError(f"{network} keeps nothing for the next pair; leave --warm-start out")
            self.last = place
        return found


def _frames(pair) -> tuple[np.ndarray, np.ndarray]:
    """Both frames of a pair, read from its files unless it is generated."""
    made = getattr(pair, "made", None)
    return to_images(made()) if made else (read_image(pair.frame1), read_image(pair.frame2))
