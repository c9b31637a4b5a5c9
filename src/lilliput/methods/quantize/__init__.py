"""Fewer bits per weight and activation."""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
