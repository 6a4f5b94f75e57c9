"""Augmentation-free dense contrastive distillation for semantic segmentation."""
