"""What every layer shares, without torch: configuration, paths, records, provenance, metrics, executor, stages."""
