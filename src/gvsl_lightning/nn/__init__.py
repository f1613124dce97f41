"""Networks, heads, losses and geometry in plain PyTorch; imports no Lightning."""
