"""Times and memory, never without a check of the results first: operator, decoding and training against rivals."""
