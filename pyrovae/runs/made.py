"""What a run made, to be saved: rows, codes and what belongs to them, as .npz, .csv, netCDF, a picture or a film.

    .npz    each variable as an array, with its coordinates
    .csv    a line for each row, draw or step; an element of a vector has a column, by its own name where it has one
    .nc     netCDF, as xarray and ArviZ read it: variables, coordinates, and where they come from
    .png    the figure, of pictures and of points in the plane
    .gif    pictures that move along a path, and back

Rows are saved in the units of the data: standardised ones are not any more. A file that is there is replaced only on
demand, and only by one of its own kind; it is written under another name first, so that it is whole or not there.
"""

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pyrovae.columns import OF_CLASSES
from pyrovae.errors import UsageError
from pyrovae.files import replaced, write_atomically
from pyrovae.runs.directory import begins, of_a_run
from pyrovae.runs.progress import Say

if TYPE_CHECKING:
    import pandas as pd
    import xarray
    from matplotlib.figure import Figure
    from torch import Tensor

    from pyrovae.data import Rows
    from pyrovae.plots import Style
    from pyrovae.runs.looking import Looked

# How files of each kind begin; a table of ours begins with one of these names of columns, or with the data's own.
KINDS: Mapping[str, bytes] = {".npz": b"PK", ".csv": b"", ".nc": b"\x89HDF", ".png": b"\x89PNG", ".gif": b"GIF8"}
COUNTED = ("row", "path", "dimension")
ELEMENTS = ("channel", "height", "width", "element", "latent", "x_dim")  # how dimensions of one value begin


@dataclass(frozen=True)
class Made:
    """Variables over named dimensions.

    Attributes:
        variables: Names to dimensions and values. The dimension "event" stands for those of a row of data; what begins
            with "latent" is that of a code.
        coords: Values along dimensions, such as the numbers of rows.
        said: Lines for the user.
        figure: Draws it, from a title and a style; None where there is no picture of it.
        frames: Pictures of a film, shape (frames, pictures side by side, *event); None where nothing moves.
    """

    variables: Mapping[str, tuple[tuple[str, ...], Any]]
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    said: tuple[str, ...] = ()
    figure: "Callable[[str, Style], Figure] | None" = None
    frames: "Tensor | None" = None


class Way(ABC):
    """One way of making something of a run; a frozen dataclass.

    Attributes:
        word: What messages call it.
        of_rows: Whether its pictures are of rows of data, so that there are none of a table.
        in_the_plane: Whether rows that are points of the plane have a picture, too.
    """

    word: ClassVar[str]
    of_rows: ClassVar[bool] = True
    in_the_plane: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, looked: "Looked", seed: int) -> Made:
        """Make it, with torch's random state, or with the seed where a function takes one.

        Raises:
            UsageError: the model has no use for it.
        """


def make(looked: "Looked", way: Way, out: str | Path | None, overwrite: bool, seed: int, say: Say) -> Made:
    """Make something of a run and save it; say what, and where.

    Raises:
        UsageError: it cannot be made of this run, or not be saved there.
        OutputError: the disk refused.
    """
    from pyrovae.runs.figures import style_of
    from pyrovae.seeding import seeded
    from pyrovae.version import __version__

    if out is None:
        raise UsageError(f"out: name a file to save it in, one that ends in {', '.join(KINDS)}", settings=("out",))
    rows, run = looked.rows, looked.run
    path = check_out(out, overwrite, begun_by(rows), (looked.data, run.recipe.data))
    shape, kind = rows.event_shape, path.suffix.lower()
    planar = way.in_the_plane and shape == (2,)
    drawable = is_picture(shape) or (kind == ".png" and (planar or not way.of_rows))
    if kind in (".png", ".gif") and not drawable:
        raise UsageError(
            f"out {out}: there is no picture of rows of shape {shape}; save a .csv, .npz or .nc", settings=("out",)
        )
    for notice in looked.notices:
        say(f"note: {notice}")
    with seeded(seed, "made", device=looked.place):
        made = way(looked, seed)
    of = {"run": run.name, "made": made.said[0], "seed": seed, "measure": rows.measure.description}
    save(made, path, rows, run.name, style_of(run.recipe, rows), {**of, "version": __version__})
    for line in made.said:
        say(line)
    say(f"saved in {path}")
    return made


def is_picture(event_shape: tuple[int, ...]) -> bool:
    """Whether rows of that shape are drawn as images.

    >>> is_picture((1, 28, 28)), is_picture((28, 28)), is_picture((784,)), is_picture((2, 28, 28))
    (True, True, False, False)
    """
    return len(event_shape) == 2 or (len(event_shape) == 3 and event_shape[0] in (1, 3))


def begun_by(rows: "Rows") -> tuple[bytes, ...]:
    """How a table of ours begins: with what is counted, or with the first column of the data."""
    return (*(f"{word},".encode() for word in COUNTED), (rows.columns or ["x0"])[0].encode())


def check_out(out: str | Path, overwrite: bool, tables: Sequence[bytes], sources: Sequence[str | None]) -> Path:
    """The path of a file that may be written, before anything is made.

    Args:
        out: As it was given.
        overwrite: Whether a file of that name and kind may be replaced.
        tables: How .csv files begin that may be.
        sources: Files that rows are read from, which never are replaced.

    Raises:
        UsageError: it has an unknown extension, its directory does not exist or cannot be written to, or something is
            there that may not be replaced.
    """
    path = Path(out).expanduser()
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise UsageError(f"out {out}: expected a name that ends in {', '.join(KINDS)}", settings=("out",))
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"out {out}: no such directory, {folder}; make it, or choose another", settings=("out",))
    if not os.access(folder, os.W_OK):
        raise UsageError(f"out {out}: {folder} cannot be written to; choose another directory", settings=("out",))
    if not os.path.lexists(path):
        return path
    if path.is_symlink() or not path.is_file():
        raise UsageError(f"out {out}: is there already and no ordinary file; choose another name", settings=("out",))
    if not overwrite:
        raise UsageError(
            f"out {out}: is there already; choose another name, or replace it (`overwrite=True`)",
            settings=("out", "overwrite=True"),
        )
    if any(source is not None and Path(source).exists() and path.samefile(source) for source in sources):
        raise UsageError(f"out {out}: rows are read from it; choose another name", settings=("out",))
    if of_a_run(path):
        raise UsageError(f"out {out}: is a part of a run; choose another name", settings=("out",))
    if not any(begins(path, head) for head in (tables if kind == ".csv" else (KINDS[kind],))):
        what = "no table of this kind" if kind == ".csv" else f"no {kind} file"
        raise UsageError(f"out {out}: is there already, and {what}; choose another name", settings=("out",))
    return path


def save(made: Made, path: Path, rows: "Rows", title: str, style: "Style", attributes: Mapping[str, Any]) -> None:
    """Write what was made, in the form that the file's extension says.

    Raises:
        UsageError: there is no picture of it.
        OutputError: the disk refused.
    """
    kind = path.suffix.lower()
    if kind == ".png":
        if made.figure is None:
            raise UsageError(
                f"out {path}: there is no picture of rows of shape {rows.event_shape}; save a .csv", settings=("out",)
            )
        picture = io.BytesIO()
        made.figure(title, style).savefig(picture, format="png", dpi=150)
        write_atomically(path, picture.getvalue())
    elif kind == ".gif":
        from pyrovae.plots import film

        if made.frames is None:
            raise UsageError(
                f"out {path}: nothing moves in it that is a picture; save a .png, or of a table a .csv",
                settings=("out",),
            )
        write_atomically(path, film(made.frames, style))
    elif kind == ".csv":
        write_atomically(
            path, in_the_words_of(rows, table(dataset(made, rows, attributes))).to_csv(index=False, lineterminator="\n")
        )
    elif kind == ".npz":
        import numpy as np

        of = dataset(made, rows, attributes)
        content = io.BytesIO()
        np.savez_compressed(content, **{str(name): of[name].values for name in [*of.data_vars, *of.coords]})
        write_atomically(path, content.getvalue())
    else:
        with replaced(path) as temporary:
            dataset(made, rows, attributes).to_netcdf(str(temporary))


def in_the_words_of(rows: "Rows", frame: "pd.DataFrame") -> "pd.DataFrame":
    """A table with the words of the data in the place of their numbers, where it has columns of several kinds."""
    from pyrovae.data.tables import in_words

    for column in rows.table or ():
        for name in (f"{prefix}{column.name}" for prefix in ("", "original ", "imputed ")):
            if name in frame:
                frame[name] = in_words(frame[name], column)
        if column.kind in OF_CLASSES and f"mean {column.name}" in frame:
            frame = frame.drop(columns=f"mean {column.name}")  # classes have none
    return frame


def in_units_of_the_data(values: "Tensor", rows: "Rows") -> "Tensor":
    """Rows x as the data has them: standardised ones are not any more, and masks stay what they are."""
    from pyrovae.data import Standardize

    if isinstance(rows.transform, Standardize) and values.is_floating_point():
        return rows.transform.undo(values)
    return values


def dataset(made: Made, rows: "Rows", attributes: Mapping[str, Any]) -> "xarray.Dataset":
    """The variables with their coordinates, rows in the units of the data."""
    import numpy as np
    import xarray
    from torch import Tensor

    shape = rows.event_shape
    events = {1: ("element",), 2: ("height", "width"), 3: ("channel", "height", "width")}.get(len(shape))
    events = events or tuple(f"x_dim_{i}" for i in range(len(shape)))
    variables = {}
    for name, (dims, values) in made.variables.items():
        if "event" in dims:
            values = in_units_of_the_data(values, rows)
            dims = (*dims[:-1], *events)
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        variables[name] = (dims, array)
    coords: dict[str, Any] = {name: np.asarray(values) for name, values in made.coords.items()}
    if len(shape) == 1:
        coords["element"] = np.asarray(rows.columns or [f"x{i}" for i in range(shape[0])])
    return xarray.Dataset(variables, coords, attrs=dict(attributes))


def table(of: "xarray.Dataset") -> Any:
    """A `pandas.DataFrame` with a line for each value of all dimensions that count values, the last moving fastest."""
    import numpy as np
    import pandas as pd

    counting = [str(dim) for dim in of.sizes if not str(dim).startswith(ELEMENTS)]
    lines = [of.sizes[dim] for dim in counting]
    columns: dict[str, Any] = {}
    if counting != ["draw"]:  # plain draws are a table like that of the data
        places = np.meshgrid(*(of.coords.get(dim, np.arange(of.sizes[dim])) for dim in counting), indexing="ij")
        columns |= {dim: place.ravel() for dim, place in zip(counting, places, strict=True)}
    for name, variable in of.data_vars.items():
        elements = [dim for dim in variable.dims if dim not in counting]
        values = variable.expand_dims({dim: of.sizes[dim] for dim in counting if dim not in variable.dims})
        flat = values.transpose(*counting, *elements).values.reshape(int(np.prod(lines)), -1)
        own = [str(word) for word in of.coords["element"].values] if elements == ["element"] else None
        names = own if own is not None and name == "x" else [f"{name}{i}" for i in range(flat.shape[1])]
        if own is not None and name != "x":
            names = [f"{name} {word}" for word in own]
        columns |= dict(zip([str(name)] if not elements else names, flat.T, strict=True))
    return pd.DataFrame(columns)
