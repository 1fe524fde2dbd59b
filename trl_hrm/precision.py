"""A warning of slow arithmetic."""

import logging

import torch


logger = logging.getLogger(__name__)


def warn_of_slow_bf16(device: torch.device, remedy: str) -> None:
    """Warn that bf16 is slow on the CPU, unless its instructions include AVX-512. `remedy` is the end of the message."""
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        logger.warning(
            f"This CPU has no AVX-512 instructions. Without them, bf16 is several times slower than float32. {remedy}"
        )
