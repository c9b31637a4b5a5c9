"""Efficient blocks in the place of ordinary ones."""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
