"""A worker predicts with weights of one's own, as any other model: over Kafka, into the database."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from tests.support.eventually import eventually
from tests.support.spine import Spine

pytestmark = pytest.mark.timeout(240)

COUNT = 40
LABELS = ["oak", "ash", "elm"]


async def test_weights_of_ones_own_predict_over_kafka(spine: Spine, tmp_path: Path) -> None:
    """Every picture gets the labels and the version of the file's model beside those of the built-in one."""
    torch.manual_seed(1)
    network = torchvision.models.get_model("mobilenet_v3_small", weights=None, num_classes=len(LABELS))
    path = tmp_path / "trees.safetensors"
    save_file(network.state_dict(), path, metadata={"millrace": json.dumps({"labels": LABELS})})
    name = f"file:{path}#torchvision:mobilenet_v3_small"
    models = {"MILLRACE_MODELS": f"{name},builtin:quality"}
    await spine.start("predict", "store", **models)
    await spine.send_many("tree", COUNT)
    await spine.settled("predict", "store", whole=True)
    versions = set()
    for image_id in spine.journal.places:
        (stored,) = await spine.database.predictions(image_id)
        results = {result.model: result for result in stored.prediction.models}
        assert set(results) == {name, "builtin:quality"}
        found = results[name]
        assert (found.task, set(found.scores)) == ("classify", set(LABELS))
        assert found.label in LABELS
        versions.add((found.version, found.digest))
    ((version, digest),) = versions
    assert version == digest[:12]


async def test_weights_that_do_not_fit_end_the_worker(spine: Spine, tmp_path: Path) -> None:
    """A worker whose model cannot be loaded ends with 78 and one line that names the setting."""
    models = f"file:{tmp_path}/none.safetensors#timm:resnet18"
    worker = spine.crew.start("-m", "agents", "predict", MILLRACE_MODELS=models)

    def ended() -> bool:
        return worker.exit_code is not None

    await eventually(ended, 60)
    assert worker.exit_code == 78
    said = worker.log()
    assert said.count("MILLRACE_MODELS") == 1
    assert "there is no file" in said
    assert "Traceback" not in said
