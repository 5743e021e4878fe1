"""The files to ship: TorchScript, ONNX, and their checksums."""
