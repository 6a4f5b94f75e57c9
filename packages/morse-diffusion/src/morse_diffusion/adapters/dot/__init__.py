"""The Dot around a Dash: one file per family of networks, and one for the files on disk."""

from morse_diffusion.adapters.dot.base import DotShape as DotShape
from morse_diffusion.adapters.dot.base import MorseDot as MorseDot
from morse_diffusion.adapters.dot.transformer import TransformerDot as TransformerDot
from morse_diffusion.adapters.dot.unet import UNetDot as UNetDot
