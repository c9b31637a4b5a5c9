"""Modules around a model that watch what it is asked at run time: `guard.around(model, workload)`.

from lilliput.methods.guard import Cleann, Curtail, DeepFense

safe = Cleann().around(model, work)
logits = safe(pictures)
logits, score, flagged = safe.inspect(pictures)  # a score above 1 is flagged
"""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
