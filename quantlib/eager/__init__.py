"""torch's eager-mode quantization, announced for removal: nothing else touches `torch.ao.quantization`."""
