import numpy as np
import pytest
import torch
from torch import nn

import cnmix
import cnmix.torch_mlu

TINY = {"classes": 5, "width": 0.01, "image_size": 64}


@pytest.fixture
def tiny(yolov3):
    def build(seed=0, **changes):
        torch.manual_seed(seed)
        model = yolov3.model.YOLOv3(**{**TINY, **changes})
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_mean.normal_()  # fresh ones would not show in what order they are written
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.bias)
            nn.init.uniform_(norm.weight, 0.5, 2)
        return model

    return build


class TestModel:
    def test_the_real_network(self, yolov3):
        with torch.device("meta"):
            model = yolov3.model.YOLOv3()
        convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        assert len(convs) == 75
        assert sum(parameter.numel() for parameter in model.parameters()) == 61_949_149
        # Channels out, kernel and stride, as yolov3.cfg has them.
        backbone = [(32, 3, 1)]
        for channels, repeats in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
            backbone += [(channels, 3, 2), *[(channels // 2, 1, 1), (channels, 3, 1)] * repeats]
        assert len(backbone) == 52
        heads = [*[(512, 1, 1), (1024, 3, 1)] * 3, (255, 1, 1), (256, 1, 1), *[(256, 1, 1), (512, 3, 1)] * 3]
        heads += [(255, 1, 1), (128, 1, 1), *[(128, 1, 1), (256, 3, 1)] * 3, (255, 1, 1)]
        assert [(conv.out_channels, conv.kernel_size[0], conv.stride[0]) for conv in convs] == backbone + heads
        routed = [convs[index].in_channels for index in (52, 60, 68)]
        assert routed == [1024, 768, 384]

    def test_training_and_evaluation(self, tiny):
        model = tiny()
        images = torch.rand(2, 3, 64, 64)
        assert [tuple(each.shape) for each in model(images)] == [(2, 30, side, side) for side in (2, 4, 8)]
        boxes = model.eval()(images)
        assert boxes.shape == (2, 3 * (4 + 16 + 64), 10)
        assert boxes.isfinite().all()
        assert not [name for name in model.state_dict() if "." not in name]  # weights alone

    def test_decode(self, yolov3):
        torch.manual_seed(0)
        anchors = [[4.0 + each, 5.0 + 2 * each] for each in range(9)]
        maps = [torch.randn(2, 3 * 7, side, side) for side in (2, 4, 8)]
        boxes = yolov3.model.decode(maps, *yolov3.model.priors(64, anchors))
        number = 0
        for scale, (each, stride) in enumerate(zip(maps, (32, 16, 8), strict=True)):
            for row in range(each.shape[2]):
                for column in range(each.shape[3]):
                    for place in range(3):
                        raw = each[:, 7 * place : 7 * place + 7, row, column]
                        width, height = anchors[3 * (2 - scale) + place]
                        sure = raw.sigmoid()
                        expected = [
                            (sure[:, 0] + column) * stride,
                            (sure[:, 1] + row) * stride,
                            raw[:, 2].exp() * width,
                            raw[:, 3].exp() * height,
                            *sure[:, 4:].T,
                        ]
                        torch.testing.assert_close(boxes[:, number], torch.stack(expected, 1))
                        number += 1
        assert number == boxes.shape[1]

    @pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning")
    def test_export_and_trace(self, tiny):
        model = tiny().eval()
        images = torch.rand(1, 3, 64, 64)
        expected = model(images)
        exported = torch.export.export(model, (images,))
        torch.testing.assert_close(exported.module()(images), expected)
        torch.testing.assert_close(torch.jit.trace(model, images)(images), expected)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"classes": 0}, "classes must be an integer of at least 1, got 0"),
            ({"width": 0.0}, "width must be a number above 0 and up to 8, got 0.0"),
            ({"image_size": 100}, "image_size must be a multiple of 32, the largest stride, got 100"),
            ({"anchors": [[1, 2]]}, "anchors must be nine pairs"),
        ],
    )
    def test_refused(self, yolov3, arguments, message):
        with pytest.raises(ValueError, match=message):
            yolov3.model.YOLOv3(**{**TINY, **arguments})


class TestWeights:
    @pytest.mark.parametrize("backbone", [False, True])
    def test_there_and_back(self, yolov3, tiny, tmp_path, backbone):
        file = tmp_path / ("darknet53.conv.74" if backbone else "yolov3.weights")
        first, second = tiny(0), tiny(1)
        yolov3.weights.save_darknet(first, file, seen=2**33, backbone=backbone)
        untouched = second.head8.map.weight.clone()
        assert yolov3.weights.load(second, file) == 2**33
        again = tmp_path / "again.weights"
        yolov3.weights.save_darknet(second, again, seen=2**33, backbone=backbone)
        assert again.read_bytes() == file.read_bytes()
        assert torch.equal(second.head8.map.weight, untouched) == backbone
        if not backbone:
            images = torch.rand(1, 3, 64, 64)
            assert torch.equal(first.eval()(images), second.eval()(images))

    def test_layout(self, yolov3, tiny, tmp_path):
        model = tiny()
        file = tmp_path / "x.weights"
        yolov3.weights.save_darknet(model, file, seen=7)
        assert np.fromfile(file, "<i4", 5).tolist() == [0, 2, 0, 7, 0]
        values = torch.from_numpy(np.fromfile(file, "<f4", offset=20))
        bn = model.stem.bn
        start = torch.cat([bn.bias, bn.weight, bn.running_mean, bn.running_var, model.stem.conv.weight.flatten()])
        assert torch.equal(values[: len(start)], start)
        end = torch.cat([model.head8.map.bias, model.head8.map.weight.flatten()])
        assert torch.equal(values[-len(end) :], end)

    def test_size_of_the_published_files(self, yolov3):
        with torch.device("meta"):
            model = yolov3.model.YOLOv3()
        sizes = [sum(each.numel() for each in yolov3.weights._tensors(model, part)) for part in (False, True)]
        assert 20 + 4 * sizes[0] == 248_007_048  # yolov3.weights
        assert 20 + 4 * sizes[1] == 162_482_580  # darknet53.conv.74

    def test_old_header(self, yolov3, tiny, tmp_path):
        model = tiny()
        file = tmp_path / "x.weights"
        yolov3.weights.save_darknet(model, file, seen=7)
        old = np.asarray([0, 1, 0, 9], "<i4").tobytes()
        file.write_bytes(old + file.read_bytes()[20:])
        assert yolov3.weights.load(tiny(1), file) == 9

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda data: data[:-4], "it is truncated, or of another network"),
            (lambda data: data + b"\0" * 4, "it is of another network"),
            (lambda data: data[:8], "truncated: it ends within the header"),
            (lambda data: data[:14], "truncated: it ends within the header"),
            (lambda data: b"", "truncated: it ends within the header"),
            (lambda data: b"<html>" + data, "no file of darknet's"),
        ],
    )
    def test_bad_files(self, yolov3, tiny, tmp_path, change, message):
        file = tmp_path / "x.weights"
        yolov3.weights.save_darknet(tiny(), file)
        file.write_bytes(change(file.read_bytes()))
        model = tiny(1)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            yolov3.weights.load(model, file)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_other_classes(self, yolov3, tiny, tmp_path):
        yolov3.weights.save_darknet(tiny(classes=20), tmp_path / "x.weights")
        with pytest.raises(ValueError, match="such as one for 20 classes and not 5"):
            yolov3.weights.load(tiny(), tmp_path / "x.weights")

    @pytest.mark.parametrize("key", [None, "state_dict", "model"])
    def test_pth(self, yolov3, tiny, tmp_path, key):
        weights = tiny(0).state_dict()
        torch.save(weights if key is None else {key: weights}, tmp_path / "x.pth")
        model = tiny(1)
        assert yolov3.weights.load(model, tmp_path / "x.pth") is None
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        with pytest.raises(
            ValueError, match=r"6 entries differ, such as head16.map.bias, of shape \(30,\) in the file"
        ):
            yolov3.weights.load(tiny(classes=7), tmp_path / "x.pth")

    def test_missing(self, yolov3, tiny):
        with pytest.raises(FileNotFoundError, match=r"there are no weights nowhere\.weights"):
            yolov3.weights.load(tiny(), "nowhere.weights")


class TestLoss:
    def test_assign(self, yolov3):
        anchors = [[4 * 1.4**each, 4 * 1.4**each] for each in range(9)]
        loss = yolov3.loss.Loss(64, anchors, alike=1.0)
        targets = [torch.tensor([[2, 20, 41, 4, 4]]), torch.zeros(0, 5), torch.tensor([[0, 33, 63.9, 59, 59]])]
        images, boxes, objects = loss.assign(targets)
        assert images.tolist() == [0, 2]
        assert objects.tolist() == [0, 1]
        # The smallest anchor is the first of stride 8, the largest the last of stride 32.
        assert boxes.tolist() == [3 * (4 + 16) + 3 * (5 * 8 + 2), 3 * (1 * 2 + 1) + 2]

    def test_complete_iou(self, yolov3):
        boxes = torch.tensor([[10.0, 10, 4, 8]]).repeat(3, 1)
        truth = torch.tensor([[10.0, 10, 4, 8], [10.0, 10, 8, 16], [40.0, 10, 4, 8]])
        loss = yolov3.loss.complete_iou_loss(boxes, truth)
        expected = [0, 1 - 0.25, 1 + 900 / (34**2 + 64)]
        torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("level", ["O0", "O1"])
    def test_falls_on_one_batch(self, yolov3, level):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        data = yolov3.data.ShapeImages(4, 64)
        images, targets = yolov3.data.collate([data[index] for index in range(3)])
        targets[1] = targets[1][:0]  # an image without objects
        model = yolov3.model.YOLOv3(**TINY)
        loss_of = yolov3.loss.Loss(64, model.anchors)
        model, optimizer = cnmix.initialize(model, torch.optim.Adam(model.parameters(), 0.01), opt_level=level)
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            loss, parts = loss_of(model(images), targets)
            with cnmix.scale_loss(loss, optimizer) as scaled_loss:
                scaled_loss.backward()
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
            optimizer.step()
            losses.append(loss.item())
            assert sum(parts.values()) == pytest.approx(loss.item(), rel=1e-4)
        assert losses[-1] < 0.7 * losses[0]
