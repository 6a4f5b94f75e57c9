"""The method on tensors and modules of torch alone; ``adapters`` bring it to transformers."""
