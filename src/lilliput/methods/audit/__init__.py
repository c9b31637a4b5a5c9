"""What a change harmed beyond the score, and whether a model is safe: `audit.check(workload, before, after)`.

from lilliput.methods.audit import Calibration, Corruptions, Exemplars, Groups, Language, Membership, TrojanSignatures

print(Groups().check(workload, workload.model, fitted))
found = Exemplars().check(workload, [first, second], [first_small, second_small])  # models of several seeds

The models are modules, or sessions of a runtime where their answers are all that counts. Nothing is changed.
"""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
