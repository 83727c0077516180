"""Triton kernels, one file each. The plain torch function of the same name is their specification and fallback."""
