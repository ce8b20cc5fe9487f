"""What is asked of a model: perplexity by length, recall, choices, what the features carry; and the report of it.

`suite` asks all of it as `settings` say. Everything else is usable alone."""
