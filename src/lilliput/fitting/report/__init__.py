"""The self-contained report of a fit."""
