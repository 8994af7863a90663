"""Methods that guess several tokens and check them in one forward pass."""
