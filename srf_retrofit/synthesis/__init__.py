"""Text written by a model: `sampling` writes batches, `text_filters` drops bad texts, `synthesize` makes a corpus."""
