"""Training of one network. Entry point: `fit.fit`."""
