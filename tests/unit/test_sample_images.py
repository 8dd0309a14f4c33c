"""Sample pictures are what they say they are, for any seed."""

import pytest
import torch

from loadtest import images
from pipeline import formats, imaging
from pipeline.models.builtin import SIDE_PIXELS, FingerprintModel, QualityModel

CPU = torch.device("cpu")
torch.set_num_threads(1)  # tests share the machine
PER_SEED = 18  # every kind in every media type


def pixels_of(samples: list[images.SamplePicture]) -> torch.Tensor:
    view = imaging.View(SIDE_PIXELS, SIDE_PIXELS)
    decoded = [torch.from_numpy(imaging.decode(sample.data, [view]).pixels[0].copy()) for sample in samples]
    return torch.stack(decoded).permute(0, 3, 1, 2)  # (N, 3, 256, 256) uint8


@pytest.mark.parametrize("seed", range(20))
def test_samples_get_the_label_they_expect(seed: int) -> None:
    """Every sample of every class and seed is labelled as drawn, well away from the threshold."""
    samples = list(images.draw(seed, PER_SEED))
    outputs = QualityModel(CPU).forward(pixels_of(samples))
    assert [output.label for output in outputs] == [sample.expected_label for sample in samples]
    assert min(output.score or 0.0 for output in outputs) > 0.7


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_are_nearer_than_other_scenes(seed: int) -> None:
    """The fingerprint of a near-duplicate is closer to its original's than to any other scene's."""
    samples = [sample for sample in images.draw(seed, 6 * 6) if sample.expected_label == "keep"]
    outputs = FingerprintModel(CPU).forward(pixels_of(samples))
    vectors = torch.stack([torch.from_numpy(output.embedding) for output in outputs])
    cosine = vectors @ vectors.T
    ids = [sample.id for sample in samples]
    for index, sample in enumerate(samples):
        if sample.near_duplicate_of is None:
            continue
        original = ids.index(sample.near_duplicate_of)
        others = [other for other in range(len(samples)) if other not in (index, original)]
        assert cosine[index, original] > 0.99
        assert cosine[index, others].max() < 0.6


def test_the_sequence_is_drawn_from_the_seed() -> None:
    """The same seed gives the same pictures, another seed others; places are independent."""
    first, again, other = (list(images.draw(seed, 7)) for seed in (1, 1, 2))
    assert first == again
    assert {sample.data for sample in first}.isdisjoint(sample.data for sample in other)
    assert images.draw_one(1, 5) == first[5]
    assert len({sample.id for sample in first}) == 7


def test_all_kinds_come_in_all_media_types() -> None:
    """Eighteen pictures cover each kind in each format, and the media type is the true one."""
    samples = list(images.draw(3, PER_SEED))
    kinds = [(images.KINDS[index % 6], sample.media_type) for index, sample in enumerate(samples)]
    assert len(set(kinds)) == PER_SEED
    for sample in samples:
        assert formats.media_type(sample.data[: formats.HEAD_BYTES]) == sample.media_type
