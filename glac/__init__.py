"""glac: ahead-of-time compiled, autotuned Triton kernels for gated linear attention.

Importing this package loads neither PyTorch nor Triton and touches no device; the operations live
in ``glac.attention``.
"""

__version__ = "0.1.0"
