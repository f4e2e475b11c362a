"""What a training logs of its operands, and reports of it."""
