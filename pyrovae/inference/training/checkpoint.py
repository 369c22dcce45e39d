"""Checkpoints: the only file that reads or writes one.

A run directory holds `checkpoints/step-NNNNNNNNN/`, each with

    weights.safetensors     the pair's tensors
    training.safetensors    the optimiser's tensors, for resuming
    training.json           everything else that resuming needs: counters, history, schedules
    manifest.json           format, step, and size and SHA-256 of the other files

A checkpoint is written under a temporary name, flushed to the disk, and renamed: it is there whole or not at all. The
newest two stay, and the best. Reading verifies sizes and checksums first, and executes nothing: tensors are
safetensors, the rest JSON.
"""

import hashlib
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrovae.errors import CheckpointError, OutputError, UsageError
from pyrovae.files import flush, inside, open_own, read_json

with suppress(ImportError):  # Windows has none
    import fcntl

FORMAT = 1
WEIGHTS, TENSORS, TRAINING, MANIFEST = "weights.safetensors", "training.safetensors", "training.json", "manifest.json"
FILES = (WEIGHTS, TENSORS, TRAINING)
# Tensors that pairs did not have at first, by the end of their names, and the value that they then computed with.
ADDED = {"likelihood.unit": 1.0}


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        step: Gradient steps taken.
        weights: The pair's tensors by name.
        training: Anything made of dictionaries, lists, numbers, strings and tensors.
        notices: What the user should read: a damaged newer checkpoint that was passed over.
    """

    step: int
    weights: dict[str, Tensor]
    training: dict[str, Any]
    notices: tuple[str, ...] = ()


def save(run: Path, checkpoint: Checkpoint, best: Iterable[int | None] = ()) -> None:
    """Write a checkpoint, then remove all but the newest two whole ones and those of the steps in `best`.

    Raises:
        OutputError: the disk refused; earlier checkpoints are intact.
        CheckpointError: the folder of checkpoints is a link.
    """
    from safetensors.torch import save_file

    folder = inside(run, "checkpoints")
    target = folder / name_of(checkpoint.step)
    temporary = folder / f".{target.name}.{os.getpid()}"
    tensors: dict[str, Tensor] = {}
    earlier = "; earlier checkpoints are intact" if steps(run) else ""
    try:
        for leftover in folder.glob(".step-*"):  # of a process that was killed while writing
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        record = json.dumps(pack(checkpoint.training, tensors))
        (temporary / TRAINING).write_text(record)
        save_file(copied(checkpoint.weights), temporary / WEIGHTS)
        save_file(copied(tensors), temporary / TENSORS)
        for name in (WEIGHTS, TENSORS):  # safetensors leaves them to their owner; the umask decides, as for the others
            (temporary / name).chmod((temporary / TRAINING).stat().st_mode)
        recorded = {name: fingerprint(temporary / name) for name in FILES}
        manifest = {"format": FORMAT, "step": checkpoint.step, "files": recorded}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for name in (*FILES, MANIFEST):
            flush(temporary / name)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        flush(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        blocked = os.path.lexists(folder) and not folder.is_dir()
        remedy = f"{folder} is a file; move it away" if blocked else "Free space and resume the run"
        why = f"({error.strerror or error}){earlier}"
        raise OutputError(
            f"checkpoint {target}: could not be written {why}. {remedy}", settings=() if blocked else ("resume",)
        ) from error
    except Exception as error:  # safetensors reports a full disk by an exception of its own
        shutil.rmtree(temporary, ignore_errors=True)
        if type(error).__name__ != "SafetensorError":
            raise
        raise OutputError(f"checkpoint {target}: could not be written ({error}){earlier}") from error
    # Newer ones than this are torn: training went on from before them.
    whole = [step for step in steps(run) if step <= checkpoint.step and is_whole(folder / name_of(step))]
    kept = {*whole[:2], *best}
    for old in steps(run):
        if old not in kept:
            shutil.rmtree(folder / name_of(old), ignore_errors=True)


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory and have no strides, as safetensors asks for."""
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}


def name_of(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:09d}"


def kept_in(run: Path | None) -> bool:
    """Whether a run has come as far as a checkpoint, whole or not."""
    return run is not None and bool(steps(run))


def steps(run: Path) -> list[int]:
    """Steps with a checkpoint, newest first."""
    try:
        names = os.listdir(run / "checkpoints")
    except OSError:
        return []
    return sorted(
        (int(name[5:]) for name in names if re.fullmatch(r"step-(\d{9}|[1-9]\d{9,17})", name, re.A)), reverse=True
    )


def load_latest(run: Path) -> Checkpoint:
    """The newest checkpoint that is whole, with a notice for each newer one that is not.

    Raises:
        CheckpointError: there is none, or their folder is a link.
    """
    inside(run, "checkpoints")
    notices: list[str] = []
    for step in steps(run):
        try:
            checkpoint = load(run, step)
        except CheckpointError as error:
            notices.append(str(error))
            continue
        checkpoint.notices = tuple(f"{notice}; falling back to the previous checkpoint" for notice in notices)
        return checkpoint
    found = "; ".join(notices) or f"{run.resolve()} has no checkpoints"
    raise CheckpointError(f"no usable checkpoint: {found}. Was it written by pyrovae.fit?")


def load(run: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, verified.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    folder = inside(run, "checkpoints", name_of(step))
    verify(folder)
    tensors = read_tensors(folder / TENSORS)
    try:
        training = unpack(read_json(folder / TRAINING), tensors)
        if not isinstance(training, dict):
            raise TypeError("not a dictionary")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint {folder / TRAINING}: not written by pyrovae ({type(error).__name__})"
        ) from error
    return Checkpoint(step, read_tensors(folder / WEIGHTS), training)


def verify(folder: Path) -> None:
    """Compare a checkpoint with its manifest before anything of it is read.

    Raises:
        CheckpointError: it is not as its manifest says, or has none.
    """
    for name, (size, digest) in read_manifest(folder).items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"checkpoint {path}: missing, or not an ordinary file")
        if path.stat().st_size != size:
            raise CheckpointError(f"checkpoint {path}: expected {size} bytes, found {path.stat().st_size}")
        if fingerprint(path)["sha256"] != digest:
            raise CheckpointError(f"checkpoint {path}: checksum mismatch")


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of a checkpoint's files, as they were written.

    Raises:
        CheckpointError: there is none, or it is damaged, of a newer format, or of another step.
    """
    try:
        manifest = read_json(inside(folder, MANIFEST), 100_000)
        version, step, recorded = manifest["format"], manifest["step"], manifest["files"]
        found = {name: (recorded[name]["bytes"], recorded[name]["sha256"]) for name in FILES}
        if any(type(size) is not int or not isinstance(digest, str) for size, digest in found.values()):
            raise TypeError("not a size and a checksum")
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: no manifest ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder}: its manifest is damaged") from error
    if type(version) is not int or version != FORMAT:
        raise CheckpointError(f"checkpoint {folder}: format {version}, this version of pyrovae reads format {FORMAT}")
    if type(step) is not int or folder.name != name_of(step):
        raise CheckpointError(f"checkpoint {folder}: its manifest is damaged, or of another step ({step})")
    return found


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint has all its files in their sizes; their checksums are for those who read them."""
    try:
        return all((folder / name).lstat().st_size == size for name, (size, _) in read_manifest(folder).items())
    except (OSError, CheckpointError):
        return False


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path}: not a safetensors file ({error})") from error


def assign(target: dict[str, Tensor], source: dict[str, Tensor], where: str) -> None:
    """Copy tensors by name, after comparing every name, shape and type. Older runs may lack those in `ADDED`.

    Raises:
        CheckpointError: tensors are missing, extra, misshapen, mistyped or not finite; each is named.
    """
    for name, tensor in target.items():
        if name not in source and (value := ADDED.get(".".join(name.split(".")[-2:]))) is not None:
            source = {**source, name: torch.full(tensor.shape, value, dtype=tensor.dtype)}
    faults = [f"missing {name}" for name in target if name not in source]
    faults += [f"extra {name}" for name in source if name not in target]
    for name in target.keys() & source.keys():
        want, came = target[name], source[name]
        if want.shape != came.shape:
            faults.append(f"{name} has shape {tuple(came.shape)}, expected {tuple(want.shape)}")
        elif want.dtype != came.dtype:
            faults.append(f"{name} has type {came.dtype}, expected {want.dtype}")
        elif came.is_floating_point() and not came.isfinite().all():
            faults.append(f"{name} has {int((~came.isfinite()).sum())} elements that are not finite")
    if faults:
        raise CheckpointError(f"{where}: does not fit the pair: {'; '.join(sorted(faults))}")
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """A JSON value for nested data, with its tensors moved to `tensors` by path."""
    if isinstance(value, Tensor):
        while path in tensors:  # the keys 0 and "0", or "a/b" and "a" above "b"
            path += "'"
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, dict):
        return {"items": [[key, pack(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [pack(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UsageError(f"checkpoint: cannot store {path} of type {type(value).__name__}")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`; tuples come back as lists."""
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: unpack(item, tensors) for key, item in value["items"]}
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    return value


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextmanager
def lock(run: Path) -> Iterator[str | None]:
    """Hold a run directory for this process; yields a notice if a dead process had left its lock.

    The file RUN/lock is locked by the operating system, which lets go of it when the process ends, however that
    happens. What it says (process, host, start) is for people, and for file systems that have no locks: there a living
    process of that number and start holds it, and one of another host is left to the user.

    Raises:
        OutputError: a living process holds it, or the directory cannot be written.
        CheckpointError: the lock is a link, or no ordinary file.
    """
    path = run / "lock"
    try:
        run.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = open_own(path, os.O_RDWR)
            try:
                locked = acquire(descriptor)
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                by_record = locked is None or " " not in holder  # a version before wrote its number and locked nothing
                if locked is False or (by_record and may_live(holder, os.fstat(descriptor).st_mtime)):
                    remedy = "" if locked is False else f", or remove {path} if it is gone"
                    raise OutputError(
                        f"{run}: {described(holder)} is writing there; wait for it, choose another directory{remedy}",
                        settings=("out",),
                    )
                if is_same(descriptor, path):
                    break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # of a run that ended just now, and took its lock away
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, own_record().encode(), 0)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{run}: cannot be written ({error.strerror or error}); choose another directory", settings=("out",)
        ) from error
    notices = [f"{run}: took over the lock of {described(holder)}, which is gone"] if holder else []
    if locked is None:
        notices.append(f"{run}: its file system has no locks; start no second process there")
    owner = os.getpid()
    held.add(descriptor)
    try:
        yield "; ".join(notices) or None
    finally:
        if os.getpid() == owner:
            held.discard(descriptor)
            try:
                if is_same(descriptor, path):
                    path.unlink()  # before it is let go: whoever has opened it meanwhile sees that it has gone
            finally:
                os.close(descriptor)


held: set[int] = set()


def let_go() -> None:
    """Close the locks of the parent in a forked process, which would hold them after the parent's end."""
    for descriptor in held:
        os.close(descriptor)
    held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=let_go)


def acquire(descriptor: int) -> bool | None:
    """Whether the operating system gives us the lock of a file; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, NameError):
        return None
    return True


def is_same(descriptor: int, path: Path) -> bool:
    """Whether a descriptor is of the file that now has that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def own_record() -> str:
    """Number, host and start of this process, as a lock holds them."""
    return f"{os.getpid()} {socket.gethostname()} {started(os.getpid()):.2f}"


def started(pid: int) -> float:
    """When a process began, in seconds; NaN if there is none of that number."""
    import psutil  # type: ignore[import-untyped]

    try:
        return float(psutil.Process(pid).create_time())
    except (psutil.Error, ValueError, OverflowError):
        return math.nan


def may_live(record: str, written: float) -> bool:
    """Whether the process that left a lock at that time may still run, by what it wrote: its number, host and start."""
    try:
        pid, *rest = record.split()
        if not rest:
            return int(pid) != os.getpid() and started(int(pid)) <= written
        host, start = rest
        return host != socket.gethostname() or abs(started(int(pid)) - float(start)) < 2
    except ValueError:
        return False


def described(record: str) -> str:
    """The holder of a lock in words."""
    if len(words := record.split()) != 3:
        return f"process {record}"
    return f"process {words[0]}" + (f" on {words[1]}" if words[1] != socket.gethostname() else "")
