"""How networks lay out their features: token sequences and maps, and the grid behind both."""

from typing import Literal

from effml_common.errors import InputError

# Axes of a feature tensor: N images, L tokens, H rows, W columns, C channels.
Layout = Literal["NLC", "NHWC", "NCHW"]


def token_grid(tokens: int, image: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of a token sequence, from the proportions of the image.

    Args:
        tokens: Number of spatial tokens.
        image: Shape of the image; its last two numbers are height and width in pixels.

    Raises:
        InputError: If the tokens fill no such grid (patches dropped, an unknown prefix).
    """
    h = round((tokens * image[-2] / image[-1]) ** 0.5)
    if h < 1 or tokens % h:
        raise InputError(
            f"{tokens} tokens fill no grid over an image of {image[-2]}x{image[-1]}; switch off "
            "patch dropout or token pruning, or give the number of prefix tokens"
        )
    return h, tokens // h
