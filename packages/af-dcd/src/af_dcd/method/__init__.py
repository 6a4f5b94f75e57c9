"""The paper on tensors and modules of torch alone; ``adapters`` bring it to mmsegmentation."""
