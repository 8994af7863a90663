"""Meters: one probe each, looking at a system from outside."""
