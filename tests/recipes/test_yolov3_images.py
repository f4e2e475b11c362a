import random

import numpy as np
import pytest
import torch
from PIL import Image


class TestData:
    def test_deterministic(self, yolov3):
        first, second = (yolov3.data.ShapeImages(20, 64, seed) for seed in (0, 0))
        for index in random.Random(0).sample(range(20), 20):
            for a, b in zip(first[index], second[index], strict=True):
                assert torch.equal(a, b)
        second.set_epoch(1)
        assert not torch.equal(first[3][0], second[3][0])
        assert not torch.equal(first[3][0], yolov3.data.ShapeImages(20, 64, 1)[3][0])

    def test_samples(self, yolov3):
        data = yolov3.data.ShapeImages(100, 64)
        classes = set()
        for image, objects in data:
            assert image.shape == (3, 64, 64)
            assert image.dtype == torch.float32
            assert 0 <= image.min() <= image.max() <= 1
            assert objects.shape[1] == 5
            assert len(objects) >= 1
            edges = yolov3.detection.corners(objects[:, 1:])
            assert edges.min() >= 0
            assert edges.max() <= 64
            classes |= set(objects[:, 0].tolist())
        assert classes == set(range(5))

    @pytest.mark.parametrize("name", ["circle", "square", "triangle", "star", "cross"])
    def test_boxes_are_tight(self, yolov3, name):
        image = Image.new("RGB", (64, 64))
        draw = yolov3.data.ImageDraw.Draw(image)
        box = yolov3.data._draw(draw, name, 30.0, 33.0, 20.0, 0.3, (255, 255, 255))
        left, top, right, bottom = image.getbbox()
        assert np.abs(np.subtract(box, (left, top, right - 1, bottom - 1))).max() <= 1

    def test_folder(self, yolov3, tmp_path):
        for part in ("images", "labels"):
            (tmp_path / part / "train").mkdir(parents=True)
        pixels = np.zeros((50, 100, 3), np.uint8)
        pixels[10:20, 20:60] = 255
        Image.fromarray(pixels).save(tmp_path / "images" / "train" / "a.png")
        Image.fromarray(pixels).save(tmp_path / "images" / "train" / "b.png")
        (tmp_path / "labels" / "train" / "a.txt").write_text("1 0.4 0.3 0.4 0.2\n\n")
        data = yolov3.data.LabelledImages(tmp_path, "train", 200, ["cat", "dog"])
        assert len(data) == 2
        image, objects = data[0]
        assert objects.tolist() == [[1, 80, 80, 80, 20]]
        assert (image[:, 75:85, 45:115] == 1).all()
        assert (image[:, :49] == 128 / 255).all()
        assert data[1][1].shape == (0, 5)
        data.flip = True
        places = set()
        for epoch in range(8):
            data.set_epoch(epoch)
            image, ((_, x, *_),) = data[0]
            assert image[0, 80, int(x)] == 1
            places.add(float(x))
        assert places == {80.0, 120.0}

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("1 0.5 0.5 0.5", "must be a class and four numbers from 0 to 1"),
            ("1 0.5 0.5 0.5 1.5", "must be a class and four numbers from 0 to 1"),
            ("cat 0.5 0.5 0.5 0.5", "must be a class and four numbers from 0 to 1"),
            ("2 0.5 0.5 0.5 0.5", "class 2 is not one of the 2"),
        ],
    )
    def test_bad_labels(self, yolov3, tmp_path, line, message):
        (tmp_path / "a.txt").write_text(f"0 0.1 0.1 0.1 0.1\n{line}\n")
        with pytest.raises(ValueError, match=rf"a\.txt:2: {message}"):
            yolov3.data.read_labels(tmp_path / "a.txt", 2)

    def test_anchors(self, yolov3):
        sizes = torch.tensor([[10.0, 10.0], [40.0, 20.0], [60.0, 90.0]]).repeat_interleave(20, 0)
        near = sizes * (1 + 0.05 * torch.rand(sizes.shape, generator=torch.Generator().manual_seed(0)))
        anchors = torch.tensor(yolov3.data.find_anchors(near, 3))
        torch.testing.assert_close(anchors, sizes[[0, 20, 40]], rtol=0.06, atol=0)
        with pytest.raises(ValueError, match="9 anchors need as many boxes, and there are 2"):
            yolov3.data.find_anchors(sizes[:2])


class TestDetection:
    def test_suppress_is_the_naive_loop(self, yolov3):
        generator = torch.Generator().manual_seed(0)
        for count in (0, 1, 7, 60):
            boxes = 40 * torch.rand(count, 4, generator=generator)
            boxes[:, 2:] = boxes[:, :2] + 5 + 30 * torch.rand(count, 2, generator=generator)
            scores = torch.rand(count, generator=generator).mul(20).round().div(20)  # some are equal
            classes = torch.randint(2, (count,), generator=generator)
            kept = []
            for index in sorted(range(count), key=lambda each: -scores[each]):
                if all(
                    classes[index] != classes[other] or overlap(boxes[index], boxes[other]) <= 0.4 for other in kept
                ):
                    kept.append(index)
            assert yolov3.detection.suppress(boxes, scores, classes, 0.4).tolist() == kept

    def test_detect(self, yolov3):
        output = torch.zeros(2, 5, 7)
        output[0, 0] = torch.tensor([20, 20, 10, 20, 0.9, 0.2, 0.8])
        output[0, 1] = torch.tensor([21, 20, 10, 20, 0.8, 0.2, 0.8])  # the same object
        output[0, 2] = torch.tensor([21, 20, 10, 20, 0.7, 0.9, 0.1])  # of another class
        output[0, 3] = torch.tensor([2, 60, 10, 10, 0.5, 0.5, 0.6])  # over the edge
        output[0, 4, 4] = torch.nan
        found = yolov3.detection.detect(output, 64, confidence=0.1)
        expected = [[15, 10, 25, 30, 0.9, 0.8, 1], [16, 10, 26, 30, 0.7, 0.9, 0], [0, 55, 7, 64, 0.5, 0.6, 1]]
        torch.testing.assert_close(found[0], torch.tensor(expected))
        assert found[1].shape == (0, 7)

    def test_precision(self, yolov3):
        data = yolov3.data.ShapeImages(10, 64)
        targets = [objects for _, objects in data]
        perfect = [detections_of(yolov3, each) for each in targets]
        measure = yolov3.detection.mean_average_precision
        assert measure(perfect, targets, 5, 64) == (1, 1)
        shifted = [torch.cat([each[:, :4] + each[:, 2:3].sub(each[:, :1]) * 0.15, each[:, 4:]], 1) for each in perfect]
        over, at_half = measure(shifted, targets, 5, 64)
        assert at_half == 1
        assert 0.1 < over < 0.5
        assert measure([each[:0] for each in perfect], targets, 5, 64) == (0, 0)
        with pytest.raises(ValueError, match="detections of 9 images and objects of 10"):
            measure(perfect[1:], targets, 5, 64)

    def test_picture(self, yolov3, tmp_path):
        image, objects = yolov3.data.ShapeImages(1, 64)[0]
        found = detections_of(yolov3, objects)
        yolov3.pictures.save_picture(tmp_path / "new" / "a.png", image, found, yolov3.data.SHAPES, scale=2)
        with Image.open(tmp_path / "new" / "a.png") as picture:
            assert picture.size == (128, 128)
            left, top = (int(2 * each) for each in found[0, :2])
            colour = picture.getpixel((left, top + 10))
        assert min(colour) == 0  # a full hue, as none is drawn by chance
        assert max(colour) == 255


def overlap(first, second):
    left, top = torch.maximum(first[:2], second[:2])
    right, bottom = torch.minimum(first[2:], second[2:])
    shared = max(right - left, 0) * max(bottom - top, 0)
    return shared / ((first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod() - shared)


def detections_of(yolov3, objects):
    scores = torch.linspace(1, 0.5, len(objects))[:, None]
    edges = yolov3.detection.corners(objects[:, 1:])
    return torch.cat([edges, scores, torch.ones(len(objects), 1), objects[:, :1]], 1)
