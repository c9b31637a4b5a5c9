"""Around a model at run time: what leaves the device, what comes in, and how sure the answers are.

from lilliput.methods.guard import BayesianMoe, InformationObfuscation

guarded = InformationObfuscation(budget=0.05).wrap(model, workload)  # called as the model is
"""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
