"""Start a model from another: grow, cut, stitch, fuse."""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
