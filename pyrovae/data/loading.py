"""Loading: find the source, check what it holds, and split it alike in every run."""

import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeGuard

import numpy as np
import torch
from torch import Tensor

from pyrovae.checks import check_choice
from pyrovae.data.files import FORMATS, read_frame, read_path
from pyrovae.data.found import (
    HELD_OUT,
    SEED,
    SPLITS,
    Found,
    check_agreement,
    check_shape,
    counted,
    encode_labels,
    of_levels,
    shown_path,
)
from pyrovae.data.rows import Data
from pyrovae.data.sources import NAMES, find_source
from pyrovae.data.streaming import Conversion, MappedRows, read
from pyrovae.data.summary import Part, summarise
from pyrovae.errors import DataError, UsageError
from pyrovae.files import user_cache

if TYPE_CHECKING:
    import pandas as pd

STREAM = ("auto", "on", "off")


def load_data(
    source: "str | Path | pd.DataFrame" = "digits",
    root: str | Path | None = None,
    download: bool = True,
    stream: Literal["auto", "on", "off"] = "auto",
    columns: str | None = None,
    missing: bool = False,
) -> Data:
    """Load a named data set or the user's own file, in splits that are the same in every run.

    A given test set is kept; validation is then the last min(5000, N // 10) of the N training rows after a fixed
    permutation (at least one), unless it is given too. Without a test set the rows are permuted and split 80/10/10,
    but no more than 10,000 rows each go to validation and test, which are held in memory.

    Args:
        source: One of `NAMES` (in any case, with `-` or `_`), such as "digits", with settings "sprites:side=32" where
            it has some; or a path to

            - .npz holding `x`, or `x_train` and `x_test` and perhaps `x_validation`; labels `y`, `y_train`, ...;
            - .npy holding rows; the one format whose training rows can stay in the file; NAME.labels.npy beside
              NAME.npy holds their labels;
            - .csv, with or without a header, numeric; a column named `y` or `label` holds the labels;
            - a folder of 8-bit images of one size: subfolders `train` and `test` (and `validation`) are the splits,
              other subfolders the labels; one channel if all are grey, otherwise three (alpha is dropped).

            uint8 is read as 256 grey levels; (N, H, W) gets a channel axis, and (N, H, W, C) with C in 1, 3, 4 has it
            moved first unless axis 1 can be one already. Data of zeros and ones only is binary. Everything else is
            continuous, in float32. Or a `pandas.DataFrame`, which is read as a .csv is.
        root: Directory of torchvision's data sets; by default `pyrovae` in the user's cache, `~/.cache`.
        download: Let torchvision fetch what is not under `root`.
        stream: Whether training rows stay in their file and are read when used: "auto", if they do not fit in memory
            and are in a .npy file; "on", always; "off", never. Splits, rows and hash are the same either way. The
            file has to stay as it is meanwhile: one that is cut short ends the process (SIGBUS).
        columns: Of a table, the kind of each column, as "age=continuous,job=categorical": continuous, binary, count or
            categorical. Those not named are guessed from their values, all of them with "auto"; which, is said.
        missing: Whether NaN, such as an empty cell of a table, is a value that is missing; else it is refused.
    Returns:
        The rows as they are. EMNIST is turned upright; Omniglot is 28x28, strokes bright, labels counted through
        from training to test alphabets; CelebA is the central 148x148 pixels at 64x64, without labels.
    Raises:
        UsageError: `source` is neither a name nor an existing path, or its training rows cannot stay in it.
        DataError: missing, damaged, empty, non-finite or non-numeric data, or too much of it for the memory;
            rows and columns in messages are counted from 0.

    >>> load_data("digits").event_shape
    (1, 8, 8)
    """
    if is_frame(source):
        return _assembled(read_frame(source, "the data frame", columns), "the data frame", "the data frame", missing)
    if not isinstance(source, str | Path):
        raise UsageError(
            f"source: expected the name of a data set or the path of a file, got {type(source).__name__}; fit and "
            "log_marginal take rows as a tensor"
        )
    check_choice("stream", stream, STREAM)
    named = find_source(source)
    path = Path(source) if named else _existing(source)
    where = named.name if named else shown_path(source, path)
    if stream == "on" and (named or path.suffix.lower() != ".npy"):
        raise UsageError(f"stream: only the rows of a .npy file can stay in it, got {where}; save them with np.save")
    if named is None:
        return _assembled(read_path(path, where, stream, columns), path.name, where, missing, foreign=not path.is_dir())
    if columns is not None:
        raise UsageError(f"columns: is for a .csv, got {where}; leave it out", settings=("columns",))
    directory = Path(user_cache() if root is None else root).expanduser().absolute()
    return _assembled(named.read(directory, download), named.name, where, missing)


def _assembled(found: Found, name: str, where: str, missing: bool, foreign: bool = False) -> Data:
    """Check what a source holds, split it, and find out what there is to know of all rows.

    Args:
        foreign: Whether the rows come from a user's file, in which uint8 may mean something else than grey levels.
    """
    x, notices = found.x, list(found.notices)
    for split, array in x.items():
        check_shape(array, f"{where}, {split}")
    check_agreement(x, where)
    y, classes = encode_labels(found.y, x, where, notices)
    parts = _split({split: len(array) for split, array in x.items()}, where, notices)
    conversion = Conversion.of(x["train"])
    summary = summarise(x, parts, conversion, where, found.columns, missing)
    levels = found.levels if of_levels(x["train"]) and not summary.binary else None
    if summary.binary:
        conversion = conversion.binary()

    labels: dict[str, Tensor | None] = dict.fromkeys(SPLITS)
    for split, part in parts.items():
        if part.source in y:
            of_source = torch.from_numpy(y[part.source])
            labels[split] = of_source if part.positions is None else of_source[torch.from_numpy(part.positions)]
    train, validation, test = ((x[parts[split].source], parts[split].positions, conversion) for split in SPLITS)
    return Data(
        name=name,
        train=MappedRows(*train) if found.stream else read(*train),
        validation=read(*validation),
        test=read(*test),
        labels=labels,
        levels=levels,
        highest=summary.highest if levels is not None and foreign else None,
        moments=summary.moments,
        hash=summary.hash,
        notices=(*notices, *summary.notices),
        columns=found.columns if found.columns is None else tuple(found.columns),
        classes=classes or found.classes,
        table=found.table,
        missing=missing,
        factors=None if found.factors is None else found.factors.split(parts),
    )


def is_frame(source: object) -> TypeGuard["pd.DataFrame"]:
    """Whether it is a pandas data frame; where pandas has not been imported yet, nothing is."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(source, pandas.DataFrame)


def _existing(source: str | Path) -> Path:
    """The path of a source that is no name.

    Raises:
        DataError: nothing is there.
        UsageError: nothing is there, and it looks like a name that is misspelt.
    """
    path = Path(source).expanduser()
    if str(source) and os.path.exists(path):
        return path
    if isinstance(source, Path) or path.suffix or len(path.parts) > 1:
        raise DataError(
            f"{shown_path(source, path)}: no such file or folder; give {FORMATS}, or one of {', '.join(NAMES)}"
        )
    nearest = difflib.get_close_matches(source.lower().replace("_", "-"), NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise UsageError(f"unknown data set {source!r}: {hint}Give one of {', '.join(NAMES)}, or a path to {FORMATS}")


def _split(counts: Mapping[str, int], where: str, notices: list[str]) -> dict[str, Part]:
    """Take validation, and test where none is given, off the end of the training rows in a fixed order."""
    count = counts["train"]
    missing = [split for split in ("validation", "test") if split not in counts]
    tenth = max(1, count // 10)
    held_out = min(HELD_OUT if "test" in missing else 5000, tenth)
    first = count - held_out * len(missing)
    if count < 2 or first < 1:
        raise DataError(f"{where}: {counted(count, 'row')}, too few for training, validation and test; give more")
    parts = {split: Part(split) for split in counts}
    if not missing:
        return parts
    if "test" in missing and held_out < tenth:
        notices.append(f"{where}: validation and test are {held_out} rows each, not a tenth of {count}")
    order = np.random.default_rng(SEED["permutation"]).permutation(count)
    positions = np.split(order, [first + held_out * i for i in range(len(missing))])
    return parts | {split: Part("train", at) for split, at in zip(["train", *missing], positions, strict=True)}
