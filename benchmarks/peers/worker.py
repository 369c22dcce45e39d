"""A contestant of `speed.py`, seen from inside its process: requests on standard input, answers on standard output.

A request and its answer are one line of JSON each. "build" comes first, then any number of the others:

    {"do": "build", "model": "dense", "batch": 100, "K": 5, "x": FILE, "rows": FILE or null, "device": "cpu"}
    {"do": "steps", "number": 20}      one training step each; seconds of each, and the last loss
    {"do": "epoch"}                    one pass over the rows of the file; seconds
    {"do": "memory"}                   peak memory so far, in MiB

`x` is a file of batches (B, batch, *event) in float32, which steps take in turn; `rows` one of uint8 rows (N, 784).
Only the standard library is imported here: what else a contestant needs to be imported is part of its start-up time.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path


def peak_resident() -> float:
    """Peak resident memory of this process in MiB. (Not ru_maxrss, which is inherited from the process before.)"""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


@dataclass
class Peer:
    """What a contestant has built.

    Attributes:
        parameters: Number of trained parameters.
        step: Takes one training step on batch i of `x`; returns the loss per row.
        epoch: Makes one pass over `rows`; returns the seconds that it took.
        versions: What to credit the times to.
        memory: Peak memory so far, in MiB.
    """

    parameters: int
    step: Callable[[int], float]
    epoch: Callable[[], float]
    versions: dict[str, str]
    memory: Callable[[], float] = peak_resident
    batches: "count[int]" = field(default_factory=count)


def timed(passage: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    passage()
    return time.perf_counter() - started


def answer(peer: Peer, request: dict) -> dict:
    """What a request other than "build" asks for."""
    if request["do"] == "epoch":
        return {"seconds": peer.epoch()}
    if request["do"] == "memory":
        return {"MiB": peer.memory()}
    losses: list[float] = []
    seconds = [timed(lambda: losses.append(peer.step(next(peer.batches)))) for _ in range(request["number"])]
    return {"seconds": seconds, "loss": losses[-1]}


def serve(build: Callable[..., Peer]) -> None:
    """Answer requests until the input ends. `build` takes the arguments of the request of that name."""
    # Whatever libraries print goes to standard error: standard output is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if peer is None:
                request.pop("do")
                peer = build(**request)
                reply = {"parameters": peer.parameters, "versions": peer.versions}
            else:
                reply = answer(peer, request)
        except Exception as error:  # the one who asked decides what to do about it
            text = str(error).strip().splitlines()
            reply = {"error": f"{type(error).__name__}: {text[0] if text else ''}"}
        print(json.dumps(reply), file=answers, flush=True)
