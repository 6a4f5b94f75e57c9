"""Glue to timm: teachers, students, and the training task that joins them.

A new family of teachers goes into ``teacher_families.py``, a new family of students into
``student_families.py``. Nothing else in the package knows one family from another.
"""
