"""The demo: small networks, the samplers that it compares, and its report."""
