"""Checkpoints: whole or not at all, verified before they are read, and nothing in them is executed."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from pyrovae.errors import CheckpointError, OutputError, UsageError
from pyrovae.files import write_atomically
from pyrovae.inference.training import checkpoint as checkpoints
from pyrovae.inference.training.checkpoint import (
    FILES,
    Checkpoint,
    assign,
    fingerprint,
    load,
    load_latest,
    lock,
    save,
    started,
    steps,
)

MANIFEST, WEIGHTS, TENSORS, TRAINING = "manifest.json", "weights.safetensors", "training.safetensors", "training.json"


def checkpoint(step: int) -> Checkpoint:
    """A checkpoint whose every number tells its step."""
    weights = {"w": torch.full((3, 2), float(step)), "b": torch.arange(4) + step}
    return Checkpoint(step, weights, {"progress": {"step": step}, "optimizer": {"m": torch.full((5,), step / 7)}})


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:09d}"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with checkpoints at steps 10 and 20."""
    save(tmp_path, checkpoint(10))
    save(tmp_path, checkpoint(20))
    return tmp_path


def assert_holds(found: Checkpoint, step: int) -> None:
    expected = checkpoint(step)
    assert found.step == step
    assert_close((found.weights, found.training), (expected.weights, expected.training), rtol=0, atol=0)


def sign(run: Path, step: int, **changes: object) -> None:
    """Write a manifest that agrees with the files as they are now, as a forger would."""
    path = folder(run, step)
    files = {name: fingerprint(path / name) for name in FILES}
    (path / MANIFEST).write_text(json.dumps({"format": 1, "step": step, "files": files} | changes))


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# --------------------------------------------------------------------------------------------------------- round trip


def test_the_newest_comes_back(run):
    assert_holds(load_latest(run), 20)
    assert_holds(load(run, 10), 10)
    assert load_latest(run).notices == ()


def test_nested_state_comes_back_with_keys_of_every_kind(tmp_path):
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 11: {"step": torch.tensor(1.0)}},
        "groups": [{"lr": 1e-3, "params": [0, 11], "amsgrad": False, "foreach": None, "betas": [0.9, 0.999]}],
        "same path?": {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}},
        "same key?": {0: torch.tensor(3), "0": torch.tensor(4)},
        "numbers": [float("inf"), -0.0, 1e-310, 2**63 - 1, True],
        "words": "é\n\"'",
        "empty": [{}, [], ""],
        "called tensor": {"tensor": "x", "items": 1},
    }
    save(tmp_path, Checkpoint(1, {"w": torch.zeros(1)}, state))
    found = load(tmp_path, 1).training
    for name in ("state", "same path?", "same key?"):
        assert_close(found[name], state[name], rtol=0, atol=0)
    for name in ("groups", "words", "empty", "called tensor", "numbers"):
        assert found[name] == state[name]
    assert list(found["state"]) == [0, 11]
    assert found["numbers"][4] is True
    assert str(found["numbers"]) == str(state["numbers"])


def test_an_optimiser_goes_on_where_it_was(tmp_path):
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        return layer, torch.optim.Adam([*layer.parameters()], lr=0.1, fused=True)

    def advance(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        layer(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    layer, optimizer = start()
    advance(layer, optimizer)
    save(tmp_path, Checkpoint(1, dict(layer.state_dict()), {"optimizer": optimizer.state_dict()}))
    advance(layer, optimizer)
    again, its_optimizer = start()
    saved = load_latest(tmp_path)
    assign(again.state_dict(keep_vars=True), saved.weights, "here")
    its_optimizer.load_state_dict(saved.training["optimizer"])
    advance(again, its_optimizer)
    assert_close(dict(again.state_dict()), dict(layer.state_dict()), rtol=0, atol=0)


def test_shared_and_strided_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    weights = {
        "base": base, "transposed": base.T, "every other": base[:, ::2], "row": base[1], "the same": base,
        "expanded": torch.tensor([1.0, 2.0])[:, None].expand(2, 3), "scalar": torch.tensor(2, dtype=torch.int8),
        "none": torch.zeros(0, 3), "half": base.bfloat16(), "parameter": nn.Parameter(base), "flags": base > 3,
    }  # fmt: skip
    save(tmp_path, Checkpoint(1, weights, {"shared": [base, base.T]}))
    found = load(tmp_path, 1)
    assert_close(found.weights, {name: t.detach() for name, t in weights.items()}, rtol=0, atol=0)
    assert_close(found.training["shared"], [base, base.T], rtol=0, atol=0)
    found.weights["base"].zero_()
    assert found.weights["the same"].sum() == 66


def test_what_cannot_be_stored_is_named_and_nothing_is_left(run):
    with pytest.raises(UsageError, match="cannot store /hook of type function"):
        save(run, Checkpoint(30, {}, {"hook": lambda: None}))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000000010", "step-000000020"]


def test_the_newest_two_and_the_best_stay(tmp_path):
    for step in range(10, 70, 10):
        save(tmp_path, checkpoint(step), best=(20,) if step < 60 else (40, None))
    assert steps(tmp_path) == [60, 50, 40]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step-0000000{s}" for s in (40, 50, 60)]


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_falls_back_with_a_notice(run, name):
    path = folder(run, 20) / name
    random.seed(name)
    size = 8 * path.stat().st_size
    for bit in [0, size - 1, *random.sample(range(size), 6)]:
        flip(path, bit)
        found = load_latest(run)
        assert_holds(found, 10)
        (notice,) = found.notices
        assert f"{name}: checksum mismatch; falling back to the previous checkpoint" in notice
        flip(path, bit)
    assert_holds(load_latest(run), 20)


def test_one_flipped_bit_in_the_manifest_never_gives_other_numbers(run):
    path = folder(run, 20) / MANIFEST
    for bit in range(0, 8 * path.stat().st_size, 5):
        flip(path, bit)
        found = load_latest(run)
        assert_holds(found, 20 if not found.notices else 10)
        flip(path, bit)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "missing", "a directory", "a link"])
def test_damaged_files_fall_back_with_a_notice(run, name, damage):
    path = folder(run, 20) / name
    content = path.read_bytes()
    if damage in ("truncated", "longer", "empty"):
        path.write_bytes({"truncated": content[:-3], "longer": content + b"x", "empty": b""}[damage])
    else:
        path.unlink()
        if damage == "a directory":
            path.mkdir()
        if damage == "a link":
            (run / "elsewhere").write_bytes(content)
            path.symlink_to(run / "elsewhere")
    found = load_latest(run)
    assert_holds(found, 10)
    assert "falling back to the previous checkpoint" in found.notices[0]
    if damage == "truncated" and name != MANIFEST:
        assert f"expected {len(content)} bytes, found {len(content) - 3}" in found.notices[0]


def test_all_damaged_never_restarts_in_silence(run):
    for step in (10, 20):
        flip(folder(run, step) / WEIGHTS, 700)
    with pytest.raises(CheckpointError, match=r"no usable checkpoint: .*step-0+20/.*checksum.*step-0+10/.*checksum"):
        load_latest(run)


def test_no_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        load_latest(tmp_path)
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        load_latest(tmp_path)
    with pytest.raises(CheckpointError, match="no manifest"):
        load(tmp_path, 10)


def test_other_things_in_the_folder_are_left_alone(run):
    for name in ("step-", "step-x", "step-000000020.bak", "notes.txt"):
        (run / "checkpoints" / name).mkdir()
    save(run, checkpoint(30))
    assert steps(run) == [30, 20]
    assert (run / "checkpoints" / "notes.txt").exists()


def test_a_newer_format_says_which(run):
    sign(run, 20, format=2)
    found = load_latest(run)
    assert "format 2, this version of pyrovae reads format 1" in found.notices[0]
    assert found.step == 10


@pytest.mark.parametrize("manifest", ["[]", "{}", "null", "{", '{"format": 1, "files": {}}', "\x00", '{"files": 3}'])
def test_a_manifest_that_is_none(run, manifest):
    (folder(run, 20) / MANIFEST).write_text(manifest)
    assert "manifest is damaged" in load_latest(run).notices[0]


# ------------------------------------------------------------------------------------------------------------ forgery


class Trap:
    """Unpickling it leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("write", [lambda trap, path: path.write_bytes(pickle.dumps(trap)), torch.save])
def test_a_pickle_executes_nothing(run, name, write):
    """Even one whose manifest agrees."""
    trap = run / "executed"
    write(Trap(trap), folder(run, 20) / name)
    sign(run, 20)
    found = load_latest(run)
    assert found.step == 10
    assert len(found.notices) == 1
    assert not trap.exists()


def test_a_tensor_file_that_claims_more_than_it_holds(run):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder(run, 20) / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    sign(run, 20)
    found = load_latest(run)
    assert "not a safetensors file" in found.notices[0]
    assert found.step == 10


@pytest.mark.parametrize(
    "text", ["", "nonsense", "[1, 2]", '{"items": 3}', '{"tensor": "nowhere"}', "\xff", "[" * 10**6]
)
def test_training_that_is_no_training(run, text):
    (folder(run, 20) / TRAINING).write_text(text, encoding="latin-1")
    sign(run, 20)
    found = load_latest(run)
    assert "training.json" in found.notices[0]
    assert found.step == 10


# -------------------------------------------------------------------------------------------------------- assignments


def test_everything_that_does_not_fit_is_named_and_nothing_is_assigned():
    target = {name: torch.zeros(2) for name in ("good", "missing", "misshapen", "mistyped", "broken")}
    source = {
        "good": torch.ones(2),
        "misshapen": torch.ones(3),
        "mistyped": torch.ones(2, dtype=torch.float64),
        "broken": torch.tensor([1.0, float("nan")]),
        "stray": torch.ones(1),
    }
    with pytest.raises(CheckpointError) as caught:
        assign(target, source, "runs/a, step 3")
    words = str(caught.value)
    assert words.startswith("runs/a, step 3: does not fit the pair")
    for fault in (
        "missing missing",
        "extra stray",
        "misshapen has shape (3,), expected (2,)",
        "mistyped has type torch.float64, expected torch.float32",
        "broken has 1 elements that are not finite",
    ):
        assert fault in words
    assert all((tensor == 0).all() for tensor in target.values())


def test_a_run_from_before_the_unit_of_its_likelihood():
    """It computed with a unit of 1; nothing else may be missing, nor may what only ends like it."""
    target = {"vae.likelihood.unit": torch.zeros(()), "vae.w": torch.zeros(2)}
    assign(target, {"vae.w": torch.ones(2)}, "runs/a, step 3")
    assert all((tensor == 1).all() for tensor in target.values())
    for name in ("vae.unit", "vae.my_likelihood.unit"):
        with pytest.raises(CheckpointError, match=f"missing {name}"):
            assign({name: torch.zeros(())}, {}, "runs/a, step 3")


def test_tensors_swapped_between_runs_do_not_fit(run):
    weights = load_file(folder(run, 20) / WEIGHTS)
    save_file({"w": weights["w"]}, folder(run, 20) / WEIGHTS)
    sign(run, 20)
    with pytest.raises(CheckpointError, match="missing b"):
        assign(checkpoint(0).weights, load_latest(run).weights, "here")


# ---------------------------------------------------------------------------------------------- disks, and other runs


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["os.replace", "safetensors.torch.save_file", "os.fsync", "pathlib.Path.write_text"])
def test_a_full_disk_leaves_earlier_checkpoints(run, where, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(OutputError, match=r"step-0+30: could not be written \(No space left on device\)"):
            save(run, checkpoint(30))
    assert steps(run) == [20, 10]
    assert_holds(load_latest(run), 20)
    assert [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []
    save(run, checkpoint(30))
    assert_holds(load_latest(run), 30)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="file size limits")
def test_a_limit_on_the_size_of_files(tmp_path):
    """The operating system itself refuses, in the middle of a tensor file."""
    script = """
import resource, signal, sys, torch
from pathlib import Path
from pyrovae.errors import OutputError
from pyrovae.inference.training.checkpoint import Checkpoint, save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save(Path(sys.argv[1]), Checkpoint(1, {"w": torch.ones(100)}, {}))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save(Path(sys.argv[1]), Checkpoint(2, {"w": torch.ones(100_000)}, {}))
except OutputError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused:")
    assert steps(tmp_path) == [1]
    assert load_latest(tmp_path).weights["w"].sum() == 100


def test_killed_while_writing_leaves_whole_checkpoints_only(run, monkeypatch):
    """What a kill leaves behind at any write is never read, and goes with the next checkpoint."""

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("pyrovae.inference.training.checkpoint.os.getpid", lambda: 999_999_999)
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            save(run, checkpoint(30))
    assert steps(run) == [20, 10]
    assert_holds(load_latest(run), 20)
    save(run, checkpoint(30))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000000020", "step-000000030"]


def test_text_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    write_atomically(path, "first")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OutputError, match="No space left on device"):
            write_atomically(path, "second")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
    write_atomically(path, "second")
    assert path.read_text() == "second"


@pytest.fixture
def neighbour() -> subprocess.Popen:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_a_living_process_keeps_its_directory(tmp_path, neighbour):
    """Also one of a version that wrote its number alone."""
    (tmp_path / "lock").write_text(str(neighbour.pid))
    with pytest.raises(OutputError, match=f"process {neighbour.pid} is writing there"), lock(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == str(neighbour.pid)


HOLDER = """
import sys, time
from pathlib import Path
from pyrovae.inference.training.checkpoint import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_the_operating_system_holds_the_lock_and_lets_go_of_it(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(OutputError, match=f"process {process.pid} is writing there"), lock(tmp_path):
        pass
    process.kill()
    process.communicate()
    with lock(tmp_path) as notice:
        assert f"took over the lock of process {process.pid}, which is gone" in notice


def test_a_lock_that_its_holder_took_away_meanwhile_is_none(tmp_path, monkeypatch):
    """Opened before the holder ended, locked after it: the file has no name any more, and keeps nobody out."""
    acquire = checkpoints.acquire

    def late(descriptor: int) -> bool | None:
        monkeypatch.setattr(checkpoints, "acquire", acquire)
        (tmp_path / "lock").unlink()
        return acquire(descriptor)

    monkeypatch.setattr(checkpoints, "acquire", late)
    with lock(tmp_path):
        assert (tmp_path / "lock").read_text().split()[0] == str(os.getpid())
        with pytest.raises(OutputError, match="is writing there"), lock(tmp_path):
            pass


def record(pid: int, host: str, start: float) -> str:
    return f"{pid} {host} {start:.2f}"


@pytest.mark.parametrize("start", ["its own", "another"])
@pytest.mark.parametrize("host", ["here", "another"])
def test_a_process_of_the_same_number_does_not_lock_itself_out(tmp_path, start, host):
    """A container that is started again has the same numbers, and perhaps another name."""
    began = started(os.getpid()) - (0 if start == "its own" else 1000)
    (tmp_path / "lock").write_text(record(os.getpid(), socket.gethostname() if host == "here" else "elsewhere", began))
    with lock(tmp_path) as notice:
        assert f"took over the lock of process {os.getpid()}{'' if host == 'here' else ' on elsewhere'}" in notice


def test_a_number_alone_that_is_taken_by_a_later_process_is_stale(tmp_path, neighbour):
    for pid in (neighbour.pid, os.getpid()):
        (tmp_path / "lock").write_text(str(pid))
        os.utime(tmp_path / "lock", (1e9, 1e9))
        with lock(tmp_path) as notice:
            assert f"took over the lock of process {pid}" in notice


def test_without_locks_of_the_file_system_the_record_decides(tmp_path, neighbour, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: full())
    path, here = tmp_path / "lock", socket.gethostname()
    for text in (record(neighbour.pid, here, started(neighbour.pid)), record(3, "elsewhere", 5.0)):
        path.write_text(text)
        with pytest.raises(OutputError, match=f"or remove {path} if it is gone"), lock(tmp_path):
            pass
        assert path.read_text() == text
    for text in (
        record(neighbour.pid, here, started(neighbour.pid) - 1000),
        "",
        "1 2",
        "\udcff".encode(errors="replace"),
    ):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with lock(tmp_path) as notice:
            assert "has no locks" in notice
            assert path.read_text() == record(os.getpid(), here, started(os.getpid()))
        assert not path.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_of_many_starts_one_takes_a_stale_lock(tmp_path):
    """In every round four start at once on the lock of a dead process: one gets it, and never two at once."""
    for _ in range(12):
        (tmp_path / "lock").write_text(record(2**22 + 1, socket.gethostname(), 5.0))
        go, started_all = os.pipe()
        answers, answer = os.pipe()
        children = []
        for _ in range(4):
            if (pid := os.fork()) == 0:
                os.close(started_all)
                os.read(go, 1)  # until all of them are there
                word = b"refused "
                try:
                    with suppress(OutputError), lock(tmp_path):
                        (tmp_path / "held").touch(exist_ok=False)
                        time.sleep(0.01)
                        (tmp_path / "held").unlink()
                        word = b"held "
                except BaseException as error:
                    word = repr(error).encode()
                os.write(answer, word)
                os._exit(0)
            children.append(pid)
        for end in (go, started_all, answer):
            os.close(end)
        for pid in children:
            os.waitpid(pid, 0)
        found = os.read(answers, 10_000).split()
        os.close(answers)
        assert set(found) <= {b"held", b"refused"}
        assert len(found) == 4
        assert b"held" in found
        assert not (tmp_path / "lock").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_does_not_keep_the_lock_of_its_parent(tmp_path):
    """The parent is killed, the child lives on."""
    read, write = os.pipe()
    if (parent := os.fork()) == 0:
        with lock(tmp_path):
            if (child := os.fork()) == 0:
                time.sleep(30)
                os._exit(0)
            os.write(write, str(child).encode())
            os._exit(0)
    os.waitpid(parent, 0)
    child = int(os.read(read, 20))
    try:
        os.kill(child, 0)
        with lock(tmp_path) as notice:
            assert f"took over the lock of process {parent}" in notice
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["a link", "a dangling link", "a hard link", "a FIFO", "a folder"])
def test_a_lock_that_is_no_ordinary_file_is_refused(tmp_path, kind):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.write_text("mine")
    make = {
        "a link": lambda path: path.symlink_to(outside),
        "a dangling link": lambda path: path.symlink_to(tmp_path / "new"),
        "a hard link": lambda path: path.hardlink_to(outside),
        "a FIFO": os.mkfifo,
        "a folder": Path.mkdir,
    }
    make[kind](run / "lock")
    with pytest.raises(OutputError if kind == "a folder" else CheckpointError), lock(run):
        pass
    assert outside.read_text() == "mine"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("holder", ["gone", "nonsense", "-1", "0", "9" * 30, "1 2 3 4"])
def test_a_stale_lock_is_taken_over_and_said(tmp_path, neighbour, holder):
    if holder == "gone":
        neighbour.kill()
        neighbour.wait()
        holder = str(neighbour.pid)
    (tmp_path / "lock").write_text(holder)
    with lock(tmp_path) as notice:
        assert f"took over the lock of process {holder}, which is gone" in notice
        assert (tmp_path / "lock").read_text().split()[0] == str(os.getpid())
    assert not (tmp_path / "lock").exists()


def test_a_lock_is_free_afterwards_whatever_happens(tmp_path):
    def fail() -> None:
        with lock(tmp_path / "run") as notice:
            assert notice is None
            with pytest.raises(OutputError, match=f"process {os.getpid()} is writing"), lock(tmp_path / "run"):
                pass
            assert (tmp_path / "run" / "lock").exists()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not (tmp_path / "run" / "lock").exists()


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match="cannot be written"), lock(run):
            pass
        with pytest.raises(OutputError, match="could not be written"):
            save(run, checkpoint(1))


def test_checkpoints_are_found_through_a_link_to_the_run_and_after_a_move(run, tmp_path):
    """The link to a run is the user's; one inside of it may be a stranger's, and lead anywhere."""
    shutil.move(run / "checkpoints", tmp_path / "moved" / "checkpoints")
    (tmp_path / "latest").symlink_to(tmp_path / "moved")
    assert_holds(load_latest(tmp_path / "latest"), 20)
    save(tmp_path / "latest", checkpoint(30))
    assert steps(tmp_path / "moved") == [30, 20]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").symlink_to(tmp_path / "moved" / "checkpoints")
    for use in (load_latest, lambda run: load(run, 30), lambda run: save(run, checkpoint(40))):
        with pytest.raises(CheckpointError, match="checkpoints: is a link, and a run holds none"):
            use(tmp_path / "other")
    assert steps(tmp_path / "moved") == [30, 20]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read(tmp_path, mask):
    before = os.umask(mask)
    try:
        save(tmp_path, checkpoint(10))
    finally:
        os.umask(before)
    modes = {name: (folder(tmp_path, 10) / name).stat().st_mode & 0o777 for name in (*FILES, MANIFEST)}
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)


def test_torn_checkpoints_are_not_what_stays(run):
    """Newest ones that are torn: training goes on from before them, and its own checkpoints are kept."""
    for step in (30, 40):
        save(run, checkpoint(step), best=(10, 20))
        (folder(run, step) / WEIGHTS).write_bytes(b"")
    assert load_latest(run).step == 20
    save(run, checkpoint(25), best=(10,))
    assert steps(run) == [25, 20, 10]
    assert load_latest(run).notices == ()
    (folder(run, 20) / MANIFEST).unlink()
    save(run, checkpoint(50))
    assert steps(run) == [50, 25]


@pytest.mark.parametrize(
    "name", ["step-²", "step-٣", "step-000000٣٣٣", "step--1", "step-1e3", "step-" + "9" * 40, "step-5"]
)
def test_names_that_are_no_steps(run, name):
    (run / "checkpoints" / name).mkdir()
    assert steps(run) == [20, 10]
    save(run, checkpoint(30))
    assert steps(run) == [30, 20]


def test_a_checkpoint_under_another_name_is_none(run):
    shutil.copytree(folder(run, 20), folder(run, 90))
    found = load_latest(run)
    assert found.step == 20
    assert "step-000000090: its manifest is damaged, or of another step (20)" in found.notices[0]


def test_what_is_read_is_bounded(run):
    """Files without an end, and files that wait."""
    path = folder(run, 20)
    with (path / MANIFEST).open("r+b") as file:
        file.truncate(10**12)
    assert "its manifest is damaged" in load_latest(run).notices[0]
    for name in (MANIFEST, WEIGHTS, TENSORS, TRAINING):
        (path / name).unlink()
        os.mkfifo(path / name)
        assert load_latest(run).step == 10
        (path / name).unlink()
        shutil.copy(folder(run, 10) / name, path / name)


def test_devices_and_gradients_are_left_behind(tmp_path):
    tensor: Tensor = torch.ones(2, requires_grad=True) * 2
    save(tmp_path, Checkpoint(1, {"w": tensor}, {"m": [tensor]}))
    found = load(tmp_path, 1)
    assert not found.weights["w"].requires_grad
    assert found.training["m"][0].tolist() == [2.0, 2.0]
    assert checkpoints.FORMAT == 1
