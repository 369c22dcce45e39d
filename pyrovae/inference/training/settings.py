"""What a run is trained with, beside its pair, its data and its objective."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """See `fit`, whose arguments these are."""

    epochs: int
    batch_size: int
    seed: int
    precision: str
    particle_chunk: int | None
