"""The batches of a training stage. What is in batch number k follows from (seed, k) alone, so a run resumes exactly.

A batch is made in parts, as many as `gradient_accumulation` says, each by one worker: gradients are accumulated over
them, and processes share them. So four parts give the same losses on one process, on two and on four.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils.data import Dataset

from fleetflow.data.augment.geometry import crop
from fleetflow.data.augment.own import own
from fleetflow.data.dataset import Files, datasets, open_files
from fleetflow.data.generate import generate
from fleetflow.data.generate.textures import Textures
from fleetflow.data.workers import Ahead
from fleetflow.training.echo import Echo, check
from fleetflow.training.recipe import Recipe, Source, Stage
from fleetflow.types import FleetflowError, Sample

HELD_BACK = 0.2  # share of the pairs on which fine-tuning is measured: the last ones, which are of other scenes


class Feed(Dataset):
    """Item (step, part) is that part of that batch, as a tuple of the first four fields of `Sample`."""

    def __init__(
        self, stage: Stage, seed: int, gradient_accumulation: int, textures: Textures | None, root: Path | None
    ):
        for size in stage.batches:
            if size.batch % gradient_accumulation:
                raise FleetflowError(
                    f"batches of {size.batch} do not divide into {gradient_accumulation} parts; change batch, or "
                    "--gradient-accumulation"
                )
            check(stage.echo, size.batch // gradient_accumulation)
        self.stage, self.seed, self.parts, self.textures = stage, seed, gradient_accumulation, textures
        self.echo = Echo(self._make, stage.echo)
        self.sources = open_sources(stage.sources, root)
        self.index = [
            (number, k)
            for number, (source, files) in enumerate(self.sources)
            for _ in range(source.repeat)
            for k in range(len(files))
        ]

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        step, part = key
        size = self.stage.at(step)
        count = size.batch // self.parts
        every = self.stage.generated_every
        if not self.sources or (every and step % every == every - 1):
            return tuple(self.echo.batch(count, size.height, size.width, step * self.parts + part)[:4])
        first = self.stage.samples(step) + part * count
        rows = [self._sample(place, (size.height, size.width)) for place in range(first, first + count)]
        return tuple(torch.cat(tensors) for tensors in zip(*rows))

    def _make(self, count: int, height: int, width: int, place: int) -> Sample:
        how = {"seed": self.seed, "index": place, "textures": self.textures, "mixture": self.stage.mixture}
        return generate(count, height, width, **how)

    def _sample(self, place: int, size: tuple[int, int]) -> tuple:
        epoch, k = divmod(place, len(self.index))
        number, k = self.index[_order(self.seed, epoch, len(self.index))[k]]
        source, files = self.sources[number]
        sample = Sample(*(tensor[None] for tensor in files[k][:4]))
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + place * 0xD1B54A32D192ED03) % 2**63)
        return tuple((source.augment or crop)(sample, generator, size)[:4])


def open_sources(sources: tuple[Source, ...], root: Path | None) -> list[tuple[Source, Files]]:
    """Returns each source with its files below `root`; raises FleetflowError where there is no root to look in."""
    if not sources:
        return []
    if root is None:
        folders = ", ".join(dict.fromkeys(source.folder for source in sources))
        raise FleetflowError(f"this recipe reads data sets; give --root DIR, the folder that holds {folders}")
    return [(source, source.files(root / source.folder)) for source in sources]


@dataclass(frozen=True)
class Chosen:
    """Reads a data set that the user named: what `Source.files` is in a recipe.

    Args:
        part: "learned" and "held back" are all pairs with known flow but the last fifth, and that fifth: at most 100.
    """

    dataset: str
    options: tuple[str, ...]
    part: str = ""

    def __call__(self, root: Path) -> Files:
        files = open_files(self.dataset, root, options=self.options)
        if not self.part:
            return files
        known = [pair for pair in files.pairs if pair.truth is not None]
        if len(known) < 2:
            raise FleetflowError(
                f"{root} has {len(known)} pairs with known flow; fine-tuning needs two at least, one of them to measure "
                "on (fleetflow adapt learns from frames alone)"
            )
        count = min(max(1, round(HELD_BACK * len(known))), 100)
        return Files(known[:-count] if self.part == "learned" else known[-count:])


def dataset_of(source: Source) -> str:
    """Returns the name of the data set that a source reads."""
    reader = source.files
    return reader.dataset if isinstance(reader, Chosen) else getattr(reader, "func", reader).__name__


def on_data(plan: Recipe, data: str) -> Recipe:
    """Returns the recipe with the pairs of one data set, whose folder is --root, in place of its own.

    Args:
        data: NAME or NAME:option=value,option=value, as of `fleetflow evaluate`. The pairs are augmented as those of
            the first data set of each stage; those of a stage on generated pairs are only cropped. With split=train,
            the stages are validated on split=val; else not at all, but fine-tuning holds back the last fifth of the
            pairs.

    Raises:
        FleetflowError: For an unknown data set.
    """
    name, _, options = data.partition(":")
    datasets[name]  # an unknown name is said before all else
    chosen = Chosen(name, tuple(options.split(",")) if options else ())
    held = replace(chosen, options=tuple(option.replace("split=train", "split=val") for option in chosen.options))
    stages = []
    for stage in plan.stages:
        if stage.keep_best and held == chosen:
            chosen, held = replace(chosen, part="learned"), replace(chosen, part="held back")
        augment = own if stage.keep_best else stage.sources[0].augment if stage.sources else None
        source = Source(chosen, "", augment=augment)
        validation = () if held == chosen else (Source(held, ""),)
        stages.append(replace(stage, sources=(source,), validation=validation))
    return replace(plan, stages=tuple(stages))


def batches(feed: Feed, first: int, last: int, own: range, *, workers: int = 0) -> Ahead:
    """Returns an iterator over the steps from `first` to before `last`: of each, the parts in `own`."""
    return Ahead(feed, [(step, part) for step in range(first, last) for part in own], workers=workers)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
