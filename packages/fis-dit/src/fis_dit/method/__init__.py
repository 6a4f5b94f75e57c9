"""The method on tensors: which frames a block computes, how the others are filled, what it costs."""
