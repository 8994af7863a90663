"""A comparison for people, pull requests, CI systems and programs.

terminal    a compact table: what is not the same
markdown    the same for a job's summary page
junit       a test case per record and metric
document    everything, as JSON
"""
