"""The stages of the pipelines: each reads `params.yaml` and earlier stages' files and writes its own."""
