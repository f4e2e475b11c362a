"""The networks of the matrix transformers does not have: torch's Transformer, a tagger, and four of convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

PAD = 0


class Translator(nn.Module):
    """nn.Transformer from tokens to tokens, with a causal mask and masks of padding on both sides."""

    def __init__(self, vocabulary: int, width: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.positions = nn.Embedding(length, width)
        self.transformer = nn.Transformer(width, 2, 1, 1, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        given, expected = target[:, :-1], target[:, 1:]
        later = torch.ones(given.shape[1], given.shape[1], dtype=torch.bool).triu(1)
        out = self.transformer(
            self.embed(source),
            self.embed(given),
            tgt_mask=later,
            src_key_padding_mask=source == PAD,
            tgt_key_padding_mask=given == PAD,
            memory_key_padding_mask=source == PAD,
        )
        return F.cross_entropy(self.head(out).flatten(0, 1), expected.flatten(), ignore_index=PAD)


class Tagger(nn.Module):
    """Two bidirectional LSTM layers over packed sequences, and a class for each token."""

    def __init__(self, vocabulary: int, width: int, tags: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.lstm = nn.LSTM(width, width, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * width, tags)

    def forward(self, tokens: Tensor, lengths: Tensor, tags: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.tokens(tokens), lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return F.cross_entropy(self.head(states).flatten(0, 1), tags.flatten(), ignore_index=-100)


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution, its batch normalization and a rectifier that leaks, as in Darknet."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1))


class UNet(nn.Module):
    """Two levels down and up again, by transposed convolutions, each joined to what was at its size before."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.down = nn.ModuleList([conv_norm(3, width), conv_norm(width, 2 * width)])
        self.bottom = conv_norm(2 * width, 4 * width)
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)]
        )
        self.join = nn.ModuleList([conv_norm(4 * width, 2 * width), conv_norm(2 * width, width)])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        x, skipped = images, []
        for down in self.down:
            skipped.append(down(x))
            x = F.max_pool2d(skipped[-1], 2)
        x = self.bottom(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), skipped.pop()], 1))
        return F.cross_entropy(self.head(x), classes)


class DepthwiseSeparable(nn.Module):
    """A stem and blocks of a depthwise and a pointwise convolution, as in MobileNet."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        blocks = [conv_norm(3, width, stride=2)]
        for inputs, outputs, stride in ((width, 2 * width, 1), (2 * width, 4 * width, 2), (4 * width, 4 * width, 1)):
            blocks += [conv_norm(inputs, inputs, 3, stride, groups=inputs), conv_norm(inputs, outputs, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.blocks(images).mean((2, 3))), classes)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(width, width // 2, 1), conv_norm(width // 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Detector(nn.Module):
    """A detector after YOLOv3: a small Darknet, two scales, the coarse one upsampled and joined to the fine one.

    Each cell of each scale has a box for each of two anchors: four numbers, an objectness, and the classes.
    """

    # Sides of the anchors in pixels, of the coarse scale and of the fine one.
    anchors = ((12.0, 20.0), (5.0, 9.0))

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        outputs = 2 * (5 + classes)
        self.stem = nn.Sequential(conv_norm(3, width), conv_norm(width, 2 * width, stride=2), Residual(2 * width))
        self.fine = nn.Sequential(conv_norm(2 * width, 4 * width, stride=2), Residual(4 * width))
        self.coarse = nn.Sequential(conv_norm(4 * width, 8 * width, stride=2), Residual(8 * width))
        self.neck = conv_norm(8 * width, 4 * width, 1)
        self.coarse_head = nn.Sequential(conv_norm(4 * width, 8 * width), nn.Conv2d(8 * width, outputs, 1))
        self.lateral = conv_norm(4 * width, 2 * width, 1)
        self.fine_head = nn.Sequential(conv_norm(6 * width, 4 * width), nn.Conv2d(4 * width, outputs, 1))

    def predict(self, images: Tensor) -> list[Tensor]:
        """Returns for each scale, the coarse one first, (batch, anchors, rows, columns, 5 + classes)."""
        fine = self.fine(self.stem(images))
        neck = self.neck(self.coarse(fine))
        up = F.interpolate(self.lateral(neck), scale_factor=2.0, mode="nearest")
        raw = (self.coarse_head(neck), self.fine_head(torch.cat([up, fine], 1)))
        return [each.unflatten(1, (2, -1)).permute(0, 1, 3, 4, 2) for each in raw]

    def forward(self, images: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
        """Returns the loss.

        Args:
            images: (batch, 3, side, side).
            boxes: (batch, objects, 4): centre and sides in pixels.
            classes: (batch, objects).
        """
        side = images.shape[-1]
        loss = images.new_zeros(())
        # The anchor nearest in size to an object is responsible for it, in the cell of its centre.
        sizes = torch.tensor(self.anchors).log()
        best = (boxes[..., 2:].log().mean(-1, keepdim=True) - sizes.flatten()).abs().argmin(-1)
        for scale, predicted in enumerate(self.predict(images)):
            cells = predicted.shape[2]
            pixels = side / cells
            batch, which = torch.nonzero(best // 2 == scale, as_tuple=True)
            own, anchor = boxes[batch, which], best[batch, which] % 2
            column, row = (own[:, :2] / pixels).long().clamp(max=cells - 1).unbind(1)
            objectness = torch.zeros_like(predicted[..., 4])
            objectness[batch, anchor, row, column] = 1.0
            loss = loss + F.binary_cross_entropy_with_logits(predicted[..., 4], objectness)
            if len(batch):
                at = predicted[batch, anchor, row, column]
                centre = own[:, :2] / pixels - torch.stack([column, row], 1)
                stretch = own[:, 2:].log() - sizes[scale][anchor, None]
                loss = loss + F.mse_loss(at[:, :2].sigmoid(), centre) + F.mse_loss(at[:, 2:4], stretch)
                chosen = F.one_hot(classes[batch, which], self.classes).float()
                loss = loss + F.binary_cross_entropy_with_logits(at[:, 5:], chosen)
        return loss
