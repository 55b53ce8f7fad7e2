"""Methods against each other on the same seeds: run in parallel, aggregated, and laid beside the paper."""
