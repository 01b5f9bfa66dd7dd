"""Triton kernels, each with a plain-PyTorch twin of the same signature.

The room knows tensors only: no model and no site. It imports nothing by itself, because
`transformers` looks for a package named `kernels`, which the link in the repository's root could answer to.
"""
