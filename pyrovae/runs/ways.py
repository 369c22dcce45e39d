"""The options of `python -m pyrovae.sample` as one of the ways of making rows (`pyrovae.runs.drawing`)."""

from typing import TYPE_CHECKING, Any

from pyrovae.errors import UsageError
from pyrovae.runs.build import build_proposal
from pyrovae.runs.drawing import PATHS, Between, Denoise, Draws, Impute, Near, Traverse, hidden
from pyrovae.runs.made import Way
from pyrovae.runs.options import PARTS
from pyrovae.runs.parts import choose
from pyrovae.runs.recipe import refuse
from pyrovae.settings import Number, Several, Whole, Words, read

if TYPE_CHECKING:
    from pyrovae.models.corruptions import Corruption

# What is made, by the option that asks for it, and the other options that it has.
WAYS = {
    "": ("n", "mean", "temperature"),
    "near": ("n", "radius"),
    "between": ("steps", "path"),
    "traverse": ("steps", "dims"),
    "impute": ("n", "rows", "K", "proposal"),
    "denoise": ("rows",),
}
OF_ROWS = ("split", "data")  # which plain draws have none of
PROPOSALS = ("individual", "guide")  # whose latents can be drawn
ROW_NUMBERS = Several(Whole(0), tuple)


def way_of(options: dict[str, Any]) -> Way:
    """What is asked for.

    Raises:
        UsageError: several at once, or an option that it has no use for.
    """
    asked = [name for name in WAYS if name in options] or [""]
    if len(asked) > 1:
        raise UsageError(f"{asked[0]}, {asked[1]}: make one at a time", settings=(asked[0], asked[1]))
    way = asked[0]
    unused = [name for names in WAYS.values() for name in names if name not in WAYS[way]]
    unused += OF_ROWS if not way else ()
    why = f"that is not of `{way}`" if way else "that is not of plain draws"
    refuse(options, tuple(dict.fromkeys(unused)), why, of=way)
    n = whole(options, "n", 8 if way else 100)
    steps, limit = whole(options, "steps", 11), whole(options, "rows", 8)
    if not way:
        temperature = read("temperature", options.get("temperature", 1.0), Number(above=0))
        return Draws(n, bool(options.get("mean")), temperature)
    if way == "near":
        radius = read("radius", options.get("radius", 0.1), Number(least=0))
        return Near(read("near", options["near"], ROW_NUMBERS), radius, n)
    if way == "between":
        ends = read("between", options["between"], ROW_NUMBERS)
        if len(ends) != 2:
            got = options["between"]
            raise UsageError(f"between: expected two numbers of rows, such as 0,3, got {got}", settings=("between",))
        path = read("path", options.get("path", "both"), Words(PATHS))
        return Between(ends[0], ends[1], steps, path)
    if way == "traverse":
        dims = read("dims", options["dims"], ROW_NUMBERS) if "dims" in options else None
        return Traverse(read("traverse", options["traverse"], Whole(0)), dims, steps)
    if way == "impute":
        word = read("proposal", options["proposal"], Words(PROPOSALS)) if "proposal" in options else None
        proposal = None if word is None else build_proposal(word)
        num_particles = whole(options, "K", 1000) if "K" in options else None
        return Impute(hidden(options["impute"]), limit, n, num_particles, proposal)
    return Denoise(corruption(options["denoise"]), limit)


def whole(options: dict[str, Any], key: str, default: int) -> int:
    """An option that is a whole number of at least 1."""
    number: int = read(key, options.get(key, default), Whole(2 if key == "steps" else 1))
    return number


def corruption(word: str) -> "Corruption":
    """The corruption that a name and an amount stand for; without an amount, with its usual one.

    Raises:
        UsageError: there is none of that name, or the amount makes no sense.
    """
    name, _, amount = word.partition(":")
    chosen = choose("denoise", name, None, PARTS["corruption"]).name
    cls = PARTS["corruption"][chosen].classes[0]
    if not cls.settings:
        raise UsageError(
            f"denoise: expected a corruption of rows, such as noise:0.5, got {word}", settings=("denoise",)
        )
    ((key, setting),) = cls.settings.items()
    made: Corruption = cls.build("denoise", {key: read("denoise", amount or setting.default, setting.kind)})
    return made
