"""`python -m pyrovae.sample` and `encode`: what is in the files is what the model says, in the units of the data."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

import pyrovae
from pyrovae import encode, sample
from pyrovae.command import explain
from pyrovae.data.others import other_rows
from pyrovae.errors import CheckpointError, DataError, UsageError
from pyrovae.inference import log_prob_missing
from pyrovae.models import PPCA, BernoulliMixture, LatentLayers
from pyrovae.models.corruptions import Noise
from pyrovae.quality import sse
from pyrovae.runs.directory import Run
from pyrovae.runs.drawing import Between, Denoise, Impute
from pyrovae.runs.made import make
from pyrovae.seeding import seeded

TINY = {"epochs": 1, "eval_K": 5, "device": "cpu", "seed": 0, "latent_dim": [3], "network": {"hidden": [8]}}
COLUMNS = ["height", "mass", "age"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def digits(folder: Path) -> Run:
    return pyrovae.train(TINY, folder / "digits", plots=False)


@pytest.fixture(scope="module")
def given(folder: Path) -> Run:
    return pyrovae.train({**TINY, "condition": "label"}, folder / "given", plots=False)


@pytest.fixture(scope="module")
def people(folder: Path) -> Run:
    """A table in units of its own, whose rows are standardised."""
    torch.manual_seed(0)
    x = torch.randn(300, 3, dtype=torch.float64) * torch.tensor([10.0, 5.0, 20.0]) + torch.tensor([170.0, 70.0, 40.0])
    pd.DataFrame(x.numpy(), columns=COLUMNS).to_csv(folder / "people.csv", index=False)
    options = {"data": str(folder / "people.csv"), "standardize": True, "likelihood": "gaussian", "epochs": 20}
    return pyrovae.train({**TINY, **options}, folder / "people", plots=False)


@pytest.fixture(scope="module")
def mixture(folder: Path) -> Run:
    options = {key: TINY[key] for key in ("epochs", "device", "seed")}
    return pyrovae.train({**options, "model": {"name": "mixture", "components": 4}}, folder / "mixture", plots=False)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(run: Run, words: str, command: Any = sample) -> dict[str, Tensor]:
    """The arrays of a .npz that a command writes."""
    assert (
        command.command([str(run.directory), "--device", "cpu", "--out", "made.npz", "--overwrite", *words.split()])
        == 0
    )
    with np.load("made.npz") as arrays:
        return {name: torch.from_numpy(a) if a.dtype.kind in "fiub" else a for name, a in arrays.items()}


def pair_of(run: Run) -> Any:
    return run.model()


def test_draws_are_in_the_units_of_the_data_and_can_be_read_as_data(people: Run) -> None:
    """A table of draws has the columns and moments of its data; encoding the data's own rows is encoding the split."""
    assert sample.command([str(people.directory), "--n", "4000", "--out", "draws.csv"]) == 0
    drawn, data = pd.read_csv("draws.csv"), pd.read_csv(people.directory.parent / "people.csv")
    assert list(drawn.columns) == COLUMNS
    assert len(drawn) == 4000
    assert drawn.mean().to_numpy() == pytest.approx(data.mean().to_numpy(), abs=6)
    with seeded(0, "made"):
        own = pair_of(people).sample(4000)
    assert_close(torch.tensor(drawn.to_numpy()), people.rows().transform.undo(own).double(), rtol=0, atol=1e-3)
    assert encode.command([str(people.directory), "--data", "draws.csv", "--rows", "7", "--out", "codes.csv"]) == 0
    codes = pd.read_csv("codes.csv")
    z, rows = [f"z_mean{i}" for i in range(3)], people.rows()
    standardised = rows.transform(torch.tensor(drawn[:7].to_numpy()))
    assert_close(torch.tensor(codes[z].to_numpy()), pair_of(people).encode(standardised).double(), rtol=0, atol=1e-4)


def test_what_is_read_of_a_file_is_what_is_read_of_the_data(folder: Path, digits: Run, people: Run) -> None:
    rows = people.rows()
    others = other_rows(rows, folder / "people.csv")
    assert len(others.x) == 300
    for split in (rows.validation, rows.test):
        assert all((others.x == row).all(1).any() for row in split)
    levels = pyrovae.load_data("digits")
    np.savez("levels.npz", x=levels.test.numpy(), y=levels.labels["test"].numpy())
    np.savez("binary.npz", x=digits.rows().test.numpy())
    again = other_rows(digits.rows(), "levels.npz")
    assert torch.equal(again.x, digits.rows().test)  # test rows of grey levels: the same fixed noise
    assert again.labels == [str(label) for label in levels.labels["test"].tolist()]
    assert torch.equal(other_rows(digits.rows(), "binary.npz").x, digits.rows().test)
    density = levels.rows("density")
    np.savez("dequantised.npz", x=density.test.numpy())
    assert torch.equal(other_rows(density, "dequantised.npz").x, density.test)


def test_codes_are_those_of_the_guide(digits: Run) -> None:
    rows, model = digits.rows(), pair_of(digits)
    found = made(digits, "--draws 4000 --rows 5", encode)
    q = model.posterior(rows.test[:5])
    assert torch.equal(found["z_mean"], q.mean)
    assert torch.equal(found["z_sd"], q.stddev)
    assert found["label"].tolist() == [str(label) for label in rows.labels["test"][:5].tolist()]
    assert_close(found["z"].mean(1), q.mean.detach(), rtol=0, atol=0.1)
    weights = (
        model.likelihood(found["z"]).log_prob(rows.test[:5].unsqueeze(1))
        + model.prior().log_prob(found["z"])
        - q.expand((4000, 5)).log_prob(found["z"].movedim(1, 0)).T
    )
    assert_close(found["log_weight"], weights.detach(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("words", ["encode --draws 2", "sample --impute 0.5 --n 2 --K 20 --proposal guide"])
def test_a_log_density_is_said_to_be_of_standardised_rows(
    words: str, people: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows beside it are saved in the data's own units, in which it would be another number."""
    name, *options = words.split()
    made(people, " ".join(["--rows 3", *options]), {"encode": encode, "sample": sample}[name])
    assert people.rows().measure.description in capsys.readouterr().out


def test_decoded_codes_begin_and_end_with_the_rows_own(digits: Run) -> None:
    model, x = pair_of(digits), digits.rows().test
    own = model.reconstruct(x)
    found = made(digits, "--near 4,2 --radius 0 --n 3")
    assert_close(found["x"], own[[4, 2]].unsqueeze(1).expand(-1, 3, -1, -1, -1).detach())
    assert torch.equal(found["original"], x[[4, 2]])
    found = made(digits, "--between 1,6 --steps 5")
    assert found["path"].tolist() == ["line", "circle"]
    assert_close(found["x"][:, [0, -1]], own[[1, 6]].expand(2, -1, -1, -1, -1).detach())
    assert_close(found["z"][0, 2], (found["z"][0, 0] + found["z"][0, 4]) / 2)
    assert_close(found["z"][1, 2].norm(), (found["z"][1, 0].norm() + found["z"][1, 4].norm()) / 2)
    found = made(digits, "--traverse 3 --dims 2,0 --steps 7")
    code = model.encode(x[3:4])[0]
    assert_close(found["x"], model.decode(found["z"]))
    assert torch.equal(found["z"][0, :, :2], code[:2].expand(7, -1))
    assert torch.equal(found["z"][0, :, 2], found["value"][0])
    assert torch.equal(found["z"][1, :, 1:], code[1:].expand(7, -1))


def test_one_class_is_drawn_and_decoded_as_given(given: Run) -> None:
    """The other labels' outputs differ; a row is decoded under its own label, or the one that is chosen."""
    model, rows = pair_of(given), given.rows()
    found = made(given, "--class 7 --mean --n 3000")
    assert set(found["label"].tolist()) == {"7"}
    wanted = model.sample(3000, torch.eye(10)[7], mean=True).mean(0)
    assert_close(found["x"].mean(0), wanted, rtol=0, atol=0.03)
    every = made(given, "--n 2")
    assert every["label"].tolist() == [str(i) for i in range(10) for _ in range(2)]
    x, y = rows.test[:1], rows.given["test"][0][:1]
    assert_close(made(given, "--near 0 --radius 0 --n 1")["x"][0], model.reconstruct(x, y).detach())
    seven = torch.eye(10)[7:8]  # as what the code of a row is decoded, and what a row is taken for when it is encoded
    as_seven = model.decode(model.encode(x, y), seven)
    assert_close(made(given, "--near 0 --radius 0 --n 1 --class 7")["x"][0], as_seven)
    assert_close(made(given, "--traverse 0 --dims 1 --class 7")["z"][0, 0, 0], model.encode(x, y)[0, 0])
    assert_close(made(given, "--between 0,1 --class 7 --steps 2 --path line")["x"][0, :1], as_seven)
    assert_close(made(given, "--class 7 --rows 1", encode)["z_mean"], model.encode(x, seven))
    filled = made(given, "--impute upper --rows 3 --n 2 --K 50 --proposal guide")
    assert torch.equal(filled["x"][:, :, :, 4:], rows.test[:3, :, 4:].unsqueeze(1).expand(-1, 2, -1, -1, -1))


@pytest.mark.parametrize(("half", "where"), [("lower", (slice(4, 8), slice(8))), ("left", (slice(8), slice(4)))])
def test_imputed_halves(half: str, where: tuple[slice, slice], digits: Run, mixture: Run) -> None:
    """What is seen is what it was; the mixture's is its closed form."""
    found = made(digits, f"--impute {half} --rows 3 --n 2 --K 50 --proposal guide")
    seen = torch.ones(1, 8, 8, dtype=torch.bool)
    seen[..., *where] = False
    x = digits.rows().test[:3]
    assert torch.equal(found["seen"], seen.expand(3, 1, 8, 8))
    assert torch.equal(found["x"][..., seen], x[:, seen].unsqueeze(1).expand(-1, 2, -1))
    assert torch.equal(found["mean"][:, seen], x[:, seen])
    assert ((found["ess"] >= 1) & (found["ess"] <= 50)).all()
    exact = made(mixture, f"--impute {half} --rows 3 --n 2")
    model = mixture.model()
    assert isinstance(model, BernoulliMixture)
    assert_close(exact["log_prob_missing"], model.log_prob_missing(x, seen).detach())
    assert_close(exact["mean"], model.impute(x, seen, mean=True)[0])


def test_a_mask_of_a_file_and_a_share(digits: Run) -> None:
    mask = np.zeros((1, 8, 8), bool)
    mask[0, :, 3:] = True
    np.save("mask.npy", mask)
    found = made(digits, "--impute mask.npy --rows 2 --n 1 --K 20 --proposal guide")
    assert torch.equal(found["seen"], torch.from_numpy(mask).expand(2, 1, 8, 8))
    found = made(digits, "--impute 0.25 --rows 100 --n 1 --K 20 --proposal guide")
    assert (~found["seen"]).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_denoising_is_the_reconstruction_of_what_was_corrupted(digits: Run, people: Run) -> None:
    found = made(digits, "--denoise noise:0.5 --rows 6")
    model = pair_of(digits)
    assert isinstance(model, LatentLayers)
    assert_close(found["x"], model.reconstruct(found["corrupted"]).detach())
    assert_close(found["sse_corrupted"], sse(found["original"], found["corrupted"]))
    assert_close(found["sse_reconstructed"], sse(found["original"], found["x"]))
    standardised = made(people, "--denoise noise:0.5 --rows 6")  # saved in centimetres, kilograms and years
    assert_close(standardised["sse_corrupted"], sse(standardised["original"], standardised["corrupted"]))
    masked = made(digits, "--denoise masking:0.5 --rows 100")
    gone = (masked["corrupted"] != masked["original"])[masked["original"] == 1]
    assert gone.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_same_in_every_kind_of_file(digits: Run, people: Run) -> None:
    """Equal seeds, equal numbers; netCDF says where they come from; a film goes along the way and back."""
    arrays = made(digits, "--between 0,1 --steps 4")
    for name in ("way.nc", "way.csv", "way.png", "way.gif"):
        assert sample.command([str(digits.directory), "--between", "0,1", "--steps", "4", "--out", name]) == 0
    with xarray.open_dataset("way.nc") as data:
        assert_close(torch.tensor(data["x"].values), arrays["x"])
        assert data["x"].dims == ("path", "step", "channel", "height", "width")
        assert data.attrs["run"] == "digits"
        assert "mass" in data.attrs["measure"]
    table = pd.read_csv("way.csv")
    assert table[["path", "step"]].to_numpy()[5].tolist() == ["circle", pytest.approx(1 / 3)]
    assert_close(torch.tensor(table[[f"x{i}" for i in range(64)]].to_numpy()).view(2, 4, 1, 8, 8), arrays["x"].double())
    with Image.open("way.png") as picture:
        assert picture.format == "PNG"
    with Image.open("way.gif") as picture:
        assert (picture.format, picture.n_frames) == ("GIF", 6)
        frames = []
        for i in range(6):
            picture.seek(i)
            frames.append(np.array(picture.convert("L")))
    assert (frames[1] == frames[5]).all()
    assert (frames[0] != frames[3]).any()
    assert sample.command([str(people.directory), "--near", "3", "--n", "2", "--out", "near.csv"]) == 0
    near = pd.read_csv("near.csv")
    assert list(near.columns)[:5] == ["row", "neighbour", *COLUMNS]
    assert near["row"].tolist() == [3, 3]


def test_more_layers_are_looked_at_by_the_one_next_to_the_data(folder: Path) -> None:
    options = {**TINY, "model": "hierarchical", "latent_dim": [4, 2]}
    run = pyrovae.train(options, folder / "layers", plots=False)
    found = made(run, "--draws 3 --rows 2", encode)
    assert (found["z1"].shape, found["z2"].shape, found["z1_mean"].shape) == ((2, 3, 4), (2, 3, 2), (2, 4))
    own = run.model().reconstruct(run.rows().test[:1])
    assert_close(made(run, "--near 0 --radius 0 --n 1")["x"][0], own.detach())
    filled = made(run, "--impute right --rows 2 --n 1 --K 20 --proposal guide")
    assert torch.equal(filled["x"][..., :4], run.rows().test[:2, None, :, :, :4])


def test_points_that_decode_are_looked_at_and_have_no_density(folder: Path) -> None:
    """An autoencoder's codes have neighbours, ways and traversals; nothing that asks for q(z|x) or p(x)."""
    options = {key: value for key, value in TINY.items() if key != "eval_K"}
    run = pyrovae.train({**options, "model": "autoencoder"}, folder / "autoencoder", plots=False)
    own = run.model().reconstruct(run.rows().test[:2]).detach()
    assert_close(made(run, "--near 0,1 --radius 0 --n 1")["x"][:, 0], own)
    assert_close(made(run, "--between 0,1 --steps 3")["x"][0, [0, 2]], own)
    assert made(run, "--traverse 0 --dims 1")["x"].shape == (1, 11, 1, 8, 8)
    found = made(run, "--denoise masking:0.3 --rows 2")
    assert_close(found["x"], run.model().reconstruct(found["corrupted"]).detach())
    for command, words in ((sample, "--impute lower"), (encode, "--rows 2")):
        with pytest.raises(UsageError, match="reconstructs only: its codes are points"):
            command.command([str(run.directory), "--out", "x.csv", *words.split()])
    (run.directory / "codes.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no density of codes to draw from; resume the run"):
        sample.command([str(run.directory), "--out", "x.csv"])


def test_draws_of_pictures_are_read_from_a_table(digits: Run) -> None:
    assert sample.command([str(digits.directory), "--n", "5", "--out", "draws.csv"]) == 0
    assert torch.equal(other_rows(digits.rows(), "draws.csv").x, made(digits, "--n 5")["x"])


REFUSED = {
    "": "--out: name a file to save it in",
    "--out x.txt": r"--out x.txt: expected a name that ends in .npz, .csv",
    "--out no/x.csv": "--out no/x.csv: no such directory",
    "--out x.csv --near 0 --between 0,1": "--near, --between: make one at a time",
    "--out x.csv --radius 1": "--radius: not used, since that is not of plain draws",
    "--out x.csv --split train": "--split: not used, since that is not of plain draws",
    "--out x.csv --near 0 --mean": "--mean: not used, since that is not of --near",
    "--out x.csv --near 500": "--near: expected numbers of rows from 0 to 178, got 500",
    "--out x.csv --near a": "--near: expected whole numbers of at least 0, got a",
    "--out x.csv --near 0 --radius -1": "--radius: expected a number of at least 0, got -1",
    "--out x.csv --between 0": "--between: expected two numbers of rows",
    "--out x.csv --between 0,1 --path arc": "--path: expected one of line, circle, both, got arc",
    "--out x.csv --between 0,1 --steps 1": "--steps: expected a whole number of at least 2, got 1",
    "--out x.csv --traverse 0 --dims 3": "--dims: expected latent dimensions from 0 to 2, got 3",
    "--out x.csv --class 7": "--class: .* is of p\\(x\\), given nothing; train it with --condition label",
    "--out x.csv --impute 1.5": "--impute: expected a share above 0 and below 1, got 1.5",
    "--out x.csv --impute bottom": "--impute: expected lower, upper, left, right, a share",
    "--out x.csv --impute lower --proposal annealed": "--proposal: expected individual or guide, got annealed",
    "--out x.csv --impute seen.npy": "--impute: nothing is hidden of these rows",
    "--out x.csv --impute point.npy": "point.npy: a mask of shape \\(\\), where rows are of shape",
    "--out x.csv --denoise fog": "--denoise: 'fog' is none of",
    "--out x.csv --denoise noise:x": "--denoise: expected a number above 0, got x",
    "--out x.csv --near 0 --split best": "--split: expected one of test, validation, train, got best",
    "--out x.gif": "nothing moves in it",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused(words: str, digits: Run) -> None:
    masks = {"seen.npy": np.ones((1, 8, 8), bool), "point.npy": np.array(True)}
    for name in set(words.split()) & set(masks):
        np.save(name, masks[name])
    before = set(Path().iterdir())
    with pytest.raises((UsageError, DataError)) as caught:
        sample.command([str(digits.directory), "--device", "cpu", *words.split()])
    assert re.search(REFUSED[words], explain(caught.value)[1]), explain(caught.value)[1]
    assert set(Path().iterdir()) == before


def test_what_a_model_has_no_use_for_is_refused_by_its_name(
    mixture: Run, people: Run, given: Run, folder: Path
) -> None:
    for words in ("--K 9", "--proposal guide"):
        with pytest.raises(UsageError, match="not used, since a mixture is imputed exactly"):
            sample.command([str(mixture.directory), "--out", "x.csv", "--impute", "lower", *words.split()])
    for words in ("--near 0", "--between 0,1", "--traverse 0", "--denoise noise"):
        with pytest.raises(UsageError, match="holds a mixture, which has no encoder and so no codes"):
            sample.command([str(mixture.directory), "--out", "x.csv", *words.split()])
    with pytest.raises(UsageError, match="holds a mixture, which has no encoder"):
        encode.command([str(mixture.directory), "--out", "x.csv"])
    for name in ("x.png", "x.gif"):
        with pytest.raises(UsageError, match=r"there is no picture of rows of shape \(3,\); save a .csv"):
            sample.command([str(people.directory), "--out", name])
    for way in (Impute(0.5), Denoise(Noise()), Between(0, 1)):  # of points in the plane, before anything is computed
        looked = SimpleNamespace(rows=SimpleNamespace(event_shape=(2,), columns=None), run=people, data=None)
        with pytest.raises(UsageError, match=r"there is no picture of rows of shape \(2,\); save a .csv"):
            make(looked, way, "x.png", False, 0, print)
    with pytest.raises(UsageError, match=r"impute lower: rows of shape \(3,\) have no halves"):
        sample.command([str(people.directory), "--impute", "lower", "--out", "x.csv"])
    with pytest.raises(UsageError, match=r"class: expected one of 0, 1, .*, got ten"):
        sample.command([str(given.directory), "--class", "ten", "--out", "x.csv"])
    labels = given.rows().labels["test"].tolist()
    other = next(i for i, label in enumerate(labels) if label != labels[0])
    with pytest.raises(UsageError, match="the rows are of two classes"):
        sample.command([str(given.directory), "--between", f"0,{other}", "--out", "x.csv"])
    with pytest.raises(CheckpointError, match="no such run directory"):
        sample.command(["nowhere", "--out", "x.csv"])
    options = {key: TINY[key] for key in ("epochs", "device", "seed")}
    ppca = {**options, "data": "three-gaussians", "model": {"name": "ppca", "components": 1}}
    run = pyrovae.train(ppca, folder / "ppca", plots=False)
    found = made(run, "--impute 0.5 --rows 9 --n 2")
    model = run.model()
    assert isinstance(model, PPCA)
    assert_close(found["log_prob_missing"], model.log_prob_missing(found["original"], found["seen"]).detach())
    assert sample.command([str(run.directory), "--out", "points.png"]) == 0


FILES = {
    "colour.npz": (np.zeros((4, 3, 8, 8), np.uint8), r"rows of shape \(3, 8, 8\), where the model has \(1, 8, 8\)"),
    "bright.npz": (np.full((4, 8, 8), 200, np.uint8), "values from 200 to 200, where .* grey levels from 0 to 16"),
    "grey.npz": (np.full((4, 8, 8), 0.3, np.float32), "save levels as uint8, or zeros and ones"),
    "holes.npz": (np.full((4, 8, 8), np.nan, np.float32), "4 rows with values NaN, .* the first being row 0"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_other_rows_is_refused(name: str, digits: Run) -> None:
    rows, words = FILES[name]
    np.savez(name, x=rows)
    with pytest.raises(DataError, match=words):
        encode.command([str(digits.directory), "--data", name, "--out", "x.csv"])


def test_a_damaged_file_and_one_of_other_columns_or_classes(digits: Run, given: Run, people: Run) -> None:
    np.savez("whole.npz", x=np.zeros((4, 8, 8), np.uint8), y=np.array(["zero"] * 4))
    Path("cut.npz").write_bytes(Path("whole.npz").read_bytes()[:-100])
    Path("mine.csv").write_text("mass,height,age\n70,170,40\n")
    for run, name, words in (
        (digits, "cut.npz", "not a whole .npz archive"),
        (digits, "nothing.npz", "no such file or folder"),
        (given, "whole.npz", "label zero, where the model has 0, 1"),
        (people, "mine.csv", "columns mass, height, age, ..., where the model was trained on height, mass, age"),
    ):
        with pytest.raises(DataError, match=words):
            encode.command([str(run.directory), "--data", name, "--out", "x.csv"])
    np.savez("alone.npz", x=np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(DataError, match="no labels, and the model is given one with each row"):
        sample.command([str(given.directory), "--data", "alone.npz", "--near", "0", "--out", "x.csv"])


def test_a_file_that_is_there_is_replaced_on_demand_and_only_by_its_kind(digits: Run, tmp_path: Path) -> None:
    words = [str(digits.directory), "--n", "2", "--out"]
    assert sample.command([*words, "x.npz"]) == 0
    with pytest.raises(UsageError, match=r"out x.npz: is there already; .* replace it"):
        sample.command([*words, "x.npz"])
    assert sample.command([*words, "x.npz", "--overwrite"]) == 0
    Path("note.png").write_text("not a picture")
    with pytest.raises(UsageError, match=r"out note.png: is there already, and no .png file"):
        sample.command([*words, "note.png", "--overwrite"])
    assert Path("note.png").read_text() == "not a picture"
    mine = {"mine.csv": "day,rain\n1,2\n", str(digits.directory / "metrics.csv"): None}
    for name, text in mine.items():
        path = Path(name)
        if text is not None:
            path.write_text(text)
        before = path.read_bytes()
        with pytest.raises(UsageError, match=r"no table of this kind|a part of a run"):
            sample.command([*words, name, "--overwrite"])
        assert path.read_bytes() == before
    for way in (["--n", "2"], ["--near", "0"], ["--between", "0,1"], ["--traverse", "0"], ["--impute", "0.5"]):
        k = ["--K", "2", "--proposal", "guide"] if "--impute" in way else []
        for _ in range(2):
            assert sample.command([str(digits.directory), "--out", "own.csv", "--overwrite", *way, *k]) == 0
    Path("link.npz").symlink_to("x.npz")
    Path("folder.npz").mkdir()
    for name in ("link.npz", "folder.npz"):
        with pytest.raises(UsageError, match="is there already and no ordinary file"):
            sample.command([*words, name, "--overwrite"])
    Path("closed").mkdir(mode=0o555)
    if os.access("closed", os.W_OK):  # root writes everywhere
        return
    with pytest.raises(UsageError, match="closed cannot be written to"):
        sample.command([*words, "closed/x.npz"])


def test_the_rows_that_are_read_are_never_replaced(people: Run) -> None:
    before = Path(people.recipe.data).read_bytes()
    Path("other.csv").write_bytes(before)
    for source, words in ((people.recipe.data, []), ("other.csv", ["--data", "other.csv", "--near", "0"])):
        with pytest.raises(UsageError, match="rows are read from it"):
            sample.command([str(people.directory), "--out", str(source), "--overwrite", *words])
        assert Path(source).read_bytes() == before


@pytest.mark.slow
def test_what_the_page_shows_from_python_runs() -> None:
    """Halves of digits are drawn among some hundred of the thousand weighted draws, and their log p is finite."""
    page = Path(__file__).parents[1] / "docs" / "looking.md"
    (block,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(block, str(page), "exec"), names)
    assert names["filled"].ess.median() > 100
    assert torch.equal(names["filled"].draws[..., :4, :], names["x"][:8, :, :4].expand(100, -1, -1, -1, -1))
    assert names["between"].shape == (11, 1, 8, 8)
    assert names["near"].shape == (8, 1, 8, 8)
    assert (log_prob_missing(names["whole"], names["part"]).values < 0).all()


def test_help_waits_for_nothing_heavy_and_shows_examples() -> None:
    code = """
import sys
from pyrovae import encode, sample
for command in (sample, encode):
    try:
        command.command(["--help"])
    except SystemExit:
        pass
print([name for name in ("torch", "pyro", "pandas", "matplotlib", "xarray") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert "  python -m pyrovae.sample RUN --impute lower --out imputed.png" in lines
    assert "  python -m pyrovae.encode RUN --out codes.png" in lines


@pytest.mark.parametrize("source", ["/dev/zero", "fifo.npy", "/", "~nobody/x.npz"])
def test_what_is_no_file_of_rows_is_neither_waited_for_nor_read_without_end(source: str, digits: Run) -> None:
    os.mkfifo("fifo.npy")
    with pytest.raises(DataError):
        encode.command([str(digits.directory), "--data", source, "--out", "x.csv"])
