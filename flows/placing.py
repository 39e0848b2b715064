"""On which device a fold is made, and why not on the one that the line names."""

import socket
from dataclasses import replace

from flows.options import LineConfig, RunnerConfig


def placed(settings: LineConfig, fallback: str = "") -> tuple[LineConfig, str]:
    """A line's settings for a fold in this process, and why it is on the CPU although the line says otherwise; "" else.

    `fallback` is why the work pool did not fold it.
    """
    here = replace(settings, runner=RunnerConfig())
    if not fallback and settings.runner.fallback == "cpu" and settings.device.startswith("cuda"):
        import torch

        fallback = "" if torch.cuda.is_available() else f"the worker on {socket.gethostname()} has no GPU"
    return (replace(here, device="cpu"), fallback) if fallback else (here, "")
