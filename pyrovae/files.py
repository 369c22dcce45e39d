"""Files that somebody else may have made: read within bounds, and never written through; ours are replaced as a whole.

A run directory may come from a stranger. What is read of it is an ordinary file of bounded size, so that nothing waits
(a FIFO), ends never (a device) or unfolds in memory (YAML's aliases); it holds no links, so that what is written into
it stays in it. A link *to* a run directory, or one in the path of a file that is named on the command line, is the
user's own.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from pyrovae.errors import CheckpointError, OutputError

LARGEST = 2**28  # bytes of a record; ten thousand epochs write a hundredth of that
LARGEST_YAML = 100_000  # bytes of a configuration, which has one or two thousand
DEEPEST = 20  # levels of a configuration, which has three
MOST_FILES = 100_000  # in a run directory, which has some thirty
# What the operating system says where one may read but not write: the permissions, or a disk that is read-only.
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

# How files are opened: not kept by programs that are started, and a FIFO without a writer is not waited for.
CAREFULLY = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
NOT_A_LINK = getattr(os, "O_NOFOLLOW", 0)


def user_cache() -> Path:
    """The user's own folder of this library: downloaded data, and the key of scores."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pyrovae"


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """An ordinary file, to read.

    Raises:
        OSError: it cannot be opened, or is a directory, a FIFO or a device.
        ValueError: its name is none.
    """
    descriptor = os.open(path, os.O_RDONLY | CAREFULLY)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not an ordinary file")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_bytes(path: Path, most: int = LARGEST) -> bytes:
    """The content of an ordinary file.

    Raises:
        OSError: see `opened`.
        ValueError: it is larger than `most` bytes.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"it has {size:,} bytes, more than the {most:,} it may have")
        return file.read(size)


def read_json(path: Path, most: int = LARGEST) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: see `opened`.
        ValueError: it is no JSON, too large, or nested too deeply.
    """
    try:
        return json.loads(read_bytes(path, most))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class PlainLoader(yaml.SafeLoader):
    """YAML's plain values without dates, which no option takes: 2020-01-01 stays a word."""


PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> Any:
    """The plain value in a YAML file: words, numbers of 64 bits, true, false and null, in lists and by name.

    Raises:
        OSError: see `opened`.
        ValueError: it is no YAML, too large, nested too deeply, or holds something else; or has aliases, by which a
            line can stand for a gigabyte.
    """
    content = read_bytes(path, LARGEST_YAML)
    try:
        depth = 0
        for event in yaml.parse(content, PlainLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise ValueError("it has YAML anchors or aliases; write the values out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError("it is nested too deeply")
        value = yaml.load(content, PlainLoader)
        check_plain(value)
        return value
    except (yaml.YAMLError, TypeError) as error:  # TypeError: a key that is a list
        raise ValueError(f"it is no YAML ({type(error).__name__})") from error


def check_plain(value: Any) -> None:
    """Refuse what YAML has beyond plain values, and words that a terminal would act on or that no file name has."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("it has names that are no words")
        for item in (*value, *value.values()):
            check_plain(item)
    elif isinstance(value, list):
        for item in value:
            check_plain(item)
    elif isinstance(value, str) and not (value.isprintable() and len(value) <= 4096):
        raise ValueError(f"it has a word of control characters, or without end: {value[:40]!r}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("it has a number of more than 64 bits")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"it has a value of type {type(value).__name__}")


def inside(directory: Path, *names: str) -> Path:
    """directory/NAME/..., where what is written stays in the directory.

    Raises:
        CheckpointError: one of the names is a link.
    """
    path = directory
    for name in names:
        path = path / name
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a link, and a run holds none; put there what it points to (cp -rL)")
    return path


def refuse_links(directory: Path) -> None:
    """Refuse a run directory in which anything is a link, or neither a folder nor an ordinary file.

    Raises:
        CheckpointError: there is one, or the directory has more files than any run.
    """
    folders, count = [directory], 0
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:  # what another process was writing has got its name meanwhile
            continue
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from error
        count += len(entries)
        if count > MOST_FILES:
            raise CheckpointError(f"{directory}: has more than {MOST_FILES:,} files, which no run has")
        for entry in entries:
            inside(folder, entry.name)
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
                raise CheckpointError(f"{entry.path}: is no ordinary file, and a run holds no others; remove it")


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a run's own file, to be changed in place; made with the permissions that the umask leaves.

    Raises:
        CheckpointError: it is a link, or has a second name elsewhere, or is no ordinary file.
        OSError: it cannot be opened.
    """
    inside(path.parent, path.name)
    descriptor = os.open(path, flags | os.O_CREAT | NOT_A_LINK | CAREFULLY, 0o666)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        what = "has another name elsewhere (a hard link)" if stat.S_ISREG(status.st_mode) else "is no ordinary file"
        raise CheckpointError(f"{path}: {what}, so nothing is written to it; replace it by a copy")
    return descriptor


def flush(path: Path) -> None:
    """Have the operating system put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Where to write what then replaces a file as a whole.

    Raises:
        OutputError: the disk refused; the earlier file is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # of a process of this number that was killed while writing
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OutputError(f"{path}: could not be written ({error.strerror or error})") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole, in a directory that is made if there is none.

    Raises:
        OutputError: the disk refused; the earlier file is intact.
    """
    with replaced(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("x" if isinstance(content, str) else "xb") as file:  # never through a link
            file.write(content)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace a JSON file as a whole; numbers that are not finite, which JSON does not have, become null.

    Raises:
        OutputError: the disk refused; the earlier file is intact.
    """

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_atomically(path, json.dumps(clean(values), indent=1, allow_nan=False) + "\n")


def is_writable(directory: Path) -> bool:
    """Whether files can be made in a directory, found out by making one."""
    probe = directory / f".probe.{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        return error.errno not in READ_ONLY
    probe.unlink()
    return True
