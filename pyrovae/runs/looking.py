"""What is looked at: a run's model, and some rows, of one of its splits or of a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pyrovae.errors import UsageError
from pyrovae.processors import pick_device
from pyrovae.runs.directory import Run, open_run
from pyrovae.runs.scoring import SPLITS, rows_of
from pyrovae.settings import Words, read

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.inference.batch import Batch
    from pyrovae.models.autoencoder import Reconstruction
    from pyrovae.models.conditional import ConditionalVAE
    from pyrovae.models.labelled import LabelledVAE
    from pyrovae.models.vae import LatentLayers
    from pyrovae.runs.build import Model

ENOUGH = 10_000  # training rows, for means and moments


@dataclass(frozen=True)
class Looked:
    """A run and the rows beside it.

    Attributes:
        run: The run.
        split: Of its rows, or of those of the file.
        data: A file of other rows; None: the run's own.
        label: The class that everything is given, in place of each row's own; None: each row's own. What is decoded
            near, between and along codes is of that class; the codes are those of the rows as they are.
        device: Where to compute.
    """

    run: Run
    split: str = "test"
    data: str | None = None
    label: str | None = None
    device: str = "auto"

    @cached_property
    def place(self) -> "torch.device":
        """The device itself."""
        return pick_device(self.device)

    @cached_property
    def rows(self) -> "Rows":
        """What the run was trained on."""
        return self.run.rows()

    @cached_property
    def model(self) -> "Model":
        """The run's model, in evaluation mode."""
        return self.run.model(self.place)

    @property
    def notices(self) -> list[str]:
        """What is to be said of the checkpoints that the model is read from, and of a file of other rows."""
        of_file = [] if self.data is None else self._others.notices
        return [*self.run.notices, *of_file] if self.model is not None else []

    @property
    def reconstructs_only(self) -> bool:
        """Whether the model has no p(x)."""
        from pyrovae.models import Reconstruction

        return isinstance(self.model, Reconstruction)

    def coded(self, what: str) -> "LatentLayers | ConditionalVAE | LabelledVAE | Reconstruction":
        """The model, which has codes and decodes them.

        Raises:
            UsageError: it has none.
        """
        from pyrovae.models import Exact

        if isinstance(self.model, Exact):
            raise UsageError(
                f"{self.run.directory}: holds a {self.run.recipe.model.name}, which has no encoder and so no codes, as "
                f"{what} needs; draw from it, or impute"
            )
        return self.model

    def inferred(self, what: str) -> "LatentLayers | ConditionalVAE | LabelledVAE":
        """The model, whose codes have a density q(z|x).

        Raises:
            UsageError: it has no codes, or they are points.
        """
        from pyrovae.models import Reconstruction

        model = self.coded(what)
        if isinstance(model, Reconstruction):
            raise UsageError(
                f"{self.run.directory}: holds a model ({self.run.recipe.model.name}) that reconstructs only: its codes "
                f"are points, without the density q(z|x) that {what} needs; load it in Python and call encode"
            )
        return model

    @cached_property
    def condition(self) -> "Tensor | None":
        """The label as the model is given it, shape (C,); None where none was chosen.

        Raises:
            UsageError: the run is given no labels, or has no such class.
        """
        if self.label is None:
            return None
        examples = self.rows.given.examples
        if not examples:
            raise UsageError(
                f"class: {self.run.directory} is of p(x), given nothing; train it with `condition=label`",
                settings=("class", "condition=label"),
            )
        if self.label not in examples:
            raise UsageError(f"class: expected one of {', '.join(examples)}, got {self.label}", settings=("class",))
        return examples[self.label].to(self.place)

    @cached_property
    def _others(self) -> Any:
        from pyrovae.data.others import other_rows

        return other_rows(self.rows, str(self.data), self.split)

    @cached_property
    def count(self) -> int:
        """How many rows there are."""
        return len(self._others.x if self.data is not None else getattr(self.rows, self.split))

    @cached_property
    def labels(self) -> list[str] | None:
        """The names of all rows' labels; None where there are none."""
        if self.data is not None:
            found: list[str] | None = self._others.labels
            return found
        labels, classes = self.rows.labels[self.split], self.rows.classes
        return None if labels is None else [str(i) if classes is None else classes[i] for i in labels.tolist()]

    def first(self, limit: int | None, own: bool = False) -> "Batch":
        """The first rows, given the label that was chosen, if one was, unless they are to have their own."""
        from pyrovae.inference.batch import Batch

        if self.data is None:
            batch = rows_of(self.rows, self.split, limit)
        else:
            batch = Batch(self._others.x[:limit], tuple(value[:limit] for value in self._others.given))
            self.check_support(batch)
        if self.condition is not None and not own:
            batch = Batch(batch.x, (self.condition.cpu().expand(len(batch), -1),))
        return batch.to(self.place)

    def check_support(self, batch: "Batch") -> None:
        """Refuse rows of a file that are outside the support of the model.

        Raises:
            DataError: there is one.
        """
        import torch

        from pyrovae.models import Exact, Reconstruction

        if isinstance(self.model, Exact):
            with torch.no_grad():
                self.model.log_prob(batch.x.to(self.place))
        elif isinstance(self.model, Reconstruction):
            self.model.check_support(batch.x.to(self.place))
        else:
            self.model.likelihood.check_support(batch.x.to(self.place))

    def numbered(self, numbers: Sequence[int], option: str) -> "Batch":
        """Rows by their numbers, each given its own label.

        Raises:
            UsageError: there is no row of such a number.
        """
        import torch

        for number in numbers:
            if not 0 <= number < self.count:
                raise UsageError(
                    f"{option}: expected numbers of rows from 0 to {self.count - 1}, got {number}", settings=(option,)
                )
        return self.first(max(numbers) + 1, own=True)[torch.tensor(list(numbers), device=self.place)]

    def decoded_given(self, batch: "Batch") -> "tuple[Tensor, ...]":
        """What is given to what is decoded of rows: the label that was chosen, or each row's own."""
        return batch.given if self.condition is None else (self.condition.expand(len(batch), -1),)

    def labels_of(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Their labels as a variable along "row", if there are any."""
        return {} if self.labels is None else {"label": (("row",), [self.labels[i] for i in numbers])}

    def training(self) -> "Batch":
        """The first training rows, enough of them for means and moments."""
        return rows_of(self.rows, "train", ENOUGH).to(self.place)


def look(directory: str, options: Mapping[str, Any]) -> Looked:
    """Open a run and say which rows are looked at, by the options "split", "data", "class" and "device".

    Raises:
        CheckpointError: there is no run, or its configuration is damaged.
        UsageError: there is no such split.
    """
    names = {"split": "split", "data": "data", "class": "label", "device": "device"}
    chosen = {field: str(options[name]) for name, field in names.items() if name in options}
    read("split", chosen.get("split", "test"), Words(SPLITS))
    return Looked(open_run(directory), **chosen)
