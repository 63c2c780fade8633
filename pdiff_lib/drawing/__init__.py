"""Figures and pictures, from tables and tensors alone."""
