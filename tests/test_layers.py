"""Imports point downwards: every module has a layer, and none imports from above its own."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[1] / "docs" / "imports.py"


@pytest.fixture(scope="module")
def map_of() -> Iterator[ModuleType]:
    """The script that draws the map of the modules."""
    spec = importlib.util.spec_from_file_location("docs_imports", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["docs_imports"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["docs_imports"]


@pytest.fixture(scope="module")
def graph(map_of: ModuleType) -> dict[str, frozenset[str]]:
    """What each module of the package imports."""
    return map_of.imports(map_of.modules())


def test_every_module_has_a_layer_and_every_place_a_module(map_of: ModuleType) -> None:
    modules = map_of.modules()
    assert len(modules) > 50
    assert [name for name in modules if map_of.layer_of(name) is None] == []
    folders = {f"{name.rpartition('.')[0]}.*" for name in modules}
    places = [place for layer in map_of.LAYERS for place in layer.places]
    assert [place for place in places if place not in modules and place not in folders] == []
    assert len(places) == len(set(places))


def test_no_module_imports_from_a_layer_above_or_a_shelf_beside(
    map_of: ModuleType, graph: dict[str, frozenset[str]]
) -> None:
    """In functions and for types too: what a module names, a reader has to know."""
    assert map_of.upward(graph) == []


def test_no_modules_import_one_another_in_a_circle(map_of: ModuleType, graph: dict[str, frozenset[str]]) -> None:
    assert map_of.circle(graph) == []


def test_the_map_sees_imports_wherever_they_stand(map_of: ModuleType, tmp_path: Path) -> None:
    text = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from pyrovae.errors import UsageError
def f():
    from pyrovae.runs import build
    import pyrovae.data.sources
    from pyrovae import __version__, plots
"""
    (tmp_path / "here.py").write_text(text)
    names = ("here", "errors", "runs", "runs.build", "data", "data.sources", "plots", "pyrovae", "version")
    files = dict.fromkeys(names, PATH) | {"here": tmp_path / "here.py"}
    assert map_of.imports(files)["here"] == {"errors", "runs.build", "data.sources", "plots", "pyrovae"}


def test_arrows_that_point_up_or_beside_and_circles_are_found(map_of: ModuleType) -> None:
    for above, below in (("runs.build", "fit"), ("models.vae", "inference.pair"), ("errors", "files")):
        graph = {above: frozenset({below}), below: frozenset()}
        assert bool(map_of.upward(graph)) == (above != "errors")  # within a layer only circles are refused
    graph = {name: frozenset(others) for name, others in {"a": "b", "b": "cd", "c": "b", "d": ""}.items()}
    assert map_of.circle(graph) == ["b", "c", "b"]
    assert map_of.circle({**graph, "c": frozenset("d")}) == []


def test_an_arrow_is_drawn_unless_others_lead_there(map_of: ModuleType) -> None:
    few = {name: frozenset(others) for name, others in {"a": "bc", "b": "c", "c": "", "d": "ac"}.items()}
    assert map_of.drawn(few) == {"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a"}}


def test_every_arrow_of_the_picture_points_down(map_of: ModuleType, graph: dict[str, frozenset[str]]) -> None:
    rows = map_of.rows_of(graph)
    assert rows.keys() == graph.keys()
    for module, others in graph.items():
        assert all(rows[other] < rows[module] for other in others)
