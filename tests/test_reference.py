"""The authors' checkpoints: every key of theirs has its place, and no file can do harm or load half-way."""

import json
from pathlib import Path

import pytest
import torch

from sunets import create_model
from sunets.models.reference import WeightsError, load_reference_weights, reference_keys
from sunets.models.sunet import SUNet

ASSETS = Path(__file__).parent / "assets"
AUTHORS = json.loads((ASSETS / "state_dict_keys.json").read_text())
DEGRIDDING = json.loads((ASSETS / "degridding_head_keys.json").read_text())


def authors_shapes(model):
    shapes = [list(tensor.shape) for tensor in model.state_dict().values()]
    return dict(zip(reference_keys(model).values(), shapes, strict=True))


@pytest.mark.parametrize("name", AUTHORS)
def test_every_key_and_shape_of_the_release(name):
    with torch.device("meta"):
        classifier = create_model(name, task="classification", num_classes=1000)
        linear = create_model(name, num_classes=21)
        degridding = create_model(name, num_classes=21, head="degridding", output_stride=8)
    released = dict(AUTHORS[name]["state_dict"])
    assert authors_shapes(classifier) == released
    features = {key: shape for key, shape in released.items() if key.startswith("features.")}
    last = released["linear.weight"][1]
    head = {"final.conv1.weight": [21, last, 1, 1], "final.conv1.bias": [21]}
    assert authors_shapes(linear) == features | head
    if name == "sunet7128":
        assert authors_shapes(degridding) == features | dict(DEGRIDDING)


NARROW = {"width": 8, "stage_channels": (16, 24, 32, 40), "stem_channels": 8}  # the authors' structure, quick to build


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(1)
    model = create_model("sunet64", task="classification", num_classes=10, **NARROW)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randint(2, 5, ()) if tensor.dim() == 0 else torch.rand_like(tensor) + 0.5)
    return model.eval()


def theirs(model, prefix=""):
    """The state dict that the authors' code would save for the same network."""
    keys = reference_keys(model)
    return {prefix + keys[name]: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(state, other):
    assert state.keys() == other.keys()
    return [name for name, tensor in state.items() if not torch.equal(tensor, other[name])]


def checkpoint(model, path):
    content = {"state_dict": theirs(model, "module."), "epoch": 100, "best_prec1": torch.tensor(70.5), "optimizer": {}}
    torch.save(content, path)
    return path


def test_classifier_from_a_released_file(classifier, tmp_path):
    model = create_model("sunet64", task="classification", num_classes=10, **NARROW).eval()
    report = load_reference_weights(model, checkpoint(classifier, tmp_path / "sunet64.pth.tar"))
    assert list(report.loaded) == list(theirs(classifier))
    assert (report.left_out, report.untouched, report.epoch) == ((), (), 100)
    assert str(report) == f"{len(report.loaded)} tensors loaded"
    assert differing(model.state_dict(), classifier.state_dict()) == []


@pytest.mark.parametrize("head", ["linear", "degridding"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_segmentation_backbone_from_a_classifier(classifier, head, prefix):
    model = create_model("sunet64", num_classes=3, head=head, output_stride=8, **NARROW)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_reference_weights(model, theirs(classifier, prefix))
    assert report.left_out == ("linear.weight", "linear.bias")
    own = [name for name in before if name.startswith("head.") and not name.endswith("num_batches_tracked")]
    assert report.untouched == tuple(own)
    assert "left out: linear.weight, linear.bias" in str(report)
    backbone = {name: tensor for name, tensor in classifier.state_dict().items() if not name.startswith("head.")}
    assert differing(model.state_dict(), before | backbone) == []


@pytest.mark.parametrize("head", ["linear", "degridding"])
def test_segmentation_from_segmentation(head):
    options = {"num_classes": 4, "head": head, "width": 8, "stage_channels": (16, 24), "num_blocks": (1, 2)}
    source, model = create_model("sunet64", **options), create_model("sunet64", output_stride=4, **options)
    report = load_reference_weights(model, theirs(source))
    assert (report.left_out, report.untouched) == ((), ())
    assert differing(model.state_dict(), source.state_dict()) == []


def test_files_older_than_the_batch_counter(classifier):
    state = {k: v for k, v in theirs(classifier).items() if not k.endswith("num_batches_tracked")}
    model = create_model("sunet64", task="classification", num_classes=10, **NARROW)
    report = load_reference_weights(model, state)
    assert len(report.loaded) == len(state)
    assert report.untouched == ()
    assert torch.equal(model.head.weight, classifier.head.weight)


def unchanged_after(model: SUNet, source, message):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        load_reference_weights(model, source)
    assert differing(model.state_dict(), before) == []


@pytest.mark.slow
def test_what_does_not_fit_is_named_and_nothing_is_loaded(classifier):
    model = create_model("sunet64", task="classification", num_classes=10, **NARROW)
    good = theirs(classifier, "module.")
    key = "features.unet2_1.up.1.deconv0.weight"
    unchanged_after(model, good | {f"module.{key}": torch.zeros(8, 8, 5, 5)}, rf"{key} has shape .*5, 5\], the model")
    unchanged_after(model, good | {"module.features.extra": torch.zeros(1)}, r"unknown key 'features.extra'")
    unchanged_after(model, {k: v for k, v in good.items() if k != f"module.{key}"}, f"{key} is missing")
    unchanged_after(model, good | {f"module.{key}": 3}, f"{key}: a tensor is expected, not int")
    unchanged_after(model, {"fc.weight": torch.zeros(1)}, r"unknown key 'fc.weight'; this is no checkpoint of the auth")
    unchanged_after(model, {}, "state_dict: a dict of tensors is expected")
    unchanged_after(model, {"state_dict": [1, 2]}, "state_dict: a dict of tensors is expected, not list")


@pytest.mark.slow
def test_number_of_classes_head_and_task_have_to_agree(classifier):
    other = create_model("sunet64", task="classification", num_classes=11, **NARROW)
    unchanged_after(other, theirs(classifier), r"linear.weight has shape \[10, 40\], the model needs \[11, 40\]$")
    linear, degridding = (create_model("sunet64", num_classes=2, head=h, **NARROW) for h in ("linear", "degridding"))
    unchanged_after(linear, theirs(degridding), r"final.conv1.weight has shape \[512")
    unchanged_after(classifier, theirs(linear), "unknown key 'final.conv1.weight'; a classifier cannot be loaded from")


def test_checkpoint_of_another_network(classifier):
    released = create_model("sunet64", task="classification", num_classes=10)
    unchanged_after(classifier, theirs(released), r"features.conv1.* has shape .*; the checkpoint is one of sunet64, ")
    with pytest.raises(WeightsError, match="the authors' checkpoints are for SUNets, not for SmallUNet"):
        load_reference_weights(create_model("unet_small", num_classes=2), theirs(classifier))


def test_a_whole_pickled_model_is_refused(classifier, tmp_path):
    torch.save(classifier, tmp_path / "model.pth")
    unchanged_after(
        classifier, tmp_path / "model.pth", "refused, .*: it holds sunets.models.sunet.SUNet besides weights"
    )


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files(tmp_path, share, zipped):
    model = create_model("sunet_tiny", task="classification", num_classes=2, width=4)
    whole = tmp_path / "whole.pth"
    torch.save({"state_dict": theirs(model)}, whole, _use_new_zipfile_serialization=zipped)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    unchanged_after(model, cut, r"cut.pth: .*fetch it again")


def test_what_is_no_checkpoint_at_all(classifier, tmp_path):
    text = tmp_path / "page.pth"
    text.write_text("<html>not found</html>")
    unchanged_after(classifier, text, r"page.pth: .*fetch it again")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    unchanged_after(classifier, tmp_path / "tensor.pth", "a dict with state_dict is expected, not Tensor")
    with pytest.raises(FileNotFoundError, match=r"missing.pth"):
        load_reference_weights(classifier, tmp_path / "missing.pth")
