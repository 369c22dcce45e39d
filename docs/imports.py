"""Draw the map of the modules: which there are, what each holds, and which imports which.

    python docs/imports.py

writes `docs/imports.svg` and the table of files in `docs/concepts.md`, both from the sources as they are: an import
counts wherever it stands, in a function or for types alone. `LAYERS` says where each module belongs; a test asserts
that the table has them all, that no module imports from a layer above its own, and that there is no circle.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE, PAGE = ROOT / "docs" / "imports.svg", ROOT / "docs" / "concepts.md"
START, END = "<!-- written by docs/imports.py -->\n", "<!-- to here -->\n"
Graph = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Layer:
    """Modules that may import one another and what lies below.

    Args:
        name: As the picture writes it.
        places: Modules, or folders as "models.*": all modules in it, but not those in folders of it.
        shelf: Layers of different shelves know nothing of one another; "" for a layer that stands across all of them.
    """

    name: str
    places: tuple[str, ...]
    shelf: str = ""


# From the ground up. A package's own `__init__`, which only gives names to what is in it, is on top of its folders.
LAYERS = (
    Layer(
        "ground", ("errors", "settings", "columns", "version", "checks", "files", "seeding", "processors", "processes")
    ),
    Layer("models", ("models", "models.*"), "models"),
    Layer("data", ("data", "data.*"), "data"),
    Layer("inference", ("inference.*",), "inference"),
    Layer("inference/tracing", ("inference.tracing", "inference.tracing.*"), "inference"),
    Layer("inference/training", ("inference.training", "inference.training.*"), "inference"),
    Layer("inference, its names", ("inference",), "inference"),
    Layer("quality", ("quality.*",)),
    Layer("quality, its names", ("quality",)),
    Layer("plots", ("plots", "plots.*"), "plots"),
    Layer("runs", ("runs", "runs.*")),
    Layer("command", ("command",)),
    Layer(
        "commands",
        (
            "fit",
            "evaluate",
            "gaps",
            "gradients",
            "compare",
            "classify",
            "sample",
            "encode",
            "disentangle",
            "runs.__main__",
        ),
    ),
    Layer("all commands", ("__main__",)),
    Layer("pyrovae, its names", ("pyrovae",)),
)


def modules() -> dict[str, Path]:
    """Each module of the package, its name without the leading "pyrovae.", and its file."""
    paths = sorted((ROOT / "pyrovae").rglob("*.py"))
    parts = [path.relative_to(ROOT / "pyrovae").with_suffix("").parts for path in paths]
    names = [".".join(part[:-1] if part[-1] == "__init__" else part) or "pyrovae" for part in parts]
    return dict(zip(names, paths, strict=True))


def imports(files: Mapping[str, Path]) -> Graph:
    """What each module imports of the package, wherever the import stands."""
    return {name: frozenset(_imported(path, files) - {name}) for name, path in files.items()}


def _imported(path: Path, files: Mapping[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from pyrovae.runs import options` is of the module options, `from pyrovae.runs import NAME` of runs.
            for alias in node.names:
                longer = f"{node.module}.{alias.name}"
                found.add(longer if longer.removeprefix("pyrovae.") in files else node.module)
    return {name.removeprefix("pyrovae.") for name in found} & files.keys()


def layer_of(module: str) -> int | None:
    """Where in `LAYERS` a module belongs; None where no layer has it."""
    folder = module.rpartition(".")[0]
    exact = [i for i, layer in enumerate(LAYERS) if module in layer.places]
    return next(iter(exact + [i for i, layer in enumerate(LAYERS) if f"{folder}.*" in layer.places]), None)


def upward(graph: Graph) -> list[str]:
    """The imports that no layer allows: of a layer above, or of a shelf beside."""
    wrong = []
    for module, others in graph.items():
        for other in sorted(others):
            here, there = layer_of(module), layer_of(other)
            if here is None or there is None:
                continue
            shelves = {LAYERS[here].shelf, LAYERS[there].shelf} - {""}
            if there > here or len(shelves) > 1:
                wrong.append(f"{module} ({LAYERS[here].name}) imports {other} ({LAYERS[there].name})")
    return wrong


def circle(graph: Graph) -> list[str]:
    """Modules that import one another in a circle, the first one found, or none."""
    left = dict(graph)
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    if not left:
        return []
    walk = [min(left)]
    while (following := min(left[walk[-1]] & left.keys())) not in walk:
        walk.append(following)
    return [*walk[walk.index(following) :], following]


def reach(graph: Graph) -> dict[str, set[str]]:
    """All that each module needs, directly or not; the graph has no circle."""
    found: dict[str, set[str]] = {}

    def below(module: str) -> set[str]:
        if module not in found:
            found[module] = set(graph[module]).union(*(below(other) for other in graph[module]))
        return found[module]

    for module in graph:
        below(module)
    return found


def drawn(graph: Graph) -> dict[str, set[str]]:
    """The arrows of the picture: an import is left out where others lead to the same module by a longer way."""
    needs = reach(graph)
    return {
        module: {other for other in others if not any(other in needs[between] for between in others)}
        for module, others in graph.items()
    }


def only_names(path: Path) -> bool:
    """Whether a module is a docstring and imports: it gives names to what is elsewhere."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return path.name == "__init__.py" and all(isinstance(n, ast.Expr | ast.Import | ast.ImportFrom) for n in body)


def first_sentence(path: Path) -> str:
    """What a module says of itself first."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).removesuffix(".").replace("|", "\\|")


def table(files: Mapping[str, Path]) -> str:
    """The files by layer, from the commands down, in Markdown."""
    lines = []
    for index, layer in reversed(list(enumerate(LAYERS))):
        rows = [(name, path) for name, path in files.items() if layer_of(name) == index]
        rows = [(name, path) for name, path in rows if path.stat().st_size]
        if rows:
            lines += ["", f"| {layer.name} | |", "|---|---|"]
            lines += [f"| `{path.relative_to(ROOT / 'pyrovae')}` | {first_sentence(path)} |" for _, path in rows]
    return "\n".join([*lines, "", ""])


def fingerprint(graph: Graph) -> str:
    """What tells whether a picture is of this graph: it stands in the picture's description."""
    text = "\n".join(f"{module}: {' '.join(sorted(others))}" for module, others in sorted(graph.items()))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Column:
    """Where a layer stands in the picture: at the left edge, and how many boxes fit into a row of it."""

    left: float
    boxes: int


# In widths of a box. Shelves stand side by side, and the others across all of them.
COLUMNS = {
    "models": Column(0, 2),
    "data": Column(2.3, 2),
    "inference": Column(4.6, 4),
    "inference, its names": Column(4.6, 4),
    "inference/tracing": Column(8.9, 1),
    "inference/training": Column(10.2, 2),
    "plots": Column(12.5, 2),
}
ACROSS = Column(3.0, 7)
COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
Place = tuple[float, int]  # the middle of a box, in widths of a box, and its row from the ground


def column_of(module: str) -> Column:
    """The column of a module's layer."""
    return COLUMNS.get(LAYERS[layer_of(module) or 0].name, ACROSS)


def rows_of(graph: Graph) -> dict[str, int]:
    """The row of each module, from the ground up: every import points to a row below.

    A module stands as low as what it imports lets it, and as the width of its column does.
    """
    rows: dict[str, int] = {}
    base = 0
    for shelved, band in groupby(range(len(LAYERS)), lambda index: bool(LAYERS[index].shelf)):
        for layers in [list(band)] if shelved else [[index] for index in band]:
            inside = {module: graph[module] for module in sorted(graph) if layer_of(module) in layers}
            taken: Counter[tuple[Column, int]] = Counter()
            for module in sorted(inside, key=lambda module: (_depth(module, inside), module)):
                column = column_of(module)
                row = max([base, *(1 + rows[other] for other in inside[module] & inside.keys())])
                while taken[column, row] == column.boxes:
                    row += 1
                taken[column, row] += 1
                rows[module] = row
            base = max(rows.values(), default=-1) + 1
    return rows


def _depth(module: str, graph: Mapping[str, frozenset[str]]) -> int:
    """The longest way from a module down to one that imports none of these."""
    return 1 + max((_depth(other, graph) for other in graph[module] & graph.keys()), default=-1)


def placed(arrows: Mapping[str, set[str]], rows: Mapping[str, int]) -> dict[str, Place]:
    """Where each box stands: one row after another is put in the order that leaves arrows short and boxes clear."""
    lines: dict[tuple[Column, int], list[str | None]] = {}
    for module, row in sorted(rows.items()):
        lines.setdefault((column_of(module), row), []).append(module)
    for (column, _), line in lines.items():
        line += [None] * (column.boxes - len(line))

    def places() -> dict[str, Place]:
        return {
            module: (column.left + slot + 0.5, row)
            for (column, row), line in lines.items()
            for slot, module in enumerate(line)
            if module is not None
        }

    for _ in range(6):  # each time the best exchange of two places in every line
        for key in sorted(lines, key=lambda key: (key[1], key[0].left)):
            orders = [lines[key], *exchanged(lines[key])]
            costs = []
            for order in orders:
                lines[key] = order
                costs.append(_cost(arrows, places(), {module for module in order if module}))
            lines[key] = orders[costs.index(min(costs))]
    return places()


def exchanged(line: list[str | None]) -> list[list[str | None]]:
    """A line of boxes with every two of its places exchanged."""
    found = []
    for i, j in combinations(range(len(line)), 2):
        other = list(line)
        other[i], other[j] = other[j], other[i]
        found.append(other)
    return found


def _cost(arrows: Mapping[str, set[str]], places: Mapping[str, Place], moved: set[str]) -> float:
    """How far the arrows of some boxes run sideways, and how often one runs behind a box."""
    total = 0.0
    for module, others in arrows.items():
        x, y = places[module]
        for other in others:
            to, low = places[other]
            if moved & {module, other}:
                total += abs(x - to)
            # Of an arrow that stays where it is, only the boxes that move can come in its way.
            for name in places if moved & {module, other} else moved:
                middle, row = places[name]
                if low < row < y:
                    at = x + (to - x) * (y - row) / (y - low)
                    total += 6.0 * (abs(at - middle) < 0.5)
    return total


def pictured(graph: Graph, files: Mapping[str, Path]) -> Graph:
    """The modules of the picture: all but those that only give names and that no other imports."""
    used = set().union(*(others for module, others in graph.items() if module != "pyrovae"))
    names = {module for module in graph if only_names(files[module]) and module not in used} | {"pyrovae"}
    return {module: others - names for module, others in graph.items() if module not in names}


def draw(graph: Graph, files: Mapping[str, Path], target: Path = PICTURE) -> None:
    """Write the picture of what is `pictured`, with its `fingerprint` beside it where the format holds one."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    graph = pictured(graph, files)
    arrows, rows = drawn(graph), rows_of(graph)
    places = placed(arrows, rows)
    width, height = max(c.left + c.boxes for c in COLUMNS.values()), max(rows.values()) + 1
    figure = Figure(figsize=(1.15 * width + 0.4, 0.8 * height + 0.3))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.2, width + 0.2), ylim=(-0.75, height - 0.15))
    axes.axis("off")
    shade = {"boxstyle": "round,pad=0.05", "linewidth": 0}
    for index, layer in enumerate(LAYERS):
        inside = [module for module in places if layer_of(module) == index]
        if not inside:
            continue
        column = COLUMNS.get(layer.name, Column(0, width))  # type: ignore[arg-type]
        bottom, top = (limit(rows[module] for module in inside) for limit in (min, max))
        corner, size = (column.left + 0.03, bottom - 0.38), (column.boxes - 0.06, top - bottom + 0.84)
        axes.add_patch(FancyBboxPatch(corner, *size, facecolor="0.95", zorder=0, **shade))
        axes.text(column.left + 0.05, top + 0.36, layer.name, fontsize=9, weight="bold", color="0.35", va="center")
    for module, others in arrows.items():
        colour = COLOURS[list(places).index(module) % len(COLOURS)]
        for other in sorted(others):
            (x, y), (to, low) = places[module], places[other]
            start, end = (x, y - 0.2), (to, low + 0.2)
            style = {"arrowstyle": "-|>", "color": colour, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0, "alpha": 0.75}
            axes.annotate("", end, start, arrowprops=style, zorder=1)
    for module, (x, y) in places.items():
        box = {"boxstyle": "round,pad=0.02", "facecolor": "white", "edgecolor": "0.3", "linewidth": 0.8}
        axes.add_patch(FancyBboxPatch((x - 0.42, y - 0.17), 0.84, 0.34, zorder=2, **box))
        name = module.rpartition(".")[2]
        axes.text(x, y, name, fontsize=min(8.5, 115 / len(name)), ha="center", va="center", zorder=3)
    note = "An arrow points from a module to one that it imports; it is left out where other arrows lead there too."
    axes.text(width, -0.62, note, fontsize=8, ha="right", va="center", color="0.35")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "imports"}):
        figure.savefig(
            target, metadata={"Date": None, "Description": fingerprint(graph)} if target == PICTURE else None
        )


def main() -> None:
    """Write the picture and the table."""
    files = modules()
    graph = imports(files)
    if wrong := [module for module in files if layer_of(module) is None]:
        raise SystemExit(f"no layer has {', '.join(wrong)}; add a place to LAYERS")
    if found := circle(graph):
        raise SystemExit(f"a circle: {' -> '.join(found)}")
    draw(graph, files)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + START + table(files) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
