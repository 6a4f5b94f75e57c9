"""The paper: projector, feature mimicking, parameter perception, released settings."""
