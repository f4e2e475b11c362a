import random

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

import cnmix
import cnmix.torch_mlu
from cnmix.inference import prepare

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
        for _ in range(20):
            optimizer.zero_grad()
            loss, parts = loss_of(model(images), targets)
            with cnmix.scale_loss(loss, optimizer) as scaled_loss:
                scaled_loss.backward()
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
            optimizer.step()
            losses.append(loss.item())
            assert sum(parts.values()) == pytest.approx(loss.item(), rel=1e-4)
        assert losses[-1] < 0.5 * losses[0]


@pytest.fixture(scope="module")
def trained(yolov3, tmp_path_factory):
    settings = ["model.width=0.01", "model.image_size=64", "data.train_images=8", "data.test_images=4"]
    settings += ["epochs=1", "batch_size=4", "threads=1", f"output={tmp_path_factory.mktemp('runs')}"]
    return yolov3.train.main(settings)


class TestTrain:
    def test_leaves_a_run(self, yolov3, trained):
        folder = trained
        names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        pictures = {f"pictures/{number:02}.png" for number in range(4)}
        assert names == {"settings.yaml", "metrics.csv", "results.json", "yolov3.pt", *pictures}
        saved = cnmix.checkpoint.load(folder / "yolov3.pt")
        model = yolov3.train.build_model(OmegaConf.create(saved["settings"]))
        prepare(model, saved)
        assert model(torch.rand(1, 3, 64, 64)).isfinite().all()

    @pytest.mark.parametrize(
        ("argument", "message"),
        [("epoch=3", "epoch=3: Key 'epoch'"), ("epochs=0", "epochs must be an integer"), ("data.part=a", "Key 'part'")],
    )
    def test_refused(self, yolov3, argument, message):
        with pytest.raises(ValueError, match=message):
            yolov3.train.read_settings([argument])


class TestVendorsScript:
    @pytest.fixture
    def run(self, yolov3, trained, tmp_path, capsys):
        def run(line):
            places = ["--model_path", str(trained / "yolov3.pt"), "--quantized_model_path", str(tmp_path)]
            yolov3.test.run(yolov3.test.parse([*line.split(), *places]))
            return dict(part.split(": ") for part in capsys.readouterr().out.splitlines())

        return run

    @pytest.fixture
    def card(self):
        cnmix.torch_mlu.install(cards=1, strict=False, card_name="MLU370")
        yield
        cnmix.torch_mlu.install(cards=0, strict=False, card_name="MLU370")

    def test_on_the_host(self, run, tmp_path):
        printed = run(f"--image_number 4 --batch_size 2 --compute_map true --run_mode true --pictures {tmp_path}/seen")
        assert list(printed) == ["Mean AP", "Mean AP (overlap 0.5)", "Throughput(fps)", "Latency(ms)"]
        assert all(float(value) >= 0 for value in printed.values())
        assert len(list((tmp_path / "seen").iterdir())) == 4

    @pytest.mark.usefixtures("card")
    @pytest.mark.filterwarnings("ignore:qconfig_spec. firstconv with a mean of 0:UserWarning")
    @pytest.mark.parametrize("mode", [1, 4])
    def test_quantize_and_infer(self, run, tmp_path, mode):
        options = f"--image_number 2 --quantized_mode {mode}"
        assert run(f"{options} --quantization true") == {
            "quantized": str(tmp_path / f"yolov3_{['', 'int8', '', '', 'c_int16'][mode]}.pth")
        }
        printed = run(f"{options} --mlu true --half_input 1 --batch_size 2 --core_number 4 --run_mode true")
        assert list(printed) == ["Throughput(fps)", "Latency(ms)"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("--image_number 5 --batch_size 2", "--image_number 5 is no multiple of --batch_size 2"),
            ("--mlu perhaps", "true or false, not 'perhaps'"),
            ("--save_offline_model true", "--save_offline_model needs --mlu true --jit true"),
            ("--quantization true --mlu true", "--quantization computes on the host"),
            ("--quantized_mode 5", "--quantized_mode is one of 0 to 4, not 5"),
        ],
    )
    def test_refused(self, yolov3, capsys, line, message):
        with pytest.raises(SystemExit):
            yolov3.test.parse(line.split())
        assert message in capsys.readouterr().err


def overlap(first, second):
    left, top = torch.maximum(first[:2], second[:2])
    right, bottom = torch.minimum(first[2:], second[2:])
    shared = max(right - left, 0) * max(bottom - top, 0)
    return shared / ((first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod() - shared)


def detections_of(yolov3, objects):
    scores = torch.linspace(1, 0.5, len(objects))[:, None]
    edges = yolov3.detection.corners(objects[:, 1:])
    return torch.cat([edges, scores, torch.ones(len(objects), 1), objects[:, :1]], 1)
