"""Fewer bits per weight: linear layers replaced by packed ones."""
