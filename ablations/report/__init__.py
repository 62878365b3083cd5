"""Tables, figures and the page of the ablations, from their records alone.

Every number is of a grid or a confirmation on the test split, over the seeds, unless it says `search`: what a sampler
looked at on the validation split, with one seed, chooses settings and compares nothing. No torch here.
"""
