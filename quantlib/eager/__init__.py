"""torch's eager-mode quantization, which torch will remove: nothing else touches `torch.ao.quantization`."""
