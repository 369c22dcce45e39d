"""The page that maps the documents to the code names nothing that is not there, and its identities are true."""

import importlib
import math
import re
import shlex
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import nn
from torch.testing import assert_close

from pyrovae import fit
from pyrovae.errors import CheckpointError, UsageError
from pyrovae.inference import ELBO
from pyrovae.models import VAE, Gaussian, IsotropicNormal, MeanFieldNormal, Network, StandardNormal
from pyrovae.runs.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "documents.md").read_text(encoding="utf-8")
SECTIONS = dict(part.split("\n", 1) for part in PAGE.split("\n## ")[1:])
SHELVES = ("models", "inference", "plots", "quality", "data")
OF_PYRO = {type_.__name__ for type_ in (Trace_ELBO, TraceEnum_ELBO)}


def code(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def rows(section: str) -> list[list[str]]:
    """The cells of each row of a section's tables, without their headings."""
    lines = [line.strip("|").split("|") for line in SECTIONS[section].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if set(line[0]) != {"-"}][1:]


COMMANDS = [text for text in code(PAGE) if text.startswith("python -m pyrovae.")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_is_understood(command: str, tmp_path: Path, monkeypatch) -> None:
    """Training, up to the data; what is done with a run, up to the run, which is not there."""
    monkeypatch.chdir(tmp_path)
    module, *words = shlex.split(command)[2:]
    if module == "pyrovae.fit":
        if "--config" in words:
            at = words.index("--config") + 1
            words[at] = str(ROOT / words[at])
        Recipe(**fit.read_options(words))
        return
    with pytest.raises(CheckpointError, match="RUN"):
        importlib.import_module(module).command(words)


def test_every_option_that_stands_alone_is_one_of_training() -> None:
    alone = {text.split()[0] for text in code(PAGE) if text.startswith("--")}
    assert len(alone) > 3
    assert [option for option in alone if f"{option} " not in fit.options_parser().format_help()] == []


def test_every_name_of_the_page_is_in_the_library() -> None:
    homes = [importlib.import_module(f"pyrovae.{shelf}") for shelf in SHELVES]
    names = {re.sub(r"\(.*\)$", "", text) for text in code(PAGE)}
    names = {name for name in names if re.fullmatch(r"[A-Z]\w+", name)} - OF_PYRO
    names |= {name for row in rows("Where each system is") for name in code(row[1]) if re.fullmatch(r"\w+", name)}
    assert len(names) > 30
    missing = [name for name in sorted(names - OF_PYRO) if not any(hasattr(home, name) for home in homes)]
    assert missing == []


def test_every_test_of_the_page_exists() -> None:
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = [text for text in code(PAGE) if text.startswith("test_")]
    assert [name for name in named if f"def {name}(" not in written] == []


def anchors(page: Path) -> set[str]:
    """What its headings are linked by."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_of_the_page_leads_somewhere_and_every_notebook_is_on_it() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]*))?\)", PAGE)
    for link, anchor in links:
        page = ROOT / "docs" / link
        assert page.exists(), link
        assert not anchor or anchor in anchors(page), f"{link}#{anchor}"
    notebooks = {f"../notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks - {link for link, _ in links} == set()


def test_every_system_is_shown_by_something_or_said_not_to_be_here() -> None:
    systems = rows("Where each system is")
    assert len(systems) > 25
    for system, _, shown in systems:
        assert "](" in shown or "`" in shown or "not here yet" in shown, system
    for written, _, shown in rows("What the documents get wrong"):
        assert "](" in shown, written


def pair(scale: float, prior: nn.Module) -> VAE:
    decoder, encoder = Network(nn.Linear(2, 3), 2, 3), Network(nn.Linear(3, 4), 3, 4)
    return VAE(prior, Gaussian(decoder, scale=scale), MeanFieldNormal(encoder, 2)).double()


@pytest.mark.parametrize("document", ["lecture", "review"])
def test_the_loss_of_the_lecture_and_of_the_review_in_terms_of_the_elbo(document: str) -> None:
    """The same draw: their squared errors and KL lines, and ours."""
    scale = {"lecture": 1.0, "review": math.sqrt(0.5)}[document]
    prior = {"lecture": StandardNormal(2), "review": IsotropicNormal(2, math.sqrt(0.5))}[document]
    vae, x = pair(scale, prior), torch.randn(5, 3, dtype=torch.double)
    D, Z = 3, 2
    torch.manual_seed(1)
    trace = pyro.poutine.trace(vae.guide).get_trace(x)
    q, z = trace.nodes["z"]["fn"].base_dist, trace.nodes["z"]["value"]
    error = (x - vae.likelihood(z).mean).square().sum(-1)
    torch.manual_seed(1)
    elbo = ELBO().bound(vae.model, vae.guide, x)
    if document == "lecture":
        theirs = error + (q.mean.square() + q.variance - q.variance.log() - 1).sum(-1)
        assert_close(theirs, -2 * elbo - D * math.log(2 * math.pi))
    else:
        theirs = error + (q.mean.square() + q.variance - q.stddev.log() - 0.5).sum(-1)
        assert_close(theirs, -elbo + Z / 2 * math.log(2) - D / 2 * math.log(math.pi))
    assert_close(
        error,
        2 * scale**2 * (-vae.likelihood(z).log_prob(x) - D / 2 * math.log(2 * math.pi * scale**2)),
    )
    assert isinstance(q, dist.Normal)


def test_a_command_that_is_not_understood_would_be_seen(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UsageError, match="did you mean"):
        test_every_command_of_the_page_is_understood("python -m pyrovae.fit --latent-dm 3", tmp_path, monkeypatch)
