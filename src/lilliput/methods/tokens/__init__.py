"""Fewer tokens in some blocks: skipped, merged or pooled."""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
