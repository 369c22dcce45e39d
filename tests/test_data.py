"""Where rows come from, how they are split, and on which measure they are scored."""

import dataclasses
import gzip
import io
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pyrovae import data as data_package
from pyrovae.command import explain
from pyrovae.data import (
    NAMES,
    SPLITS,
    Binary,
    Data,
    MappedRows,
    Measure,
    Reading,
    Space,
    default_measure,
    found,
    load_data,
    transforms,
)
from pyrovae.data.raw import Raw
from pyrovae.data.transforms import AsFloat
from pyrovae.errors import DataError, UsageError

GREY = np.random.default_rng(0).integers(0, 256, (60, 5, 4), dtype=np.uint8)
FLOATS = np.random.default_rng(1).standard_normal((60, 3)).astype(np.float32)
BITS = np.random.default_rng(2).integers(0, 2, (60, 6), dtype=np.uint8)
PLANE = ("three-gaussians", "ring", "pinwheel")


def saved(path: Path, **arrays: np.ndarray) -> str:
    """Save one array `x` as .npy, or several as .npz, and return the path as a user gives it."""
    if path.suffix == ".npy":
        np.save(path, arrays["x"])
    else:
        np.savez(path, **arrays)
    return str(path)


@contextmanager
def raises(error: type[Exception], *words: str) -> Iterator[None]:
    """Expect an error of one line that holds all these words."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def leave_memory(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    """Let the machine seem to have that many bytes of memory left."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))


def rows_of(*splits: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for split in splits for row in split}


def write_mnist(root: Path, train: int = 40, test: int = 10) -> Path:
    """A small data set in the layout that torchvision.datasets.MNIST(root) reads."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(3)
    for prefix, count in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        images[:, 0, 0] = labels  # so that a test can tell that labels follow their rows
        head = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, count) + labels.tobytes())
    return raw


# ------------------------------------------------------------------------------------------------------------ splits


def test_splits_partition_the_rows_whatever_the_global_seed(tmp_path):
    path = saved(tmp_path / "x.npy", x=np.arange(300, dtype=np.float32).reshape(100, 3))
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    one = load_data(path)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    two = load_data(path)
    assert [len(one.train), len(one.validation), len(one.test)] == [80, 10, 10]
    values = torch.cat([one.train, one.validation, one.test]).flatten().sort().values
    assert torch.equal(values, torch.arange(300.0))
    assert not torch.equal(one.train[:, 0], one.train[:, 0].sort().values)  # permuted: files are often in order
    for split in SPLITS:
        assert torch.equal(getattr(one, split), getattr(two, split))
    assert one.hash == two.hash


def test_a_given_test_set_is_kept_and_validation_comes_off_train(tmp_path):
    train, test = FLOATS[:50], FLOATS[50:]
    data = load_data(saved(tmp_path / "x.npz", x_train=train, x_test=test))
    assert np.array_equal(data.test.numpy(), test)
    assert (len(data.train), len(data.validation)) == (45, 5)
    assert rows_of(data.train, data.validation) == rows_of(torch.from_numpy(train))


def test_validation_beside_a_test_set_is_at_most_5000(tmp_path):
    x = np.arange(60_000, dtype=np.float32)[:, None]
    data = load_data(saved(tmp_path / "x.npz", x_train=x, x_test=-x[1:100]))
    assert (len(data.train), len(data.validation)) == (55_000, 5_000)


def test_given_validation_is_kept_and_train_stays_in_its_order(tmp_path):
    a, b, c = FLOATS[:20], FLOATS[20:30], FLOATS[30:40]
    data = load_data(saved(tmp_path / "x.npz", x_train=a, x_validation=b, x_test=c))
    for split, rows in zip(SPLITS, (a, b, c), strict=True):
        assert np.array_equal(getattr(data, split).numpy(), rows)


def test_labels_follow_their_rows(tmp_path):
    x = np.arange(200, dtype=np.float32).reshape(100, 2)
    data = load_data(saved(tmp_path / "x.npz", x=x, y=np.arange(100) * 7))
    for split in SPLITS:
        labels = data.labels[split]
        assert labels.dtype == torch.int64
        assert torch.equal(getattr(data, split)[:, 0], 2.0 * (labels // 7))


def test_names_become_codes_that_agree_between_splits(tmp_path):
    y_train, y_test = np.array(["cat", "dog"] * 10), np.array(["dog", "eel"])
    data = load_data(
        saved(tmp_path / "x.npz", x_train=FLOATS[:20], x_test=FLOATS[20:22], y_train=y_train, y_test=y_test)
    )
    assert data.classes == ("cat", "dog", "eel")
    assert data.columns is None
    assert data.labels["test"].tolist() == [1, 2]
    assert set(data.labels["train"].tolist()) == {0, 1}


def test_loading_and_fixed_draws_leave_the_global_generators_alone(tmp_path):
    path = saved(tmp_path / "x.npy", x=GREY)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for source in ("digits", *PLANE, path):
        load_data(source)
    data = load_data(path)
    data.rows("mass", "fixed")
    data.rows("mass", "dynamic")
    data.rows("density")
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)  # noqa: NPY002


def test_the_default_device_and_type_of_torch_do_not_matter(tmp_path):
    path = saved(tmp_path / "x.npy", x=GREY)
    hash_before = load_data(path).rows("density").hash
    torch.set_default_dtype(torch.float64)
    try:
        rows = load_data(path).rows("density")
        assert rows.transform(rows.train[:2]).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert rows.hash == hash_before


# ----------------------------------------------------------------------------------------------------------- measures


def test_digits_have_17_levels_in_one_channel():
    data = load_data("digits")
    assert (data.event_shape, data.levels, data.train.dtype) == ((1, 8, 8), 17, torch.uint8)
    assert int(data.train.max()) == 16
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert default_measure(data) == "mass"
    assert data.labels["test"].unique().tolist() == list(range(10))


def test_dynamic_binarisation_draws_anew_with_the_pixel_probability():
    data = load_data("digits")
    rows = data.rows("mass")
    assert rows.binarize == "dynamic"
    raw = data.train[:50]
    torch.manual_seed(0)
    draws = torch.stack([rows.transform(raw) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    p = raw.double() / 16
    error = (p * (1 - p) / 400).sqrt()
    assert ((draws.double().mean(0) - p).abs() <= 5 * error).all()  # exact where p is 0 or 1


def test_validation_and_test_are_the_same_in_every_run_and_training_draws_are_not():
    torch.manual_seed(0)
    one = load_data("digits").rows("mass")
    torch.manual_seed(1)
    two = load_data("digits").rows("mass")
    assert torch.equal(one.test, two.test)
    assert torch.equal(one.validation, two.validation)
    assert one.hash == two.hash
    assert one.test.dtype == torch.float32
    p = load_data("digits").test.double() / 16
    z = (one.test.double() - p).sum() / (p * (1 - p)).sum().sqrt()
    assert abs(z) < 5
    assert one.test[p == 1].all()
    assert not one.test[p == 0].any()


def test_validation_and_test_are_drawn_independently(tmp_path):
    rows = load_data(saved(tmp_path / "x.npy", x=np.full((500, 20), 128, np.uint8))).rows("mass", "fixed")
    train, validation, test = rows.transform(rows.train)[:50], rows.validation, rows.test
    for one, two in ((train, validation), (validation, test), (test, train)):
        assert abs((one == two).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(one.numel())


def test_fixed_binarisation_draws_the_training_rows_once():
    data = load_data("digits")
    rows, dynamic = data.rows("mass", "fixed"), data.rows("mass", "dynamic")
    first = rows.transform(rows.train)
    assert rows.train.dtype == torch.uint8
    assert torch.equal(first, rows.transform(rows.train))
    p = data.train.double() / 16
    assert abs((first.double() - p).sum() / (p * (1 - p)).sum().sqrt()) < 5
    assert not torch.equal(first, (p > 0.5).float())
    assert torch.equal(rows.test, dynamic.test)
    assert rows.hash != dynamic.hash


def test_threshold_is_above_one_half(tmp_path):
    x = np.tile(np.array([0, 127, 128, 255], np.uint8), (20, 1))
    x[:, 0] = np.arange(20)
    rows = load_data(saved(tmp_path / "x.npy", x=x)).rows("mass", "threshold")
    for split in (rows.transform(rows.train), rows.validation, rows.test):
        assert torch.equal(split, torch.tensor([0.0, 0, 1, 1]).expand_as(split))
    digits = load_data("digits")
    assert torch.equal(digits.rows("mass", "threshold").test, (digits.test > 8).float())  # 8/16 is not above


def test_floats_in_the_unit_interval_are_probabilities_on_demand(tmp_path):
    x = np.tile(np.array([0.0, 0.25, 1.0], np.float32), (20_000, 1))
    data = load_data(saved(tmp_path / "x.npy", x=x))
    assert default_measure(data) == "density"
    with raises(DataError, "[0, 1]", "choose a binarisation", "a Gaussian likelihood"):
        data.rows("mass")
    rows = data.rows("mass", "dynamic")
    drawn = rows.transform(rows.train)
    assert drawn[:, 0].max() == 0
    assert drawn[:, 2].min() == 1
    assert abs(drawn[:, 1].mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 16_000)


def test_floats_outside_the_unit_interval_have_no_mass(tmp_path):
    for test, limits in (
        (GREY.astype(np.float32), "[0, 255]"),
        (GREY / np.float32(255) - np.float32(0.5), "[-0.5, 1]"),
    ):
        data = load_data(saved(tmp_path / "x.npz", x_train=GREY / np.float32(255), x_test=test))
        for binarize in (None, "dynamic", "threshold"):
            with raises(DataError, f"values in {limits}", "choose a binarisation", "a Gaussian likelihood"):
                data.rows("mass", binarize)


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.int64, np.float64])
def test_binary_data_are_used_as_they_are(tmp_path, dtype):
    data = load_data(saved(tmp_path / "x.npz", x_train=BITS.astype(dtype), x_test=BITS[:7].astype(dtype)))
    assert (data.levels, data.binary, data.train.dtype) == (None, True, torch.uint8)
    assert default_measure(data) == "mass"
    rows = data.rows("mass")
    assert rows.binarize is None
    assert np.array_equal(rows.test.numpy(), BITS[:7].astype(np.float32))
    assert torch.equal(rows.transform(rows.train), data.train.float())
    with raises(UsageError, "nothing to binarise"):
        data.rows("mass", "dynamic")
    with raises(DataError, "density of binary data is meaningless", "a Bernoulli likelihood"):
        data.rows("density")


@pytest.mark.parametrize("source", ["digits", "grey"])
def test_dequantised_levels_floor_back_exactly(tmp_path, source):
    if source == "grey":
        source = saved(tmp_path / "x.npy", x=np.random.default_rng(0).integers(0, 256, (20_000, 64), dtype=np.uint8))
    data = load_data(source)
    rows = data.rows("density")
    torch.manual_seed(0)
    one, two = rows.transform(rows.train), rows.transform(rows.train)
    assert not torch.equal(one, two)
    for x, raw in ((one, data.train), (rows.validation, data.validation), (rows.test, data.test)):
        assert x.dtype == torch.float32
        assert x.min() >= 0
        assert x.max() < 1
        assert torch.equal((x * data.levels).floor().to(torch.uint8), raw)
    u = (one.double() * data.levels - data.train).flatten()
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * len(u))
    assert abs(u.var() - 1 / 12) < 5 / math.sqrt(180 * len(u))
    assert torch.equal(rows.test, load_data(source).rows("density").test)


def test_the_level_255_never_becomes_1():
    almost = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    level = torch.tensor([[255, 0]], dtype=torch.uint8)

    def largest(like, generator):
        return almost.expand(like.shape)

    original, transforms._uniform = transforms._uniform, largest
    try:
        assert (transforms.Dequantize(256)(level) * 256).floor().tolist() == [[255.0, 0.0]]
    finally:
        transforms._uniform = original


def test_bits_per_dimension():
    uniform_density = Measure("density", "", 256, 10).bits_per_dimension(0.0)  # log 1 on [0,1]^10
    uniform_mass = Measure("mass", "", None, 10).bits_per_dimension(-10 * math.log(2))
    assert uniform_density == 8
    assert uniform_mass == pytest.approx(1, abs=1e-12)
    assert Measure("density", "", 256, 2).bits_per_dimension(2 * math.log(2)) == pytest.approx(7, abs=1e-12)
    assert Measure("density", "", None, 10).bits_per_dimension(-3.0) is None


def test_measures_say_what_they_measure():
    digits = load_data("digits")
    assert digits.rows("mass").measure == Measure("mass", "mass on {0,1}^64", None, 64)
    density = digits.rows("density").measure
    assert density == Measure("density", "density of data dequantised from 17 levels to [0,1]^64", 17, 64)
    ring = load_data("ring")
    assert ring.rows("density").measure.description == "density of the data in its own units, 2 dimensions"
    assert ring.rows("density", standardize=True).measure.description == "density of standardised data, 2 dimensions"


def test_hashes_tell_measure_binarisation_and_data_apart(tmp_path):
    digits, ring = load_data("digits"), load_data("ring")
    rows = [digits.rows("mass", choice) for choice in ("dynamic", "fixed", "threshold")]
    rows += [digits.rows("density"), ring.rows("density"), ring.rows("density", standardize=True)]
    assert len({r.hash for r in rows}) == len(rows)
    changed = GREY.copy()
    changed[3, 2, 1] ^= 1
    one, two = (load_data(saved(tmp_path / "x.npy", x=x)) for x in (GREY, changed))
    assert one.hash != two.hash
    assert len(one.hash) == 64
    as_floats = load_data(saved(tmp_path / "x.npy", x=GREY.astype(np.float32)[:, None]))
    assert as_floats.hash != one.hash  # the same numbers, of another type
    assert load_data(saved(tmp_path / "x.npy", x=GREY.reshape(60, 4, 5))).hash != one.hash


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_hash_of_the_data_covers_every_split(tmp_path, split):
    splits = {"x_train": GREY[:40], "x_validation": GREY[40:50], "x_test": GREY[50:]}
    one = load_data(saved(tmp_path / "x.npz", **splits))
    changed = splits[f"x_{split}"].copy()
    changed[3, 2, 1] ^= 1
    other = load_data(saved(tmp_path / "x.npz", **splits | {f"x_{split}": changed}))
    assert one.hash != other.hash
    assert one.rows("density").hash != other.rows("density").hash


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_hash_of_rows_covers_what_was_drawn_for_them(monkeypatch, split):
    digits = load_data("digits")
    before = [digits.rows("mass"), digits.rows("density")]
    monkeypatch.setitem(found.SEED, split, found.SEED[split] + 1)
    for one, other in zip(before, [digits.rows("mass"), digits.rows("density")], strict=True):
        assert not torch.equal(getattr(one, split), getattr(other, split))
        assert one.hash != other.hash


def test_every_pixel_has_a_draw_of_its_own():
    """Of n pixels at probability 1/2, the sum over any axis has variance n / 4; no two dequantised ones are equal."""
    torch.manual_seed(0)
    grey = torch.full((60, 50, 40), 0.5)
    bits = transforms.DrawnPixels(None)(grey)
    for axes in ((0,), (1,), (2,), (0, 1), (1, 2)):
        sums = bits.sum(axes).double()
        n = grey.numel() / sums.numel()
        assert abs(sums.mean() - n / 2) < 5 * math.sqrt(n / 4 / sums.numel())
        assert abs(sums.var() / (n / 4) - 1) < 5 * math.sqrt(2 / sums.numel())
    u = transforms.Dequantize(2)(torch.zeros(9, 8, 7, dtype=torch.uint8))
    assert len(u.unique()) == u.numel()


def test_standardised_training_rows_have_mean_0_and_sd_1(tmp_path):
    x = FLOATS * [1, 100, 0] + [5, -1000, 7]
    data = load_data(saved(tmp_path / "x.npy", x=x))
    rows = data.rows("density", standardize=True)
    z = rows.transform(rows.train).double()
    assert torch.allclose(z.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(z.std(0, correction=0), torch.tensor([1.0, 1, 0], dtype=torch.float64), atol=1e-5)
    assert torch.equal(rows.transform(rows.train), rows.transform(rows.train))
    mean, sd = data.train.double().mean(0), data.train.double().std(0, correction=0)
    assert torch.allclose(rows.test[:, :2].double(), ((data.test - mean) / sd)[:, :2], atol=1e-4)
    elsewhere = load_data(saved(tmp_path / "x.npz", x_train=x, x_test=x + 2)).rows("density", standardize=True)
    assert torch.equal(elsewhere.test[:, 2], torch.full((60,), 2.0))  # in the data's units where sd is 0


def test_a_deviation_below_the_least_number_is_replaced_by_1(tmp_path):
    """Values that differ, but by less than single precision can say of their deviation."""
    x = FLOATS.copy()
    x[:, 1] = np.where(np.arange(len(x)) % 2, np.float32(1e-45), 0)
    rows = load_data(saved(tmp_path / "x.npy", x=x)).rows("density", standardize=True)
    assert rows.transform(rows.train).isfinite().all()
    assert rows.test.isfinite().all()


def test_constant_columns_are_counted_under_a_density(tmp_path):
    x = np.concatenate([FLOATS, np.full((60, 2), 3, np.float32)], 1)
    rows = load_data(saved(tmp_path / "x.npy", x=x)).rows("density")
    assert any("2 columns of 5 constant" in notice and "without bound" in notice for notice in rows.notices)
    assert not load_data("ring").rows("density").notices


def test_transforms_travel_between_processes():
    for rows in (load_data("digits").rows("density"), load_data("ring").rows("density", standardize=True)):
        copy = pickle.loads(pickle.dumps(rows.transform))
        torch.manual_seed(0)
        expected = rows.transform(rows.train[:3])
        torch.manual_seed(0)
        assert torch.equal(copy(rows.train[:3]), expected)


@pytest.mark.parametrize(
    ("source", "arguments", "words"),
    [
        ("digits", {"measure": "mas"}, ["mass", "density", "did you mean mass"]),
        ("digits", {"measure": "mass", "binarize": "dinamic"}, ["did you mean dynamic"]),
        ("digits", {"measure": "density", "binarize": "fixed"}, ["not used by a density"]),
        ("digits", {"measure": "density", "standardize": True}, ["standardize", "17 grey levels"]),
        ("digits", {"measure": "mass", "standardize": True}, ["standardize"]),
    ],
)
def test_choices_that_make_no_sense(source, arguments, words):
    with raises(UsageError, *words):
        load_data(source).rows(**arguments)


def test_messages_speak_of_settings_and_commands_of_options(tmp_path):
    """A user of the library has typed no option, and one of a command no argument."""
    data = load_data(saved(tmp_path / "x.npy", x=np.abs(FLOATS) / 10))
    with pytest.raises(DataError) as caught:
        data.rows("mass")
    assert "--" not in str(caught.value)
    code, line = explain(pickle.loads(pickle.dumps(caught.value)))  # as it comes from another process
    assert (code, line) == (3, f"{caught.value} (--binarize, --likelihood gaussian)")
    package = Path(data_package.__file__).parents[1]
    written = {
        p: p.read_text() for shelf in ("data", "models", "inference", "plots") for p in package.glob(f"{shelf}/**/*.py")
    }
    assert len(written) > 40
    for path, text in written.items():
        assert re.findall(r"(?<!gunzip )--(?!help|-)[a-z][\w-]*", text) == [], path


@dataclasses.dataclass(frozen=True)
class Levels(Space):
    """A space of one's own: grey levels as they are, for a likelihood on {0, ..., L - 1}^D."""

    name = "levels"
    words = "a mass on grey levels"

    def read(self, data: Raw) -> Reading:
        dimensions = math.prod(data.event_shape)
        return Reading(
            Measure("mass", f"mass on {data.levels} levels, {dimensions} pixels", None, dimensions), AsFloat()
        )


def test_a_likelihood_on_another_space_costs_one_class():
    data = load_data("digits")
    rows = data.rows(Levels())
    assert torch.equal(rows.test, data.test.float())
    assert torch.equal(rows.transform(rows.train[:9]), data.train[:9].float())
    uniform = -64 * math.log(17)  # the same number of bits as a uniform density of dequantised levels
    assert rows.measure.bits_per_dimension(uniform) == pytest.approx(math.log2(17), rel=1e-12)
    assert rows.measure.bits_per_dimension(uniform) == pytest.approx(
        data.rows("density").measure.bits_per_dimension(0.0), rel=1e-12
    )
    assert rows.hash not in (data.rows("mass").hash, data.rows("density").hash)
    assert data.rows(Binary("fixed")).hash == data.rows("mass", "fixed").hash


# ---------------------------------------------------------------------------------------- what rows are conditioned on


def test_labels_are_given_as_one_hot_rows(tmp_path):
    """Column c is 1 where the label is the c-th of the training labels, whatever numbers or names they are."""
    x = np.arange(200, dtype=np.float32).reshape(100, 2)
    data = load_data(saved(tmp_path / "x.npz", x=x, y=np.arange(100) % 3 * 7 - 7))
    rows, plain = data.rows("density", condition="label"), data.rows("density")
    assert (rows.given.name, rows.given.columns) == ("label", ("-7", "0", "7"))
    for split in SPLITS:
        (y,) = rows.given[split]
        raw = getattr(data, split)
        assert (y.dtype, y.shape) == (torch.float32, (len(raw), 3))
        assert torch.equal(y.sum(1), torch.ones(len(raw)))
        assert torch.equal(y.argmax(1), (raw[:, 0] // 2 % 3).long())  # each label beside its own row
        assert plain.given[split] == ()
    assert torch.equal(rows.test, plain.test)
    assert rows.hash != plain.hash
    assert rows.measure.description == f"{plain.measure.description}, given the label"
    names = load_data(saved(tmp_path / "x.npz", x=x, y=np.array(["cat", "dog"] * 50)))
    assert names.rows("density", condition="label").given.columns == ("cat", "dog")


def test_the_hash_of_rows_covers_what_they_are_given(tmp_path):
    x, y = FLOATS, np.arange(60) % 2
    data = [load_data(saved(tmp_path / "x.npz", x=x, y=labels)) for labels in (y, 1 - y)]
    one, other = (d.rows("density", condition="label").hash for d in data)
    assert one != other
    assert data[0].rows("density").hash == data[1].rows("density").hash


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": FLOATS}, ["no labels for the rows of train, validation, test", "label"]),
        (
            {"x_train": FLOATS[:50], "x_test": FLOATS[50:], "y_train": np.arange(50) % 2, "y_test": np.full(10, 4)},
            ["10 rows of test have labels that no training row has, such as 4"],
        ),
        ({"x_train": FLOATS[:50], "x_test": FLOATS[50:], "y_train": np.arange(50)}, ["no labels for the rows of test"]),
    ],
)
def test_labels_that_cannot_be_conditioned_on(tmp_path, arrays, words):
    data = load_data(saved(tmp_path / "x.npz", **arrays))
    with raises(DataError, *words):
        data.rows("density", condition="label")
    with raises(UsageError, "condition", "label"):
        data.rows("density", condition="labels")


def test_data_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_data("ring").name = "other"


# ------------------------------------------------------------------------------------------------------------ sources


@pytest.mark.parametrize("name", PLANE)
def test_the_plane(name):
    data = load_data(name)
    assert (data.event_shape, data.train.dtype, data.levels) == ((2,), torch.float32, None)
    assert len(data.train) >= 2000
    assert default_measure(data) == "density"
    assert data.hash == load_data(name.upper().replace("-", "_")).hash


def test_ring_is_a_normal_variable_pushed_to_the_circle():
    x = torch.cat([getattr(load_data("ring"), split) for split in SPLITS]).double()
    length = x.norm(dim=1) - 1  # |z| / 10, so squared and times 100 chi-square with 2 degrees of freedom
    assert length.min() > 0
    assert abs(100 * (length**2).mean() - 2) < 5 * 2 / math.sqrt(len(x))
    assert (x / x.norm(dim=1, keepdim=True)).mean(0).abs().max() < 5 / math.sqrt(2 * len(x))


def test_three_gaussians_of_equal_weight():
    data = load_data("three-gaussians")
    labels = data.labels["train"]
    count = torch.bincount(labels).double()
    assert len(count) == 3
    assert ((count / len(labels) - 1 / 3).abs() < 5 * math.sqrt(2 / 9 / len(labels))).all()
    for label in range(3):
        rows = data.train[labels == label].double()
        assert abs(rows.mean(0).norm() - 2) < 5 * 0.5 / math.sqrt(len(rows))
        assert ((rows.std(0) - 0.5).abs() < 5 * 0.5 / math.sqrt(2 * len(rows))).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "event"),
    [
        ((30, 6, 5), np.uint8, (1, 6, 5)),
        ((30, 6, 5), np.bool_, (1, 6, 5)),
        ((30, 6, 5), np.float32, (6, 5)),
        ((30, 6, 5, 3), np.uint8, (3, 6, 5)),
        ((30, 6, 5, 4), np.uint8, (4, 6, 5)),
        ((30, 3, 6, 5), np.uint8, (3, 6, 5)),
        ((30, 1, 6, 3), np.uint8, (1, 6, 3)),
        ((30, 6, 5, 2), np.uint8, (6, 5, 2)),
        ((30, 7), np.uint8, (7,)),
    ],
)
def test_images_are_channels_first(tmp_path, shape, dtype, event):
    x = (np.random.default_rng(0).random(shape) * 256).astype(np.uint8).astype(dtype)
    data = load_data(saved(tmp_path / "x.npz", x_train=x, x_validation=x[:5], x_test=x[:9]))
    assert data.event_shape == event
    if x.ndim == 4 and event[0] == shape[3]:
        assert np.array_equal(data.train.numpy(), x.transpose(0, 3, 1, 2))
    else:
        assert np.array_equal(data.train.numpy().ravel(), x.ravel())


def test_default_measures(tmp_path):
    colour = load_data(saved(tmp_path / "x.npy", x=np.tile(GREY[..., None], 3)))
    assert (default_measure(colour), colour.levels) == ("density", 256)
    assert default_measure(load_data(saved(tmp_path / "x.npy", x=GREY))) == "mass"
    assert default_measure(load_data(saved(tmp_path / "x.npy", x=GREY.reshape(60, -1)))) == "mass"
    assert default_measure(load_data(saved(tmp_path / "x.npy", x=FLOATS))) == "density"


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f2", "<f8", ">i4"])
def test_other_numbers_become_float32(tmp_path, dtype):
    x = (FLOATS * 100).astype(dtype)
    data = load_data(saved(tmp_path / "x.npz", x_train=x, x_validation=x[:3], x_test=x[:4]))
    assert data.train.dtype == torch.float32
    assert np.array_equal(data.train.numpy(), x.astype(np.float32))
    notices = data.rows("density").notices
    assert any("whole numbers" in notice and "uint8" in notice for notice in notices) == (dtype == ">i4")


def test_a_third_level_makes_grey_of_binary_data(tmp_path):
    x = BITS.copy()
    x[40, 0] = 2
    assert load_data(saved(tmp_path / "x.npy", x=x)).levels == 256
    assert load_data(saved(tmp_path / "x.npz", x_train=BITS, x_test=x)).levels == 256
    assert not load_data(saved(tmp_path / "x.npy", x=x.astype(np.float32))).binary


def test_integers_in_the_range_of_levels_are_continuous_unless_uint8(tmp_path):
    assert load_data(saved(tmp_path / "x.npy", x=GREY.astype(np.int64))).levels is None


def test_column_order_in_memory_does_not_matter(tmp_path):
    c = load_data(saved(tmp_path / "x.npy", x=FLOATS))
    fortran = load_data(saved(tmp_path / "x.npy", x=np.asfortranarray(FLOATS)))
    assert c.hash == fortran.hash


def test_a_read_only_file_stays_unchanged(tmp_path):
    path = Path(saved(tmp_path / "x.npy", x=FLOATS))
    path.chmod(0o444)
    before = path.read_bytes()
    data = load_data(path)
    for split in SPLITS:
        getattr(data, split).fill_(0)
    assert path.read_bytes() == before


def test_unknown_keys_are_said_to_be_unused(tmp_path):
    data = load_data(saved(tmp_path / "x.npz", x=FLOATS, weights=FLOATS))
    assert any("not used: weights" in notice for notice in data.notices)


def test_rows_in_both_train_and_test_are_counted(tmp_path):
    x, other = GREY[:40], GREY[40:50]
    data = load_data(saved(tmp_path / "x.npz", x_train=x, x_validation=other, x_test=np.concatenate([x[:3], other])))
    assert any("3 of 13 test rows also in train" in notice for notice in data.notices)
    assert not load_data(saved(tmp_path / "x.npz", x_train=x, x_test=other)).notices


def test_csv_with_header_and_labels(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("\ufeffa,label,b\n" + "".join(f"{i}.5,n{i % 3},{-i}\n" for i in range(30)), encoding="utf-8")
    data = load_data(str(path))
    assert data.event_shape == (2,)
    for split in SPLITS:
        x = getattr(data, split)
        assert torch.equal(x[:, 1], 0.5 - x[:, 0])
        assert torch.equal(data.labels[split], ((x[:, 0] - 0.5) % 3).long())
    assert any("'label' is read as labels" in notice for notice in data.notices)
    for named in (data, data.rows("density")):  # as figures call them
        assert named.columns == ("a", "b")
        assert named.classes == ("n0", "n1", "n2")


@pytest.mark.parametrize("mark", [False, True])
def test_csv_without_header_keeps_its_first_row(tmp_path, mark):
    path = tmp_path / "x.csv"
    np.savetxt(path, FLOATS, delimiter=",")
    if mark:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as spreadsheets do
    data = load_data(path)
    values = torch.cat([data.train, data.validation, data.test]).sort(dim=0).values
    assert torch.equal(values, torch.from_numpy(np.sort(FLOATS, 0)))
    assert data.columns is None


def test_a_csv_column_y_of_coordinates_is_data(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("x,y\n" + "".join(f"{i / 8},{i / 16}\n" for i in range(30)))
    assert load_data(path).event_shape == (2,)


def test_a_hole_among_the_labels_of_a_csv_makes_them_no_data(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b,y\n" + "".join(f"{i / 8},{i / 16},{i % 3 if i else ''}\n" for i in range(30)))
    data = load_data(path)
    assert (data.event_shape, data.labels["train"]) == ((2,), None)
    assert any("labels are not used" in notice for notice in data.notices)


def write_images(folder: Path, count: int, mode: str = "L", size: tuple[int, int] = (5, 4), shade: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("L", size, shade + index).convert(mode).save(folder / f"{index:03}.png")


def test_a_folder_of_images_in_order(tmp_path):
    write_images(tmp_path / "a", 20, shade=10)
    write_images(tmp_path / "b", 20, shade=100)
    (tmp_path / "a" / "._000.png").write_bytes(b"not an image")
    (tmp_path / "notes.txt").write_text("")
    write_images(tmp_path / ".thumbnails", 20)
    data = load_data(str(tmp_path))
    assert (data.event_shape, data.levels) == ((1, 4, 5), 256)
    assert data.classes == ("a", "b")
    for split in SPLITS:
        assert torch.equal(data.labels[split], (getattr(data, split)[:, 0, 0, 0] >= 100).long())
    colour = tmp_path / "colour"
    write_images(colour, 10, mode="RGB")
    assert load_data(colour).event_shape == (3, 4, 5)
    assert load_data(colour).labels["train"] is None
    for mode in ("1", "LA"):
        write_images(tmp_path / "grey", 10, mode=mode)
        assert load_data(tmp_path / "grey").event_shape == (1, 4, 5)


def test_a_folder_of_train_and_test(tmp_path):
    write_images(tmp_path / "train", 20, shade=10)
    write_images(tmp_path / "test", 4, shade=100)
    data = load_data(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 2, 4)
    assert data.test.min() == 100
    assert data.labels["train"] is None


# --------------------------------------------------------------------------------------- training rows in their file


def both(path: Path, x: np.ndarray) -> tuple[Data, Data]:
    """The same file, read into memory and left where it is."""
    np.save(path, x)
    memory, mapped = (load_data(path, stream=stream) for stream in ("off", "on"))
    assert isinstance(memory.train, torch.Tensor)
    assert isinstance(mapped.train, MappedRows)
    return memory, mapped


RANDOM = np.random.default_rng(4)
STREAMED = {
    "grey": RANDOM.integers(0, 256, (300, 7), dtype=np.uint8),
    "grey images": RANDOM.integers(0, 256, (300, 5, 4), dtype=np.uint8),
    "colour images": RANDOM.integers(0, 256, (300, 6, 5, 3), dtype=np.uint8),
    "channels first": RANDOM.integers(0, 256, (300, 3, 5, 4), dtype=np.uint8),
    "bool": RANDOM.integers(0, 2, (300, 5, 4)).astype(bool),
    "binary levels": RANDOM.integers(0, 2, (300, 6), dtype=np.uint8),
    "binary floats": RANDOM.integers(0, 2, (300, 6)).astype(np.float32),
    "binary doubles": RANDOM.integers(0, 2, (300, 6)).astype(np.float64),
    "probabilities": RANDOM.random((300, 6)).astype(np.float32),
    "floats": RANDOM.standard_normal((300, 5, 2)).astype(np.float32),
    "doubles": RANDOM.standard_normal((300, 3)) * [1, 1e3, 0] + [0, 1e6, 7],
    "big-endian": RANDOM.standard_normal((300, 3)).astype(">f8"),
    "integers": RANDOM.integers(-300, 300, (300, 3)),
}
MASS = [{"binarize": choice} for choice in (None, "dynamic", "fixed", "threshold")]
DENSITY = [{"standardize": choice} for choice in (False, True)]


@pytest.mark.parametrize("kind", STREAMED)
@pytest.mark.parametrize("block", [16, 2**20])
def test_rows_in_their_file_are_the_rows_in_memory(tmp_path, monkeypatch, kind, block):
    monkeypatch.setattr("pyrovae.data.streaming._BLOCK", block)
    memory, mapped = both(tmp_path / "x.npy", STREAMED[kind])
    for name in ("name", "levels", "hash", "notices", "event_shape", "binary"):
        assert getattr(mapped, name) == getattr(memory, name)
    assert (len(mapped.train), mapped.train.shape) == (240, memory.train.shape)
    assert (mapped.train.dtype, mapped.train.ndim) == (memory.train.dtype, memory.train.ndim)
    assert torch.equal(mapped.validation, memory.validation)
    assert torch.equal(mapped.test, memory.test)

    compared = 0
    for arguments in [{"measure": "mass", **a} for a in MASS] + [{"measure": "density", **a} for a in DENSITY]:
        try:
            expected = memory.rows(**arguments)
        except (DataError, UsageError) as error:
            with raises(type(error), str(error)):
                mapped.rows(**arguments)
            continue
        compared += 1
        rows = mapped.rows(**arguments)
        for name in ("hash", "notices", "measure", "binarize", "event_shape"):
            assert getattr(rows, name) == getattr(expected, name)
        assert torch.equal(rows.validation, expected.validation)
        assert torch.equal(rows.test, expected.test)
        for index in (torch.tensor([7, 3, 3, 239, -1]), slice(5, 40), slice(None, None, 9), torch.empty(0).long()):
            batch = rows.train[index]
            assert torch.equal(batch, expected.train[index])
            assert batch.is_contiguous() or rows.binarize == "fixed"  # drawn once, and so in memory
            torch.manual_seed(0)
            x = rows.transform(batch)
            torch.manual_seed(0)
            assert torch.equal(x, expected.transform(expected.train[index]))
    assert compared


def test_what_is_summarised_does_not_depend_on_the_blocks(tmp_path, monkeypatch):
    """But for rounding: moments of the last block alone, or of it left out, would be far off."""
    path = saved(tmp_path / "x.npy", x=STREAMED["doubles"])
    whole = load_data(path)
    monkeypatch.setattr("pyrovae.data.streaming._BLOCK", 16)
    parts = load_data(path)
    assert (parts.hash, parts.notices) == (whole.hash, whole.notices)
    assert (parts.moments.low, parts.moments.high) == (whole.moments.low, whole.moments.high)
    assert torch.allclose(parts.moments.mean, whole.moments.mean, rtol=1e-6)
    assert torch.allclose(parts.moments.sd, whole.moments.sd, rtol=1e-6)
    assert parts.moments.constant.tolist() == whole.moments.constant.tolist() == [False, False, True]
    train = whole.train.double()
    assert torch.allclose(whole.moments.mean.double(), train.mean(0), rtol=1e-6)
    assert torch.allclose(whole.moments.sd.double()[:2], train.std(0, correction=0)[:2], rtol=1e-6)


def test_binary_data_of_any_type_have_one_hash(tmp_path):
    hashes = {load_data(saved(tmp_path / "x.npy", x=BITS.astype(t))).hash for t in (np.uint8, bool, np.int64, "f4")}
    assert len(hashes) == 1


def test_rows_in_their_file_are_copies(tmp_path):
    path = Path(saved(tmp_path / "x.npy", x=FLOATS))
    path.chmod(0o444)
    before = path.read_bytes()
    train = load_data(path, stream="on").train
    rows = train[torch.arange(5)]
    expected = rows.clone()
    rows.fill_(0)
    assert torch.equal(train[torch.arange(5)], expected)
    assert path.read_bytes() == before


def test_a_file_larger_than_memory_is_read_where_it_is(tmp_path, monkeypatch):
    x = RANDOM.integers(0, 256, (4000, 100), dtype=np.uint8)
    path = saved(tmp_path / "x.npy", x=x)
    for module in ("loading", "arrays"):
        monkeypatch.setattr(f"pyrovae.data.{module}.HELD_OUT", 10)
    memory = load_data(path)
    leave_memory(monkeypatch, 3980 * 100 - 1)
    mapped = load_data(path)
    assert isinstance(mapped.train, MappedRows)
    assert mapped.hash == memory.hash
    assert torch.equal(mapped.train[:], memory.train)
    with raises(DataError, "binarize='fixed'", "choose dynamic or threshold"):
        mapped.rows("mass", "fixed")
    for places, held_out in ((4000 * 16 - 1, 0), (4000 * 16, 8 * 20 * 100 - 1)):
        leave_memory(monkeypatch, places + held_out)  # not even for the places of the rows, and for those held out
        with raises(DataError, "GiB of memory"):
            load_data(path)
    leave_memory(monkeypatch, 4000 * 16 + 8 * 20 * 100)
    load_data(path)


def test_a_file_that_fits_is_read_into_memory(tmp_path):
    assert isinstance(load_data(saved(tmp_path / "x.npy", x=GREY)).train, torch.Tensor)


def test_validation_and_test_are_10_000_rows_at_most(tmp_path):
    data = load_data(saved(tmp_path / "x.npy", x=np.arange(200_000, dtype=np.float32)[:, None]))
    assert [len(getattr(data, split)) for split in SPLITS] == [180_000, 10_000, 10_000]
    assert any("10000 rows each, not a tenth of 200000" in notice for notice in data.notices)
    assert len(torch.cat([data.train, data.validation, data.test]).unique()) == 200_000


@pytest.mark.parametrize("suffix", [".npz", ".csv", "", "digits"])
def test_sources_whose_rows_cannot_stay_in_them(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".npz":
        np.savez(path, x=FLOATS)
    elif suffix == ".csv":
        np.savetxt(path, FLOATS, delimiter=",")
    elif suffix == "":
        write_images(path, 10)
    with raises(UsageError, "stream", ".npy", "np.save"):
        load_data("digits" if suffix == "digits" else path, stream="on")
    with raises(UsageError, "stream", "did you mean auto"):
        load_data("digits", stream="aut")


def test_columns_cannot_be_streamed(tmp_path):
    path = saved(tmp_path / "x.npy", x=np.asfortranarray(FLOATS))
    with raises(DataError, path, "column by column", "C order"):
        load_data(path, stream="on")


@pytest.mark.parametrize(("row", "column"), [(0, 0), (37, 2), (59, 1)])
def test_not_finite_in_a_file_is_named_by_its_place_there(tmp_path, monkeypatch, row, column):
    monkeypatch.setattr("pyrovae.data.streaming._BLOCK", 12)
    x = FLOATS.copy()
    x[row, column] = x[59, 2] = np.nan
    with raises(DataError, "2 values", f"nan in row {row}, column {column};"):
        load_data(saved(tmp_path / "x.npy", x=x), stream="on")


def test_rows_in_their_file_that_are_in_train_and_test(tmp_path, monkeypatch):
    monkeypatch.setattr("pyrovae.data.streaming._BLOCK", 40)
    memory, mapped = both(tmp_path / "x.npy", np.tile(np.arange(50, dtype=np.uint8)[:, None], (4, 3)))
    train = rows_of(memory.train)
    count = sum(row.numpy().tobytes() in train for row in memory.test)
    assert count
    assert mapped.notices == memory.notices
    assert any(f"{count} of 20 test rows also in train" in notice for notice in mapped.notices)


def test_rows_in_their_file_are_indexed_by_tensors_and_slices(tmp_path):
    train = load_data(saved(tmp_path / "x.npy", x=FLOATS), stream="on").train
    for index in (3, [1, 2], None):
        with pytest.raises(TypeError, match="tensor or a slice"):
            train[index]
    assert "x.npy" in repr(train)
    assert "(48, 3)" in repr(train)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory that leave out mapped files are Linux's")
def test_rows_in_their_file_take_no_memory(tmp_path):
    path = tmp_path / "x.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(100_000, 1000)).flush()  # 100 MB, a hole on disk
    code = f"""
import resource, torch
from pathlib import Path
from pyrovae.data import load_data
load_data("ring").rows("density")
used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 70 * 10**6,) * 2)
data = load_data({str(path)!r}, stream="on")
assert data.train[torch.arange(0, 80_000, 400)].sum() == 0
try:
    load_data({str(path)!r}, stream="off")
except (MemoryError, RuntimeError):
    print("the limit works: a copy in memory fails")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "the limit works: a copy in memory fails", result.stderr


# --------------------------------------------------------------------------------------------------------- torchvision


def test_torchvision_mnist(tmp_path):
    write_mnist(tmp_path)
    data = load_data("MNIST", tmp_path, download=False)
    assert (data.name, data.event_shape, data.levels) == ("mnist", (1, 28, 28), 256)
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 10)
    for split in SPLITS:
        assert torch.equal(getattr(data, split)[:, 0, 0, 0].long(), data.labels[split])
    assert data.labels["test"].tolist() == list(range(10))  # a given test set keeps its order


def test_torchvision_files_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST.download", lambda self: pytest.fail("tried to download"))
    with raises(
        DataError, "fashion-mnist", str(tmp_path / "none"), "give the directory that holds it", "download is off"
    ):
        load_data("fashion_mnist", tmp_path / "none", download=False)


def test_torchvision_download_that_fails(tmp_path, monkeypatch):
    from torchvision import datasets

    def download(self):
        raise ConnectionResetError("no\nnetwork")

    monkeypatch.setattr(datasets.MNIST, "download", download)
    with raises(
        DataError, "mnist", str(tmp_path), "give the directory that holds it", "the download failed (no network)"
    ):
        load_data("mnist", tmp_path)


def test_torchvision_downloads_only_what_is_not_there(tmp_path, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets.MNIST, "download", lambda self: pytest.fail("tried to download"))
    write_mnist(tmp_path)
    load_data("mnist", tmp_path, download=True)


def test_torchvision_file_cut_short(tmp_path):
    file = write_mnist(tmp_path) / "train-images-idx3-ubyte"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    with raises(DataError, str(file), f"expected {size} bytes", f"found {size - 100}"):
        load_data("mnist", tmp_path, download=False)


def test_torchvision_file_that_claims_too_much(tmp_path):
    file = write_mnist(tmp_path) / "t10k-images-idx3-ubyte"
    file.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 2**31, 2**31, 28) + file.read_bytes()[16:])
    with raises(DataError, f"expected {16 + 2**62 * 28} bytes", f"found {16 + 10 * 784}"):
        load_data("mnist", tmp_path, download=False)


def test_torchvision_packed_file_damaged(tmp_path):
    file = write_mnist(tmp_path) / "train-images-idx3-ubyte"
    content = file.read_bytes()
    packed = gzip.compress(content)
    file.unlink()
    path = file.with_suffix(".gz")

    cut = packed[: len(packed) // 2]
    path.write_bytes(cut)
    found = len(zlib.decompressobj(wbits=31).decompress(cut))
    with raises(DataError, str(path), f"expected {len(content)} bytes", f"found {found};"):
        load_data("mnist", tmp_path, download=False)

    path.write_bytes(gzip.compress(content + bytes(10**7)))  # counted only until it is clear that it is too much
    with pytest.raises(DataError, match=f"expected {len(content)} bytes.* found") as caught:
        load_data("mnist", tmp_path, download=False)
    assert f"found {len(content) + 10**7}" not in str(caught.value)

    for damaged in (b"", packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:], gzip.compress(b"something else")):
        path.write_bytes(damaged)
        with raises(DataError, str(path), "fetch it again"):
            load_data("mnist", tmp_path, download=False)


def test_torchvision_packed_file_is_to_be_unpacked_and_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST.download", lambda self: pytest.fail("tried to download"))
    file = write_mnist(tmp_path) / "train-images-idx3-ubyte"
    file.with_suffix(".gz").write_bytes(gzip.compress(file.read_bytes()))
    load_data("mnist", tmp_path)
    file.unlink()
    with raises(DataError, str(file) + ".gz", "gunzip"):
        load_data("mnist", tmp_path)


def test_torchvision_labels_that_do_not_fit(tmp_path):
    raw = write_mnist(tmp_path)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 3) + b"abc")
    with raises(DataError, "10 rows in test", "(3,)"):
        load_data("mnist", tmp_path, download=False)


def test_emnist_is_turned_upright_and_balanced(tmp_path):
    raw = write_mnist(tmp_path)
    target = tmp_path / "EMNIST" / "raw"
    target.mkdir(parents=True)
    for theirs, ours in (("train", "train"), ("t10k", "test")):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{theirs}-{kind}-ubyte").rename(target / f"emnist-balanced-{ours}-{kind}-ubyte")
    stored = np.frombuffer((target / "emnist-balanced-test-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    data = load_data("emnist", tmp_path, download=False)
    assert np.array_equal(data.test.numpy()[:, 0], stored.reshape(-1, 28, 28).transpose(0, 2, 1))


class Pictures:
    """Stands in for torchvision's classes whose items are PIL images."""

    def __init__(self, root, download, background=True, split=None, target_type=None):
        self.rows = 30 if background and split in (None, "train") else 6
        self.labels = split is None
        self.size = (105, 105) if self.labels else (178, 218)

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        image = Image.new("RGB" if not self.labels else "1", self.size, (9, 9, index) if not self.labels else 1)
        if not self.labels:
            image.paste((200, 100, index), (15, 35, 163, 183))  # the central 148 x 148
        else:
            image.paste(0, (0, 0, 52, 105))
        return image, index % 4 if self.labels else None


def test_omniglot_is_28_by_28_with_bright_strokes(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.Omniglot", Pictures)
    data = load_data("omniglot", tmp_path)
    assert data.event_shape == (1, 28, 28)
    assert data.test[:, :, :, :13].min() == 255
    assert data.test[:, :, :, 15:].max() == 0
    assert data.labels["test"].tolist() == [4, 5, 6, 7, 4, 5]  # other characters than those of training


def test_celeba_is_the_central_square(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CelebA", Pictures)
    data = load_data("celeba", tmp_path)
    assert (data.event_shape, len(data.train), len(data.validation), len(data.test)) == ((3, 64, 64), 30, 6, 6)
    assert data.test[:, 0].unique().tolist() == [200]
    assert data.test[:, 1].unique().tolist() == [100]
    assert data.test[:, 2, 0, 0].tolist() == list(range(6))
    assert data.labels["train"] is None


REAL = os.environ.get("PYROVAE_DATA", "")


@pytest.mark.skipif(not (Path(REAL) / "MNIST").is_dir() or not REAL, reason="PYROVAE_DATA names no folder with MNIST")
def test_real_mnist():
    data = load_data("mnist", REAL, download=False)
    assert (len(data.train), len(data.validation), len(data.test)) == (55_000, 5_000, 10_000)
    assert data.labels["test"][:5].tolist() == [7, 2, 1, 0, 4]
    assert not data.notices
    mean = data.test.double().mean() / 255
    assert abs(data.rows("mass").test.double().mean() - mean) < 5 * math.sqrt(0.25 / data.test.numel())


# ------------------------------------------------------------------------------------------------------------- faults


def test_a_misspelt_name_gets_the_nearest():
    with raises(UsageError, "did you mean 'fashion-mnist'", *NAMES):
        load_data("fasion-mnist")
    with raises(UsageError, "digits"):
        load_data("")


@pytest.mark.parametrize("source", ["missing/x.npz", "x.npy", "~/missing-folder/x"])
def test_a_missing_file(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    resolved = str(tmp_path / source.removeprefix("~/"))
    with raises(DataError, source, resolved, "no such file"):
        load_data(source)


def test_a_wrong_extension(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.mat").write_text("")
    with raises(DataError, "x.mat", str(tmp_path / "x.mat"), "'.mat'", ".npz"):
        load_data("x.mat")


def test_a_folder_without_images(tmp_path):
    with raises(DataError, str(tmp_path), "without images"):
        load_data(tmp_path)


def test_a_folder_of_all_sorts_of_files(tmp_path, monkeypatch):
    """One with a few more files than pictures is read; one that is no folder of pictures is not gone through."""
    write_images(tmp_path, 3)
    monkeypatch.setattr("pyrovae.data.files.OTHERS", 20)
    for i in range(20):
        (tmp_path / f"{i}.txt").touch()
    assert len(load_data(tmp_path).train) == 1
    for i in range(20, 31):
        (tmp_path / f"{i}.txt").touch()
    with raises(DataError, str(tmp_path), "holds all sorts of files; give a folder of images alone"):
        load_data(tmp_path)


def test_images_of_two_sizes(tmp_path):
    write_images(tmp_path / "a", 2)
    write_images(tmp_path / "b", 1, size=(7, 9))
    with raises(DataError, str(tmp_path / "a" / "000.png"), "5x4", str(tmp_path / "b" / "000.png"), "7x9"):
        load_data(tmp_path)


def test_a_damaged_image(tmp_path):
    write_images(tmp_path, 12, size=(50, 50))
    file = tmp_path / "005.png"
    file.write_bytes(file.read_bytes()[:60])
    with raises(DataError, str(file), "not a whole image"):
        load_data(tmp_path)


def test_an_image_of_16_bits(tmp_path):
    Image.fromarray(np.full((4, 5), 1000, np.uint16)).save(tmp_path / "a.png")
    with raises(DataError, "a.png", "8-bit"):
        load_data(tmp_path)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_not_finite(tmp_path, suffix, bad):
    x = FLOATS.astype(np.float64)
    x[17, 2] = x[30, 0] = bad
    with raises(DataError, "x", "2 values", f"the first {bad}", "row 17, column 2"):
        load_data(saved(tmp_path / f"x{suffix}", x=x))


def test_not_finite_in_the_test_rows(tmp_path):
    x = FLOATS.copy()
    x[4, 1] = np.nan
    with raises(DataError, "test", "1 value NaN", "row 4, column 1"):
        load_data(saved(tmp_path / "x.npz", x_train=FLOATS, x_test=x))


@pytest.mark.parametrize("hole", ["", "NA", "nan", "inf"])
def test_a_hole_in_a_csv(tmp_path, hole):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n" + "1,2\n" * 9 + f"3,{hole}\n" + "5,6\n" * 9)
    with raises(DataError, str(path), "1 value", "row 9, column 1 ('b')"):
        load_data(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty"]),
        ("a,b\n", ["empty"]),
        ("a,b\n" + "1,2\n" * 9 + "3,dog\n" * 2, ["column 'b' is not numeric: 'dog' in row 9"]),
        ("a,b\n" + "1,2\n" * 9 + "3,4,5\n", ["fields"]),
        ("a,b\n" + "1,2,3\n" * 9, ["more fields than the 2"]),
        ("y,label,a\n" + "1,2,3\n" * 9, ["two columns of labels"]),
        ("y\n" + "1\n" * 9, ["empty"]),
    ],
)
def test_csv_faults(tmp_path, text, words):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with raises(DataError, str(path), *words):
        load_data(path)


def test_a_single_training_row_is_too_few_whatever_else_is_given(tmp_path):
    with raises(DataError, "1 row, too few"):
        load_data(saved(tmp_path / "x.npz", x_train=FLOATS[:1], x_validation=FLOATS[:5], x_test=FLOATS[5:9]))


def test_csv_that_is_not_text(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xff\xfe\x00\x81" * 50)
    with raises(DataError, str(path), "not a table"):
        load_data(path)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((0, 3), np.float32), ["empty", "(0, 3)"]),
        (np.zeros((5, 0), np.float32), ["empty", "(5, 0)"]),
        (np.zeros((1, 3), np.float32), ["1 row,", "too few"]),
        (np.eye(2, dtype=np.float32), ["2 rows", "too few"]),
        (np.zeros(10, np.float32), ["(10,)", "x.reshape(-1, 1)"]),
        (np.float32(3), ["shape ()"]),
        (np.zeros((9, 2), complex), ["complex128"]),
        (np.full((9, 2), "a"), ["<U1"]),
        (np.full((9, 2), b"a"), ["|S1"]),
        (np.zeros((9, 2), "M8[s]"), ["datetime64"]),
        (np.zeros((9, 2), [("a", "f4")]), ["'a'"]),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_that_are_no_rows(tmp_path, x, words, suffix):
    with raises(DataError, "x" + suffix, *words):
        load_data(saved(tmp_path / f"x{suffix}", x=x))


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("an object array was unpickled",)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_object_arrays_are_never_unpickled(tmp_path, suffix):
    x = np.empty((5, 1), object)
    x[:] = Trap()
    with raises(DataError, "Python objects", "never unpickled", "float32"):
        load_data(saved(tmp_path / f"x{suffix}", x=x))


def test_pickled_bytes_are_no_array(tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(pickle.dumps(Trap()))
    with raises(DataError, str(path), "not a NumPy array"):
        load_data(path)


def test_train_and_test_of_different_shape_or_type(tmp_path):
    with raises(DataError, "(3,)", "(2,)", "event shape"):
        load_data(saved(tmp_path / "x.npz", x_train=FLOATS, x_test=FLOATS[:, :2]))
    with raises(DataError, "float32", "uint8"):
        load_data(saved(tmp_path / "x.npz", x_train=BITS, x_test=BITS.astype(np.float32)))


@pytest.mark.parametrize("keys", [["images"], ["x_train"], ["x", "x_test"], ["x_test", "y"]])
def test_npz_without_the_keys(tmp_path, keys):
    with raises(DataError, "`x_train` and `x_test`", *keys):
        load_data(saved(tmp_path / "x.npz", **dict.fromkeys(keys, FLOATS)))


def test_labels_of_another_length(tmp_path):
    with raises(DataError, "60 rows in train", "(59,)"):
        load_data(saved(tmp_path / "x.npz", x=FLOATS, y=np.arange(59)))


@pytest.mark.parametrize("y", [np.arange(60) / 7, np.zeros((60, 2)), np.where(np.arange(60) == 7, np.inf, 1.0)])
def test_labels_of_no_use_are_said_to_be_left_out(tmp_path, y):
    data = load_data(saved(tmp_path / "x.npz", x=FLOATS, y=y))
    assert data.labels == dict.fromkeys(SPLITS)
    assert any("labels are not used" in notice for notice in data.notices)


def test_npy_cut_short(tmp_path):
    path = Path(saved(tmp_path / "x.npy", x=FLOATS))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-7])
    with raises(DataError, str(path), f"expected {size} bytes", f"found {size - 7}"):
        load_data(path)
    path.write_bytes(path.read_bytes()[:20])
    with raises(DataError, str(path), "not a NumPy array"):
        load_data(path)
    path.write_bytes(b"")
    with raises(DataError, str(path), "not a NumPy array"):
        load_data(path)


def npy(shape: tuple[int, ...], content: bytes = b"") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue() + content


def no_allocation(*arguments, **keywords):
    pytest.fail("allocated or read before the header was checked")


def test_npy_header_that_claims_too_much(tmp_path, monkeypatch):
    path = tmp_path / "x.npy"
    path.write_bytes(npy((10**9, 10**9), bytes(400)))
    monkeypatch.setattr(np, "load", no_allocation)
    with raises(DataError, str(path), f"expected {128 + 4 * 10**18} bytes", "found 528"):
        load_data(path)
    path.write_bytes(npy((-10, 10), bytes(400)))
    with raises(DataError, "(-10, 10)"):
        load_data(path)
    path.write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + bytes(400))
    with raises(DataError, "not a NumPy array", "(2, 0)"):  # refused by its version, before 4 GB of header are read
        load_data(path)


@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_npz_cut_short(tmp_path, keep):
    path = Path(saved(tmp_path / "x.npz", x=FLOATS))
    content = path.read_bytes()
    kept = int(len(content) * keep)
    path.write_bytes(content[:kept])
    expected = max(kept, content.index(b"PK\x01\x02"))  # at least the member; the rest is not known
    with raises(DataError, str(path), f"expected more than {expected} bytes", f"found {kept}"):
        load_data(path)


def test_npz_with_a_flipped_bit(tmp_path):
    path = Path(saved(tmp_path / "x.npz", x=FLOATS))
    content = bytearray(path.read_bytes())
    content[400] ^= 1
    path.write_bytes(content)
    with raises(DataError, str(path), "x: damaged inside its archive"):
        load_data(path)


def test_npz_member_shorter_than_its_header_says(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", npy((10**9, 10**9), bytes(400)))
    monkeypatch.setattr(np.lib.format, "read_array", no_allocation)
    with raises(DataError, str(path), f"expected {128 + 4 * 10**18} bytes", "found 528"):
        load_data(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy((11, 10), bytes(400)))
    with raises(DataError, str(path), "expected 568 bytes", "found 528"):
        load_data(path)


def test_npz_packed_in_another_way(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", npy((10, 10), bytes(400)))
    with raises(DataError, str(path), "np.savez_compressed"):
        load_data(path)


def test_npz_directory_that_claims_more_than_it_can_unpack(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    member = npy((10**6, 100), bytes(400))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", member)
    content = path.read_bytes()
    claimed = 128 + 4 * 10**8
    path.write_bytes(content.replace(struct.pack("<I", len(member)), struct.pack("<I", claimed)))
    monkeypatch.setattr(np.lib.format, "read_array", no_allocation)
    with raises(DataError, f"expected {claimed} bytes", "found"):
        load_data(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ""])
def test_data_larger_than_memory(tmp_path, monkeypatch, suffix):
    """By a byte of what is needed for the rows in their final type, and for the copies made on the way."""
    monkeypatch.setattr(np.lib.format, "read_array", no_allocation)
    monkeypatch.setattr(np, "load", no_allocation)
    path = tmp_path / f"x{suffix}"
    x = np.zeros((40, 2000), np.float32)
    if suffix in (".npy", ".npz"):
        np.savez_compressed(path, x=x) if suffix == ".npz" else np.save(path, x)  # a small archive of a large array
    elif suffix == ".csv":
        np.savetxt(path, x, delimiter=",")
    else:
        write_images(path, 10, size=(80, 90))
    needed = {".npy": x.nbytes, ".npz": 2 * x.nbytes + 128, "": 2 * 10 * 80 * 90}
    leave_memory(monkeypatch, (needed[suffix] if suffix in needed else 10 * path.stat().st_size) - 1)
    with raises(DataError, str(path), "GiB of memory", "is available", ".npy"):
        load_data(path, stream="off")


def test_importing_data_imports_nothing_heavy():
    """The list of sources, which --help shows, not even torch."""
    code = """
import sys
def heavy(*names): print([name for name in names if name in sys.modules])
from pyrovae.data import SOURCES
heavy("numpy", "torch", "torchvision", "sklearn", "pandas", "PIL")
from pyrovae.data import load_data
heavy("torchvision", "sklearn", "pandas", "PIL")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]", "[]"]


def test_data_say_what_they_are_in_one_line():
    assert isinstance(load_data("ring"), Data)
    assert "tensor" not in repr(load_data("ring"))


# ------------------------------------------------------------------------------------------- headers that are damaged


def with_header(header: str, content: bytes = bytes(80), version: int = 1) -> bytes:
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes((version, 0)) + size + header.encode("latin1") + content


HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (10, 2)",  # TokenError
    "{'descr': '<f4', 'fortran_order': False, 'shape': (10, 2L), [1]: 2}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (10, {[]: 1})}",  # TypeError
    "{'descr': '<f4', 'fortran_order': False, b'shape': (10, 2)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (0, " + "9" * 30 + ")}",  # OverflowError
    "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 300 + ")" * 300 + "}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': " + "-" * 60000 + "1}",  # MemoryError, RecursionError
    "{'descr': '<f4', 'fortran_order': False, 'shape': (10, 007)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (10)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1, " * 70 + ")}",
    "{'descr': '<f4', 'fortran_order': 1, 'shape': (10, 2)}",
    "{'descr': '<f4', 'shape': (10, 2)}",
    "{'descr': '<f4', 'descr': '<f4', 'shape': (10, 2)}",
    "{'descr': '|S0', 'fortran_order': False, 'shape': (10, 2)}",
    "{'descr': '<f77', 'fortran_order': False, 'shape': (10, 2)}",
    "{'descr': '(2,)f4', 'fortran_order': False, 'shape': (10, 2)}",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (10, 2)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (10, 2), 'é\x00': 1}",
    "",
)


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_damaged_headers_are_refused_in_a_line(tmp_path, header, suffix):
    path = tmp_path / f"x{suffix}"
    content = with_header(header)
    if suffix == ".npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
    with raises(DataError, str(path)):
        load_data(path)


def test_headers_in_any_order_and_spacing_are_read(tmp_path):
    """What other programs write."""
    rows = np.arange(20, dtype=np.float32).reshape(10, 2)
    for header in (
        "{'shape':(10,2),'descr':'<f4','fortran_order':False}",
        "{ 'fortran_order' : False ,\n'shape' : ( 10 , 2 , ) , 'descr' : '<f4' , }" + " " * 20000,
    ):
        (tmp_path / "x.npy").write_bytes(with_header(header, rows.tobytes()))
        data = load_data(tmp_path / "x.npy")
        assert sorted(torch.cat([data.train, data.validation, data.test])[:, 0].tolist()) == rows[:, 0].tolist()


def test_archives_that_claim_the_impossible(tmp_path):
    """A directory of wrong numbers: a version that does not exist, an offset beyond 64 bits."""
    path = Path(saved(tmp_path / "x.npz", x=FLOATS))
    whole = path.read_bytes()
    at = whole.index(b"PK\x01\x02")
    path.write_bytes(whole[: at + 6] + b"\x80" + whole[at + 7 :])
    with raises(DataError, str(path)):
        load_data(path)
    huge = struct.pack("<HHQQ", 1, 16, 2**64 - 1, 2**64 - 1)
    head = struct.pack("<4s5H3I2H", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, 5, len(huge))
    path.write_bytes(head + b"x.npy" + huge + bytes(100))
    with raises(DataError, str(path), "not a whole .npz archive"):
        load_data(path)


# ------------------------------------------------------------------------------------- whole numbers, and what they are

COUNTS = np.random.default_rng(3).poisson(2.0, (60, 4))


def said(path: str, measure: str, binarize: str | None = None) -> str:
    return "\n".join(load_data(path).rows(measure, binarize).notices)


@pytest.mark.parametrize(
    ("binarize", "words"),
    [
        (None, "1 with probability level / 255, drawn anew whenever it is used (binarize: dynamic)"),
        ("fixed", "1 with probability level / 255, drawn once (binarize: fixed)"),
        ("threshold", "1 where its level is over 127 (binarize: threshold)"),
    ],
)
def test_how_uint8_is_read_is_said(tmp_path, binarize, words):
    path = saved(tmp_path / "x.npy", x=GREY)
    notice = said(path, "mass", binarize)
    assert "uint8 up to 255 is read as 256 grey levels" in notice
    assert words in notice
    assert "Poisson" not in notice
    assert "dequantised to [0,1], x = (level + u) / 256" in said(path, "density")
    assert load_data("digits").rows("mass").notices == ()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_counts_in_uint8_name_the_likelihoods_for_counts(tmp_path, suffix):
    path = saved(tmp_path / f"x{suffix}", x=COUNTS.astype(np.uint8))
    for measure in ("mass", "density"):
        notice = said(path, measure)
        assert f"uint8 up to {COUNTS.max()} is read as 256 grey levels" in notice
        assert "Poisson or negative binomial" in notice
        assert "categorical" in notice


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.float32, np.float64])
def test_a_density_of_whole_numbers_is_said_to_have_no_bound(tmp_path, dtype):
    notice = said(saved(tmp_path / "x.npy", x=COUNTS.astype(dtype)), "density")
    assert "all values are whole numbers" in notice
    assert "no upper bound" in notice
    assert "Poisson or negative binomial" in notice
    with raises(DataError, "whole numbers, have no mass", "uint8", "Poisson"):
        said(saved(tmp_path / "x.npy", x=COUNTS.astype(dtype)), "mass")


def test_columns_of_whole_numbers_are_counted(tmp_path):
    """In a table some columns are; those that are constant are told of as such."""
    x = np.column_stack([FLOATS, COUNTS[:, :2], np.full(60, 7.0)])
    (tmp_path / "x.csv").write_text("\n".join(",".join(map(repr, row)) for row in x.tolist()))
    notice = said(str(tmp_path / "x.csv"), "density")
    assert "2 of 6 columns are whole numbers" in notice
    assert "1 column of 6 constant" in notice
    assert "whole numbers" not in said(saved(tmp_path / "x.npy", x=FLOATS), "density")
    late = FLOATS.round()  # a single fraction in the last row of a column
    late[-1] += 0.5
    assert "whole numbers" not in said(saved(tmp_path / "x.npy", x=late), "density")
    assert "whole numbers" not in said(saved(tmp_path / "x.npz", x_train=late[:-5], x_test=late[-5:]), "density")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("stream", ["auto", "on"])
def test_booleans_that_are_neither_are_refused(tmp_path, suffix, stream):
    """A byte of 7 is no truth; it does not make grey levels of the others."""
    if suffix == ".npz" and stream == "on":
        return
    bits = BITS.astype(bool)
    path = Path(saved(tmp_path / f"x{suffix}", x=bits))
    assert load_data(path, stream=stream).binary
    bits.view(np.uint8)[41, 3] = 7
    saved(path, x=bits)
    with raises(DataError, str(path), "a boolean array in which a byte is 7, neither 0 nor 1"):
        load_data(path, stream=stream)


def test_labels_of_characters_that_do_not_exist(tmp_path):
    """Four bytes of a damaged label can be more than Unicode has."""
    labels = np.array(["a"] * 60)
    labels.view(np.uint32)[7] = 0x7FFFFFFF
    with raises(DataError, "labels are no text"):
        load_data(saved(tmp_path / "x.npz", x=FLOATS, y=labels))


def test_a_whole_number_that_no_float_holds_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"a,b\n1,2\n{'9' * 400},3\n3,4\n4,5\n")
    with pytest.raises(DataError, match="column 'a' is not numeric"):
        load_data(tmp_path / "x.csv")


@pytest.mark.parametrize("r", [2, 3])
def test_rows_of_a_manifold_have_its_dimension_wherever_one_looks(r: int) -> None:
    """The nearest rows of a row are in r directions, but for the curvature; all rows together are in many more."""
    x = load_data(f"manifold-{r}-in-20").train.double()
    assert x.shape[1:] == (20,)
    every = torch.linalg.svdvals(x - x.mean(0))
    assert every[2 * r] > 0.05 * every[0]
    for i in range(0, len(x), 800):
        near = x[(x - x[i]).square().sum(1).argsort()[:25]]
        values = torch.linalg.svdvals(near - near.mean(0))
        assert values[r] < 0.25 * values[r - 1] < 0.25 * values[0]


def test_rows_of_a_manifold_are_in_patches() -> None:
    """One for each label: rows of a label are nearer to one another than to the others."""
    data = load_data("manifold-2-in-20")
    x, label = data.train.double(), data.labels["train"]
    assert label.unique().tolist() == [0, 1, 2, 3]
    nearest = torch.cdist(x[:500], x).fill_diagonal_(torch.inf).argmin(1)
    assert (label[nearest] == label[:500]).double().mean() > 0.99
