"""A draw of priors, guides, likelihoods and gradient estimators does what docs/combinations.md says of them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def combinations() -> ModuleType:
    spec = importlib.util.spec_from_file_location("combinations", ROOT / "benchmarks" / "combinations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["combinations"] = module
    spec.loader.exec_module(module)
    return module


def test_a_draw_of_cells_is_as_the_page_says(combinations: ModuleType) -> None:
    cells = combinations.drawn(120)
    for d, choices in enumerate(combinations.names()):
        assert {cell[d] for cell in cells} == set(choices)
    page = combinations.PAGE.read_text(encoding="utf-8")
    assert combinations.disagreeing(cells, page) == []


def test_the_page_has_every_choice_of_today(combinations: ModuleType) -> None:
    said = combinations.tables(combinations.PAGE.read_text(encoding="utf-8"))
    parts = zip(combinations.DIMENSIONS, combinations.names(), strict=True)
    choices = {f"{part} {name}" for part, of in parts for name in of}
    assert {one for pair in said for one in pair} == choices


def test_a_page_that_says_otherwise_is_found_out(combinations: ModuleType) -> None:
    cell = ("StandardNormal", "MeanFieldNormal", "Bernoulli", "enumerated")
    table = (
        "## gradient by guide\n\n| | `MeanFieldNormal` |\n|---|---|\n| `enumerated` | {} |\n\n1. "
        + combinations.outcome(cell)
    )
    for right in ("[1]", "✓ but [1]"):
        assert combinations.disagreeing([cell], table.format(right)) == []
    assert combinations.disagreeing([cell], table.format("[2]")) != []
    (wrong,) = combinations.disagreeing([cell], table.format("✓"))
    assert "the page says ✓ of gradient enumerated and guide MeanFieldNormal, now gradient=enumerated" in wrong
