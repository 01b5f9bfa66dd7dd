"""Sparse autoencoders on attention outputs and other sites: training, loading and attribution.

Not built yet: nothing can be imported from here in this version.
"""
