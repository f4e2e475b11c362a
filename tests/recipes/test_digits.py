import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F


class TestNet:
    @pytest.mark.parametrize("channels", [1, 8, 32])
    def test_parameters(self, digits, channels):
        shapes = {name: tuple(value.shape) for name, value in digits.Net(channels=channels).state_dict().items()}
        norm = ("weight", "bias", "running_mean", "running_var")
        assert shapes == {
            "conv1.weight": (channels, 1, 3, 3),
            "conv1.bias": (channels,),
            **{f"bn1.{name}": (channels,) for name in norm},
            "bn1.num_batches_tracked": (),
            "conv2.weight": (2 * channels, channels, 3, 3),
            "conv2.bias": (2 * channels,),
            **{f"bn2.{name}": (2 * channels,) for name in norm},
            "bn2.num_batches_tracked": (),
            "fc1.weight": (128, 32 * channels),
            "fc1.bias": (128,),
            "fc2.weight": (10, 128),
            "fc2.bias": (10,),
        }

    def test_defaults(self, digits):
        net = digits.Net()
        assert net.fc1.in_features == 1024
        assert net.dropout.p == 0.25

    def test_forward(self, digits):
        torch.manual_seed(0)
        net = digits.Net(channels=4).eval()
        # Fresh running statistics hardly change a value; these show that the normalisation is there.
        for norm in (net.bn1, net.bn2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        images = torch.randn(5, 1, 8, 8)
        x = F.relu(net.bn2(net.conv2(F.relu(net.bn1(net.conv1(images))))))
        expected = net.fc2(F.relu(net.fc1(F.max_pool2d(x, 2).flatten(1))))
        output = net(images)
        assert output.dtype == torch.float32
        assert output.shape == (5, 10)
        torch.testing.assert_close(output, expected)

    def test_every_parameter_learns(self, digits):
        torch.manual_seed(0)
        net = digits.Net()
        F.cross_entropy(net(torch.randn(6, 1, 8, 8)), torch.arange(6)).backward()
        assert all(parameter.grad is not None for parameter in net.parameters())

    @pytest.mark.parametrize("channels", [0, -3, 2.5, True, "8", None])
    def test_refused_channels(self, digits, channels):
        with pytest.raises(ValueError, match=f"channels must be an integer of at least 1, got {channels!r}"):
            digits.Net(channels=channels)

    @pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, float("nan"), True, "0.5", None])
    def test_refused_dropout(self, digits, dropout):
        with pytest.raises(ValueError, match=f"dropout must be a number from 0 to below 1, got {dropout!r}"):
            digits.Net(dropout=dropout)


class TestLoad:
    @pytest.mark.parametrize(("share", "sizes"), [(0.25, (1347, 450)), (0.5, (898, 899)), (0.1, (1617, 180))])
    def test_sizes_and_types(self, digits, share, sizes):
        datasets = digits.load(test_share=share)
        for dataset, size in zip(datasets, sizes, strict=True):
            assert isinstance(dataset, torch.utils.data.TensorDataset)
            images, labels = dataset.tensors
            assert images.dtype == torch.float32
            assert images.shape == (size, 1, 8, 8)
            assert labels.dtype == torch.int64
            assert labels.shape == (size,)
            assert labels.unique().tolist() == list(range(10))

    def test_default_share(self, digits):
        assert tuple(map(len, digits.load())) == (1347, 450)

    def test_split_is_stratified(self, digits):
        train, test = digits.load()
        counts = torch.bincount(test.tensors[1]) + torch.bincount(train.tensors[1])
        assert counts.sum() == 1797
        assert ((torch.bincount(test.tensors[1]) - 0.25 * counts).abs() < 1).all()

    def test_split_is_the_whole_data_once(self, digits):
        train, test = digits.load()
        source = load_digits()
        # Grey levels are whole numbers from 0 to 16, so the scaling can be undone exactly.
        values = torch.cat([train.tensors[0], test.tensors[0]])
        grey = ((values - values.min()) / (values.max() - values.min()) * 16).round().long().flatten(1)
        rows = torch.cat([grey, torch.cat([train.tensors[1], test.tensors[1]]).unsqueeze(1)], dim=1).numpy()
        expected = np.column_stack([source.data, source.target]).astype(np.int64)
        assert np.array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])

    def test_training_set_is_scaled_to_mean_0_and_std_1(self, digits):
        train, test = (dataset.tensors[0].double() for dataset in digits.load())
        assert abs(train.mean()) < 1e-6
        assert abs(train.std(correction=0) - 1) < 1e-6
        # The test set shares the training set's scale, so its own statistics are near, not equal.
        assert 0 < abs(test.mean()) < 0.05
        assert test.min() == train.min()

    def test_same_seed_same_split(self, digits):
        np.random.seed(1)
        first = digits.load(split_seed=3)
        np.random.seed(2)
        again = digits.load(split_seed=3)
        other = digits.load(split_seed=4)
        for one, two in zip(first, again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one.tensors, two.tensors, strict=True))
        assert not torch.equal(first[0].tensors[1], other[0].tensors[1])

    @pytest.mark.parametrize("share", [0, 1, 0.0, 1.0, -0.5, 2, float("nan"), True, "0.25", None])
    def test_refused_share(self, digits, share):
        with pytest.raises(ValueError, match=f"test_share must be a number above 0 and below 1, got {share!r}"):
            digits.load(test_share=share)

    @pytest.mark.parametrize(("share", "test_count"), [(0.005, 9), (0.995, 1789)])
    def test_refused_tiny_sets(self, digits, share, test_count):
        with pytest.raises(ValueError, match=f"test_share {share} puts {test_count} of 1797 images"):
            digits.load(test_share=share)

    @pytest.mark.parametrize(("share", "smaller"), [(10 / 1797, 10), (1787 / 1797, 10)])
    def test_smallest_sets(self, digits, share, smaller):
        assert min(map(len, digits.load(test_share=share))) == smaller

    @pytest.mark.parametrize("seed", [-1, 2**32, 0.5, True, "0", None])
    def test_refused_seed(self, digits, seed):
        with pytest.raises(ValueError, match=f"split_seed must be an integer from .*, got {seed!r}"):
            digits.load(split_seed=seed)


def test_a_few_epochs_learn(digits):
    train, test = digits.load()
    torch.manual_seed(0)
    net = digits.Net(channels=8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)
    for _ in range(4):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
    net.eval()
    images, labels = test.tensors
    with torch.no_grad():
        assert (net(images).argmax(dim=1) == labels).float().mean() > 0.95
