"""What `python -m pyrovae.encode` makes of rows: their codes, the mean and standard deviation of q(z|x), and draws."""

from dataclasses import dataclass
from typing import Any

from pyrovae.runs.looking import Looked
from pyrovae.runs.made import Made, Way

BLOCK = 500  # rows that are encoded at a time


@dataclass(frozen=True)
class Encode(Way):
    """Codes of rows.

    Attributes:
        rows: The first so many; None: all.
        draws: Draws of z from the guide for each row, of all its layers, with log w = log p(x, z) - log q(z|x).
    """

    word = "encoding"
    of_rows = False
    rows: int | None = None
    draws: int = 0

    def __call__(self, looked: Looked, seed: int) -> Made:
        """Encode them, with torch's random state.

        Raises:
            UsageError: the model has no codes.
        """
        import torch

        from pyrovae import plots
        from pyrovae.inference.pair import Pair
        from pyrovae.inference.weights import draw
        from pyrovae.models.moments import moments_of

        model, batch = looked.inferred(self.word), looked.first(self.rows)
        means, deviations = [], []
        drawn: dict[str, list[torch.Tensor]] = {}
        with torch.no_grad():
            for block in batch.split(BLOCK):
                found = moments_of(model.posterior(*block.tensors), block.x.device)
                means.append(found.mean)
                deviations.append(found.sd)
                if self.draws:
                    particles = draw(Pair(model.model, model.guide), block, self.draws)
                    for name, site in particles.latents.items():
                        drawn.setdefault(name, []).append(site.value.movedim(0, 1))
                    drawn.setdefault("log_weight", []).append(particles.log_weights.T)
        numbers, each = range(len(batch)), ("row", "draw")
        code, (mean, deviation) = model.code, (torch.cat(means), torch.cat(deviations))
        # The code may be several layers side by side.
        by_site = zip(code, mean.split(list(code.values()), -1), deviation.split(list(code.values()), -1), strict=True)
        moments = {
            f"{site}_{word}": (("row", f"latent_{site}"), values)
            for site, *both in by_site
            for word, values in zip(("mean", "sd"), both, strict=True)
        }

        def figure(title: str, style: plots.Style) -> Any:
            labels = (looked.labels or [])[: len(batch)]
            few = 0 < len(set(labels)) <= plots.MAX_CLASSES
            return plots.latent_map(mean, labels if few else None, title)

        return Made(
            {
                **looked.labels_of(numbers),
                **moments,
                **{
                    name: (each if name == "log_weight" else (*each, f"latent_{name}"), torch.cat(parts))
                    for name, parts in drawn.items()
                },
            },
            {"row": numbers, **({"draw": range(self.draws)} if self.draws else {})},
            (
                f"{len(batch)} rows encoded: mean and sd of q({', '.join(code)}|x), {mean.shape[1]} dimensions"
                + model.code_note
                + (f" (by {found.draws} draws of each row: they have no closed form)" if found.draws else "")
                + (f", and {self.draws} draws with log w: {looked.rows.measure.description}" if self.draws else ""),
            ),
            figure=figure,
        )
