"""One training loop for every stage: state, optimisers, partitioning, checkpoints, metrics."""
