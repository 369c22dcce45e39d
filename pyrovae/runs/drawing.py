"""What `python -m pyrovae.sample` makes of a run: draws, and what is decoded, imputed and denoised.

Each way is a small value, called with what is looked at (`Looked`); it returns what was `Made`, to be saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrovae.columns import BINARY, OF_CLASSES
from pyrovae.errors import CheckpointError, DataError, UsageError
from pyrovae.runs.looking import Looked
from pyrovae.runs.made import Made, Way, in_units_of_the_data, is_picture

if TYPE_CHECKING:
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.inference.proposals import Proposal
    from pyrovae.models.corruptions import Corruption
    from pyrovae.models.exact import Exact

HALVES = ("lower", "upper", "left", "right")
MISSING = "missing"  # what is hidden already: the gaps of the rows
PATHS = ("line", "circle", "both")
REACH = 2.5  # standard deviations of the codes, to either side, of a traversal
MOST_DIMS = 10  # of a traversal, unless they are named


def counted(made: str, event_shape: tuple[int, ...]) -> str:
    """A line that says what was made."""
    return f"{made}, each of shape {tuple(event_shape)}"


@dataclass(frozen=True)
class Draws(Way):
    """Draws of x from p(x), or from p(x | y) of a class.

    Attributes:
        number: How many; with a conditional model and no class chosen, so many of each.
        mean: The means of p(x | z) in place of draws.
        temperature: By which the noise of z is multiplied; with any but 1, these are no draws of p(x).
    """

    word = "draws"
    number: int = 100
    mean: bool = False
    temperature: float = 1.0

    def __call__(self, looked: Looked, seed: int) -> Made:
        import torch

        from pyrovae import plots
        from pyrovae.models import ConditionalVAE, LabelledVAE

        options: dict[str, Any] = {"mean": self.mean}
        if self.temperature != 1:
            self.check_noise(looked)
            options["temperature"] = self.temperature
        model, shape = looked.model, looked.rows.event_shape
        chosen = looked.condition  # also refuses a class that is none
        what = self.words(looked)
        drawable = is_picture(shape) or shape == (2,)
        if not isinstance(model, ConditionalVAE | LabelledVAE) or (isinstance(model, LabelledVAE) and chosen is None):
            x = model.sample(self.number, **options)
            said = (counted(f"{self.number} {what}", shape),)
            figure = (lambda title, style: plots.samples(x, f"{title}, {what}", style)) if drawable else None
            return Made({"x": (("draw", "event"), x)}, said=said, figure=figure)
        names = list(looked.rows.given.examples) if looked.label is None else [looked.label]
        each = [y.to(looked.place) for y in looked.rows.given.examples.values()] if chosen is None else [chosen]
        drawn = torch.stack([model.sample(self.number, y, **options) for y in each])
        of = "each class" if looked.label is None else f"class {looked.label}"
        labels = [name for name in names for _ in range(self.number)]
        return Made(
            {"x": (("draw", "event"), drawn.flatten(0, 1)), "label": (("draw",), labels)},
            said=(counted(f"{self.number} {what} of {of}", shape),),
            figure=(lambda title, style: plots.conditional_samples(drawn, names, f"{title}, {what}", style))
            if drawable
            else None,
        )

    def check_noise(self, looked: Looked) -> None:
        """Refuse a temperature where there is no p(z) whose noise it could scale."""
        recipe = looked.run.recipe
        if recipe.is_exact or recipe.is_reconstruction:
            why = f"a {recipe.model.name} has no p(z) whose noise it could scale"
            raise UsageError(f"temperature: not used, since {why}", settings=("temperature",))

    def words(self, looked: Looked) -> str:
        """What is drawn: of a model without a p(x|z), what it decodes of codes from their ex-post density."""
        if looked.reconstructs_only:
            if looked.model.codes is None:
                raise CheckpointError(
                    f"{looked.run.directory}: has no density of codes to draw from; resume the run, which makes it"
                )
            return "decoded codes, drawn from a density fitted to codes"
        if self.temperature != 1:
            what = "means of p(x|z)" if self.mean else "draws"
            return f"{what} at temperature {self.temperature:g}, not of p(x): the noise of z times that"
        if not self.mean:
            return "draws of x"
        exact = looked.run.recipe.is_exact  # whose z is a component, a kernel or a vector, and is not called so
        return "means of x given what it is drawn from" if exact else "means of p(x|z), z from the prior"


@dataclass(frozen=True)
class Near(Way):
    """What is decoded near the codes of rows: means of p(x | z + radius eps), eps ~ N(0, I).

    Attributes:
        numbers: Of the rows.
        radius: Standard deviation around a code, in each dimension.
        number: Neighbours of each.
    """

    word = "neighbours"
    numbers: tuple[int, ...]
    radius: float = 0.1
    number: int = 8

    def __call__(self, looked: Looked, seed: int) -> Made:
        from pyrovae import plots
        from pyrovae.inference import neighbours

        model, batch = looked.coded(self.word), looked.numbered(self.numbers, "near")
        z = neighbours(model.encode(*batch.tensors), self.radius, self.number)
        x = decoded(model, z, looked.decoded_given(batch))
        shape = looked.rows.event_shape

        def figure(title: str, style: plots.Style) -> Any:
            return plots.neighbourhood(batch.x, x, f"{title}, radius {self.radius:g}", style)

        return Made(
            {
                "x": (("row", "neighbour", "event"), x),
                "original": (("row", "event"), batch.x),
                "z": (("row", "neighbour", "latent"), z),
                **looked.labels_of(self.numbers),
            },
            {"row": self.numbers, "neighbour": range(self.number)},
            (counted(f"{self.number} neighbours of {len(self.numbers)} rows at radius {self.radius:g}", shape),),
            figure if is_picture(shape) or shape == (2,) else None,
            x.movedim(1, 0) if is_picture(shape) else None,
        )


@dataclass(frozen=True)
class Between(Way):
    """What is decoded on the way between the codes of two rows: means of p(x | z).

    Attributes:
        start: The number of the one row.
        end: Of the other.
        steps: Codes on the way, both ends among them.
        path: "line", "circle", or "both".
    """

    word = "interpolation"
    in_the_plane = False
    start: int
    end: int
    steps: int = 11
    path: str = "both"

    def __call__(self, looked: Looked, seed: int) -> Made:
        import torch

        from pyrovae import plots
        from pyrovae.inference import great_circle, line

        ends = (self.start, self.end)
        model, batch = looked.coded(self.word), looked.numbered(ends, "between")
        given = looked.decoded_given(batch)
        if given and not torch.equal(given[0][0], given[0][1]):
            raise UsageError(
                "between: the rows are of two classes, and what lies between is of none; choose `class`",
                settings=("between", "class"),
            )
        a, b = model.encode(*batch.tensors)
        every = {"line": line, "circle": great_circle}
        chosen = {name: way for name, way in every.items() if self.path in (name, "both")}
        z = torch.stack([way(a, b, self.steps) for way in chosen.values()])
        x = model.decode(z, *(value[0] for value in given))
        t = torch.linspace(0, 1, self.steps).tolist()
        names = {"line": "line", "circle": "great circle"}

        def figure(title: str, style: plots.Style) -> Any:
            caption = f"Decoded on the way from row {self.start} to row {self.end}"
            rows = [names[name] for name in chosen]
            return plots.named_rows(x, rows, [f"{time:.3g}" for time in t], caption, title, style)

        lengths = z.norm(dim=-1)
        said = [counted(f"{self.steps} codes from row {self.start} to row {self.end}", looked.rows.event_shape)]
        for name, length in zip(chosen, lengths, strict=True):
            said.append(f"  {names[name]}: lengths of codes from {length.min():.2f} to {length.max():.2f}")
        return Made(
            {"x": (("path", "step", "event"), x), "z": (("path", "step", "latent"), z)},
            {"path": list(chosen), "step": t},
            tuple(said),
            figure if is_picture(looked.rows.event_shape) else None,
            x.movedim(1, 0) if is_picture(looked.rows.event_shape) else None,
        )


@dataclass(frozen=True)
class Traverse(Way):
    """What is decoded while one element of a row's code at a time moves from one end of the codes to the other.

    Element d takes the values m_d + s_d t, t from -2.5 to 2.5, with the mean and standard deviation of the codes of
    the first 10,000 training rows; the others stay what they are for this row.

    Attributes:
        number: Of the row.
        dims: Which elements; None: the ten that vary most.
        steps: Values of each.
    """

    word = "traversal"
    number: int
    dims: tuple[int, ...] | None = None
    steps: int = 11

    def __call__(self, looked: Looked, seed: int) -> Made:
        import torch

        from pyrovae import plots
        from pyrovae.inference import traverse

        model, batch = looked.coded(self.word), looked.numbered((self.number,), "traverse")
        codes = torch.cat([model.encode(*block.tensors) for block in looked.training().split(1000)])
        mean, sd = codes.mean(0), codes.std(0)
        if self.dims is not None and max(self.dims) >= len(mean):
            wanted = f"latent dimensions from 0 to {len(mean) - 1}"
            raise UsageError(f"dims: expected {wanted}, got {max(self.dims)}", settings=("dims",))
        dims = self.dims or tuple(sd.argsort(descending=True)[:MOST_DIMS].tolist())
        t = torch.linspace(-REACH, REACH, self.steps, device=looked.place)
        values = torch.stack([mean[dim] + sd[dim] * t for dim in dims])
        z = traverse(model.encode(*batch.tensors)[0], dims, values)
        x = model.decode(z, *(value[0] for value in looked.decoded_given(batch)))
        shape = looked.rows.event_shape

        def figure(title: str, style: plots.Style) -> Any:
            words = f"{title}, from row {self.number}; in standard deviations of the codes"
            return plots.traversals(x, t.tolist(), dims, words, style)

        return Made(
            {
                "x": (("dimension", "step", "event"), x),
                "value": (("dimension", "step"), values),
                "z": (("dimension", "step", "latent"), z),
            },
            {"dimension": dims, "step": t.tolist()},
            (counted(f"{self.steps} values of {len(dims)} latent dimensions from row {self.number}", shape),),
            figure if is_picture(shape) or shape == (2,) else None,
            x.movedim(1, 0) if is_picture(shape) else None,
        )


@dataclass(frozen=True)
class Impute(Way):
    """What is missing of rows, drawn given what is seen of them: by weighted draws, or exactly where the model is.

    Attributes:
        hidden: A half ("lower", "upper", "left", "right"), a share of elements at random, a .npy file of a boolean
            mask, True where x is seen, of the shape of a row or of all of them; or "missing", what rows with gaps lack.
        rows: The first so many.
        number: Draws of each.
        num_particles: K, of weighted draws; None: 1000.
        proposal: Where the weighted draws come from; None: a Gaussian fitted to each row.
    """

    word = "imputation"
    in_the_plane = False
    hidden: str | float
    rows: int = 8
    number: int = 8
    num_particles: int | None = None
    proposal: "Proposal | None" = None

    def __call__(self, looked: Looked, seed: int) -> Made:
        import torch

        from pyrovae import plots
        from pyrovae.models.exact import Exact

        batch = looked.first(self.rows)
        seen = mask_of(self.hidden, batch.x) & ~batch.x.isnan()
        if seen.all():
            raise UsageError("impute: nothing is hidden of these rows; hide more", settings=("impute",))
        model = looked.model
        if isinstance(model, Exact):
            self.refuse_weights(looked.run.recipe.model.name)
            draws, mean, beside, said = self.exactly(model, batch.x, seen)
        else:
            draws, mean, beside, said = self.weighted(looked, batch, seen, seed)
        said = (*said, f"  of a {looked.rows.measure.description}")  # rows are saved in the data's own units
        shape, numbers = looked.rows.event_shape, range(len(batch))

        def figure(title: str, style: plots.Style) -> Any:
            panels = [batch.x, batch.x.where(seen, torch.nan), mean, *draws]
            columns = ["x", "seen", "mean", *(f"draw {i}" for i in range(len(draws)))]
            names = [f"row {i}" for i in numbers]
            return plots.named_rows(torch.stack(panels, 1), names, columns, said[0], title, style)

        return Made(
            {
                "x": (("row", "draw", "event"), draws.movedim(0, 1)),
                "mean": (("row", "event"), mean),
                **imputed_of(looked.rows, mean, draws),
                "original": (("row", "event"), batch.x),
                "seen": (("row", "event"), seen),
                **beside,
                **looked.labels_of(numbers),
            },
            {"row": numbers, "draw": range(self.number)},
            said,
            figure if is_picture(shape) else None,
            draws if is_picture(shape) else None,
        )

    def refuse_weights(self, name: str) -> None:
        """Refuse what weighted draws alone have."""
        given = {"K": self.num_particles, "proposal": self.proposal}
        unused = tuple(option for option, value in given.items() if value is not None)
        if unused:
            why = f"not used, since a {name} is imputed exactly, without weighted draws"
            raise UsageError(f"{', '.join(unused)}: {why}", settings=unused)

    def exactly(self, model: "Exact", x: "Tensor", seen: "Tensor") -> Any:
        """Draws, mean, log p(x_missing | x_seen) and lines, in closed form."""
        import torch

        from pyrovae.inference.estimate import standard_error

        draws, mean = model.impute(x, seen, self.number), model.impute(x, seen, mean=True)[0]
        with torch.no_grad():
            nats = model.log_prob_missing(x, seen).cpu()
        line = f"log p(missing | seen): {nats.mean():.3f} ± {standard_error(nats):.3f} nats per datum over rows, exact"
        return draws, mean, {"log_prob_missing": (("row",), nats)}, (self.title(x, seen), line)

    def weighted(self, looked: Looked, batch: Any, seen: "Tensor", seed: int) -> Any:
        """Draws, mean, the ESS and log p(x_missing | x_seen) of each row, and lines, by importance sampling."""
        import torch

        from pyrovae.inference import Individual, impute, log_marginal, log_prob_missing, verdict
        from pyrovae.inference.proposals import FROM_GUIDE
        from pyrovae.models.masked import Masked

        model, k = looked.inferred(self.word), self.num_particles or 1000
        # A guide that was trained on rows with gaps is a good proposal for them; that of whole rows is not.
        proposal = self.proposal or (FROM_GUIDE if looked.rows.missing else Individual())
        fill = looked.training().x.mean(0)  # NaN for a guide that sees by itself what is missing
        masked = Masked(model, torch.full_like(fill, torch.nan) if looked.rows.missing else fill)
        pair, given = (masked.model, masked.guide), (*batch.given, seen)
        filled = impute(*pair, batch.x, seen, self.number, k, proposal=proposal, seed=seed, given=batch.given)
        part = log_marginal(*pair, batch.x, k, proposal=proposal, seed=seed, given=given)
        beside: dict[str, Any] = {"ess": (("row",), filled.ess)}
        lines: tuple[str, ...] = (self.title(batch.x, seen),)
        if self.hidden != MISSING:  # what is missing of the data itself has no log p that could be known
            whole = log_marginal(model.model, model.guide, batch.x, k, proposal=proposal, seed=seed, given=batch.given)
            nats = log_prob_missing(whole, part)
            beside["log_prob_missing"] = (("row",), nats.values)
            lines += (
                f"log p(missing | seen): {nats.mean:.3f} ± {nats.error_over_rows:.3f} nats per datum over rows, Monte "
                f"Carlo error {nats.monte_carlo_error:.2g}",
            )
        least, middle, most = filled.ess.min(), filled.ess.median(), filled.ess.max()
        lines += (
            f"  log p(seen): {part.mean:.3f}, {verdict(part)}",
            f"  effective sample size of the weights: {least:.1f} to {most:.1f} of {k}, median {middle:.0f}",
        )
        return filled.draws, filled.mean, beside, lines

    def title(self, x: "Tensor", seen: "Tensor") -> str:
        """What was imputed, in words."""
        if self.hidden == MISSING:
            return f"{int((~seen).sum())} missing values of {len(x)} rows imputed, {self.number} draws each"
        what = f"the {self.hidden} half" if self.hidden in HALVES else f"{(~seen).float().mean():.0%} of the elements"
        return f"{what} of {len(x)} rows imputed, {self.number} draws each"


@dataclass(frozen=True)
class Denoise(Way):
    """Corrupted rows, and what is reconstructed of them: the mean of p(x | z) at the mean of q(z | corrupted x).

    Attributes:
        corruption: What is done to the rows.
        rows: The first so many.
    """

    word = "denoising"
    in_the_plane = False
    corruption: "Corruption"
    rows: int = 8

    def __call__(self, looked: Looked, seed: int) -> Made:
        import torch

        from pyrovae import plots
        from pyrovae.inference.estimate import standard_error
        from pyrovae.quality import sse

        model, batch = looked.coded(self.word), looked.first(self.rows)
        self.corruption.initialise(looked.training().x)
        corrupted = self.corruption.to(looked.place).corrupt(batch.x)
        x = model.reconstruct(corrupted, *batch.given)
        clean = model.reconstruct(*batch.tensors)
        original = in_units_of_the_data(batch.x, looked.rows)
        compared = {"corrupted": corrupted, "reconstructed": x, "of clean": clean}
        errors = {name: sse(original, in_units_of_the_data(y, looked.rows)) for name, y in compared.items()}
        told = ", ".join(f"{name} {e.mean():.2f} ± {standard_error(e):.2f}" for name, e in errors.items())
        shape = looked.rows.event_shape

        def figure(title: str, style: plots.Style) -> Any:
            panels = torch.stack([batch.x, corrupted, x, clean])
            names = ["x", "corrupted", "reconstructed", "of clean x"]
            columns = [f"row {i}" for i in range(len(batch))]
            return plots.named_rows(panels, names, columns, f"Denoised; SSE to x: {told}", title, style)

        return Made(
            {
                "x": (("row", "event"), x),
                "original": (("row", "event"), batch.x),
                "corrupted": (("row", "event"), corrupted),
                "sse_corrupted": (("row",), errors["corrupted"]),
                "sse_reconstructed": (("row",), errors["reconstructed"]),
                **looked.labels_of(range(len(batch))),
            },
            {"row": range(len(batch))},
            (counted(f"{len(batch)} rows denoised", shape), f"SSE to x, squared units of x, ± over rows: {told}"),
            figure if is_picture(shape) else None,
        )


def imputed_of(rows: "Rows", mean: "Tensor", draws: "Tensor") -> dict[str, Any]:
    """Of a table, the likeliest of each value, (N, D): its mean, or of binary and categorical ones the usual draw."""
    import torch

    if rows.table is None:
        return {}
    usual = draws.mode(0).values
    of_classes = torch.tensor([column.kind in (BINARY, *OF_CLASSES) for column in rows.table], device=mean.device)
    return {"imputed": (("row", "event"), torch.where(of_classes, usual, mean))}


def decoded(model: Any, z: "Tensor", given: Sequence["Tensor"]) -> "Tensor":
    """Means of p(x | z), shape (N, M, *event), for M codes of each of N rows, (N, M, Z), given y of shape (N, C)."""
    return model.decode(z.movedim(1, 0), *given).movedim(0, 1)


def hidden(word: str) -> str | float:
    """What is typed for what is hidden: a share as a number, all else as it is.

    Raises:
        UsageError: a number that is no share.
    """
    try:
        share = float(word)
    except ValueError:
        return word
    if not 0 < share < 1:
        raise UsageError(f"impute: expected a share above 0 and below 1, got {word}", settings=("impute",))
    return share


def mask_of(hidden: str | float, x: "Tensor") -> "Tensor":
    """Which elements of rows are seen, boolean, of the shape of x.

    Raises:
        UsageError: a half of what is no picture, or a mask of another shape.
        DataError: a file that cannot be read, or holds no mask.
    """
    import torch

    if isinstance(hidden, float):
        return torch.rand(x.shape, device=x.device) >= hidden
    if hidden == MISSING:
        return torch.ones_like(x, dtype=torch.bool)
    if hidden not in HALVES:
        return read_mask(Path(hidden), x)
    if not is_picture(tuple(x.shape[1:])):
        words = f"rows of shape {tuple(x.shape[1:])} have no halves; give a share or a mask"
        raise UsageError(f"impute {hidden}: {words}", settings=("impute",))
    height, width = x.shape[-2:]
    seen = torch.ones_like(x, dtype=torch.bool)
    middle = {"lower": height // 2, "upper": height // 2, "left": width // 2, "right": width // 2}[hidden]
    part = slice(middle, None) if hidden in ("lower", "right") else slice(middle)
    if hidden in ("lower", "upper"):
        seen[..., part, :] = False
    else:
        seen[..., part] = False
    return seen


def read_mask(path: Path, x: "Tensor") -> "Tensor":
    """A mask from a .npy file."""
    import numpy as np
    import torch

    from pyrovae.data.arrays import read_npy

    if path.suffix.lower() != ".npy" or not path.is_file():
        raise UsageError(
            f"impute: expected {', '.join(HALVES)}, a share from 0 to 1, or a .npy file of a mask, got {path}",
            settings=("impute",),
        )
    mask = np.asarray(read_npy(path, str(path), "off").x["train"])
    if mask.dtype != np.bool_:
        raise DataError(f"{path}: expected a boolean mask, True where x is seen, got {mask.dtype}")
    if mask.ndim == x.ndim and len(mask) >= len(x) and mask.shape[1:] == tuple(x.shape[1:]):
        mask = mask[: len(x)]
    elif mask.shape != tuple(x.shape[1:]):
        raise DataError(f"{path}: a mask of shape {mask.shape}, where rows are of shape {tuple(x.shape[1:])}")
    return torch.from_numpy(np.array(mask)).to(x.device).expand(x.shape)
