"""Training paradigms: CLIP, supervised classification, causal language modelling, or your own."""
