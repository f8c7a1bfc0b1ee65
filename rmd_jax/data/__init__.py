"""From preference files to batches: schema, readers, tokenisation, subsets, splits, loader."""
