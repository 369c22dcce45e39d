"""Which parts go together: every prior x guide x likelihood x gradient estimator, each built and run once.

    python benchmarks/combinations.py                  every cell, and docs/combinations.md anew; some minutes
    python benchmarks/combinations.py --cells 50       a draw of them, against the page

A cell is a pair of parts with usual settings, Z = 4, on five made-up rows of the likelihood's space, and a bound that
has the estimator, of K = 2 particles. It works if its loss and gradient are finite and the encoder and the decoder have
a gradient; it is refused if what it raises is one of our errors, whose line is the reason; anything else is a fault,
and the script fails.
"""

import argparse
import itertools
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pyrovae.errors import PyrovaeError
from pyrovae.inference.batch import Batch
from pyrovae.inference.pair import Pair
from pyrovae.runs.build import build_model, build_objective
from pyrovae.runs.options import GRADIENTS, OBJECTIVES, PARTS
from pyrovae.runs.recipe import Recipe
from pyrovae.seeding import seeded

PAGE = Path(__file__).parents[1] / "docs" / "combinations.md"
DIMENSIONS = ("prior", "guide", "likelihood", "gradient")
Cell = tuple[str, str, str, str]
WORKS = ""
# Of parts, so that a cell takes milliseconds.
SMALL = {"components": 3, "layers": 2, "hidden": 8, "bins": 4, "steps": 2, "codes": 4, "code_dim": 2}
ROWS, SIDE, LATENTS, LEVELS = 5, (1, 4, 4), 4, 8
TABLE = "a=continuous,b=count,c=binary,d=categorical:3"


def names() -> list[list[str]]:
    """The choices of each dimension."""
    return [[*PARTS[part]] for part in DIMENSIONS[:3]] + [[*GRADIENTS]]


def rows_of(likelihood: str) -> torch.Tensor:
    """Rows in the support of a likelihood, shape (5, *event)."""
    kind = PARTS["likelihood"][likelihood].measure
    x = 0.05 + 0.9 * torch.rand(ROWS, *SIDE)
    if kind == "mass":
        return (x > 0.5).float()
    if kind == "columns":
        a, b, c, d = x.flatten(1)[:, :4].unbind(1)
        return torch.stack([a, (5 * b).floor(), (c > 0.5).float(), (3 * d).floor()], 1)
    if kind == "documents":
        return (LEVELS * x.flatten(1)).floor()
    return x if kind == "density" else (LEVELS * x).floor()  # levels and counts


def options_of(cell: Cell) -> dict[str, Any]:
    """A recipe's options for a cell."""
    chosen: dict[str, Any] = {}
    for part, name in zip(DIMENSIONS, cell, strict=True):
        settings = (PARTS[part][name] if part in PARTS else GRADIENTS[name]).settings
        whole = [key for key, setting in settings.items() if isinstance(setting.default, int | None)]
        chosen[part] = {"name": name, **{key: SMALL[key] for key in whole if key in SMALL}}
    elbo = next(word for word, bound in OBJECTIVES.items() if cell[3] in bound.constants["gradients"])
    takes = PARTS["prior"][cell[0]].classes[0].takes
    layered = "guides" in takes
    table = PARTS["likelihood"][cell[2]].measure == "columns"
    return {
        **chosen,
        **({"model": "hierarchical"} if layered else {}),
        **({"columns": TABLE} if table else {}),
        "data": "made up",
        "elbo": elbo,
        "K": 2,
        "latent_dim": [LATENTS] * (2 if layered else 1),
        "network": {"name": "mlp", "hidden": [8]},
        "condition": "label" if {"conditional", "condition_dim"} & set(takes) else None,
    }


def outcome(cell: Cell) -> str:
    """What comes of a cell: nothing, for one that works; else the line of the refusal.

    Raises:
        AssertionError: it neither works nor is refused.
    """
    x = rows_of(cell[2])
    try:
        shape = tuple(x.shape[1:])
        classes = ("0", "1") if condition(cell) else ()
        recipe = Recipe(**options_of(cell)).settled(event_shape=shape, classes=classes, levels=LEVELS)
        model: Any = build_model(recipe, shape)
        y = torch.nn.functional.one_hot(torch.arange(ROWS) % 2, 2).float()
        given = (y,) if condition(cell) else ()
        model.initialise(x, *given)
        pair = Pair(model.model, model.guide)
        loss = build_objective(recipe, 1).loss_of(pair, Batch.of(x, given))
        loss.backward()
    except PyrovaeError as error:
        return plain(str(error))
    gradients = {name: p.grad for name, p in pair.parts.named_parameters() if p.grad is not None}
    assert loss.isfinite(), f"{cell}: loss {loss}"
    assert all(g.isfinite().all() for g in gradients.values()), f"{cell}: a gradient that is not finite"
    for part in ("encoder", "decoder"):
        assert any(part in name and g.abs().max() > 0 for name, g in gradients.items()), (
            f"{cell}: {part} has no gradient"
        )
    return WORKS


def condition(cell: Cell) -> bool:
    """Whether a pair of it is given labels."""
    return options_of(cell)["condition"] is not None


def plain(line: str) -> str:
    """A refusal without the names of parts, sites and remedies, so that equal reasons read alike."""
    line = re.sub(r"(prior|guide)=\w+", r"\1=...", re.sub(r"\s+", " ", line))
    line = re.sub(r"site 'z\d?' \(\w+\)", "site 'z'", line)
    return re.sub(r"(; use )`gradient=.*", r"\1another `gradient`", line)


def runs(cells: list[Cell]) -> Iterator[tuple[Cell, str]]:
    """Each cell and what comes of it."""
    began = time.perf_counter()
    for i, cell in enumerate(cells):
        with seeded(0, "combinations"):
            yield cell, outcome(cell)
        if i % 500 == 499:
            print(f"{i + 1} of {len(cells)} cells, {time.perf_counter() - began:.0f} s", file=sys.stderr)


def page(found: Mapping[Cell, str]) -> str:
    """The page: for each two dimensions a table of how many of the cells of two choices work, and the reasons."""
    reasons = Counter(reason for reason in found.values() if reason)
    numbers = {reason: i for i, (reason, _) in enumerate(reasons.most_common(), 1)}
    works = sum(not reason for reason in found.values())
    lines = [
        "# What goes together",
        "",
        "Every prior with every guide, likelihood and gradient estimator, each with a bound that has it, built and run",
        f"once by `python benchmarks/combinations.py`, which wrote this page: of {len(found):,} cells {works:,} work,",
        f"and {len(found) - works:,} are refused, in a line each; there is no third outcome. A test runs a draw.",
        "",
        "✓: all cells of the two choices work. ✓ but [1]: all but those that are refused for reason 1 below, by what",
        "else they are of. [1]: all are refused, for that reason.",
        "",
    ]
    for a, b in itertools.combinations(range(len(DIMENSIONS)), 2):
        across, down = names()[b], names()[a]
        if len(across) > len(down):
            a, b, across, down = b, a, down, across
        lines += [f"## {DIMENSIONS[a]} by {DIMENSIONS[b]}", "", f"| | {' | '.join(f'`{name}`' for name in across)} |"]
        lines += ["|---" * (len(across) + 1) + "|"]
        for one in down:
            entries = [entry(found, {a: one, b: other}, numbers) for other in across]
            lines.append(f"| `{one}` | {' | '.join(entries)} |")
        lines.append("")
    lines += ["## Reasons", "", "As the first of their cells says them.", ""]
    lines += [f"{i}. {reason}" for reason, i in numbers.items()]
    return "\n".join(lines) + "\n"


def entry(found: Mapping[Cell, str], chosen: Mapping[int, str], numbers: Mapping[str, int]) -> str:
    """What a table says of the cells of two choices."""
    outcomes = [reason for cell, reason in found.items() if all(cell[i] == name for i, name in chosen.items())]
    why = "".join(f"[{number}]" for number in sorted({numbers[reason] for reason in outcomes if reason}))
    if not why:
        return "✓"
    return why if all(outcomes) else f"✓ but {why}"


def disagreeing(cells: list[Cell], text: str) -> list[str]:
    """Which cells do otherwise than the page says of two of their choices."""
    said = tables(text)
    numbers = {reason: number for number, reason in re.findall(r"^(\d+)\. (.*)$", text, re.M)}
    wrong = []
    for cell, reason in runs(cells):
        choices = {f"{part} {name}" for part, name in zip(DIMENSIONS, cell, strict=True)}
        for (one, other), word in said.items():
            expected = f"[{numbers.get(reason)}]" in word if reason else word.startswith("✓")
            if {one, other} <= choices and not expected:
                wrong.append(f"{cell}: the page says {word} of {one} and {other}, now {reason or 'it works'}")
    return wrong


def tables(text: str) -> dict[tuple[str, str], str]:
    """What the tables of the page say of each two choices."""
    said: dict[tuple[str, str], str] = {}
    for heading, table in re.findall(r"## (\w+ by \w+)\n\n((?:\|.*\n)+)", text):
        down, across = heading.split(" by ")
        head, _, *lines = ([word.strip(" `") for word in line.strip("| ").split(" | ")] for line in table.splitlines())
        for one, *entries in lines:
            said |= {(f"{down} {one}", f"{across} {other}"): word for other, word in zip(head, entries, strict=True)}
    return said


def drawn(number: int, seed: int = 0) -> list[Cell]:
    """A draw of cells, each choice of each dimension in it at least once."""
    chance = random.Random(seed)
    every = names()
    cells = [[chance.choice(choices) for choices in every] for _ in range(number)]
    for d, choices in enumerate(every):
        for i, cell in enumerate(cells):
            if i % len(every) == d:
                cell[d] = choices[i // len(every) % len(choices)]
    return [tuple(cell) for cell in cells]  # type: ignore[misc]


def main() -> int:
    """Run cells, and write the page or compare with it."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cells", type=int, metavar="INT", help="only so many, drawn at random, against the page")
    given = arguments.parse_args()
    if given.cells is None:
        found = dict(runs([*itertools.product(*names())]))  # type: ignore[list-item]
        PAGE.write_text(page(found), encoding="utf-8")
        return 0
    wrong = disagreeing(drawn(given.cells), PAGE.read_text(encoding="utf-8"))
    print("\n".join(wrong) or f"{given.cells} cells are as the page says")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
