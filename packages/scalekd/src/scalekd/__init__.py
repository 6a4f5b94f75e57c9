"""Knowledge distillation from a strong vision transformer into any CNN, MLP or ViT student of timm."""
