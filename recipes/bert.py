"""BERT that answers questions from a text: transformers' network, and questions in SQuAD's form as windows of pieces.

An answer is a part of the text, and the network says for each of the text's pieces how likely the answer begins and
ends there. Nothing is downloaded: weights and vocabulary are read from a folder, or a small network learns from
questions that are made here.
"""

import json
import math
import random
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

Inputs = tuple[Tensor, Tensor, Tensor]
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHUNK = 256  # questions whose encodings, which are large, are in memory at once


class Bert(nn.Module):
    """BERT with a layer on top that points at an answer's begin and end.

    Args:
        weights: folder with `config.json` and the weights, as transformers' `save_pretrained` leaves them; None: random
            weights, for the settings.
        **settings: of transformers' `BertConfig`, such as `hidden_size`, `num_hidden_layers`, `vocab_size`.

    Raises:
        FileNotFoundError: there are no weights in the folder.
        ImportError: transformers is not installed.
    """

    def __init__(self, weights: str | None = None, **settings: Any) -> None:
        super().__init__()
        from transformers import BertConfig, BertForQuestionAnswering

        if weights is None:
            self.network = BertForQuestionAnswering(BertConfig(**settings))
            waves(self.network.bert.embeddings.position_embeddings.weight)
        elif not Path(weights, "config.json").is_file():
            raise FileNotFoundError(
                f"{weights} lacks config.json: put the files of bert-base-uncased there (config.json, vocab.txt and "
                "model.safetensors), or give model.args.weights"
            )
        else:  # a folder of a model for another task has no such last layer, which starts random
            self.network = BertForQuestionAnswering.from_pretrained(weights, local_files_only=True, **settings)
            self.network.train()  # transformers returns it in evaluation mode, in which there is no dropout

    def forward(self, pieces: Tensor, present: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """Says where answers begin and end.

        Args:
            pieces: of question and text, int64, shape (N, T).
            present: 1 for a piece, 0 for padding, int64, shape (N, T).
            part: 0 for the question, 1 for the text, int64, shape (N, T).

        Returns:
            Logits of begin and of end at each piece, float32, shape (N, T) each.
        """
        # In this shape transformers takes the mask as it is; what it makes of another one, no offline model can have.
        answer = self.network(pieces, attention_mask=present[:, None, None, :].bool(), token_type_ids=part)
        return answer.start_logits, answer.end_logits


def waves(weight: Tensor) -> None:
    """Fills an embedding of positions (positions, features) with waves, as strong as what it holds.

    From random numbers, a network that is not pre-trained takes far longer to learn which position is beside which.
    """
    count, width = weight.shape
    place, feature = torch.arange(count).unsqueeze(1), torch.arange(0, width, 2)
    angle = place * torch.exp(feature * (-math.log(10000.0) / width))
    with torch.no_grad():
        weight.copy_(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1) * (weight.std() * math.sqrt(2)))


class Window(NamedTuple):
    """A question with a part of its text.

    Attributes:
        pieces: of both, with BERT's marks in front, between and behind, int64, shape (T,).
        text: place of the text's first piece.
        offsets: of each piece of the text, where it starts and stops in it, characters, shape (T - text - 1, 2).
    """

    pieces: Tensor
    text: int
    offsets: Tensor

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Returns the places of the pieces with the characters from `start` to before `stop`; (0, 0) if some lack."""
        inside = ((self.offsets[:, 0] < stop) & (self.offsets[:, 1] > start)).nonzero().flatten().tolist()
        if not inside or self.offsets[inside[0], 0] > start or self.offsets[inside[-1], 1] < stop:
            return 0, 0
        return self.text + inside[0], self.text + inside[-1]


class Question:
    """A question, and the windows of its text.

    Attributes:
        answers: texts that are right; none: the text has no answer.
        context: the text.
        windows: the question with parts of the text that overlap.
        spans: places of the first answer's first and last piece in each window, (0, 0) where it is not in there whole.
    """

    def __init__(self, entry: Mapping[str, Any], context: str, windows: list[Window]) -> None:
        self.answers = [each["text"] for each in entry["answers"]]
        self.context = context
        self.windows = windows
        self.spans = [(0, 0)] * len(windows)
        if self.answers:
            start = _place(self.answers[0], entry["answers"][0]["answer_start"], context)
            self.spans = [window.span(start, start + len(self.answers[0])) for window in windows]

    def answer(self, begins: Tensor, ends: Tensor, longest: int, unanswerable: bool) -> str:
        """Returns the likeliest answer, "" for none.

        Args:
            begins: logits of an answer's begin at the pieces of each window, shape (windows, T).
            ends: of its end.
            longest: pieces that it may have.
            unanswerable: whether there may be none.
        """
        best, text = float("-inf"), ""
        for window, begin, end in zip(self.windows, begins, ends, strict=True):
            count = len(window.offsets)
            places = slice(window.text, window.text + count)
            sums = begin[places, None] + end[None, places]
            sums = sums.masked_fill(torch.ones_like(sums).triu().tril(longest - 1) == 0, float("-inf"))
            if sums.max() > best:
                best = float(sums.max())
                first, last = divmod(int(sums.argmax()), count)
                text = self.context[window.offsets[first, 0] : window.offsets[last, 1]]
        # The piece in front of the question is where training says that the answer is not in the window.
        return "" if unanswerable and float((begins[:, 0] + ends[:, 0]).min()) > best else text


def _place(answer: str, start: int, context: str) -> int:
    """Returns where an answer starts: where the file says, or at the nearest place where the text has it.

    Raises:
        ValueError: the text does not have it.
    """
    places = [each.start() for each in re.finditer(f"(?={re.escape(answer)})", context)]
    if not places:
        raise ValueError(f"the text does not have the answer {answer!r}")
    return min(places, key=lambda place: abs(place - start))


class Squad(Dataset[Question]):
    """Questions in SQuAD's form, one a sample.

    Args:
        data: what a file holds: `{"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text",
            "answer_start"}]}]}]}]}`; version 2.0 has questions without an answer.
        tokenizer: of `tokenizers`, BERT's.
        length: pieces of question and text in a window, BERT's three marks included.
        stride: pieces of the text that one window and the next have in common.
        where: what messages call the data.

    Raises:
        ValueError: it has another form, or no question.
    """

    def __init__(self, data: Any, tokenizer: Any, length: int, stride: int, where: str) -> None:
        self.questions: list[Question] = []
        try:
            entries = [(entry, context) for context, entries in paragraphs(data) for entry in entries]
            for at in range(0, len(entries), CHUNK):
                chunk = entries[at : at + CHUNK]
                questions = [entry["question"].strip() for entry, _ in chunk]
                tokenizer.no_truncation()
                for asked in tokenizer.encode_batch(questions):  # what does not fit is no error there, but a panic
                    if len(asked.ids) + 1 + stride >= length:  # one more mark, between it and the text
                        raise ValueError(
                            f"a question has {len(asked.ids) - 2} pieces, which with a stride of {stride} leave no "
                            f"room for the text in windows of {length}: give a larger data.args.length"
                        )
                tokenizer.enable_truncation(length, stride=stride, strategy="only_second")
                encoded = tokenizer.encode_batch(list(zip(questions, (context for _, context in chunk), strict=True)))
                for (entry, context), first in zip(chunk, encoded, strict=True):
                    windows = [_window(each) for each in (first, *first.overflowing)]
                    self.questions.append(Question(entry, context, windows))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} does not have the form of SQuAD's files: {error!r}") from error
        if not self.questions:
            raise ValueError(f"{where} has no question")

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Question:
        """Returns a question, of which `collate` makes inputs and targets."""
        return self.questions[index]

    def collate(self, samples: list[Question]) -> tuple[Inputs, tuple[Tensor, list[Question]]]:
        """Returns the windows of questions below each other, and what they are to be answered with.

        Returns:
            The inputs of `Bert`, shape (windows, T) each; first and last piece of the answers, int64, shape (windows,
            2), with the questions.
        """
        windows = [window for question in samples for window in question.windows]
        pieces = pad_sequence([window.pieces for window in windows], batch_first=True)
        place = torch.arange(pieces.shape[1])
        present = place < torch.tensor([[len(window.pieces)] for window in windows])
        part = present & (place >= torch.tensor([[window.text] for window in windows]))
        spans = torch.tensor([span for question in samples for span in question.spans])
        return (pieces, present.long(), part.long()), (spans, samples)


def _window(encoding: Any) -> Window:
    """Returns the window that an encoding of `tokenizers` is: not its strings, which take up most of it."""
    text = encoding.type_ids.index(1)
    return Window(torch.tensor(encoding.ids), text, torch.tensor(encoding.offsets[text:-1]))


def loss(outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, list[Question]]) -> Tensor:
    """Returns the mean cross entropy of begin and end, in nats."""
    spans, _ = targets
    return (F.cross_entropy(outputs[0], spans[:, 0]) + F.cross_entropy(outputs[1], spans[:, 1])) / 2


def score(
    outputs: tuple[Tensor, Tensor],
    targets: tuple[Tensor, list[Question]],
    longest: int = 30,
    unanswerable: bool = False,
) -> tuple[int, int]:
    """Returns how many questions are answered exactly, as SQuAD's own script compares texts, and of how many.

    Args:
        outputs: logits of begin and end, float32, shape (windows, T) each.
        targets: as `Squad.collate` returns them.
        longest: pieces that an answer may have.
        unanswerable: whether there are questions without an answer, as in SQuAD 2.0.
    """
    _, questions = targets
    sizes = [len(question.windows) for question in questions]
    begins, ends = (each.float().split(sizes) for each in outputs)
    given = [
        question.answer(*logits, longest, unanswerable)
        for question, *logits in zip(questions, begins, ends, strict=True)
    ]
    right = [
        normalize(text) in map(normalize, question.answers or [""])
        for text, question in zip(given, questions, strict=True)
    ]
    return sum(right), len(right)


def normalize(text: str) -> str:
    """Returns a text as SQuAD compares it: in lower case, without punctuation, articles and further spaces."""
    kept = "".join(each for each in text.lower() if each not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def paragraphs(data: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yields each text with its questions."""
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            yield paragraph["context"], paragraph["qas"]


def load(
    train: str = "data/squad/train-v1.1.json",
    test: str = "data/squad/dev-v1.1.json",
    vocabulary: str = "data/bert-base-uncased/vocab.txt",
    lowercase: bool = True,
    length: int = 384,
    stride: int = 128,
) -> tuple[Squad, Squad]:
    """Reads questions from files.

    Args:
        train: JSON file of SQuAD's form, version 1.1 or 2.0.
        test: another.
        vocabulary: BERT's `vocab.txt`, a piece a line.
        lowercase: whether it has small letters alone.
        length: pieces of question and text in a window; of a long text there are several.
        stride: pieces that one window and the next have in common.

    Raises:
        FileNotFoundError: files are missing; the message names them.
        ValueError: a file has another form.
    """
    missing = [each for each in (train, test, vocabulary) if not Path(each).is_file()]
    if missing:
        raise FileNotFoundError(
            f"missing {', '.join(missing)}: put SQuAD's JSON files and the vocab.txt of the weights there, or give "
            "data.args.train, data.args.test and data.args.vocabulary"
        )
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(vocabulary, lowercase=lowercase)
    return _squad(train, tokenizer, length, stride), _squad(test, tokenizer, length, stride)


def _squad(file: str, tokenizer: Any, length: int, stride: int) -> Squad:
    try:
        data = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    return Squad(data, tokenizer, length, stride, file)


def made(
    train: int = 400, test: int = 200, facts: int = 4, seed: int = 0, vocabulary: int = 300, length: int = 64
) -> tuple[Squad, Squad]:
    """Makes texts on people, and questions on them, in SQuAD's form.

    Args:
        train: texts in the training set; each has three questions.
        test: texts in the test set.
        facts: said in a text, from 3 to 6.
        seed: of the draw.
        vocabulary: greatest number of pieces: characters, and the words of the training texts.
        length: pieces of question and text in a window.
    """
    from tokenizers import BertWordPieceTokenizer

    draw = random.Random(seed)
    sets = [make_questions(draw, count, facts) for count in (train, test)]
    words = BertWordPieceTokenizer(lowercase=True)
    count: Counter[str] = Counter()
    for context, entries in paragraphs(sets[0]):
        for text in (context, *(entry["question"] for entry in entries)):
            count.update(word for word, _ in words.pre_tokenizer.pre_tokenize_str(words.normalizer.normalize_str(text)))
    # Each word, and each character for those that only the test has. (What `tokenizers` learns is not always the same.)
    characters = sorted(set("".join(count)))
    pieces = dict.fromkeys([*MARKS, *characters, *(f"##{each}" for each in characters), *sorted(count)])
    if len(pieces) > vocabulary:
        raise ValueError(f"vocabulary must be at least {len(pieces)}, got {vocabulary}")
    tokenizer = BertWordPieceTokenizer({piece: number for number, piece in enumerate(pieces)}, lowercase=True)
    train_set, test_set = (Squad(each, tokenizer, length, length // 4, "what is made") for each in sets)
    return train_set, test_set


# What is said of somebody, in one of several ways, how it is asked for, and what it may be.
_FACTS = (
    (
        ("lives in {}", "has a house in {}", "comes from {}"),
        ("Where does {} live?", "In which town is the house of {}?", "Where does {} come from?"),
        ("Oslo", "Rome", "Lima", "Cairo", "Delhi", "Quito", "Kyiv", "Porto", "Lagos", "New York", "Bonn", "Cape Town"),
    ),
    (
        ("was born in {}", "came into the world in {}", "has been alive since {}"),
        ("When was {} born?", "In which year did {} come into the world?", "Since when has {} been alive?"),
        tuple(map(str, range(1950, 2010))),
    ),
    (
        ("works as {}", "earns money as {}", "is {}"),
        ("What does {} work as?", "How does {} earn money?", "What is the trade of {}?"),
        ("a baker", "a nurse", "a pilot", "an actor", "a tailor", "a judge", "a painter", "a bus driver", "a vet"),
    ),
    (
        ("keeps {}", "has {} at home", "looks after {}"),
        ("Which animal does {} keep?", "What does {} have at home?", "What does {} look after?"),
        ("two cats", "a dog", "an old parrot", "three fish", "a white horse", "one snake", "ten hens", "a small pig"),
    ),
    (
        ("drinks {}", "orders {}", "asks for {}"),
        ("What does {} drink?", "What does {} order?", "What does {} ask for?"),
        ("tea", "black coffee", "cold milk", "water", "apple juice", "red wine", "cocoa", "lemonade"),
    ),
    (
        ("plays {}", "practises {}", "is good at {}"),
        ("What does {} play?", "What does {} practise?", "What is {} good at?"),
        ("chess", "the violin", "tennis", "the drums", "table football", "cards", "the flute", "golf"),
    ),
)
_PEOPLE = ("Ada", "Ben", "Carla", "David", "Emma", "Frank", "Greta", "Hugo", "Ines", "Jonas", "Karin", "Luis")


def make_questions(draw: random.Random, texts: int, facts: int = 4) -> dict[str, Any]:
    """Returns texts on somebody, with three questions each, in the form of SQuAD's files.

    Raises:
        ValueError: there are not as many facts.
    """
    if not 3 <= facts <= len(_FACTS):
        raise ValueError(f"facts must lie in [3, {len(_FACTS)}], got {facts}")
    made: list[dict[str, Any]] = []
    for number in range(texts):
        who = draw.choice(_PEOPLE)
        context, entries = "", []
        for statements, questions, answers in draw.sample(_FACTS, facts):
            before, _, after = f"{who} {draw.choice(statements)}. ".partition("{}")
            answer = {"text": draw.choice(answers), "answer_start": len(context + before)}
            context += before + answer["text"] + after
            question = draw.choice(questions).format(who)
            entries.append({"id": f"{number}-{len(entries)}", "question": question, "answers": [answer]})
        made.append({"context": context.strip(), "qas": draw.sample(entries, 3)})
    return {"version": "1.1", "data": [{"title": "people", "paragraphs": made}]}
