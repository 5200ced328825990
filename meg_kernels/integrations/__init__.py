"""Where MeG Kernels meets other libraries."""
