"""A training run, in the order of its steps.

``plan`` settles the settings, ``processes`` finds the device, ``data`` reads the images, ``networks``
builds teacher and student, ``loaders`` and ``cache`` feed the ``trainer``; ``evaluation`` measures the
student and ``students`` writes and reads its weights.
"""
