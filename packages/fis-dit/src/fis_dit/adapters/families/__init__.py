"""Facts of diffusers 0.42 on each model family: argument order and layout of its blocks.

All of them lay video tokens out frame by frame.
"""
