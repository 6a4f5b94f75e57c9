"""Where the method meets diffusers."""
