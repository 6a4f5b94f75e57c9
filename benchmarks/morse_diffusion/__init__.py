"""What is measured of morse-diffusion."""
