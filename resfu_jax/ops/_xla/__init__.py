"""Portable forms: what GPUs and TPUs run without a kernel of their own.

Arrays here are laid out as TPUs like them: whatever is narrow (scores, weights) as planes of output
pixels, with the pixels of a row last, and whatever is wide with its channels last. No array ends in
an axis of taps, groups or phases.
"""
