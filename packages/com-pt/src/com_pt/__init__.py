"""Pre-train a model family as a chain: each model is grown from, and guided by, its smaller predecessor."""
