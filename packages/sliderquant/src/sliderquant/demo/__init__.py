"""A small model trained here, quantized in several ways and compared."""
