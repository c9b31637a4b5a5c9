"""Around a model at run time: what comes in, what leaves the device, and how sure the answers are.

from lilliput.methods.defend import Cleann, InformationObfuscation

safe = Cleann().wrap(model, work)  # called as the model is
logits, score, flagged = safe.inspect(pictures)  # a score above 1 is flagged
"""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
