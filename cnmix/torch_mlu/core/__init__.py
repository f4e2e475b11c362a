"""What the vendor's package has under ``torch_mlu.core``."""
