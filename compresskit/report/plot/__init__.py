"""Pictures of stored numbers, drawn with matplotlib and written as SVG, PNG or PDF.

canvas       the library, the figure and the file: what every picture shares
labels       names beside points, kept apart
tradeoff     KL against effective bits of the rows of a table, with the Pareto front
sensitivity  KL of each part of a model at each width, with the widths that were chosen
"""
