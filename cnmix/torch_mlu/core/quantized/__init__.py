"""Quantized modules for inference on the card, as the vendor's package has them under ``torch_mlu.core.quantized``."""
