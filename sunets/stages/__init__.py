"""Stages of the pipeline; each reads `params.yaml` and files of earlier stages, and writes its outputs."""
