"""What the vendor's package has under ``torch.backends``."""
