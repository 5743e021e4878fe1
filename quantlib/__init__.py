"""quantflow: from a float PyTorch image classifier to the int8 model to ship."""
