"""Students that take their teacher's place."""
