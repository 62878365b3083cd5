"""SUNets, the baselines that they are compared with, and `create_model`, which builds each by name."""
