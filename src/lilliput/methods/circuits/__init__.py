"""Networks as circuits: what a network costs, or what it can hide, as gates."""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
