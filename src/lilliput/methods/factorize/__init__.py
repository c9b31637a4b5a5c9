"""Low rank: thin factors in the place of a layer."""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
