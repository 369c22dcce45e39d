"""Imports point downwards: every module has a layer, and none imports from above its own."""

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import pyrovae
import pyrovae.models

PATH = Path(__file__).parents[1] / "docs" / "imports.py"
PACKAGE = Path(pyrovae.__file__).parent


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


def test_the_picture_is_of_these_modules(map_of: ModuleType, graph: dict[str, frozenset[str]]) -> None:
    shown = map_of.fingerprint(map_of.pictured(graph, map_of.modules()))
    drawn = shown in map_of.PICTURE.read_text(encoding="utf-8")
    assert drawn, "docs/imports.svg is of other imports: run python docs/imports.py"


def test_the_map_of_files_names_every_module_and_nothing_else(map_of: ModuleType) -> None:
    """Each once, under the name of its layer, by the path of a file that is there."""
    page = map_of.PAGE.read_text(encoding="utf-8")
    (written,) = re.findall(f"{map_of.START}(.*?){map_of.END}", page, re.S)
    named = re.findall(r"^\| `(\S+\.py)` \| \S", written, re.M)
    package = map_of.ROOT / "pyrovae"
    files = {str(path.relative_to(package)) for path in map_of.modules().values() if path.stat().st_size}
    assert sorted(named) == sorted(files), "docs/concepts.md has another map: run python docs/imports.py"
    for layer, rows in re.findall(r"^\| ([^|`]+) \| \|\n\|---\|---\|\n((?:\|.*\n)+)", written, re.M):
        for name in re.findall(r"`(\S+)\.py`", rows):
            module = name.removesuffix("__init__").rstrip("/").replace("/", ".") or "pyrovae"
            assert map_of.LAYERS[map_of.layer_of(module)].name == layer


# What a base class answers for those of its classes that have nothing to say; and a constructor is its class's own.
HOOKS = {
    *("Network.output_bias", "Network.forward", "Prior.initialise", "Corruption.initialise"),
    *(
        "Objective.__post_init__",
        "Objective.constraint",
        "Objective.evaluated",
        "Guide.attach",
        "Guide.begin",
        "OfParticles.__post_init__",
        "OfParticles.order",
    ),
    *("GradientEstimator.bias",),
    *("Proposal.of_guide", "Proposal.as_guide", "Proposal.computation", "Proposal.summing"),
    *("Likelihood.remarks", "Likelihood.view", "Mixture.points", "Mixture._forget", "LatentLayers.extend"),
}


def overridden() -> Iterator[str]:
    """Methods of one class of the package that another writes anew, though they already do something."""
    modules = [importlib.import_module(found.name) for found in pkgutil.walk_packages(pyrovae.__path__, "pyrovae.")]
    classes = {cls for module in modules for cls in vars(module).values() if inspect.isclass(cls)}
    for cls in (cls for cls in classes if cls.__module__.startswith("pyrovae.")):
        for base in (base for base in cls.__mro__[1:] if base.__module__.startswith("pyrovae.")):
            for name, member in vars(base).items():
                code = getattr(member, "fget", None) or getattr(member, "__func__", member)
                abstract = getattr(code, "__isabstractmethod__", False)
                written = (
                    inspect.isfunction(code)
                    and not abstract
                    and Path(code.__code__.co_filename).is_relative_to(PACKAGE)
                )
                if written and name in vars(cls) and name != "__init__":
                    yield f"{base.__name__}.{name}"


def test_what_a_class_does_no_other_class_does_otherwise() -> None:
    """Abstract or final: a method is written once, so that to read it is to know it."""
    assert set(overridden()) == HOOKS


def test_pairs_are_made_of_the_layers_they_name() -> None:
    """No pair is a case of another: each says what it is made from, and what they share cannot be made by itself."""
    pairs = pyrovae.models.pairs.PAIRS
    assert [(a, b) for a in pairs for b in pairs if a is not b and issubclass(a, b)] == []
    with pytest.raises(TypeError, match="abstract"):
        pyrovae.models.LatentLayers(None, [], None, [None])
