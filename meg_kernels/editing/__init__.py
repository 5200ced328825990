"""Floor 3: the whole method, from facts to an edited model."""
