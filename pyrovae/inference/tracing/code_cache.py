"""The compiler's files, verified before they are used again.

Torch's compiler keeps libraries and sources, and takes a file that is there for one that is whole: what was left of one
by a process that was killed while it compiled, or by a full disk, would be loaded ever after. So what is compiled here
has a folder of its own in the compiler's cache, with a record of the files that whole compilations left, by size and
time of writing. What the record does not have is removed, and then compiled again. One process compiles at a time;
others, which mostly want the same, wait for it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyrovae.files import write_atomically

RECORD = "whole.json"
# What torch's compiler and Triton take for their folders.
VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")

Files = dict[str, list[int]]


@contextmanager
def verified() -> Iterator[None]:
    """Compile in the folder of whole files, and count what this adds to them if it succeeds."""
    from filelock import FileLock

    folder = home()
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        recorded = read_record(folder)
        for name, stamp in files(folder).items():
            if recorded.get(name) != stamp:
                (folder / name).unlink()
        with used(folder):
            yield
        write_atomically(folder / RECORD, json.dumps(files(folder)))


@contextmanager
def fresh() -> Iterator[None]:
    """Compile in an empty folder. If that succeeds, where `verified` did not, its files are not trusted any more."""
    folder = Path(tempfile.mkdtemp(prefix="fresh-", dir=home().parent))
    try:
        with used(folder):
            yield
        (home() / RECORD).unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what was loaded stays loaded


def home() -> Path:
    """The folder of whole files."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "pyrovae"


@contextmanager
def used(folder: Path) -> Iterator[None]:
    """Have torch's compiler keep all its files in a folder, and as before at the end."""
    from torch._inductor import codecache

    headers = {"_HEADER_DIR": folder / "headers", "_HEADER_LOCK_DIR": folder / "headers" / "locks"}
    before = {name: os.environ.get(name) for name in VARIABLES}
    of_torch = {name: getattr(codecache, name) for name in headers}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ.pop("TRITON_CACHE_DIR", None)  # within the folder, then
    try:
        for name, path in headers.items():
            setattr(codecache, name, str(path))
        yield
    finally:
        for name, path in of_torch.items():
            setattr(codecache, name, path)
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def files(folder: Path) -> Files:
    """Size and time of writing of every file in a folder but the record."""
    found: Files = {}
    for where, _, names in os.walk(folder):
        for name in names:
            path = Path(where, name)
            status = path.lstat()
            found[str(path.relative_to(folder))] = [status.st_size, status.st_mtime_ns]
    found.pop(RECORD, None)
    return found


def read_record(folder: Path) -> Files:
    """The files that were whole; none if that cannot be told."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
