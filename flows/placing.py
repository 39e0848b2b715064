"""On which device something is made, and why not on the one that the line names."""

import socket
from dataclasses import replace

from flows.options import LineConfig, RunnerConfig


def placed(settings: LineConfig, fallback: str = "") -> tuple[LineConfig, str]:
    """A line's settings for a fold in this process, and why it is on the CPU although the line says otherwise; "" else.

    `fallback` is why the work pool did not fold it.
    """
    at_hand = replace(settings, runner=RunnerConfig())
    if not fallback and settings.runner.fallback == "cpu" and at_hand.device != here(settings).device:
        fallback = f"the worker on {socket.gethostname()} has no GPU"
    return (replace(at_hand, device="cpu"), fallback) if fallback else (at_hand, "")


def here(settings: LineConfig) -> LineConfig:
    """A line's settings for what only reads, on the processor where there is no GPU: a rollback must not need one."""
    if settings.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            return replace(settings, device="cpu")
    return settings
