"""Tables, figures and the page of the ablations, from their records alone; no torch.

Every number is from a grid or a confirmation on the test split, over the seeds, unless it says `search`: a sampler's
scores, on the validation split with one seed, choose settings and compare nothing.
"""
