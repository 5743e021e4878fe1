"""Settings of a process that computes."""

import gc
import warnings

from quantlib import machine

EXPECTED_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # TorchScript and its int8 kernels are announced for removal; torch is pinned below the release that drops them.
    ("`torch.jit.(script|save|load|trace|trace_method|freeze|optimize_for_inference)` is deprecated", FutureWarning),
    ("torch.quantize_per_tensor, torch.quantize_per_channel", UserWarning),
    # TorchScript finds an annotation that it does not know in torch's own GraphModule.
    ("The TorchScript type system doesn't support instance-level annotations", UserWarning),
    # ExecuTorch reads its own files in an old way, and calls its Python interface experimental.
    ("(read_text|open_text|read_binary) is deprecated", DeprecationWarning),
    ("This API is experimental and subject to change without notice", DeprecationWarning),
)
"""Warnings that are known to be given here: start of the message, and category. pyproject.toml lists the same."""


def prepare_process() -> None:
    """Set the process up to compute."""
    machine.keep_freed_memory()
    for message, category in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    # A model consists of many thousands of objects that live for a stage: collecting garbage after every few hundred
    # new ones took a fifth of the time of converting and scripting.
    gc.set_threshold(20_000)
