"""The network, the baselines that it is compared with, and one function that builds each by name."""
