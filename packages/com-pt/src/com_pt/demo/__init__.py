"""The demo: its data, its models, the ways to train that it compares, and its report."""
