"""python -m pyrovae.fit: train a pair on data, score it, and keep all of it in a run directory."""

import io
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, Any

from pyrovae.command import add_choices, add_option, given, leading, main, parser, stoppable
from pyrovae.data import SOURCES
from pyrovae.errors import CheckpointError, DataError, UsageError
from pyrovae.files import inside
from pyrovae.runs.build import build_model, build_objective, build_optimizer, build_rows, build_schedule
from pyrovae.runs.config import Config, resolve, title, warnings
from pyrovae.runs.options import DERIVED, OPTIONS, PARTS, RESUMABLE, option, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyrovae.data import Rows
    from pyrovae.inference.training.trainer import Fit
    from pyrovae.plots import Style
    from pyrovae.runs.build import Model

# Rows that a model is initialised at: means and k-means need no more.
INITIAL_ROWS = 20_000
# Lines printed for the epochs of a run whose output is no terminal.
EPOCH_LINES = 20


def options_parser() -> Any:
    """The parser of python -m pyrovae.fit."""
    p = parser(
        "fit", "Train a deep latent variable model, score its test log p(x), and save it all in a run directory."
    )
    add_option(p, "--config", "options from a file, such as a run's config.yaml", "FILE.yaml")
    for heading, options in OPTIONS.items():
        group = p.add_argument_group(heading, DATA_HELP if heading == "Data" else None)
        for name, setting in options.items():
            if setting.default is False:
                add_option(group, f"--{option(name)}", setting.help, action="store_true")
            else:
                add_option(group, f"--{option(name)}", setting.help, setting.metavar)
        if heading != "Model":
            continue
        for part, choices in PARTS.items():
            add_choices(group, part, choices)
    group = p.add_argument_group("Output")
    add_option(group, "--out", "run directory (default: a new one, runs/NAME)", "DIR")
    add_option(group, "--resume", "continue a run: its directory, here or as --out", "DIR", nargs="?", const=True)
    add_option(group, "--overwrite", "replace the run that --out holds", action="store_true")
    add_option(group, "--no-plots", "write no plots", action="store_true")
    return p


DATA_HELP = "names: " + "; ".join(
    f"{', '.join(source.name for source in SOURCES if source.kind == kind)} ({kind})"
    for kind in dict.fromkeys(source.kind for source in SOURCES)
)


def check_processes() -> None:
    """Refuse a part of what a launcher of several processes sets: a process that is told so would write nothing."""
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if (value := os.environ.get(name)) is not None:
            if not re.fullmatch(r"\d{1,9}", value, re.A):
                raise UsageError(
                    f"{name}={value} in the environment: expected a whole number; unset it, or use torchrun"
                )
            numbers[name] = int(value)
    world = numbers.get("WORLD_SIZE", 0 if numbers else 1)
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in numbers]
    if missing and (world != 1 or numbers.get("RANK", 0)):
        found = ", ".join(f"{name}={number}" for name, number in numbers.items())
        raise UsageError(
            f"{found} in the environment without {' and '.join(missing)}: start several processes with torchrun or "
            f"accelerate launch, or unset {' and '.join(numbers)} for one"
        )
    if numbers.get("RANK", 0) >= world:
        raise UsageError(f"RANK={numbers['RANK']} in the environment, of WORLD_SIZE={world}: expected 0 to {world - 1}")


def say(text: str) -> None:
    """Print a line at once; of several processes one speaks."""
    if leading():
        print(text, flush=True)


def command(words: Sequence[str]) -> int:
    """Parse the options, train, evaluate, plot."""
    check_processes()
    options = read_options(words)
    output = {key: options.pop(key, None) for key in ("out", "resume", "overwrite", "no_plots", "debug")}
    for derived in DERIVED:
        options.pop(derived, None)
    started = time.perf_counter()
    directory: Path | None
    if output["resume"]:
        directory, config = resumed(options, output)
    else:
        if "seed" not in options and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("--seed: several processes must be given one, so that they agree")
        config = resolve(options)
        directory = None if output["out"] is None else Path(text("out", output["out"]))
    for note in warnings(config):
        say(f"note: {note}")

    from pyrovae.evaluate import pick_device
    from pyrovae.inference.training.steps import check_precision
    from pyrovae.processors import threads

    device = pick_device(config["device"])
    check_precision(config["precision"] or "fp32", device)
    expected = config.get("data_hash")
    rows = build_rows(config)
    for note in rows.notices:
        say(f"note: {note}")
    if expected is not None and rows.hash != expected:
        raise DataError(
            f"{directory}: the data has changed since the run started: hash {rows.hash[:12]} now, {expected[:12]} then"
        )
    config["event_shape"] = list(rows.event_shape)
    model = initialised_model(config, rows)

    check_optimizer(config, model)

    from pyrovae.inference.training.checkpoint import lock
    from pyrovae.runs.directory import claim, clear, fresh_directory, write_config

    if directory is None:
        directory = fresh_directory(title(config))
    if not output["resume"] and leading():
        claim(directory, config, bool(output["overwrite"]))
    with lock(directory) if leading() else nullcontext() as notice:
        if notice:
            say(f"note: {notice}")

        def begin() -> None:
            """Make the directory that of this run."""
            if leading():
                if not output["resume"]:
                    clear(directory)
                write_config(directory, config)

        if not (directory / "config.yaml").exists():
            begin()  # so that a run that is killed while it compiles can be resumed
        announce(config, rows, model, directory, device.type)
        ready = time.perf_counter()
        resume = bool(output["resume"]) and has_checkpoints(directory)
        if output["resume"] and not resume:
            say("note: the run was stopped before its first checkpoint, so it starts from the beginning")
        fitted, signal = train(config, rows, model, directory, resume, device, on_start=begin)
        if fitted.stopped == "interrupted":
            say(f"stopped at epoch {len(fitted.history) + 1}, step {fitted.step}; the state is saved. Continue with")
            say(f"  python -m pyrovae.fit --resume {directory}")
            return 128 + (signal or SIGTERM)  # none, if another process was asked
        if leading():
            try:
                trained = time.perf_counter()
                seconds = {"start": ready - started, "training": trained - ready}
                with threads(config.get("threads", "auto")):
                    conclude(config, rows, model, directory, fitted, seconds, not output["no_plots"])
            except KeyboardInterrupt:
                say("stopped while evaluating; the training is saved. Evaluate and plot with")
                say(f"  python -m pyrovae.fit --resume {directory}")
                return 130
    return 0


def read_options(words: Sequence[str]) -> Config:
    """The options of --config and of the command line, which wins.

    What a choice on the command line makes meaningless in the file is dropped: the settings of another prior, or the
    beta of another bound.
    """
    typed = given(options_parser().parse_args(words))
    stored = read_config(Path(typed.pop("config"))) if "config" in typed else {}
    if "elbo" in typed:
        for key in ("K", "alpha", "beta"):
            stored.pop(key, None)
    return overlaid(stored, typed)


def read_config(file: Path) -> Config:
    """The options in a YAML file.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    from pyrovae.files import read_yaml

    try:
        content = read_yaml(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"--config {file}: expected lines such as `elbo: iwae`, as in a run's config.yaml")
    return {key: value for key, value in content.items() if value is not None}


def has_checkpoints(directory: Path) -> bool:
    """Whether a run has come as far as a checkpoint, whole or not."""
    from pyrovae.inference.training.checkpoint import steps

    return bool(steps(directory))


def resumed(options: Config, output: dict[str, Any]) -> tuple[Path, Config]:
    """Directory and configuration of the run to continue.

    Raises:
        CheckpointError: there is none, or the options given are not its own.
    """
    from pyrovae.inference.training.checkpoint import load_latest
    from pyrovae.runs.directory import open_run

    if output["overwrite"]:
        raise UsageError("--resume and --overwrite: continue the run or replace it, not both")
    directory = output["out"] if output["resume"] is True else output["resume"]
    if directory is None:
        raise UsageError("--resume: name the run directory, as --resume DIR")
    if output["resume"] is not True and output["out"] not in (None, output["resume"]):
        raise UsageError(f"--resume {directory}: continues in its own directory; leave out --out {output['out']}")
    run = open_run(str(directory))
    stored = run.config
    if has_checkpoints(run.directory):
        run.pair_with(load_latest(run.directory))  # sizes that its weights do not have are refused here
    changes = resolve(overlaid(stored, options))
    asked = [key for key in options if changes[key] != stored.get(key)]
    forbidden = [f"{option(key)}: {stored.get(key)} then, {changes[key]} now" for key in asked if key not in RESUMABLE]
    if forbidden:
        raise CheckpointError(
            f"{directory}: cannot resume with another configuration ({'; '.join(forbidden)}); only "
            f"{', '.join('--' + option(key) for key in RESUMABLE)} may differ. Start a new run with another --out"
        )
    if "epochs" in options:
        check_epochs(Path(str(directory)), stored, changes["epochs"])
    return Path(str(directory)), stored | {key: changes[key] for key in asked}


def overlaid(stored: Config, options: Config) -> Config:
    """A stored configuration with options over it, as if all of it had been given."""
    kept = {key: value for key, value in stored.items() if key not in DERIVED}
    for key, value in options.items():
        if isinstance(value, dict) and "name" not in value:
            theirs = kept.get(key) or {}
            value = {**(theirs if isinstance(theirs, dict) else {"name": theirs}), **value}
        kept[key] = value
    return kept


def check_epochs(directory: Path, stored: Config, epochs: int) -> None:
    """Refuse a number of epochs that a run cannot be continued to."""
    from pyrovae.inference.training.checkpoint import load_latest
    from pyrovae.runs.directory import position

    if not has_checkpoints(directory):
        return
    done, _, _ = position(load_latest(directory), directory)
    if epochs < done:
        raise UsageError(
            f"--epochs {epochs}: {directory} has been trained for {done} already; give more, or leave it out"
        )
    if stored["schedule"] == "cosine" and epochs != stored["epochs"]:
        raise UsageError(
            f"--epochs {epochs}: the cosine schedule of {directory} ends at epoch {stored['epochs']}; start a new run"
        )


def initialised_model(config: Config, rows: "Rows") -> "Model":
    """The pair with its parameters drawn and started at the training rows."""
    from pyrovae.seeding import seeded

    with seeded(config["seed"], "model"):
        model = build_model(config, rows.event_shape)
        spread = max(1, len(rows.train) // INITIAL_ROWS)
        model.initialise(rows.transform(rows.train[::spread]))
    return model


def check_optimizer(config: Config, model: "Model") -> None:
    """Refuse an optimiser that cannot be made for these parameters, before anything is written."""
    try:
        build_optimizer(config)(list(model.parameters()))
    except (TypeError, ValueError) as error:
        raise UsageError(f"--optimizer {config['optimizer']}: {error}; choose another") from error


def announce(config: Config, rows: "Rows", model: "Model", directory: Path, device: str) -> None:
    """Say what is about to be trained."""
    from torch import Tensor

    parameters = sum(p.numel() for p in model.parameters())
    how = f", binarisation {rows.binarize}" if rows.binarize else ""
    counts = ", ".join(f"{len(getattr(rows, split))} {split}" for split in ("train", "validation", "test"))
    streamed = "" if isinstance(rows.train, Tensor) else ", training rows read from the file at every step"
    say(f"data   {config['data']}: {counts} rows{streamed}")
    say(f"       {rows.measure.description}{how}")
    say(f"model  {describe_model(config)}; {parameters:,} parameters")
    precision = "" if config["precision"] in (None, "fp32") else f", {config['precision']}"
    say(f"bound  {describe_bound(config)}; seed {config['seed']}, on {device}{precision}")
    say(f"run    {directory}")


def describe_model(config: Config) -> str:
    """The parts in words."""
    if config["model"]["name"] == "mixture":
        settings = {k: v for k, v in config["model"].items() if k != "name"}
        return f"mixture with {', '.join(f'{k} {v}' for k, v in settings.items())}"
    latent = ", ".join(map(str, config["latent_dim"]))
    parts = [config[part]["name"] for part in ("prior", "guide", "likelihood", "network")]
    return f"{config['model']['name']} with {', '.join(parts)}, latent dimensions {latent}"


def describe_bound(config: Config) -> str:
    """The objective in words."""
    if config["model"]["name"] == "mixture":
        return "exact log p(x), assignments summed out"
    words = {"elbo": "ELBO", "iwae": "IWAE", "renyi": "Renyi"}[config["elbo"]] + f", K = {config['K']}"
    if config["M"] != 1:
        words += f", M = {config['M']}"
    if config["elbo"] == "renyi":
        words += f", alpha = {config['alpha']:g}"
    if config["elbo"] == "elbo" and config["beta"] != 1:
        words += f", beta = {config['beta']}"
    return words


def train(
    config: Config,
    rows: "Rows",
    model: "Model",
    directory: Path,
    resume: bool,
    device: Any,
    on_start: Callable[[], None],
) -> "tuple[Fit, int]":
    """Run the training loop; returns its result and the signal that stopped it, or 0."""
    from pyrovae.inference.training.trainer import fit

    steps = -(-len(rows.train) // config["batch_size"])
    every = max(1, config["epochs"] // EPOCH_LINES)
    quiet = sys.stderr.isatty()

    def on_epoch(metrics: dict[str, float]) -> None:
        epoch = int(metrics["epoch"])
        if not quiet and (epoch % every == 0 or epoch in (1, config["epochs"])):
            active = f", {int(metrics['active_units'])} active units" if "active_units" in metrics else ""
            say(
                f"epoch {epoch:>4}  train {metrics['train_bound']:.2f}, "
                f"validation {metrics['validation_bound']:.2f} nats{active}, {metrics['rows_per_second']:,.0f} rows/s"
            )

    with stoppable() as stopped_by:
        fitted = fit(
            model.model,
            model.guide,
            rows.train,
            build_objective(config, steps),
            epochs=config["epochs"],
            batch_size=config["batch_size"],
            optimizer=build_optimizer(config),
            schedule=build_schedule(config),
            validation=rows.validation,
            transform=rows.transform,
            patience=config["patience"],
            seed=config["seed"],
            device=device,
            compile=config["compile"],
            precision=config["precision"] or "fp32",
            particle_chunk=config["particle_chunk"],
            threads=config.get("threads", "auto"),  # which older runs do not have
            directory=directory,
            resume=resume,
            on_start=on_start,
            on_epoch=on_epoch,
            on_notice=lambda text: say(f"note: {text}"),
            should_stop=lambda: bool(stopped_by()),
        )
        return fitted, stopped_by()


def conclude(
    config: Config,
    rows: "Rows",
    model: "Model",
    directory: Path,
    fitted: "Fit",
    seconds: dict[str, float],
    plots: bool,
) -> None:
    """Evaluate, print the short table, and plot."""
    from pyrovae.evaluate import refuse_invalid, report
    from pyrovae.inference.training.checkpoint import write_json

    started = time.perf_counter()
    device = next(model.parameters()).device
    model.eval()
    x = rows.test[: config["eval_rows"]].to(device)
    values = report(
        model,
        x,
        rows,
        num_particles=config["eval_K"],
        objective=build_objective(config),
        seed=0,
        progress=True,
        particle_chunk=config["particle_chunk"],
    )
    write_json(directory / "evaluation.json", values | {"notices": []})
    refuse_invalid(values)
    for note in observations(model, fitted, rows, device):
        say(f"note: {note}")
    say("")
    say(short_table(config, values, fitted, {**seconds, "evaluation": time.perf_counter() - started}))
    if plots:
        write_plots(config, model, rows, directory, fitted, values)
        command = f"; python -m pyrovae.evaluate {directory}"
        if values["verdict"] == "exact":  # there is nothing that more draws would raise
            command = ""
        elif values["unreliable_rows"]:
            command += " --repair scores those rows again"
        else:
            command += " for a larger K"
        say(f"\nplots in {directory / 'plots'}{command}")


def observations(model: "Model", fitted: "Fit", rows: "Rows", device: Any) -> list[str]:
    """Posterior collapse and a scale at its floor, in words."""
    from pyrovae.inference.diagnostics import remarks
    from pyrovae.models import Gaussian, HierarchicalVAE

    best = fitted.history[fitted.best_epoch - 1]
    notes = remarks(best)
    if isinstance(model, HierarchicalVAE) and isinstance(model.likelihood, Gaussian):
        share = model.likelihood.scale_at_floor(model.encode(rows.validation[:500].to(device)))
        if share > 0:
            notes.append(
                f"the likelihood's scale is at its floor, {model.likelihood.floor:g} standard deviations of the data, "
                f"for {100 * share:.2g} % of the elements: the density there is set by the floor (--likelihood.floor), "
                "not by the data"
            )
    return notes


def short_table(config: Config, values: dict[str, Any], fitted: "Fit", seconds: dict[str, float]) -> str:
    """What a run ends with; `seconds` are those of each stage."""
    from pyrovae.evaluate import in_words, number, short, units_in_words

    exact = values["K"] is None
    rate = fitted.metrics["rows_per_second"].median()
    which = "all" if values["rows"] == values["rows_in_split"] else "the first"
    lines = [
        (f"test rows: {which} {values['rows']} of {config['data']}, {values['measure']}", "", ""),
        (
            "log p(x)",
            number(values["log_marginal"], values["error_over_rows"]),
            "nats per datum, exact; ± error over rows",
        )
        if exact
        else (
            f"log p(x), K = {values['K']}",
            number(values["log_marginal"], values["error_over_rows"]),
            f"nats per datum, ± error over rows; Monte Carlo error {short(values['monte_carlo_error'])}",
        ),
    ]
    if not exact:
        reason, *more = textwrap.wrap(values["reason"], 80) if values["verdict"] != "ok" else [""]
        lines += [("verdict", values["verdict"], reason), *(("", "", part) for part in more)]
        bound = describe_bound(config).split(", beta")[0]
        lines.insert(1, (f"bound, {bound}", number(values["test_bound"]), "nats per datum"))
        lines.append(("KL(q(z|x) || p(z))", number(values["kl"]), f"nats per datum, {in_words(values['kl_forms'])}"))
        lines += units_in_words(values)
    if values["bits_per_dimension"] is not None:
        lines.append(("bits per dimension", f"{values['bits_per_dimension']:.4f}", ""))
    epochs = f"the best {fitted.best_epoch}; {rate:,.0f} rows/s"
    if fitted.compile_seconds:
        epochs += f"; {fitted.compile_seconds:.1f} s of the training went into compiling"
    early = "; stopped early" if fitted.stopped == "early" else ""
    lines.append(("epochs", f"{len(fitted.history)}", epochs + early))
    stages = {name: round(value, 1) for name, value in seconds.items()}  # rounded first, so that the line adds up
    parts = ", ".join(f"{name} {value:.1f}" for name, value in stages.items())
    lines.append(("time", f"{sum(stages.values()):.1f} s", parts))
    head, *rest = lines
    return "\n".join([head[0], *(f"  {label:<26}{value:>18}   {note}".rstrip() for label, value, note in rest)])


def save_figure(figure: "Figure", directory: Path, name: str) -> Path:
    """Write a figure to directory/name.png.

    Raises:
        OutputError: it cannot be written.
    """
    from pyrovae.inference.training.checkpoint import write_atomically

    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    path = directory / f"{name}.png"
    write_atomically(path, picture.getvalue())
    return path


def style_of(config: Config, rows: "Rows") -> "Style":
    """How these rows are drawn: handwriting as ink on paper, other images as photographs, tables by their columns."""
    from pyrovae.data import Standardize, find_source
    from pyrovae.plots import Style

    source = find_source(config["data"])
    low, high = rows.test.min().item(), rows.test.max().item()
    inside = (low >= 0 and high <= 1) or low == high
    return Style(
        ink=source is not None and source.handwriting,
        limits=(0.0, 1.0) if inside else (low, high),
        columns=rows.columns,
        unit="standardised" if isinstance(rows.transform, Standardize) else "",
    )


def named_labels(rows: "Rows", count: int) -> Any:
    """The labels of the first test rows: names where they have some, and few enough to be told apart."""
    from pyrovae.plots import MAX_CLASSES

    labels = rows.labels["test"]
    if labels is None or rows.classes is None or len(rows.classes) > MAX_CLASSES:
        return None if labels is None else labels[:count]
    return [rows.classes[label] for label in labels[:count].tolist()]


def write_plots(
    config: Config, model: "Model", rows: "Rows", directory: Path, fitted: "Fit", values: dict[str, Any]
) -> None:
    """Draw what there is to see of a run into its plots/."""
    import torch

    from pyrovae import plots
    from pyrovae.models import HierarchicalVAE
    from pyrovae.runs.directory import Run
    from pyrovae.seeding import seeded

    name, folder, style = directory.name, inside(directory, "plots"), style_of(config, rows)
    save_figure(plots.training_curves(fitted.metrics, title=name), folder, "training_curves")
    device = next(model.parameters()).device
    with torch.no_grad(), seeded(config["seed"], "plots", device=device):
        # Of pictures the means are shown, without the noise of single pixels; points and profiles need their noise.
        pictures = isinstance(model, HierarchicalVAE) and len(rows.event_shape) > 1
        drawn = "means of p(x|z), z from the prior" if pictures else "draws from p(x)"
        points = rows.event_shape == (2,)
        x = model.sample(1000 if points else 64, mean=pictures)
        save_figure(plots.samples(x, f"{name}, {drawn}", style), folder, "samples")
        if not isinstance(model, HierarchicalVAE):
            return
        x = rows.test[:1000].to(device)
        codes = model.encode(x)
        some = slice(500 if points else 32)
        figure = plots.reconstructions(x[some], model.decode(codes[some]), name, style)
        save_figure(figure, folder, "reconstructions")
        spread = model.posterior(x[:8]).sample((12,)).transpose(0, 1)
        save_figure(plots.neighbourhood(x[:8], model.decode(spread), name, style), folder, "neighbourhood")
        save_figure(plots.latent_map(codes, named_labels(rows, len(codes)), name), folder, "latent_map")
        dims = codes.var(0).argsort(descending=True)[:10].tolist()
        steps = torch.linspace(-2.5, 2.5, 11, device=device)
        paths = codes.mean(0).repeat(len(dims), len(steps), 1)
        for row, dim in enumerate(dims):
            paths[row, :, dim] += steps * codes[:, dim].std()
        heading = f"{name}; offsets in standard deviations of the codes"
        save_figure(plots.traversals(model.decode(paths), steps.tolist(), dims, heading, style), folder, "traversals")

    from pyrovae.evaluate import save_curve

    save_curve(Run(directory, config), values)


if __name__ == "__main__":
    main("fit", command, sys.argv[1:])
