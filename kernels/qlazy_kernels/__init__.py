"""Triton kernels for qlazy's packed weights. Needs torch and triton only, and imports neither before a kernel is asked for.

The kernels are used as `from qlazy_kernels.dequantize import dequantize_int4`: triton is imported inside the modules, so
this package can be found and named on a machine that has no triton.
"""
