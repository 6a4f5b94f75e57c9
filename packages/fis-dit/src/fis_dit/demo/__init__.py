"""The demo: small distilled models, frame-sparse and otherwise accelerated, at equal cost."""
