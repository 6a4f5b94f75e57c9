"""Training of a chain: its plan, its run folder, its stages, and the tasks that feed them."""
