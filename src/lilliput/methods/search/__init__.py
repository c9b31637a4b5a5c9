"""Which settings, under a budget: Optuna samplers."""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
