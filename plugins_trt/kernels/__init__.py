"""Triton kernels of the plugin operations. They are imported by name, so that nothing else needs Triton."""
