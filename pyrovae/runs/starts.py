"""How a run came about: each start of it, with the command line, the host and the versions, in RUN/starts.json."""

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyrovae.errors import CheckpointError
from pyrovae.files import inside, read_json, write_json
from pyrovae.processes import together

FILE = "starts.json"


def note_start(directory: Path, device: str) -> None:
    """Add a start, now and by this process on a device, to those of a run."""
    write_json(directory / FILE, {"starts": [*starts_of(directory), start(device)]})


def starts_of(directory: Path) -> list[dict[str, Any]]:
    """The starts of a run, the first one first; none where the file is not there, or is damaged."""
    try:
        found = read_json(inside(directory, FILE))["starts"]
        return [entry for entry in found if isinstance(entry, dict)]
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return []


def start(device: str) -> dict[str, Any]:
    """What is kept of a start."""
    import pyro
    import torch

    from pyrovae.version import __version__

    return {
        "command": shlex.join(sys.orig_argv),
        "folder": str(Path.cwd()),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"{os.cpu_count()} processors",
        "processes": together(),
        "versions": {
            "pyrovae": __version__,
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "python": platform.python_version(),
        },
    }
