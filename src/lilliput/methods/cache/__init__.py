"""What a decoder keeps of its keys and values: policies that build a `transformers.Cache`."""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
