"""MLflow: a live view of the runs, which the records can rebuild at any time. The only package that imports mlflow.

An experiment per benchmark holds a parent run per model, with the mean and interval of its scores, and a child run per
seed, with its curves; `<benchmark>/ablations` holds a parent per study, with the parameters that its trials share, and
a child per trial, with those that vary. Parameters and metrics carry the dotted names of `params.yaml` and of the
records.

MLflow chooses what a comparison of runs opens on (read in the pages of release 3.17.2): parallel coordinates on the
first stored of the metrics that all runs have, and on the first three, by name, of the parameters that differ; scatter
and contour plots on the first names, whether they differ or not, and a contour only on numbers. Hence a run starts with
its headline score, NaN until it is measured, which plots and filters pass over; the score is there again under `aim/`,
before all other names; and what a study does not vary stands in tags of its trials, not among their parameters.
PostgreSQL returns what was stored last at the end: there the order holds in rebuilt runs only.

MLflow gives a run a random id, so every run here carries a key made of what it is (its slot: benchmark, model, seed)
and of what made it (configuration, data, code). A run that is opened again under the same key goes on; another
configuration makes a new run in the same slot, and the older one stays with the tag `sunets.current` = false. Points of
a curve have time stamps made from their epoch, since MLflow keeps a point twice only where its time stamp differs.

Nothing here may cost a training: without mlflow, or without its server, `Tracker` says so once and does nothing. Every
call of MLflow is given up after ten seconds (`address`), and a run that a living process writes is left to it.
"""
