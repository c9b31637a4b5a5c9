"""Mixtures of experts: make one out of a dense model, keep its experts on disk, take several routes a token."""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
