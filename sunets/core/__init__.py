"""Shared by all layers, without torch: configuration, paths, records, provenance, metrics, executor, stages."""
