"""MLflow: a live view of the runs, which can be rebuilt from the records. The only package that imports mlflow.

An experiment per benchmark holds a parent run per model, with the mean and interval of its scores, and a child run per
seed, with its curves. `<benchmark>/ablations` holds a parent per study, with the parameters that its trials share, and
a child per trial, with those that vary. Parameters and metrics have the dotted names of `params.yaml` and the records.

The page of a run shows metrics in groups, by the name before the slash, and those without a slash last: the headline
score as `aim/`, then `curves/`, `summary/` (their last and best values) and `variants/` (the headline score of further
test-time variants), then scores and costs as the records name them. A run has fewer than twenty, apart from the scores
of classes, which only trainings show; costs stand in the model's run, and size also in those of trials.

Default axes of MLflow's comparison page (release 3.17.2): parallel coordinates show the first stored metric that all
runs have, and the first three differing parameters by name; scatter and contour plots show the first names, and contour
plots only numbers. Therefore a run starts with its headline score, NaN until measured, which plots and filters ignore;
`aim/` repeats the score under the name that sorts first; and parameters that a study does not vary are tags of its
trials. PostgreSQL returns the last stored metric last, so there the order holds in rebuilt runs only.

MLflow gives runs random ids, so each run has a key tag: its slot (benchmark, model, seed) and a digest of
configuration, data and code. A run with the same key is continued; another configuration makes a new run in the slot,
and the older one gets the tag `sunets.current` = false. The time stamps of curves are made from epochs, since MLflow
stores a repeated point twice only if its time stamp differs.

Tracking never fails a training: without mlflow or its server, `Tracker` says so once and does nothing. Every call of
MLflow is limited to ten seconds (`address`), and a run that another living process writes is not touched.
"""
