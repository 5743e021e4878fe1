"""The files that are shipped: TorchScript, ONNX, and their checksums."""
