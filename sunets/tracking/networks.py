"""Logged models of MLflow: parameters, signature and file of trained weights, which are not copied."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from sunets.core.paths import BenchmarkPaths
from sunets.core.record import Record, read_json
from sunets.tracking.view import Network, plain_text

EXTERNAL = "mlflow.model.isExternal"
"""MLflow's mark of a model whose files it does not hold: it says so where one tries to load it."""


def trained_network(record: Record, counted: Record, root: Path) -> Network | None:
    """Describe the network of a training; None where its weights are not here, as in a fresh clone.

    Args:
        record: of the training.
        counted: of the model's cost.
        root: root of the checkout.
    """
    paths = BenchmarkPaths(record["benchmark"], root)
    weights = paths.weights(record["model"], record["seed"])
    if record["status"] != "finished" or not weights.is_file():
        return None
    path = weights.relative_to(root).as_posix()
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    shown = {name: counted["cost"].get(f"cost.{name}") for name in ("params_m", "gmacs", "output_stride")}
    params = {f"cost.{name}": value for name, value in shown.items() if value is not None}
    if "cost.size" in counted["params"]:
        params["cost.size"] = counted["params"]["cost.size"]
    return Network(
        name=f"{record['model']}-seed{record['seed']}",
        params={name: plain_text(value) for name, value in params.items()} | {"weights.path": path},
        tags={
            EXTERNAL: "true",
            "weights.sha256": digest,
            "mlflow.note.content": f"Weights: `{path}`. Load: `sunets.training.checkpoint.load_trained(path)`.",
        },
        output=(-1, _num_classes(paths.data), *([-1, -1] if record["task"] == "segmentation" else [])),
    )


def _num_classes(prepared: Path) -> int:
    manifest = prepared / "manifest.json"
    return len(read_json(manifest)["classes"]) if manifest.exists() else -1


def specification(network: Network, model: Any) -> Any:
    """Make the content of the file `MLmodel` of a logged model: its signature.

    Args:
        network: the wanted content.
        model: `mlflow.entities.LoggedModel`.
    """
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    def schema(*shape: int) -> Schema:
        return Schema([TensorSpec(np.dtype(np.float32), shape)])

    return Model(
        artifact_path=model.artifact_location,
        model_uuid=model.model_id,
        model_id=model.model_id,
        run_id=model.source_run_id,
        signature=ModelSignature(schema(-1, 3, -1, -1), schema(*network.output)),
        metadata={EXTERNAL: True},
    )
