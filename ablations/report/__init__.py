"""Tables, figures and the page of the ablations, from their records alone; no torch.

Numbers are from a grid or a confirmation on the test split, over the seeds, unless marked `search`: a sampler's scores
(validation split, one seed) and the importance computed from them serve to choose settings, not to compare them.
"""
