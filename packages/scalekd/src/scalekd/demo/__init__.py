"""A small Swin teaches three kinds of small students, beside other ways to distil.

``data`` draws the images, ``models`` builds the networks, ``arms`` has the ways to train, ``training``
the loops, ``tables`` and ``plots`` show what came out, ``report`` is the command.
"""
