"""A small Swin teaches three kinds of small students, beside other ways to distil."""
