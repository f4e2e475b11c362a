"""A Transformer that translates, and parallel text for it: files with a sentence a line, or numbers written as words.

Pieces of words (BPE) are learned from the training text by the package `tokenizers`; nothing is downloaded.
"""

import logging
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

PAD, UNKNOWN, BEGIN, END = range(4)
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]

logger = logging.getLogger("cnmix")


class Translator(nn.Module):
    """Encoder and decoder of "Attention is all you need", with the normalisation before each sublayer.

    Args:
        vocabulary: greatest number of pieces, those of padding, unknown characters, begin and end included.
        width: features of a piece, even and a multiple of `heads`.
        heads: attention heads.
        depth: layers of the encoder, and of the decoder.
        dropout: share of features zeroed in training, from 0 to below 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, vocabulary: int = 16000, width: int = 512, heads: int = 8, depth: int = 6, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if width < 2 or width % 2 or width % heads:
            raise ValueError(f"width must be even and a multiple of heads, got width {width} and heads {heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a number from 0 to below 1, got {dropout!r}")
        self.vocabulary = vocabulary
        self.pieces = nn.Embedding(vocabulary, width, padding_idx=PAD)
        nn.init.normal_(self.pieces.weight, 0, width**-0.5)
        self.dropout = nn.Dropout(dropout)
        sizes: Any = {"dim_feedforward": 4 * width, "dropout": dropout, "batch_first": True, "norm_first": True}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, heads, **sizes), depth, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(width, heads, **sizes), depth, nn.LayerNorm(width)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, source: Tensor, given: Tensor) -> Tensor:
        """Predicts each piece of the translation from those before it.

        Args:
            source: pieces of the sentences, int64, shape (N, S), padded behind their ends.
            given: pieces of the translations, the begin first, int64, shape (N, T), padded likewise.

        Returns:
            Logits of the piece behind each, float32, shape (N, T, vocabulary).
        """
        padding = source == PAD
        later = torch.ones(given.shape[1], given.shape[1], dtype=torch.bool, device=given.device).triu(1)
        memory = self.encoder(self._embed(source), src_key_padding_mask=padding)
        # What is predicted behind a translation's end counts nowhere: its padding needs no mask.
        features = self.decoder(self._embed(given), memory, tgt_mask=later, memory_key_padding_mask=padding)
        return self.head(features)

    def _embed(self, pieces: Tensor) -> Tensor:
        width = self.pieces.embedding_dim
        place = torch.arange(pieces.shape[1], device=pieces.device).unsqueeze(1)
        angle = place * torch.exp(torch.arange(0, width, 2, device=pieces.device) * (-math.log(10000.0) / width))
        waves = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
        return self.dropout(self.pieces(pieces) * math.sqrt(width) + waves)


class Pairs(Dataset[tuple[tuple[Tensor, Tensor], Tensor]]):
    """Sentences and their translations, as pieces.

    Args:
        sources: sentences.
        targets: the translation of each.
        tokenizer: what cuts them into pieces.
        longest: pairs with more pieces than this on a side, or none, are left out, with a word of how many.
        where: what messages call them.

    Raises:
        ValueError: no pair is left.
    """

    def __init__(
        self, sources: Sequence[str], targets: Sequence[str], tokenizer: Any, longest: int, where: str
    ) -> None:
        self.tokenizer = tokenizer
        encoded = zip(*(tokenizer.encode_batch(list(each)) for each in (sources, targets)), strict=True)
        self.pairs = [
            (torch.tensor(source.ids), torch.tensor([BEGIN, *target.ids, END]))
            for source, target in encoded
            if 0 < len(source.ids) <= longest and 0 < len(target.ids) <= longest
        ]
        if not self.pairs:
            raise ValueError(f"{where} has no pair of sentences of 1 to {longest} pieces on either side")
        others = len(sources) - len(self.pairs)
        if others:
            logger.warning(
                "%s: %d of %d pairs are left out, empty or over %d pieces", where, others, len(sources), longest
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Returns ((source, given), expected): what is expected is what is given, one piece later."""
        source, target = self.pairs[index]
        return (source, target[:-1]), target[1:]

    def collate(self, samples: list[tuple[tuple[Tensor, Tensor], Tensor]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Pads the pieces of a batch, int64, to the length of the longest, shapes (N, S) and (N, T)."""
        inputs, expected = zip(*samples, strict=True)
        sources, given = zip(*inputs, strict=True)
        padded = [pad_sequence(list(each), batch_first=True, padding_value=PAD) for each in (sources, given, expected)]
        return (padded[0], padded[1]), padded[2]


def loss(outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Returns the mean cross entropy of the pieces, in nats, without those of padding.

    Args:
        outputs: logits, float32, shape (N, T, vocabulary).
        targets: expected pieces, int64, shape (N, T).
        smoothing: share of the probability that all other pieces are to have together.
    """
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=PAD, label_smoothing=smoothing)


def score(outputs: Tensor, targets: Tensor, whole: bool = False) -> tuple[int, int]:
    """Returns how many pieces are right, padding left out, and of how many; with `whole`, of sentences.

    Every piece is predicted from the right ones before it. A sentence that is right throughout is the one that greedy
    decoding finds, and the other way round.
    """
    padding = targets == PAD
    right = (outputs.argmax(-1) == targets) & ~padding
    if whole:
        return int((right | padding).all(1).sum()), len(targets)
    return int(right.sum()), int((~padding).sum())


def load(
    folder: str = "data/translation",
    source: str = "en",
    target: str = "de",
    vocabulary: int = 16000,
    longest: int = 100,
) -> tuple[Pairs, Pairs]:
    """Reads parallel text: `train.en` and `train.de`, `test.en` and `test.de`, a sentence a line, in UTF-8.

    Args:
        folder: where they are.
        source: suffix of the files with the sentences.
        target: suffix of those with their translations, line by line.
        vocabulary: greatest number of pieces, learned from both sides of the training text.
        longest: pairs with more pieces than this on a side are left out.

    Returns:
        The training and the test set.

    Raises:
        FileNotFoundError: files are missing; the message names them.
        ValueError: two files do not have the same number of lines, or there are no pairs.
    """
    files = [Path(folder, f"{part}.{suffix}") for part in ("train", "test") for suffix in (source, target)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: put parallel text there, a sentence a line, or give "
            "data.args.folder, data.args.source and data.args.target"
        )
    texts = [_sentences(file) for file in files]
    for at in (0, 2):
        if len(texts[at]) != len(texts[at + 1]):
            counts = f"{len(texts[at])} and {len(texts[at + 1])}"
            raise ValueError(f"{files[at]} and {files[at + 1]} must have as many lines, got {counts}")
    return _data(texts, vocabulary, longest, folder)


def _sentences(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in UTF-8: {error}") from error


def numbers(
    train: int = 4000, test: int = 1000, digits: int = 6, seed: int = 0, vocabulary: int = 160
) -> tuple[Pairs, Pairs]:
    """Draws numbers and writes them in English, to be translated into German.

    German puts the ones before the tens and joins the words: "forty-two thousand and seven" is
    "zweiundvierzigtausendsieben".

    Args:
        train: numbers in the training set.
        test: numbers in the test set; no number is in both.
        digits: that a number has at most, up to 6. Each count of digits is drawn as often as another where it can be.
        seed: of the draw.
        vocabulary: greatest number of pieces.

    Raises:
        ValueError: there are not as many numbers.
    """
    if not 0 < digits <= 6 or train < 1 or test < 1 or train + test > 10**digits // 2:
        raise ValueError(f"{train} and {test} numbers of at most {digits} digits cannot be drawn: take digits up to 6")
    draw = random.Random(seed)
    found: dict[int, None] = {}  # a set would not keep the order
    while len(found) < train + test:
        found.setdefault(draw.randrange(10 ** draw.randint(1, digits)))
    drawn = list(found)
    draw.shuffle(drawn)
    texts = [[write(n) for n in part] for part in (drawn[:train], drawn[train:]) for write in (english, german)]
    return _data(texts, vocabulary, 100, "what is made")


def _data(texts: list[list[str]], vocabulary: int, longest: int, where: str) -> tuple[Pairs, Pairs]:
    """Returns training and test set of (training source and target, test source and target)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.encode_special_tokens = True  # a "</s>" in the text is text
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([*texts[0], *texts[1]], trainer)
    if tokenizer.get_vocab_size() > vocabulary:
        raise ValueError(
            f"vocabulary must be at least {tokenizer.get_vocab_size()} for the text's characters alone, got "
            f"{vocabulary}: give model.args.vocabulary"
        )
    train = Pairs(texts[0], texts[1], tokenizer, longest, f"{where}, training")
    return train, Pairs(texts[2], texts[3], tokenizer, longest, f"{where}, test")


@torch.no_grad()
def translate(model: nn.Module, sentences: Sequence[str], tokenizer: Any, longest: int = 100) -> list[str]:
    """Translates sentences, each piece the likeliest behind those before it.

    Args:
        model: a `Translator` in evaluation mode.
        sentences: to be translated.
        tokenizer: that of the data set, `load(...)[0].tokenizer`.
        longest: pieces at which a translation ends where it has not by then.
    """
    source = [torch.tensor(each.ids) for each in tokenizer.encode_batch(list(sentences))]
    sources = pad_sequence(source, batch_first=True, padding_value=PAD)
    given = torch.full((len(sentences), 1), BEGIN)
    while given.shape[1] <= longest and not (given == END).any(1).all():
        given = torch.cat([given, model(sources, given)[:, -1:].argmax(-1)], dim=1)
    ended = [row[1 : row.index(END)] if END in row else row[1:] for row in given.tolist()]
    return tokenizer.decode_batch(ended)


_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen",
    "twenty thirty forty fifty sixty seventy eighty ninety",
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn",
    "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig",
)
_ENGLISH, _ENGLISH_TENS, _GERMAN, _GERMAN_TENS = (words.split() for words in _WORDS)


def english(number: int) -> str:
    """Writes a number below a million in British English: 1042 is "one thousand and forty-two"."""
    if number < 20:
        return _ENGLISH[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _ENGLISH_TENS[tens - 2] + (f"-{_ENGLISH[ones]}" if ones else "")
    name, size = ("hundred", 100) if number < 1000 else ("thousand", 1000)
    many, rest = divmod(number, size)
    joint = " and " if rest < 100 else " "
    return f"{english(many)} {name}" + (f"{joint}{english(rest)}" if rest else "")


def german(number: int) -> str:
    """Writes a number below a million in German: 1042 is "eintausendzweiundvierzig"."""
    if number < 20:
        return _GERMAN[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return (f"{_first(ones)}und" if ones else "") + _GERMAN_TENS[tens - 2]
    name, size = ("hundert", 100) if number < 1000 else ("tausend", 1000)
    many, rest = divmod(number, size)
    return f"{_first(many)}{name}" + (german(rest) if rest else "")


def _first(number: int) -> str:
    """Writes a number in front of another word: a one at its end is "ein" there."""
    written = german(number)
    return written.removesuffix("s") if number % 100 == 1 else written
