"""Weights outside memory: read from the disk when they are needed.

from lilliput.methods.offload import FlashFFN

Stores lie in the cache folder (`LILLIPUT_CACHE` moves it; it must be on a disk, not in memory), named after their
content. They can be deleted when no model uses them: loading the artifact writes them again.
"""

from lilliput.methods import family_getattr

__getattr__ = family_getattr(__name__, __path__)
