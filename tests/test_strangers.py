"""A run directory that somebody else made: nothing outside of it is touched, nothing is believed, nothing unfolds."""

import copy
import json
import os
import random
import re
import resource
import shlex
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close

import pyrovae
from pyrovae import compare, evaluate, fit, gaps
from pyrovae.command import main
from pyrovae.errors import CheckpointError, PairError, UsageError
from pyrovae.files import read_yaml
from pyrovae.inference.pair import Pair
from pyrovae.inference.training.checkpoint import FILES, Checkpoint, fingerprint, name_of, save, steps
from pyrovae.runs.directory import PLOTS, Run, claim, clear, open_run
from pyrovae.runs.recipe import Part, Recipe
from pyrovae.runs.training import check_epochs

OPTIONS = shlex.split(
    "--data three-gaussians --latent-dim 2 --network.hidden 4 --batch-size 1000 --epochs 1 --eval-K 5 --eval-rows 20 "
    "--seed 3 --device cpu --no-plots --compile off"
)
COMMANDS = {"fit": fit.command, "evaluate": evaluate.command, "gaps": gaps.command, "compare": compare.command}
EVALUATE = "evaluate run --K 40 --rows 20 --compile off"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "run"
    assert fit.command([*OPTIONS, "--out", str(directory)]) == 0
    return directory


@pytest.fixture
def run(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run, as run/ in the current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(original, Path("run"))


def ends(capsys: pytest.CaptureFixture, words: str) -> tuple[int, str]:
    """Exit code of a command and what it printed as its error: at most one bounded, printable line."""
    name, *rest = words.split()
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(name, COMMANDS[name], rest)
    error = capsys.readouterr().err
    assert error.count("\n") == (caught.value.code != 0)
    assert len(error) < 5000
    assert error.rstrip("\n").isprintable()
    assert caught.value.code != 1, error
    return int(caught.value.code or 0), error


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def change(run: Path, **changes: Any) -> None:
    """Change a run's config.yaml."""
    file = run / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))


def sign(folder: Path, **changes: Any) -> None:
    """Write a manifest that agrees with a checkpoint's files as they are now."""
    files = {name: fingerprint(folder / name) for name in FILES}
    manifest = {"format": 1, "step": int(folder.name[5:]), "files": files} | changes
    (folder / "manifest.json").write_text(json.dumps(manifest))


# -------------------------------------------------------------------------------------------------------------- links

LINKS = (
    "scores", "plots", "tensorboard", "checkpoints", "checkpoints/step-000000004",
    "checkpoints/step-000000004/weights.safetensors", "checkpoints/step-000000009", "scores/0123456789abcdef.csv",
    "plots/k_curve.png", "plots/gaps.png", "evaluation.json", "config.yaml", "metrics.csv", "gaps.json", "lock",
    "anything", "plots/deep/er",
)  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_a_run_holds_no_links(run: Path, capsys, name: str) -> None:
    """Whatever a link leads to is neither read, nor written, nor removed."""
    outside = Path("outside").resolve()
    outside.mkdir()
    path = run / name
    if path.exists() and name != "tensorboard":
        shutil.move(path, outside / "target")
    elif path.suffix:
        (outside / "target").write_text("mine")
    else:
        (outside / "target").mkdir()
        (outside / "target" / "samples.png").write_text("mine")
        shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(outside / "target")
    before = contents(outside)
    overwrite = " ".join(["fit", *OPTIONS, "--out run --overwrite"])
    for words in (EVALUATE, "gaps run --rows 5", "fit --resume run --epochs 2", overwrite, "compare run --out tables"):
        code, message = ends(capsys, words)
        assert code == 5, message
        assert "is a link, and a run holds none" in message
    with pytest.raises(CheckpointError, match="is a link"):
        pyrovae.load(run)
    assert contents(outside) == before
    assert path.is_symlink()


def test_a_link_to_a_run_is_the_users_own(run: Path, capsys) -> None:
    Path("latest").symlink_to("run")
    assert not pyrovae.load("latest").training
    assert ends(capsys, "fit --resume latest --epochs 2")[0] == 0
    assert steps(run) == [8, 4]


@pytest.mark.slow
def test_what_is_replaced_is_not_written_through_a_second_name(run: Path, capsys) -> None:
    """Backups by hard links keep what they have."""
    Path("backup").mkdir()
    (run / "plots").mkdir(exist_ok=True)
    (run / "plots" / "k_curve.png").write_text("mine")
    for name in ("evaluation.json", "metrics.csv", "config.yaml", "plots/k_curve.png"):
        os.link(run / name, Path("backup") / Path(name).name)
    before = contents(Path("backup"))
    assert ends(capsys, EVALUATE)[0] == 0
    assert ends(capsys, "fit --resume run --epochs 2")[0] == 0
    assert contents(Path("backup")) == before


@pytest.mark.parametrize("name", ["scores/x", "lock", "plots/x.png", "config.yaml", "metrics.csv", "gaps.json"])
@pytest.mark.parametrize("kind", ["FIFO", "socket"])
def test_a_run_holds_ordinary_files(run: Path, capsys, name: str, kind: str) -> None:
    """No command waits for a FIFO."""
    path = run / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    for words in (EVALUATE, "fit --resume run", " ".join(["fit", *OPTIONS, "--out run --overwrite"])):
        assert ends(capsys, words)[0] in (2, 5)
    assert path.exists()


# ---------------------------------------------------------------------------------------------------------- overwrite

OVERWRITE = " ".join(["fit", *OPTIONS, "--out run"])


def foreign_config(run: Path) -> None:
    (run / "config.yaml").write_text("model: gpt\nlr: 0.1\n")


def no_hash(run: Path) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in content.items() if k != "data_hash"}))


def foreign(name: str) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("a year of work")

    return make


@pytest.mark.parametrize(
    "make",
    [
        foreign_config,
        no_hash,
        lambda run: change(run, data_hash="deadbeef"),
        lambda run: change(run, event_shape="wide"),
        lambda run: change(run, version=None),
        lambda run: change(run, an_option_of="another program"),
        foreign("metrics.csv"),
        foreign("plots/samples.png"),
        foreign("scores/0123456789abcdef.csv"),
        foreign("checkpoints/step-000000004/thesis.tex"),
    ],
)
def test_only_what_is_certainly_a_run_is_replaced(run: Path, capsys, make: Callable[[Path], None]) -> None:
    """A folder with a config.yaml, plots, scores and checkpoints may be anybody's."""
    for name in ("plots/mine.png", "scores/exam.csv", "checkpoints/model.pt"):
        foreign(name)(run)
    make(run)
    before = contents(run)
    for words in (OVERWRITE, OVERWRITE + " --overwrite"):
        code, message = ends(capsys, words)
        assert code in (2, 5)
        assert "--overwrite" not in message
    assert contents(run) == before


def test_replacing_a_run_leaves_what_is_not_its_own(run: Path, capsys) -> None:
    mine = (
        "plots/mine.png",
        "scores/exam.csv",
        "checkpoints/model.pt",
        "tensorboard/notes.txt",
        "thesis/plots/samples.png",
    )
    for name in mine:
        foreign(name)(run)
    assert ends(capsys, EVALUATE)[0] == 0
    (scores,) = (run / "scores").glob("????????????????.csv")
    leftovers = ("checkpoints/.step-000000004.77/weights.safetensors", "plots/.gaps.png.77", ".config.yaml.77")
    for name in leftovers:
        foreign(name)(run)
    assert ends(capsys, OVERWRITE + " --overwrite --batch-size 500")[0] == 0
    assert all((run / name).read_text() == "a year of work" for name in mine)
    assert not any((run / name).exists() for name in (*leftovers, str(scores.relative_to(run))))
    assert steps(run) == [8]


@pytest.mark.slow
def test_what_the_commands_draw_is_what_replacing_a_run_removes(original: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for word in OPTIONS if word != "--no-plots"]
    assert fit.command([*words, "--out", "run"]) == 0
    assert gaps.command(["run", "--rows", "5", "--K", "10"]) == 0
    of_others = {"codes", "reliability"}  # of two stages, and of classes
    assert {path.stem for path in Path("run/plots").iterdir()} == set(PLOTS) - of_others
    clear(Path("run"))
    assert sorted(str(path) for path in Path("run").rglob("*")) == ["run/config.yaml"]


def test_the_old_run_stays_until_the_new_one_starts(run: Path, capsys, monkeypatch) -> None:
    before = contents(run)

    def refuse(*_: object) -> None:
        raise PairError("this pair does not fit")

    monkeypatch.setattr("pyrovae.inference.training.trainer.Trainer.discover", refuse)
    assert ends(capsys, OVERWRITE + " --overwrite")[0] == 2
    assert contents(run) == before


def test_a_resumption_that_is_refused_changes_nothing(run: Path, capsys) -> None:
    """The stored options were changed behind the back of the checkpoint."""
    change(run, batch_size=500)
    before = contents(run)
    code, message = ends(capsys, "fit --resume run --epochs 3")
    assert (code, "batch_size 1000 then, 500 now" in message) == (5, True)
    assert contents(run) == before


def test_what_a_kill_at_the_start_leaves_is_no_run(tmp_path: Path) -> None:
    """Killed between a temporary file and its name: the directory can be used, and the leftovers go."""
    for name in (".config.yaml.4711", "lock", ".probe.12"):
        (tmp_path / name).write_text("")
    claim(tmp_path, {}, overwrite=False)
    clear(tmp_path)
    assert not (tmp_path / ".config.yaml.4711").exists()
    (tmp_path / ".config.yaml.bak").write_text("")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        claim(tmp_path, {}, overwrite=True)


# ---------------------------------------------------------------------------------------------------- bounded reading


def bomb() -> str:
    """Ten lines that stand for ten thousand million words."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines)


CONTENTS = {
    "aliases": bomb(),
    "an anchor": "data: &here digits",
    "depth": "data: " + "[" * 50_000,
    "too large": "data: " + "x" * 4_000_000,
    "a long word": "data: " + "x" * 50_000,
    "an escape": 'data: "\\e[31mred\\a"',
    "NUL": 'data: "a\\0b.npy"',
    "a long number": "epochs: " + "9" * 5000,
    "a large number": "epochs: 1" + "0" * 400,
    "a binary number": "epochs: 0b1" + "0" * 90_000,
    "names that are none": "1: 2\n[a]: 3",
    "a list": "- data",
    "bytes": "data: !!binary aGVsbG8=",
    "a set": "data: !!set {a, b}",
    "not text": "\x00\x01",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_configuration_is_read_within_bounds(run: Path, capsys, name: str) -> None:
    valid = (run / "config.yaml").read_text()
    Path("options.yaml").write_text(CONTENTS[name])
    assert ends(capsys, "fit --config options.yaml --epochs 1")[0] == 2
    (run / "config.yaml").write_text(CONTENTS[name])
    assert ends(capsys, EVALUATE)[0] == 5
    mixed = yaml.safe_load(valid)
    for key in ("data", "epochs"):
        mixed.pop(key)
    (run / "config.yaml").write_text(yaml.safe_dump(mixed) + CONTENTS[name])
    before = contents(run)
    for words in (EVALUATE, "gaps run", "fit --resume run", OVERWRITE, OVERWRITE + " --overwrite"):
        assert ends(capsys, words)[0] == 5
    assert contents(run) == before


def test_names_are_bounded_as_words_are(tmp_path: Path) -> None:
    for name in ("\\e[31mred", "a\\0b", "\\x9b2J"):
        (tmp_path / "options.yaml").write_text(f'"{name}": 1')
        with pytest.raises(ValueError, match="control characters, or without end"):
            read_yaml(tmp_path / "options.yaml")


def test_a_file_larger_than_it_may_be_is_not_read(tmp_path: Path) -> None:
    """However little it says."""
    (tmp_path / "options.yaml").write_text("data: digits\n#" + "x" * 100_000)
    with pytest.raises(ValueError, match="100,014 bytes, more than the 100,000 it may have"):
        read_yaml(tmp_path / "options.yaml")


def test_a_date_is_a_word(tmp_path: Path) -> None:
    """A data set or a directory may be called so, and no option takes a date."""
    (tmp_path / "options.yaml").write_text("data: 2020-01-01\nout: 2020-01-01 10:00:00")
    assert read_yaml(tmp_path / "options.yaml") == {"data": "2020-01-01", "out": "2020-01-01 10:00:00"}


def test_a_directory_of_more_files_than_any_run_is_refused(run: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(pyrovae.files, "MOST_FILES", 20)
    for i in range(20):
        (run / "plots").mkdir(exist_ok=True)
        (run / "plots" / f"{i}.png").touch()
    code, message = ends(capsys, EVALUATE)
    assert (code, "run: has more than 20 files, which no run has" in message) == (5, True)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/stdin", "fifo", "/"])
def test_options_come_from_ordinary_files(capsys, tmp_path: Path, monkeypatch, device: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    code, message = ends(capsys, f"fit --config {device}")
    assert (code, "cannot be read" in message) == (2, True)


def test_messages_are_bounded_and_change_no_terminal() -> None:
    for make in (UsageError, CheckpointError, PairError, pyrovae.errors.OutputError):
        text = str(make("\x1b[2J\u202e" + "x" * 4_000_000 + "\udc80 say --help"))
        assert len(text) < 4100
        assert text.isprintable()
        assert text.endswith("say --help")
    assert str(UsageError("é, ≥ and 日本")) == "é, ≥ and 日本"


def test_an_option_without_end_is_named_by_its_beginning(capsys) -> None:
    for words in ("fit --" + "x" * 4000, "fit " + "x" * 4000, "evaluate --" + "x" * 4000):
        code, message = ends(capsys, words)
        assert code == 2
        assert len(message) < 500
        assert "xxx" in message


# -------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "changes",
    [
        {"network": {"name": "mlp", "hidden": [40_000, 40_000]}},
        {"network": {"name": "mlp", "hidden": [10**9]}},
        {"network": {"name": "mlp", "hidden": [2**62, 2**62]}},
        {"network": {"name": "conv"}},
        {"latent_dim": [10**8]},
        {"event_shape": [10**8]},
        {"event_shape": [2**40, 2**40]},
        {"event_shape": []},
        {"prior": {"name": "VampPrior", "components": 10**9}},
        {"prior": {"name": "MixtureOfGaussians", "components": 10**9}},
        {"guide": {"name": "FullCovarianceNormal"}, "latent_dim": [50_000]},
        {"model": {"name": "hierarchical"}, "latent_dim": [10**6, 10**6]},
    ],
)
def test_sizes_that_the_weights_do_not_have_are_never_allocated(run: Path, capsys, changes: dict) -> None:
    change(run, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for words in (EVALUATE, "fit --resume run --epochs 2"):
        code, message = ends(capsys, words)
        assert code == 5
        assert "does not fit the pair" in message or "declares no model" in message
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000  # kB


def test_a_pair_that_is_built_without_memory_first_is_the_same(tmp_path: Path, run: Path) -> None:
    """Also what is no parameter: indices that a guide computes, and is not saved."""
    recipe = open_run(run).recipe.settled(guide=Part("FullCovarianceNormal"), prior=Part("StandardNormal"))
    fresh = Run(tmp_path / "fresh", recipe)
    ours = pyrovae.runs.build.build_model(recipe, (2,))
    save(fresh.directory, Checkpoint(1, Pair(ours.model, ours.guide).tensors(), {}))
    theirs = fresh.pair_with(pyrovae.inference.training.checkpoint.load(fresh.directory, 1))
    for get in (torch.nn.Module.named_parameters, torch.nn.Module.named_buffers):
        expected = dict(get(ours))
        assert_close(dict(get(theirs)), expected, rtol=0, atol=0)
        assert {tensor.device.type for tensor in dict(get(theirs)).values()} == {"cpu"}
    assert "rows" in str(dict(theirs.named_buffers()).keys())


# ------------------------------------------------------------------------------------------- signed, but malformed


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The place of every value in nested lists and dictionaries."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*path, key))


MISSING = object()
VALUES = (
    MISSING, None, True, -1, 0, 3, 1.5, 10**30, -(10**30), float("nan"), float("inf"), "", "x", "4", "\x1b[31m", "²",
    [], [[]], {}, {"tensor": "nowhere"}, {"tensor": []}, {"items": [[[], 1]]}, {"items": [["a", 1]]}, {"items": 1},
)  # fmt: skip


def mutated(value: Any, path: tuple, new: Any) -> Any:
    """The value with another one at a place, or none."""
    if not path:
        return None if new is MISSING else new
    value = copy.deepcopy(value)
    place = value
    for key in path[:-1]:
        place = place[key]
    if new is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return value


def mutations(value: Any, count: int) -> Iterator[Any]:
    """So many mutations at random, each at one place."""
    rng = random.Random(0)
    places = list(leaves(value))
    for _ in range(count):
        yield mutated(value, rng.choice(places), rng.choice(VALUES))


def use(run: Path) -> None:
    """Load a run and look where it stands: it works, or is refused as damaged."""
    with suppress(CheckpointError, UsageError):
        open_run(run).model()
        check_epochs(run, Recipe(epochs=1), 5)


@pytest.mark.parametrize("name", ["training.json", "manifest.json", "config.yaml"])
def test_whatever_a_field_holds_the_run_loads_or_is_refused(run: Path, name: str) -> None:
    """With right checksums. Of another kind, missing, huge, negative, no number, nested: never a defect."""
    folder = run / "checkpoints" / name_of(4)
    file = run / name if name == "config.yaml" else folder / name
    content = yaml.safe_load(file.read_text()) if name == "config.yaml" else json.loads(file.read_text())
    for case in mutations(content, 70):
        file.write_text(yaml.safe_dump(case) if name == "config.yaml" else json.dumps(case))
        if name == "training.json":
            sign(folder)
        use(run)


def test_a_run_says_where_it_stands_or_is_refused(run: Path, capsys) -> None:
    folder = run / "checkpoints" / name_of(4)
    content = json.loads((folder / "training.json").read_text())
    (progress,) = (item for key, item in content["items"] if key == "progress")
    for key in ("epoch", "best_epoch", "best_step"):
        (entry,) = (pair for pair in progress["items"] if pair[0] == key)
        kept = entry[1]
        for value in (-1, "4", 1.0, True, [], 10**30 if key == "best_step" else -(10**30)):
            entry[1] = value
            (folder / "training.json").write_text(json.dumps(content))
            sign(folder)
            assert ends(capsys, EVALUATE)[0] == 5
            assert ends(capsys, "fit --resume run --epochs 3")[0] == 5
        entry[1] = kept


@pytest.mark.parametrize("directory", ["nowhere", "a\0b", "x" * 300, "run/config.yaml", "\x1b[31m"])
def test_names_that_are_no_runs(run: Path, directory: str) -> None:
    for use in (pyrovae.load, open_run):
        with pytest.raises(CheckpointError, match=r"no such run directory"):
            use(directory)


# ------------------------------------------------------------------------------------------------- others' directories


@pytest.fixture
def another_user(run: Path) -> Iterator[Path]:
    """The run belongs to somebody else, and may only be read."""
    place = Path(shutil.copytree(run, f"/tmp/run-of-another-{os.getpid()}-{threading.get_ident()}"))
    for path in (place, *place.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    here, user = Path.cwd(), os.geteuid()
    os.chdir(place.parent)
    if user == 0:
        os.seteuid(65534)
    try:
        yield place
    finally:
        if user == 0:
            os.seteuid(0)
        os.chdir(here)
        for path in (place, *(p for p in place.rglob("*") if p.is_dir())):
            path.chmod(0o755)
        shutil.rmtree(place)


def test_a_run_that_may_only_be_read_is_scored(another_user: Path, capsys) -> None:
    """Without a store, and with a note that nothing was kept."""
    before = contents(another_user)
    for words in (f"evaluate {another_user} --K 40 --rows 20 --compile off", f"gaps {another_user} --rows 5 --K 10"):
        name, *rest = words.split()
        assert COMMANDS[name](rest) == 0
        out = capsys.readouterr().out
        assert out.count("cannot be written to, so that neither") == 1
        assert "log p(x)" in out
    assert not pyrovae.load(another_user).training
    assert contents(another_user) == before
    assert ends(capsys, f"fit --resume {another_user} --epochs 2")[0] == 6
    assert contents(another_user) == before


def test_a_run_that_may_only_be_read_is_compared(another_user: Path, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pyrovae.runs.comparison_tables.present", lambda *_: None)  # tables: not in this folder
    assert COMMANDS["compare"](f"{another_user} --K 40 --rows 20 --no-baseline --out tables".split()) == 0
    assert "cannot be written to, so that its scores are not kept" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- elsewhere


@pytest.mark.parametrize(
    "data", ["/", "mnist", "celeba", "/etc/passwd", "/dev/zero", "fifo.npy", "~", "..", "//x/y.npz"]
)
def test_a_configuration_that_points_elsewhere(run: Path, capsys, monkeypatch, data: str) -> None:
    """Nothing is downloaded for a run, and no folder of all sorts of files is read through."""

    def connect(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("pyrovae.data.files.OTHERS", 50)
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").resolve()))
    os.mkfifo("fifo.npy")
    for i in range(60):
        Path(f"file{i}").touch()
    monkeypatch.setenv("HOME", str(Path.cwd()))
    (run / "sub").mkdir()
    change(run, data=data)
    for words in (EVALUATE, "fit --resume run --epochs 2"):
        assert ends(capsys, words)[0] in (2, 3)
    assert not Path("cache").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK=1 in the environment without WORLD_SIZE"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 in the environment without RANK and WORLD_SIZE"),
        ({"RANK": "0"}, "without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "without RANK"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE=two in the environment: expected a whole number"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK=1 in the environment, of WORLD_SIZE=1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK=-1 in the environment: expected a whole number"),
    ],
)
def test_a_part_of_what_a_launcher_sets(tmp_path: Path, capsys, monkeypatch, variables: dict, message: str) -> None:
    """A process that takes itself for one of several would train, and write nothing."""
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, error = ends(capsys, " ".join(["fit", *OPTIONS, "--out run"]))
    assert code == 2
    assert message in error
    assert not Path("run").exists()


# ----------------------------------------------------------------------------------------------------------- the page


def test_every_promise_names_a_test_that_exists() -> None:
    here = Path(__file__).parent
    page = (here.parent / "docs" / "faults.md").read_text()
    written = "".join(path.read_text() for path in here.glob("test_*.py"))
    rows = [row for row in page.splitlines() if row.startswith("| ") and not row.startswith("| What")]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split(" | ")[-1])
        assert named, f"promised without a test: {row}"
        for name in named:
            assert f"def {name}(" in written, f"{name} does not exist"
