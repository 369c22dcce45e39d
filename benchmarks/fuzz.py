"""Damaged files: whatever is done to a file that pyrovae reads, the answer is one of its own errors.

    python benchmarks/fuzz.py [--minutes 60] [--only TARGET ...] [--seed 0] [--out benchmarks/results/fuzz.md]

Valid files are mutated (bits flipped, bytes inserted, removed, repeated, tokens and numbers replaced, JSON and YAML
values exchanged for others and the checksums made to fit) and read in this process. A case is counted as

    read        the file was still accepted
    refused     by an error of `pyrovae.errors` of the code that the target allows
    fault       by anything else, by a message of more than a line or two, or after more than ten seconds

Faults are listed with their seeds: `--only TARGET --seed SEED --cases 1` repeats one.
"""

import argparse
import contextlib
import faulthandler
import gzip
import hashlib
import io
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pyrovae.command import explain
from pyrovae.errors import CheckpointError, DataError, NumericalError, OutputError, PyrovaeError, UsageError

LONG = 2000  # characters of a message that is no message any more
SLOW = 10.0  # seconds
MEMORY = 4 * 2**30  # bytes that a case may ask for

TOKENS = [
    *(b"\x00", b"\xff", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"\xff\xff\xff\x7f", b"\n", b"\r", b'"', b"'", b","),
    *(b"(", b")", b"[", b"]", b"{", b"}", b":", b"#", b"-", b"1e999", b"nan", b"-1", b"0", b"9" * 30, b"\\", b"%"),
    *("é".encode(), "²".encode(), b"\x1b[31m", b"|O", b"<f8", b">i2", b"<U5", b"|V0", b"True", b"None", b"(" * 300),
    *(
        b"[" * 3000,
        b"PK\x01\x02",
        b"PK\x03\x04",
        b"PK\x05\x06",
        b"\x93NUMPY",
        b"!!python/object:os.system",
        b"&a",
        b"*a",
    ),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 10**6, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "0"),
    *("²", "\x00", "../..", "/etc/passwd", "a" * 5000, [], {}, [[]], {"items": []}, {"tensor": "x"}, [1, "a", None]),
    *({"items": [["a"]]}, {"items": 3}, [[1, 2, 3]], {"a": {"b": {}}}, "warmup:3", "1,2", "\x1b[31m", -(10**18)),
]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A file with one to four mutations of its bytes, most of them near its beginning or its end."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        reach = rng.choice((16, 130, len(data), len(data)))
        at = rng.randrange(max(1, min(reach, len(data))))
        at = max(0, len(data) - 1 - at) if rng.random() < 0.3 else at
        length = rng.choice((1, 1, 2, 4, 8, rng.randrange(1, 200)))
        kind = rng.randrange(8)
        if not data:
            data = bytearray(rng.choice(TOKENS))
        elif kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind == 2:
            data[at:at] = rng.choice(TOKENS)
        elif kind == 3:
            token = rng.choice(TOKENS)
            data[at : at + len(token)] = token
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            del data[at:]
        elif kind == 6:
            data[at:at] = data[at : at + length] * rng.choice((1, 1, 50))
        else:
            other = rng.randrange(len(data))
            data[at : at + length] = data[other : other + length]
    return bytes(data)


def exchanged(value: Any, rng: random.Random) -> Any:
    """Nested data with one to three of its values, at any depth, exchanged for others, removed or repeated."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        stack = [value]
        while stack:
            node = stack.pop()
            items = list(node.items() if isinstance(node, dict) else enumerate(node))
            places += [(node, key) for key, _ in items]
            stack += [item for _, item in items if isinstance(item, dict | list)]
        if not places:
            return rng.choice(VALUES)
        node, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(("x", "", "²", key + " "))] = node.pop(key)
        elif kind == 2 and isinstance(node, list):
            node.insert(key, node[key])
        elif kind == 3:
            for _ in range(rng.choice((1, 20, 2000))):
                node[key] = [node[key]]
        else:
            other, place = rng.choice(places)
            new = rng.choice((*VALUES, *VALUES, other[place]))
            with contextlib.suppress(RecursionError):  # of one that is nested too deep to be copied
                new = json.loads(json.dumps(new))  # as it was before the exchange: no value holds itself
            node[key] = new
    return value


@dataclass
class Target:
    """What is damaged and read: `make` writes valid files, `damage` damages one, `read` reads it."""

    make: Callable[[Path], None]
    damage: Callable[[Path, random.Random], None]
    read: Callable[[Path], object]
    allowed: tuple[type[PyrovaeError], ...] = (DataError,)


# ------------------------------------------------------------------------------------------------- files of rows


def write_npy(folder: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(folder / "a.npy", rng.standard_normal((20, 3)).astype(np.float32))
    np.save(folder / "b.npy", np.asfortranarray(rng.integers(0, 256, (12, 3, 4), dtype=np.uint8)))
    np.save(folder / "c.npy", rng.random((20, 2)) < 0.5)
    np.save(folder / "d.npy", rng.integers(-9, 9, (15, 2)).astype(">i4"))


def damage_npy(path: Path, rng: random.Random) -> None:
    """Bytes of the file, or a header of random entries that fits its length."""
    if rng.random() < 0.5:
        path.write_bytes(damaged(path.read_bytes(), rng))
        return
    body = path.read_bytes()[128:]
    sizes = [
        rng.choice((0, 1, 2, 3, 15, 20, -1, 2**31, 2**63, 10**40, 10**18)) for _ in range(rng.choice((1, 2, 2, 3, 70)))
    ]
    shape = rng.choice(
        (str(tuple(sizes)), str(sizes), "(" * 200 + ")" * 200, "(1.5, 2)", "((2,), 3)", "()", "5", "({[]: 1},)")
    )
    kinds = (
        "'<f4'",
        "'|u1'",
        "'>i8'",
        "'|O'",
        "'<c8'",
        "'|S0'",
        "'<U3'",
        "[('a', '<f4')]",
        "'i4,f4'",
        "'<M8[s]'",
        "'f99'",
        "7",
    )
    order = rng.choice(("True", "False", "False", "0", "'x'", "None", "1j", "-" * 500 + "1"))
    entries = [f"'descr': {rng.choice(kinds)}", f"'fortran_order': {order}", f"'shape': {shape}"]
    rng.shuffle(entries)
    if rng.random() < 0.2:
        entries.append(rng.choice(("'x': 1", "'shape': (2, 3)", "é", "b'\\xff': 0", "**1")))
    header = ("{" + ", ".join(entries) + rng.choice(("}", ", }", "", "}}"))).encode()
    version = rng.choice((1, 1, 1, 2, 3, 0))
    size = struct.pack("<H" if version < 2 else "<I", min(len(header), 65535))
    path.write_bytes(b"\x93NUMPY" + bytes((version, 0)) + size + header + body)


def write_npz(folder: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 3)).astype(np.float32)
    np.savez(folder / "a.npz", x=x, y=rng.integers(0, 3, 20))
    np.savez_compressed(
        folder / "b.npz", x_train=x, x_test=x[:5], y_train=np.array(["é"] * 20), y_test=np.array(["b"] * 5)
    )


def damage_npz(path: Path, rng: random.Random) -> None:
    """Bytes of the archive, or those of a member, packed anew."""
    if rng.random() < 0.6:
        path.write_bytes(damaged(path.read_bytes(), rng))
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    chosen = rng.choice(list(members))
    single = path.with_suffix(".npy")
    single.write_bytes(members[chosen])
    damage_npy(single, rng)
    members[chosen] = single.read_bytes()
    single.unlink()
    with zipfile.ZipFile(path, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members.items():
            archive.writestr(
                name if rng.random() < 0.9 else rng.choice(("x.npy", "x", "../x.npy", "é.npy", " ")), content
            )


def write_csv(folder: Path) -> None:
    (folder / "a.csv").write_text("a,b,label\n" + "".join(f"{i / 7},{i % 5},{'uv'[i % 2]}\n" for i in range(20)))
    (folder / "b.csv").write_text("".join(f"{i % 2},{i % 3}\n" for i in range(20)))


def damage_bytes(path: Path, rng: random.Random) -> None:
    path.write_bytes(damaged(path.read_bytes(), rng))


def write_images(folder: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg", "bmp", "gif", "tif", "webp", "pgm"):
        inside = folder / suffix
        inside.mkdir()
        for index in range(4):
            picture = Image.fromarray(rng.integers(0, 256, (6, 5), dtype=np.uint8))
            picture.save(inside / f"{index}.{suffix}")


def damage_image(path: Path, rng: random.Random) -> None:
    damage_bytes(rng.choice(sorted(path.iterdir())), rng)


def write_idx(folder: Path) -> None:
    rng = np.random.default_rng(0)
    raw = folder / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 12), ("t10k", 5)):
        images, labels = (
            rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            rng.integers(0, 10, count, dtype=np.uint8),
        )
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, count, 28, 28) + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels.tobytes())


def damage_idx(path: Path, rng: random.Random) -> None:
    file = rng.choice(sorted((path / "MNIST" / "raw").iterdir()))
    damage_bytes(file, rng)
    if rng.random() < 0.2:
        packed = damaged(gzip.compress(file.read_bytes()), rng)
        file.unlink()
        file.with_name(file.name + ".gz").write_bytes(packed)


def read_rows(path: Path) -> object:
    """Load, and make rows of both measures where they can be."""
    from pyrovae.data import default_measure, load_data

    data = load_data(path)
    return data.rows(default_measure(data))


def read_idx(path: Path) -> object:
    from pyrovae.data import load_data

    return load_data("mnist", root=path, download=False)


# ------------------------------------------------------------------------------------------------- files of a run


def write_run(folder: Path) -> None:
    """A finished run, small, scored."""
    from pyrovae import evaluate, fit

    bits = (np.random.default_rng(0).random((40, 4)) < 0.5).astype(np.float32)
    np.save(folder / "bits.npy", bits)
    words = "--latent-dim 2 --network.hidden 3 --epochs 2 --batch-size 16 --eval-K 4 --eval-rows 3 --no-plots --seed 1"
    with contextlib.redirect_stdout(io.StringIO()):
        fit.command([*words.split(), "--data", str(folder / "bits.npy"), "--out", str(folder / "run")])
        evaluate.command([str(folder / "run"), "--K", "8", "--rows", "3"])


def sign(folder: Path) -> None:
    """Bring a checkpoint's manifest up to date."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, record in manifest["files"].items():
        content = (folder / name).read_bytes()
        record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def damage_checkpoint(path: Path, rng: random.Random) -> None:
    """A file of the newest checkpoint; mostly with a manifest that fits."""
    folder = max((path / "checkpoints").glob("step-*"))
    name = rng.choice(
        ("training.json", "training.json", "weights.safetensors", "training.safetensors", "manifest.json")
    )
    file = folder / name
    if (name == "training.json" and rng.random() < 0.8) or (name == "manifest.json" and rng.random() < 0.5):
        file.write_text(json.dumps(exchanged(json.loads(file.read_text()), rng)))
    else:
        damage_bytes(file, rng)
    if name != "manifest.json" and rng.random() < 0.9:
        sign(folder)
    if rng.random() < 0.9:  # no whole one to fall back on
        for other in (path / "checkpoints").glob("step-*"):
            if other != folder:
                shutil.rmtree(other)


def damage_config(path: Path, rng: random.Random) -> None:
    file = path / "config.yaml"
    if rng.random() < 0.4:
        damage_bytes(file, rng)
        return
    file.write_text(yaml.safe_dump(exchanged(yaml.safe_load(file.read_text()), rng)))


def damage_scores(path: Path, rng: random.Random) -> None:
    """A table of scores, or evaluation.json; a block's checksum is made to fit half of the time."""
    from pyrovae.runs.scores import closing

    file = rng.choice([*sorted((path / "scores").iterdir()), path / "evaluation.json"])
    if file.suffix == ".json" or rng.random() < 0.4:
        damage_bytes(file, rng)
        return
    lines = file.read_text().splitlines(keepends=True)
    rows = [i for i, line in enumerate(lines) if line[0].isdigit()]
    at = rng.choice(rows)
    cells = lines[at].rstrip("\n").split(",")
    cells[rng.randrange(len(cells))] = rng.choice(("", "x", "nan", "inf", "-1", "1e999", "²", "1_0", "\x00", "9" * 400))
    lines[at] = ",".join(cells) + "\n"
    if lines[at][:1].isdigit():
        for i in [i for i, line in enumerate(lines) if line.startswith("# rows ")]:
            lines[i] = closing([line for line in lines[:i] if line[:1].isdigit()])
    file.write_text("".join(lines))


def read_weights(path: Path) -> object:
    from pyrovae.runs.directory import load

    return load(path)


def read_resumed(path: Path) -> object:
    """Continue for an epoch."""
    from pyrovae import fit

    return fit.command(["--resume", str(path), "--epochs", "3", "--no-plots"])


def read_config(path: Path) -> object:
    """As a run's, and as --config takes it."""
    from pyrovae.fit import read_options
    from pyrovae.runs.directory import open_run
    from pyrovae.runs.options import DERIVED
    from pyrovae.runs.recipe import Recipe

    try:
        open_run(path)
    except CheckpointError:
        pass
    else:
        return "read"
    options = read_options(["--config", str(path / "config.yaml")])
    return Recipe(**{key: value for key, value in options.items() if key not in DERIVED})


def read_scores(path: Path) -> object:
    from pyrovae import evaluate

    return evaluate.command([str(path), "--K", "8", "--rows", "3"])


TARGETS = {
    "npy": Target(write_npy, damage_npy, read_rows),
    "npz": Target(write_npz, damage_npz, read_rows),
    "csv": Target(write_csv, damage_bytes, read_rows),
    "images": Target(write_images, damage_image, read_rows),
    "idx": Target(write_idx, damage_idx, read_idx),
    "config": Target(write_run, damage_config, read_config, (UsageError, CheckpointError)),
    "weights": Target(write_run, damage_checkpoint, read_weights, (CheckpointError,)),
    "resumed": Target(write_run, damage_checkpoint, read_resumed, (CheckpointError, NumericalError, UsageError)),
    "scores": Target(write_run, damage_scores, read_scores, (CheckpointError, OutputError)),
}


@dataclass
class Outcome:
    """Cases of a target."""

    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        """How many were tried."""
        return self.read + self.refused.total() + len(self.faults)


def samples(target: Target, folder: Path) -> list[Path]:
    """Valid files, or the directories that are damaged as a whole."""
    target.make(folder)
    if target.make is write_run:
        return [folder / "run"]
    return sorted(folder.iterdir())


def case(target: Target, valid: list[Path], folder: Path, seed: str, outcome: Outcome) -> None:
    """Damage a copy of a valid file and read it."""
    rng = random.Random(seed)
    source = rng.choice(valid)
    copy = folder / source.name
    if source.is_dir():
        shutil.copytree(source, copy)
    else:
        shutil.copy(source, copy)
    with contextlib.suppress(RecursionError), warnings.catch_warnings():  # of a value too deep to be written
        warnings.simplefilter("ignore")
        target.damage(copy, rng)
    began = time.process_time()  # the clock's is that of a busy machine, too
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(copy)
        outcome.read += 1
    except target.allowed as error:
        outcome.refused[type(error).__name__] += 1
        line = explain(error)[1]
        if len(line) > LONG or not line.isprintable():
            outcome.faults.append(f"{seed}: message of {len(line)} characters: {line[:200]!a}")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome.faults.append(
            f"{seed}: {type(error).__name__}: {str(error)[:200]!a} at {Path(where.filename).name}:{where.lineno}"
        )
    finally:
        took = time.process_time() - began
        if took > SLOW:
            outcome.faults.append(f"{seed}: {took:.0f} s")
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink(missing_ok=True)


def campaign(name: str, seed: int, seconds: float, cases: int | None = None) -> Outcome:
    """Cases of a target until the time of the processor is used up, or so many."""
    target, outcome = TARGETS[name], Outcome()
    with tempfile.TemporaryDirectory() as temporary:
        folder, copies = Path(temporary, "valid"), Path(temporary, "copies")
        folder.mkdir()
        copies.mkdir()
        valid = samples(target, folder)
        began = time.process_time()
        number = seed
        while cases is None or number - seed < cases:
            if time.process_time() - began > seconds:
                break
            case(target, valid, copies, f"{name} {number}", outcome)
            number += 1
        outcome.seconds = time.process_time() - began
    return outcome


def table(outcomes: dict[str, Outcome]) -> str:
    """The outcome as a page."""
    cases, seconds = sum(o.cases for o in outcomes.values()), sum(o.seconds for o in outcomes.values())
    faults = [fault for outcome in outcomes.values() for fault in outcome.faults]
    lines = [
        f"| {name} | {o.cases:,} | {o.read:,} | {o.refused.total():,} | {len(o.faults)} | {o.seconds / 60:.1f} |"
        for name, o in outcomes.items()
    ]
    return "\n".join(
        [
            "# Damaged files",
            "",
            f"{cases:,} damaged files in {seconds / 60:.0f} minutes of processor time: {len(faults)} faults.",
            "",
            f"By `benchmarks/fuzz.py`, torch {torch.__version__}, NumPy {np.__version__}.",
            "",
            "| target | cases | still read | refused in one line | faults | minutes |",
            "|---|---|---|---|---|---|",
            *lines,
            *(["", *(f"- {fault}" for fault in faults[:50])] if faults else []),
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign, write the page, and return the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="of processor time, over all targets")
    parser.add_argument("--cases", type=int, help="so many of each target at most")
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), metavar="TARGET")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--out", type=Path, help="where the page is written")
    chosen = parser.parse_args(argv)
    faulthandler.enable()
    resource.setrlimit(
        resource.RLIMIT_AS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 8 * MEMORY,) * 2
    )
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    names, outcomes = chosen.only or list(TARGETS), {}
    for name in names:
        outcome = outcomes[name] = campaign(name, chosen.seed, 60 * chosen.minutes / len(names), chosen.cases)
        kinds = Counter(fault.split(": ", 1)[1][:60] for fault in outcome.faults)
        print(
            f"{name}: {outcome.cases:,} cases, {outcome.read:,} read, {dict(outcome.refused)}, "
            f"{len(outcome.faults)} faults"
        )
        for kind, count in kinds.most_common(12):
            example = next(fault for fault in outcome.faults if kind in fault)
            print(f"  {count} x {example}", flush=True)
        if chosen.out:
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
            chosen.out.write_text(table(outcomes))
    return sum(len(outcome.faults) for outcome in outcomes.values())


if __name__ == "__main__":
    sys.exit(min(main(), 1))
