"""Chain-of-Models Pre-Training on tensors and modules: growth, the feature loss, costs and metrics."""
