"""`hf:REPOSITORY` does what transformers does with the same folder and the same picture."""

import http.server
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.errors import ConfigurationError
from pipeline.inference.forward import Forward
from tests.support import networks
from tests.support.networks import load, photographs, predict

TOLERANCE = 0.03  # of a probability, as in test_torchvision_models.py
SIDE = 64
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIDE,
    "patch_size": 16,
}
SQUARE = {"height": SIDE, "width": SIDE}
NAMES = {0: "cat", 1: "dog", 2: "crane", 3: "crane"}


def save(folder: Path, network: Any, processor: Any) -> Path:
    transformers.utils.logging.disable_progress_bar()
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def classifier(cache: Path, **more: Any) -> Path:
    """Save a classifier that tells the test's pictures apart."""
    torch.manual_seed(2)
    config = transformers.ViTConfig(**VIT, id2label=NAMES, label2id={"cat": 0, "dog": 1, "crane": 2}, **more)
    network: Any = transformers.ViTForImageClassification(config).eval()
    processor: Any = transformers.ViTImageProcessor(size=SQUARE)
    inputs = processor(images=photographs(), return_tensors="pt")
    networks.sharpen(lambda: network(**inputs), network.classifier)
    return save(cache / "org" / "classifier", network, processor)


def test_a_classifier_agrees_with_transformers(tmp_path: Path) -> None:
    """Scores are those of the library; labels that are there twice are told apart."""
    folder = classifier(tmp_path)
    model = load("hf:org/classifier", tmp_path)
    network: Any = transformers.AutoModelForImageClassification.from_pretrained(folder)
    processor: Any = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        expected = network(**processor(images=photographs(), return_tensors="pt")).logits.softmax(1)
    outputs = predict(model, photographs())
    labels = ("cat", "dog", "crane (2)", "crane (3)")
    assert len({output.label for output in outputs}) > 1
    for output, row in zip(outputs, expected, strict=True):
        assert networks.close(output, dict(zip(labels, row.tolist(), strict=True)), TOLERANCE)
    assert (model.task, model.view.fit) == ("classify", "stretch")


def test_independent_labels_are_scored_independently(tmp_path: Path) -> None:
    """A network for several labels at once gives each its own probability."""
    classifier(tmp_path, problem_type="multi_label_classification")
    output = predict(load("hf:org/classifier", tmp_path), photographs())[0]
    assert sum(output.scores.values()) != pytest.approx(1, abs=0.05)
    assert all(0 <= score <= 1 for score in output.scores.values())


@pytest.mark.parametrize("kind", ["cropped", "convnext"])
def test_preprocessing_is_that_of_the_folder(kind: str, tmp_path: Path) -> None:
    """Crops, filters, means and ratios of other image processors are understood."""
    torch.manual_seed(4)
    config = transformers.ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 32, 32], num_labels=4)
    network: Any = transformers.ConvNextForImageClassification(config).eval()
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    if kind == "cropped":
        processor: Any = transformers.BitImageProcessor(
            size={"shortest_edge": 73}, crop_size=SQUARE, resample=3, image_mean=mean, image_std=std
        )
    else:
        processor = transformers.ConvNextImageProcessor(size={"shortest_edge": SIDE}, image_mean=mean)
    inputs = processor(images=photographs(), return_tensors="pt")
    networks.sharpen(lambda: network(**inputs), network.classifier)
    save(tmp_path / "org" / "other", network, processor)
    model = load("hf:org/other", tmp_path)
    with torch.inference_mode():
        expected = network(**inputs).logits.softmax(1)
    for output, row in zip(predict(model, photographs()), expected, strict=True):
        assert networks.close(
            output, {f"LABEL_{n}": value for n, value in enumerate(row.tolist())}, TOLERANCE
        )
    assert (model.view.fit, model.view.resampling, model.view.shorter_side) == ("crop", "bicubic", 73)


def test_preprocessing_that_cannot_be_reproduced_is_refused(tmp_path: Path) -> None:
    """A model that would get other pixels than it was trained on does not start."""
    folder = classifier(tmp_path)
    path = folder / "preprocessor_config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps({**given, "rescale_factor": 1 / 127.5}))
    with pytest.raises(ConfigurationError, match="its preprocessing cannot be reproduced"):
        load("hf:org/classifier", tmp_path)


def test_one_output_is_a_score(tmp_path: Path) -> None:
    """A regression head gives a number as it is."""
    torch.manual_seed(1)
    network: Any = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, num_labels=1)).eval()
    processor: Any = transformers.ViTImageProcessor(size=SQUARE)
    save(tmp_path / "org" / "score", network, processor)
    model = load("hf:org/score", tmp_path)
    with torch.inference_mode():
        expected = network(**processor(images=photographs(), return_tensors="pt")).logits.flatten().tolist()
    assert [output.score for output in predict(model, photographs())] == pytest.approx(expected, abs=0.01)
    assert model.task == "score"


def embeddings(kind: str, cache: Path) -> tuple[str, Any]:
    """Save a network that embeds, and return its specification and the library's own vectors."""
    torch.manual_seed(6)
    processor: Any = transformers.ViTImageProcessor(size=SQUARE)
    if kind == "classifier":
        network: Any = transformers.AutoModelForImageClassification.from_pretrained(classifier(cache))
        inputs = processor(images=photographs(), return_tensors="pt")
        return "hf:org/classifier?task=embed", network.vit(**inputs).last_hidden_state[:, 0]
    if kind == "clip":
        text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
        config = transformers.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=16)
        network = transformers.CLIPModel(config).eval()
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
        inputs = processor(images=photographs(), return_tensors="pt")
        expected = network.get_image_features(**inputs).pooler_output
    elif kind == "pooled":
        network = transformers.ViTModel(transformers.ViTConfig(**VIT)).eval()
        inputs = processor(images=photographs(), return_tensors="pt")
        expected = network(**inputs).pooler_output
    else:
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        network = transformers.ResNetModel(config).eval()
        inputs = processor(images=photographs(), return_tensors="pt")
        expected = network(**inputs).pooler_output.flatten(1)
    save(cache / "org" / kind, network, processor)
    return f"hf:org/{kind}", expected


@pytest.mark.parametrize("kind", ["classifier", "clip", "pooled", "resnet"])
def test_embeddings_agree_with_transformers(kind: str, tmp_path: Path) -> None:
    """A backbone gives its pooled vector; one whose pooler was never trained gives its first token instead."""
    with torch.inference_mode():
        specification, expected = embeddings(kind, tmp_path)
    model = load(specification, tmp_path)
    rows = torch.nn.functional.normalize(expected)
    for output, row in zip(predict(model, photographs()), rows, strict=True):
        assert output.embedding is not None
        assert float(torch.from_numpy(output.embedding) @ row) > 0.998
        assert float(output.embedding @ output.embedding) == pytest.approx(1, abs=1e-5)
    assert model.task == "embed"


def test_weights_without_a_head_do_not_get_a_random_one(tmp_path: Path) -> None:
    """Where transformers warns and goes on with random numbers, the model is refused."""
    embeddings("pooled", tmp_path)
    with pytest.raises(ConfigurationError, match=r"its weights lack classifier\.bias, classifier\.weight"):
        load("hf:org/pooled?task=classify", tmp_path)


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
TRANSFORMER = {
    "d_model": 32,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 12,
    "num_labels": 3,
}


def detector(kind: str, folder: Path) -> tuple[Any, Any]:
    """Save a detector and return it with its processor."""
    torch.manual_seed(8)
    if kind == "detr":
        config: Any = transformers.DetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=transformers.ResNetConfig(**RESNET, out_features=["stage4"]),
            encoder_layers=1,
            **TRANSFORMER,
        )
        network: Any = transformers.DetrForObjectDetection(config).eval()
        processor: Any = transformers.DetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 144})
    else:
        config = transformers.RTDetrConfig(
            backbone_config=transformers.RTDetrResNetConfig(
                **RESNET, out_features=["stage2", "stage3", "stage4"]
            ),
            encoder_hidden_dim=32,
            encoder_in_channels=[16, 16, 16],
            decoder_in_channels=[32, 32, 32],
            num_denoising=0,
            **TRANSFORMER,
        )
        network = transformers.RTDetrForObjectDetection(config).eval()
        processor = transformers.RTDetrImageProcessor(size=SQUARE)
    save(folder, network, processor)
    return network, processor


@pytest.mark.parametrize("kind", ["detr", "rtdetr"])
def test_a_detector_agrees_with_transformers(kind: str, tmp_path: Path) -> None:
    """Boxes in pixels of the picture are those of the library's own post-processing."""
    network, processor = detector(kind, tmp_path / "org" / kind)
    model = load(f"hf:org/{kind}?threshold=0.05", tmp_path)
    found = 0
    for image in photographs():
        inputs = processor(images=image, return_tensors="pt")
        with torch.inference_mode():
            output = network(
                **{name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs}
            )
        (theirs,) = processor.post_process_object_detection(
            output, threshold=0.05, target_sizes=[(image.height, image.width)]
        )
        limits = torch.tensor([image.width, image.height, image.width, image.height])
        boxes = theirs["boxes"].clamp(min=0).minimum(limits)
        rows = zip(theirs["labels"], theirs["scores"], boxes, strict=True)
        wanted = [(f"LABEL_{int(label)}", float(score), box.tolist()) for label, score, box in rows]
        ours = networks.in_original(model, predict(model, [image])[0], image)
        assert len(ours) == len(wanted)
        # A rounded side is half a pixel of 96, here up to 3 of 520.
        assert networks.matched(ours, wanted, pixels=4.0, score=0.02) >= 0.9 * len(wanted)
        found += len(ours)
    assert found > 5
    together = predict(model, photographs())  # of different sizes: padded
    assert all(output.boxes for output in together)
    assert model.task == "detect"
    assert all(output.is_finite for output in together)
    for name, parameter in model._network.named_parameters():
        if "class" in name or "bbox" in name:
            parameter.fill_(torch.nan)
    assert not predict(model, photographs()[:1])[0].is_finite
    with pytest.raises(ConfigurationError, match="not a finite number for a reference picture"):
        Forward([model], networks.CPU).warm_up()


def test_a_folder_of_the_hubs_own_cache_is_found(tmp_path: Path) -> None:
    """What the hub's client has downloaded before needs no network."""
    commit = "a" * 40
    kept = tmp_path / "models--org--classifier"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit)
    shutil.copytree(classifier(tmp_path / "made"), kept / "snapshots" / commit)
    assert load("hf:org/classifier", tmp_path).digest == load("hf:org/classifier", tmp_path / "made").digest
    assert load(f"hf:org/classifier?revision={commit}", tmp_path).task == "classify"


def test_older_weights_hold_tensors_or_are_refused(tmp_path: Path) -> None:
    """pytorch_model.bin is read as tensors; a pickle that would run code is not run."""
    folder = classifier(tmp_path)
    safe = load("hf:org/classifier", tmp_path)
    network: Any = transformers.AutoModelForImageClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    assert load("hf:org/classifier", tmp_path).digest == safe.digest

    ran = tmp_path / "ran"
    torch.save({"classifier.weight": _Evil(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match="MILLRACE_MODELS: 'hf:org/classifier'"):
        load("hf:org/classifier", tmp_path)
    assert not ran.exists()


class _Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "ran"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """Serve one repository as the hub does: its description, and its files with their digests."""
    folder = classifier(tmp_path / "served")
    (folder / "modeling_evil.py").write_text("raise SystemExit('code of a repository')")
    commit = "b" * 40

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            if path.startswith("/api/models/org/classifier"):
                files = [{"rfilename": file.name} for file in folder.iterdir()]
                self._answer(json.dumps({"id": "org/classifier", "sha": commit, "siblings": files}).encode())
            elif path.startswith(f"/org/classifier/resolve/{commit}/"):
                self._answer((folder / path.rpartition("/")[2]).read_bytes())
            else:
                self.send_error(404)

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{abs(hash(body)):x}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    asked: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()
    assert not [path for path in asked if path.endswith(".py")], "code was downloaded"


_LOAD = """
import sys
from pathlib import Path
import torch
from pipeline.errors import ConfigurationError
from pipeline.models import LoadOptions, load_models
try:
    (model,) = load_models("hf:org/classifier", torch.device("cpu"), LoadOptions(cache=Path(sys.argv[1])))
except ConfigurationError as error:
    print(error)
else:
    print(model.digest)
"""


def load_apart(cache: Path, endpoint: str, **environment: str) -> str:
    """Load in a process of its own: the hub's client reads its address when it is imported."""
    given = {"HF_ENDPOINT": endpoint, "PYTHONPATH": ".", "PATH": "", "HOME": str(cache), **environment}
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(cache)], env=given, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()[-1]


def test_a_repository_is_downloaded_once_and_without_code(hub: str, tmp_path: Path) -> None:
    """Configuration and weights come from the hub and are kept; the next start asks nobody."""
    digest = load_apart(tmp_path / "cache", hub)
    assert digest == load("hf:org/classifier", tmp_path / "served").digest
    assert load_apart(tmp_path / "cache", "http://127.0.0.1:9") == digest


@pytest.mark.parametrize(
    ("kind", "environment", "reason"),
    [
        ("refuses", {}, "none from the hub: "),
        ("is silent", {}, "none from the hub: "),
        ("is silent", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_without_a_network_the_error_comes_fast(
    kind: str, environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    """One line that names the setting, what was looked for, and why the hub does not help; within seconds."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        port = silent.getsockname()[1] if kind == "is silent" else 9
        started = time.monotonic()
        message = load_apart(tmp_path, f"http://127.0.0.1:{port}", **environment)
        seconds = time.monotonic() - started
    assert seconds < 30, "that is imports, and one timeout of seconds"
    for said in ("MILLRACE_MODELS: 'hf:org/classifier'", "models--org--classifier", str(tmp_path),
                 "MILLRACE_MODEL_CACHE", reason):  # fmt: skip
        assert said in message
