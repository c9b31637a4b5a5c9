"""Remove weights, channels, heads, neurons and blocks."""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
