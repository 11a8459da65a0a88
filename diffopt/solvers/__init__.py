"""Numerical methods on plain tensors."""
