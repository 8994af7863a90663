"""Methods that make the key/value cache smaller."""
