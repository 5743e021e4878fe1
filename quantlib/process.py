"""Settings of a process that computes."""

import gc
import warnings

from quantlib import machine

EXPECTED_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # Eager-mode quantization and TorchScript are announced for removal; torch is pinned below the release that drops
    # them.
    ("torch.ao.quantization is deprecated", DeprecationWarning),
    ("`torch.jit.(script|save|load|trace|freeze|optimize_for_inference)` is deprecated", FutureWarning),
    ("torch.quantize_per_tensor, torch.quantize_per_channel", UserWarning),
    # The exporter to ONNX is the legacy one, which warns about it in two ways.
    ("You are using the legacy TorchScript-based ONNX export", DeprecationWarning),
    ("The feature will be removed. Please remove usage of this function", DeprecationWarning),
    # torch's own qconfigs ask for reduce_range in the way that its own observers advise against.
    ("Please use quant_min and quant_max to specify the range", UserWarning),
)
"""Warnings that torch is known to give here: start of the message, and category. pyproject.toml lists the same."""


def prepare_process() -> None:
    """Set the process up to compute."""
    machine.keep_freed_memory()
    for message, category in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    # A model consists of many thousands of objects that live for a stage: collecting garbage after every few hundred
    # new ones took a fifth of the time of converting and scripting.
    gc.set_threshold(20_000)
