"""What a run is trained with, beside its pair, its data and its objective."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """See `fit`, whose arguments these are."""

    epochs: int
    batch_size: int
    seed: int
    precision: str
    particle_chunk: int | None


@dataclass(frozen=True)
class Callbacks:
    """What a run asks and tells its caller while it goes on; each is left out where it is None. See `fit`."""

    on_step: Callable[..., None] | None = None
    on_epoch: Callable[[dict[str, float]], None] | None = None
    should_stop: Callable[[], bool] | None = None
    extra_metrics: Callable[[], Mapping[str, float]] | None = None
