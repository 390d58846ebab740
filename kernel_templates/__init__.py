"""Triton kernel templates, one kernel per file."""
