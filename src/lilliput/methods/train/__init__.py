"""Train with less, and learn a little while answering."""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
