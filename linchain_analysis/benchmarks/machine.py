"""The machine that was measured on, in one line."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch


def describe_machine(device: str = "cpu") -> str:
    """Return CPU model, cores, threads of torch, its version, the operating system, and the accelerator if used."""
    parts = [
        _cpu_model(),
        f"{os.cpu_count()} cores",
        f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}",
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
        f"{platform.system()} {platform.release()}",
    ]
    if device != "cpu":
        parts.insert(0, torch.cuda.get_device_name(device))
    return ", ".join(parts)


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        found = re.search(r"model name\s*:\s*(.+)", information.read_text(encoding="utf-8", errors="replace"))
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
