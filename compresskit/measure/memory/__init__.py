"""Where the bytes are.

request       the memory pass: one request, watched from the first token to the last
peaks         the highest mark of every counter, window by window
accounts      what a peak is made of, and what remains unattributed
arrivals      what the model's own cache would hold, from the keys and values it is given
weights, moved, residency, activations, watched, vram    what the parts are read from
"""
