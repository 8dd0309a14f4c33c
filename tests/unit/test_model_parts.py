"""What every network's model is made of: names taken apart, outputs read, tensors checked."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from pipeline.errors import ConfigurationError
from pipeline.events import Box
from pipeline.imaging import View
from pipeline.models import (
    LoadOptions,
    WrongOutputError,
    modules,
    packing,
    torch_threads,
    weights,
)
from pipeline.models.disagreement import disagreement, structured_pictures
from pipeline.models.modules import ModuleModel
from pipeline.models.preprocessing import Normaliser, Preprocessing, check_against, probe_picture
from pipeline.models.specification import Specification
from pipeline.models.tasks import Classify, Detect, Embed, Reader, Score, distinct, reader_of
from tests.support import logged as logs

CPU = torch.device("cpu")
SPECIFICATION = Specification.parse("test:network")
VIEW = View(24, 16)
CACHE = Path("nowhere")


class Network(nn.Module):
    """Looks at mean colours; counts the batches it sees."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, outputs)
        self.batches: list[tuple[int, ...]] = []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.batches.append(tuple(pixels.shape))
        logits: torch.Tensor = self.head(self.convolution(pixels).mean((2, 3)))
        return logits


class NothingFound(nn.Module):
    """A detector that sees nothing in pictures of any size."""

    def forward(self, pictures: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}
        return [nothing] * len(pictures)


def model(network: nn.Module, reader: Reader | None = None, **options: Any) -> ModuleModel:
    given_options = LoadOptions(CACHE, **{"precision": "fp32", "max_batch_size": 4, **options})
    reader = reader or Classify(("a", "b", "c"))
    return ModuleModel(SPECIFICATION, network, Preprocessing(VIEW), reader, {}, CPU, given_options)


def test_names_are_taken_apart() -> None:
    """Source, name, architecture and options are told apart, whatever they are."""
    parsed = Specification.parse("file:/m/w.safetensors#torchvision:resnet18?task=embed&threshold=0.25")
    assert (parsed.source, parsed.name) == ("file", "/m/w.safetensors")
    assert (parsed.architecture, parsed.options["task"]) == ("torchvision:resnet18", "embed")
    assert parsed.threshold() == 0.25
    assert Specification.parse("hf:a/b").threshold() == 0.5
    for wrong in ("hf:a/b?task", "hf:a/b?=&"):
        with pytest.raises(ConfigurationError, match="not name=value"):
            Specification.parse(wrong)
    with pytest.raises(ConfigurationError, match="threshold=2 is not a number from 0 to 1"):
        Specification.parse("hf:a/b?threshold=2").threshold()


def test_a_classifier_is_read() -> None:
    """The five best labels with their probabilities, best first; the best is the label."""
    logits = torch.tensor([[0.0, 3, 1, 2, -1, -2], [5.0, 0, 0, 0, 0, 0]])
    first, second = Classify(tuple("abcdef"))(logits)
    assert list(first.scores) == ["b", "d", "c", "a", "e"]
    assert (first.label, second.label) == ("b", "a")
    assert first.score == first.scores["b"] == pytest.approx(float(logits[0].softmax(0)[1]), abs=1e-6)
    (alone,) = Classify(("x", "y"), "sigmoid")(torch.tensor([[0.0, 2.0]]))
    assert alone.scores == pytest.approx({"y": 0.880797, "x": 0.5}, abs=1e-6)
    with pytest.raises(WrongOutputError, match=r"an output of shape \(1, 2\) for 6 labels"):
        Classify(tuple("abcdef"))(torch.zeros(1, 2))
    with pytest.raises(WrongOutputError, match="a tuple where there should be a tensor"):
        Classify(tuple("abcdef"))((torch.zeros(1, 6),))  # type: ignore[arg-type]


def test_vectors_numbers_and_boxes_are_read() -> None:
    """Vectors have length one, maps are averaged; numbers stay; boxes are sorted, cut off and named."""
    (vector,) = Embed()(torch.tensor([[3.0, 4.0]]))
    assert vector.embedding is not None
    assert vector.embedding.tolist() == pytest.approx([0.6, 0.8])
    (averaged,) = Embed()(torch.ones(1, 2, 5, 5))
    assert averaged.embedding is not None
    assert averaged.embedding.shape == (2,)
    assert [output.score for output in Score()(torch.tensor([[0.5], [-2.0]]))] == [0.5, -2.0]
    assert [output.score for output in Score()(torch.tensor([7.0]))] == [7.0]
    with pytest.raises(WrongOutputError, match="not one number per picture"):
        Score()(torch.zeros(2, 3))
    with pytest.raises(WrongOutputError, match="not one vector per picture"):
        Embed()(torch.zeros(2, 3, 4))

    raw = {
        "boxes": torch.tensor([[0.0, 0, 1, 1], [1, 2, 3, 4], [5, 6, 7, 8]]),
        "scores": torch.tensor([0.6, 0.9, 0.1]),
        "labels": torch.tensor([1, 9, 1]),
    }
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}
    empty, found, crowd = Detect({1: "cat"}, 0.5)(
        [nothing, raw, {key: value[:1].repeat(500, *[1] * (value.ndim - 1)) for key, value in raw.items()}]
    )
    assert empty.boxes == ()
    assert found.boxes == (Box("9", 0.9, 1, 2, 3, 4), Box("cat", 0.6, 0, 0, 1, 1))
    assert len(crowd.boxes) == 100
    assert empty.is_finite
    assert found.is_finite


@pytest.mark.parametrize(
    "change",
    [
        {"scores": torch.tensor([0.6, torch.nan])},
        {"scores": torch.tensor([0.6, -torch.inf])},
        {"boxes": torch.tensor([[0.0, 0, 1, 1], [0, torch.inf, 1, 1]])},
        {"is_finite": torch.tensor(False)},
    ],
)
def test_a_threshold_hides_no_number_that_is_not_finite(change: dict[str, torch.Tensor]) -> None:
    """A picture whose boxes are NaN is not one without boxes, and its neighbour is left alone."""
    good = {"boxes": torch.zeros(2, 4), "scores": torch.tensor([0.6, 0.1]), "labels": torch.tensor([1, 1])}
    bad, neighbour = Detect({1: "cat"}, 0.5)([good | change, good | {"is_finite": torch.tensor(True)}])
    assert not bad.is_finite
    assert neighbour.is_finite
    assert len(neighbour.boxes) == 1


def test_boxes_of_another_shape_are_refused() -> None:
    """Boxes, scores and labels that do not belong together say in which shapes they came."""
    good: dict[str, Any] = {"boxes": torch.zeros(2, 4), "scores": torch.ones(2), "labels": torch.ones(2)}
    for change, said in (
        ({"boxes": torch.zeros(2, 5)}, r"of shapes \(2, 5\), \(2,\), \(2,\)"),
        ({"scores": torch.ones(3)}, r"of shapes \(2, 4\), \(3,\), \(2,\)"),
        ({"labels": None}, "a NoneType where there should be a tensor"),
    ):
        with pytest.raises(WrongOutputError, match=said):
            Detect({1: "cat"}, 0.5)([good | change])


def test_readers_do_what_is_asked_or_say_what_they_can() -> None:
    """One output is a score, several a choice, and either can be left off for a vector."""
    asked = Specification.parse("test:x?task=embed")
    assert isinstance(reader_of(asked, ("a", "b")), Embed)
    assert isinstance(reader_of(SPECIFICATION, ("a",)), Score)
    for task, labels in (("classify", ("a",)), ("score", ("a", "b")), ("detect", ("a", "b"))):
        with pytest.raises(ConfigurationError, match=f"cannot {task}; it can"):
            reader_of(Specification.parse(f"test:x?task={task}"), labels)
    assert distinct(["crane", "cat", "crane"]) == ("crane (0)", "cat", "crane (2)")


@given(
    st.tuples(*[st.floats(0, 1)] * 3),
    st.tuples(*[st.floats(0.01, 2)] * 3),
    st.tuples(st.integers(1, 3), st.integers(1, 16), st.integers(1, 24)),
)
def test_normalising_is_arithmetic(mean: Any, std: Any, shape: tuple[int, int, int]) -> None:
    """One operation gives what dividing, subtracting and dividing give, for any size up to the view's."""
    count, height, width = shape
    pixels = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    found = Normaliser(Preprocessing(VIEW, mean, std), CPU)(pixels)
    expected = (pixels.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(found.double(), expected, atol=1e-3, rtol=1e-4)
    assert found.permute(0, 2, 3, 1).is_contiguous()


def test_normalising_again_uses_the_same_memory() -> None:
    """A batch takes the place of one before, with the same numbers; what a model said of that one stays."""
    normalise, views = Normaliser(Preprocessing(VIEW), CPU), structured_pictures(VIEW, 5, CPU)
    with torch.inference_mode():  # where passes are, and what comes after need not be
        largest = normalise(views, in_place_of_last=True)
    for count in (1, 3, 5):
        again = normalise(views[-count:], in_place_of_last=True)
        assert again.data_ptr() == largest.data_ptr()
        assert torch.equal(again, normalise(views[-count:]))
        assert again.permute(0, 2, 3, 1).is_contiguous()
    itself = model(nn.Flatten(), Embed())
    said = itself.forward(views[:2])[1].embedding
    assert said is not None
    before = said.copy()
    itself.forward(views[2:4])
    assert np.array_equal(said, before)


def test_preprocessing_is_compared_with_the_librarys() -> None:
    """Another view, mean, filter order or channel order than the library's is noticed; its own is not."""
    ours = Preprocessing(View(64, 64, "crop", 72), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))

    def library(
        image: Image.Image, box: bool = True, shift: float = 0.0, order: tuple[int, ...] = (0, 1, 2)
    ) -> torch.Tensor:
        scale = 72 / min(image.size)
        if box:
            image = image.resize((round(image.width * scale), round(image.height * scale)))
            left, top = (image.width - 64) // 2, (image.height - 64) // 2
            image = image.crop((left, top, left + 64, top + 64))
        pixels = torch.from_numpy(np.array(image.resize((64, 64)))).permute(2, 0, 1)[list(order)] / 255
        return (pixels - torch.tensor(ours.mean)[:, None, None] + shift) / torch.tensor(ours.std)[
            :, None, None
        ]

    check_against(SPECIFICATION, ours, library)
    for wrong in ({"box": False}, {"shift": 0.1}, {"order": (2, 1, 0)}):
        with pytest.raises(ConfigurationError, match="cannot be reproduced"):
            check_against(SPECIFICATION, ours, lambda image, wrong=wrong: library(image, **wrong))  # type: ignore[misc]
    with pytest.raises(ConfigurationError, match="cannot be reproduced"):
        check_against(SPECIFICATION, ours, lambda image: library(image)[:, :32])
    assert probe_picture((40, 30)).size == (40, 30)


def test_a_warm_up_runs_one_and_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """After it, neither a lone picture nor the largest batch is something new; once chosen is enough."""
    monkeypatch.setattr(packing, "is_possible", lambda *_: False)  # it runs others, too
    network = Network()
    warm = model(network)
    warm.warm_up()
    warm.warm_up()
    assert network.batches == [(1, 3, 16, 24), (4, 3, 16, 24)] * 2
    assert warm.precision == "float32"
    assert not network.training


def test_networks_are_compiled_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled network runs, compiled once for all sizes; one whose pictures vary in size says that it is not.

    What compiles stands in for torch's, which needs a C++ compiler and a minute.
    """
    logged = logs.capture(monkeypatch, modules)
    compiled: list[tuple[nn.Module, bool]] = []
    runs: list[tuple[int, ...]] = []

    def compile_(network: nn.Module, *, dynamic: bool) -> Any:
        compiled.append((network, dynamic))

        def run(pixels: torch.Tensor) -> Any:
            runs.append(tuple(pixels.shape))
            return network(pixels)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    network = Network()
    found = model(network, compile=True)
    found.warm_up()
    found.warm_up()
    assert compiled == [(network, True)]
    assert runs == [(1, 3, 16, 24), (4, 3, 16, 24)] * 2
    model(Network()).warm_up()
    assert len(compiled) == 1
    assert logged.entries == []

    varying = Preprocessing(View(24, 16, "inside"))
    options = LoadOptions(CACHE, precision="fp32", compile=True)
    detector = ModuleModel(SPECIFICATION, NothingFound(), varying, Detect({}, 0.5), {}, CPU, options)
    detector.warm_up()
    assert len(compiled) == 1
    assert [(entry["event"], entry["model"]) for entry in logged.entries] == [
        ("not compiled: its pictures vary in size", "test:network")
    ]


@pytest.mark.parametrize("wanted", ["bf16", "fp32"])
def test_a_precision_that_is_asked_for_is_taken(wanted: str) -> None:
    """Outputs in fewer bits are near those in float32, and the network that was given is left as it was."""
    network = Network()
    found = model(network, precision=wanted)
    found.warm_up()
    pixels = structured_pictures(VIEW, 3, CPU)
    reference = model(Network())
    assert found.precision == {"bf16": "bfloat16", "fp32": "float32"}[wanted]
    assert disagreement(reference.forward(pixels), found.forward(pixels)) < 1
    assert network.head.weight.dtype == torch.float32
    assert found.digest == reference.digest


def test_tensors_must_fit(tmp_path: Path) -> None:
    """Missing, unknown and misshapen tensors are named; counters of batch norms mean nothing."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    state = network.state_dict()
    weights.load_tensors(
        SPECIFICATION, network, {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    )
    wrong = {**state, "0.weight": torch.zeros(5, 3, 1, 1), "more": torch.zeros(1)}
    del wrong["0.bias"]
    with pytest.raises(ConfigurationError) as refused:
        weights.load_tensors(SPECIFICATION, network, wrong)
    for said in (
        "missing: 0.bias",
        "unknown: more",
        "of another shape: 0.weight (5, 3, 1, 1 for 4, 3, 1, 1)",
    ):
        assert said in refused.value.message


def test_only_tensors_are_unpickled(tmp_path: Path) -> None:
    """Whatever else a file of weights holds is refused, not run."""
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(2)}, path)
    assert torch.equal(weights.read_tensors(SPECIFICATION, path)["a"], torch.ones(2))
    torch.save({"a": Path("x")}, path)
    with pytest.raises(ConfigurationError, match="holds more than tensors"):
        weights.read_tensors(SPECIFICATION, path)
    torch.save(["a"], path)
    with pytest.raises(ConfigurationError, match="not a dictionary of tensors"):
        weights.read_tensors(SPECIFICATION, path)
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2)[:-1] + b"\x00")
    with pytest.raises(ConfigurationError):
        weights.read_tensors(SPECIFICATION, path)
    with pytest.raises(ConfigurationError, match="is not there"):
        weights.read_tensors(SPECIFICATION, tmp_path / "none.safetensors")


def test_digests_see_everything_that_changes_outputs() -> None:
    """One number, one name or one fact more is another digest; the order of tensors is not."""
    network = Network()
    base = weights.digest_of(network, {"labels": ["a"]})
    assert base == weights.digest_of(Network(), {"labels": ["a"]})
    assert base != weights.digest_of(network, {"labels": ["b"]})
    with torch.no_grad():
        network.head.bias[0] += 1e-6
    assert base != weights.digest_of(network, {"labels": ["a"]})


def test_small_networks_get_one_thread() -> None:
    """Work too little to share gets one thread, unless somebody says otherwise."""
    small = model(Network())
    large = ModuleModel(
        SPECIFICATION,
        nn.Linear(1000, 1000),
        Preprocessing(View(1000, 1000)),
        Embed(),
        {},
        CPU,
        LoadOptions(CACHE),
    )
    assert [torch_threads(models, 0) for models in ([small], [large], [small, large])] == [1, 0, 0]
    assert [torch_threads(models, 4) for models in ([small], [large])] == [4, 4]
