"""The built-in models measure what they say, and specifications load what they name."""

from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from PIL import Image, ImageEnhance

from loadtest import images
from pipeline import imaging
from pipeline.errors import ConfigurationError
from pipeline.models import LoadOptions, Model, Output, load_models, resolve_device, torch_threads
from pipeline.models.builtin import FINGERPRINT_DIMENSION, LABELS, SIDE_PIXELS, FingerprintModel, QualityModel
from tests.support import pictures

CPU = torch.device("cpu")
torch.set_num_threads(1)  # tests share the machine
VIEW = imaging.View(SIDE_PIXELS, SIDE_PIXELS)


def batch_of(*arrays: np.ndarray) -> torch.Tensor:
    """Stack (256, 256, 3) arrays as the engine does."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def pixels_of(image: Image.Image) -> np.ndarray:
    return imaging.decode(pictures.encode(image, "PNG"), [VIEW]).pixels[0]


def sharp_scene(index: int = 0) -> Image.Image:
    return Image.open(BytesIO(images.draw_one(7, 6 * index).data)).convert("RGB")


def quality(*arrays: np.ndarray) -> list[Output]:
    return QualityModel(CPU).forward(batch_of(*arrays))


def fingerprint(*arrays: np.ndarray) -> np.ndarray:
    outputs = FingerprintModel(CPU).forward(batch_of(*arrays))
    return np.stack([output.embedding for output in outputs if output.embedding is not None])


def page_of_print() -> np.ndarray:
    """Draw dark lines on white: bright on the whole, and nothing wrong with it."""
    page = np.full((256, 256, 3), 252, np.uint8)
    for top in (*range(20, 110, 8), *range(130, 230, 8)):
        for left in range(24, 226, 9):
            page[top : top + 3, left : left + 6] = 20
    return page


def night_street() -> np.ndarray:
    """Draw a few lit windows in the dark: dark on the whole, and nothing wrong with it."""
    street = np.full((256, 256, 3), 8, np.uint8)
    for top in range(20, 240, 40):
        street[top : top + 12, 20:240:40] = 0
        for left in range(20, 240, 40):
            street[top : top + 12, left : left + 8] = 245
    return street


@pytest.mark.parametrize(
    ("array", "label"),
    [
        (np.zeros((256, 256, 3), np.uint8), "dark"),
        (np.full((256, 256, 3), 255, np.uint8), "overexposed"),
        (np.full((256, 256, 3), 128, np.uint8), "flat"),
        (page_of_print(), "keep"),
        (night_street(), "keep"),
    ],
)
def test_plain_cases_get_the_plain_label(array: np.ndarray, label: str) -> None:
    """Black is dark, white is blown out, grey is flat; contrast excuses a dark or bright picture."""
    (output,) = quality(array)
    assert output.label == label
    assert label in LABELS
    assert 0.5 <= (output.score or 0) <= 1


def test_numbers_mean_what_they_are_called() -> None:
    """More light, blur or grain moves the number of that name, and in the right direction."""
    scene = sharp_scene()
    grain = np.random.default_rng(0).normal(0, 12, (256, 256, 1))
    plain = pixels_of(scene)
    noisy = np.clip(plain + grain, 0, 255).astype(np.uint8)
    blurred = pixels_of(scene.resize((32, 32), Image.Resampling.BOX).resize(scene.size))
    brighter = pixels_of(ImageEnhance.Brightness(scene).enhance(1.4))
    greyer = pixels_of(ImageEnhance.Contrast(scene).enhance(0.4))
    measured = [output.scores for output in quality(plain, noisy, blurred, brighter, greyer)]
    assert measured[1]["noise"] > measured[0]["noise"] + 0.03
    assert measured[2]["sharpness"] < measured[0]["sharpness"] / 2
    assert measured[3]["exposure"] > measured[0]["exposure"] + 0.05
    assert measured[4]["contrast"] < measured[0]["contrast"] / 2
    assert set(measured[0]) == {"sharpness", "exposure", "contrast", "noise"}


def test_a_neighbour_changes_nothing() -> None:
    """A picture gets the same outputs alone as in a batch."""
    arrays = [pixels_of(sharp_scene(index)) for index in range(5)]
    together = quality(*arrays)
    assert [quality(array)[0] for array in arrays] == together
    apart = np.concatenate([fingerprint(array) for array in arrays])
    assert np.allclose(apart, fingerprint(*arrays), atol=1e-6)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(numpy_strategies.arrays(np.uint8, (4, 4, 3)), st.sampled_from([1, 8, 64]))
def test_any_pixels_give_finite_numbers(tile: np.ndarray, scale: int) -> None:
    """No picture makes a number that is not finite, a score outside 0..1 or a vector not of length one."""
    array = np.tile(np.kron(tile, np.ones((scale, scale, 1), np.uint8)), (64 // scale, 64 // scale, 1))
    (output,) = quality(array)
    assert np.isfinite(list(output.scores.values())).all()
    assert 0 <= (output.score or 0) <= 1
    (vector,) = fingerprint(array)
    assert vector.shape == (FINGERPRINT_DIMENSION,)
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda scene: Image.open(BytesIO(pictures.encode(scene, "JPEG", quality=40))),
        lambda scene: Image.open(BytesIO(pictures.encode(scene, "WEBP", quality=40))),
        lambda scene: scene.resize((scene.width // 3, scene.height // 3)),
        lambda scene: scene.resize((900, 700)),
        lambda scene: ImageEnhance.Brightness(scene).enhance(1.1),
        lambda scene: ImageEnhance.Brightness(scene).enhance(0.9),
        lambda scene: ImageEnhance.Contrast(scene).enhance(1.15),
    ],
)
def test_fingerprints_see_through_small_changes(change: object) -> None:
    """Re-encoded, resized or slightly brighter, a picture stays nearer to itself than to any other."""
    assert callable(change)
    scenes = [sharp_scene(index) for index in range(4)]
    originals = fingerprint(*(pixels_of(scene) for scene in scenes))
    changed = fingerprint(*(pixels_of(change(scene).convert("RGB")) for scene in scenes))
    cosine = originals @ changed.T
    assert cosine.diagonal().min() > 0.97
    assert (cosine - np.eye(4) * 9).max() < 0.6


def test_models_say_who_they_are() -> None:
    """Each model has a name, a version, a digest that tells models apart, and one shared view."""
    models: list[Model] = load_models("builtin:quality, builtin:fingerprint", CPU)
    assert [model.name for model in models] == ["builtin:quality", "builtin:fingerprint"]
    assert [model.task for model in models] == ["classify", "embed"]
    assert len({model.view for model in models}) == 1
    assert len({model.digest for model in models}) == 2
    assert all(len(model.digest) == 64 and model.version for model in models)
    for model in models:
        model.warm_up()


def test_outputs_of_this_version_are_pinned() -> None:
    """Numbers that change without a new version would make stored results lie."""
    row, column = np.indices((256, 256))
    array = np.stack([row, column, (row * column) % 256], axis=2).astype(np.uint8)
    (output,) = quality(array)
    assert (QualityModel.version, FingerprintModel.version) == ("1", "1")
    assert output.label == "keep"
    assert output.score == pytest.approx(0.8625, abs=2e-4)
    assert output.scores == pytest.approx(
        {"sharpness": 0.87942, "exposure": 0.49911, "contrast": 0.19428, "noise": 0.00672}, abs=2e-5
    )
    assert fingerprint(array)[0, :4] == pytest.approx([-0.44763, -0.31974, -0.01365, -0.03664], abs=1e-4)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("", "names no model; known: builtin:quality, builtin:fingerprint"),
        ("builtin:qualty", "unknown model 'builtin:qualty'; known: builtin:quality, builtin:fingerprint"),
        ("builtin:quality,builtin:quality", "'builtin:quality' is there twice"),
        ("python:tests.support.models:failing", "MILLRACE_ALLOW_PYTHON_MODELS=true"),
    ],
)
def test_wrong_specifications_name_the_setting(spec: str, reason: str) -> None:
    """A typing mistake ends with one line that names the setting and the models there are."""
    with pytest.raises(ConfigurationError) as refused:
        load_models(spec, CPU)
    assert refused.value.message.startswith("MILLRACE_MODELS: ")
    assert reason in refused.value.message


def test_python_models_load_when_allowed() -> None:
    """With the setting, a specification may name code and give it options."""
    (model,) = load_models(
        "python:tests.support.models:sleeping?seconds=0", CPU, LoadOptions(allow_python=True)
    )
    assert model.forward(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)) == [Output(score=1.0)] * 2


@pytest.mark.parametrize("rest", ["tests.support.models:nothing_there", "no_such_module:x", "", "os:sep"])
def test_python_models_that_do_not_load_are_a_configuration_error(rest: str) -> None:
    """A wrong module, attribute or factory is reported, not raised."""
    with pytest.raises(ConfigurationError, match="does not load"):
        load_models(f"python:{rest}", CPU, LoadOptions(allow_python=True))


def test_models_too_small_to_share_get_one_thread() -> None:
    """The built-in models run on one thread unless somebody says otherwise; of others torch decides."""
    builtin = load_models("builtin:quality,builtin:fingerprint", CPU)
    other = load_models("python:tests.support.models:sleeping?seconds=0", CPU, LoadOptions(allow_python=True))
    assert [torch_threads(models, 0) for models in (builtin, other, [*builtin, *other])] == [1, 0, 0]
    assert torch_threads(builtin, 4) == 4


def test_devices_resolve() -> None:
    """`auto` and `cpu` work everywhere; anything else that is not there names the setting."""
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cpu", "cuda")
    for wrong in ("tpu", "cuda:99", "mps", ""):
        with pytest.raises(ConfigurationError, match="MILLRACE_DEVICE"):
            resolve_device(wrong)
