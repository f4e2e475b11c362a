import json
import random

import pytest
import torch
from tokenizers import BertWordPieceTokenizer
from torch.nn import functional as F

from cnmix import evaluation, inference
from cnmix.recipe import load_recipe
from cnmix.task import batches
from cnmix.training import run_recipe

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
CONTEXT = "The Loire is a river. It flows through Orléans, Tours and Nantes into the sea."
WORDS = "the loire is a river it flows through tours and nantes into sea where does what . , ? or ##leans ##s"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split(" ")]


def squad(*questions, context=CONTEXT):
    entries = []
    for number, (question, *answers) in enumerate(questions):
        given = [{"text": each, "answer_start": context.index(each)} for each in answers]
        entries.append({"id": str(number), "question": question, "answers": given})
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": entries}]}]}


LOST = {"id": "1", "question": "b", "answers": [{"text": "river", "answer_start": 0}]}


@pytest.fixture
def tokenizer():
    return BertWordPieceTokenizer({piece: number for number, piece in enumerate(PIECES)}, lowercase=True)


@pytest.fixture
def questions(bert, tokenizer):
    def make(*asked, length=40, stride=4, **more):
        return bert.Squad(squad(*asked, **more), tokenizer, length, stride, "here")

    return make


def logits(question, spans):
    """Returns logits that are certain of these places, one for each window."""
    shape = len(question.windows), max(len(window.pieces) for window in question.windows)
    begins, ends = torch.zeros(shape), torch.zeros(shape)
    for row, (first, last) in enumerate(spans):
        begins[row, first] = ends[row, last] = 5.0
    return begins, ends


def test_an_answer_with_accents_is_found_and_given_back(questions):
    (question,) = questions(("Where does it flow through?", "Orléans, Tours"))
    ((first, last),) = question.spans
    (window,) = question.windows
    assert [PIECES[piece] for piece in window.pieces[first : last + 1]] == ["or", "##leans", ",", "tours"]
    assert PIECES[window.pieces[0]] == "[CLS]"
    assert question.answer(*logits(question, question.spans), 30, False) == "Orléans, Tours"


def test_batch(questions):
    data = questions(("what is the Loire?", "a river"), ("Where?", "Orléans"))
    (pieces, present, part), (spans, asked) = next(iter(batches(data, 2)))
    assert pieces.shape == present.shape == part.shape
    assert asked == data.questions
    for row, question in enumerate(asked):
        (window,) = question.windows
        count = len(window.pieces)
        assert pieces[row, :count].tolist() == window.pieces.tolist()
        assert not pieces[row, count:].any()
        assert present[row].tolist() == [1] * count + [0] * (len(pieces[row]) - count)
        assert part[row].tolist() == [0] * window.text + [1] * (count - window.text) + [0] * (len(pieces[row]) - count)
        assert tuple(spans[row].tolist()) == question.spans[0]


def test_an_answer_that_is_not_where_the_file_says(bert, tokenizer):
    data = squad(("where?", "Nantes"))
    (answer,) = data["data"][0]["paragraphs"][0]["qas"][0]["answers"]
    (right,) = bert.Squad(data, tokenizer, 40, 4, "here").questions
    answer["answer_start"] -= 2
    (found,) = bert.Squad(data, tokenizer, 40, 4, "here").questions
    assert found.spans == right.spans != [(0, 0)]


def test_a_long_text_has_several_windows(questions):
    (question,) = questions(("where?", "Nantes"), length=16)
    assert len(question.windows) > 1
    inside = [span for span in question.spans if span != (0, 0)]
    assert inside  # in at least one of them
    for window, span in zip(question.windows, question.spans, strict=True):
        assert len(window.pieces) <= 16
        if span != (0, 0):
            assert PIECES[window.pieces[span[0]]] == "nantes"
    assert question.answer(*logits(question, question.spans), 30, False) == "Nantes"


def test_an_answer_cut_in_two_is_not_there(bert):
    window = bert.Window(torch.zeros(6), 2, torch.tensor([[4, 8], [9, 12], [12, 13]]))
    assert window.span(9, 13) == (3, 4)
    assert window.span(10, 11) == (3, 3)  # a piece that it is a part of
    assert window.span(2, 8) == (0, 0)
    assert window.span(9, 15) == (0, 0)
    assert window.span(20, 22) == (0, 0)


def test_score(bert, questions):
    data = questions(("what?", "a river", "river"), ("where?", "the sea"), ("which?",))
    inputs, targets = data.collate(data.questions)
    right = [logits(question, question.spans) for question in data.questions]
    length = inputs[0].shape[1]
    outputs = [torch.cat([F.pad(each[side], (0, length - each[side].shape[1])) for each in right]) for side in (0, 1)]
    assert bert.score(outputs, targets, unanswerable=True) == (3, 3)
    assert data.questions[2].answer(*right[2], 30, True) == "" != data.questions[2].answer(*right[2], 30, False)
    begins, ends = (each.clone() for each in outputs)
    first = data.questions[0].spans[0][0]
    begins[0, first + 1] = 9.0  # "river": an article counts for nothing
    assert bert.score((begins, ends), targets, unanswerable=True) == (3, 3)
    ends[0, first + 2] = 9.0  # "river."
    assert bert.score((begins, ends), targets, unanswerable=True) == (3, 3)
    ends[0, first + 3] = 19.0
    assert bert.score((begins, ends), targets, unanswerable=True) == (2, 3)
    assert bert.score((begins, ends), targets, longest=1, unanswerable=True)[0] < 3


def test_an_answer_ends_behind_its_begin_and_is_of_the_text(questions):
    (question,) = questions(("where?", "Nantes"))
    begins, ends = logits(question, question.spans)
    begins[0, 1] = ends[0, 1] = 50.0  # in the question
    ends[0, question.spans[0][0] - 1] = 9.0
    assert question.answer(begins, ends, 30, False) == "Nantes"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("The  Loire!", "loire"), ("an apple, a pear", "apple pear"), ("U.S.A.", "usa"), ("theatre", "theatre")],
)
def test_normalize(bert, text, expected):
    assert bert.normalize(text) == expected


def test_loss(bert):
    begins, ends = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    spans = torch.tensor([[1, 2], [0, 0], [4, 4]])
    expected = (F.cross_entropy(begins, spans[:, 0]) + F.cross_entropy(ends, spans[:, 1])) / 2
    assert bert.loss((begins, ends), (spans, [])) == expected


def test_questions_that_are_made(bert):
    data = bert.make_questions(random.Random(0), 50, facts=4)
    found = list(bert.paragraphs(data))
    assert len(found) == 50
    for context, entries in found:
        assert len(entries) == 3
        for entry in entries:
            (answer,) = entry["answers"]
            assert context[answer["answer_start"] :].startswith(answer["text"])
            assert "{" not in entry["question"] + context
    train, test = bert.made(train=30, test=10)
    assert (len(train), len(test)) == (90, 30)
    again, _ = bert.made(train=30, test=10)
    pieces = [[question.windows[0].pieces.tolist() for question in each.questions] for each in (train, again)]
    assert pieces[0] == pieces[1]
    for question in (*train.questions, *test.questions):  # every answer can be found
        assert bert.normalize(question.answer(*logits(question, question.spans), 30, False)) == bert.normalize(
            question.answers[0]
        )


def write(folder, questions, name="train.json"):
    (folder / name).write_text(questions if isinstance(questions, str) else json.dumps(questions), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(PIECES), encoding="utf-8")
    return {"train": str(folder / name), "test": str(folder / name), "vocabulary": str(folder / "vocab.txt")}


def test_files(bert, tmp_path):
    train, test = bert.load(**write(tmp_path, squad(("where?", "Nantes"), ("what?", "a river"))), length=20, stride=5)
    assert len(train) == len(test) == 2
    with pytest.raises(FileNotFoundError, match=r"missing data/squad/train-v1.1.json, .*vocab.txt: put SQuAD's JSON"):
        bert.load()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "train.json is no JSON"),
        ({"data": [{"paragraph": []}]}, "train.json does not have the form of SQuAD's files: KeyError"),
        ([1], "does not have the form"),
        ({"data": [{"paragraphs": [{"context": "a", "qas": [{"id": "1", "question": "b"}]}]}]}, "KeyError..answers"),
        ({"data": []}, "train.json has no question"),
        (squad(("what " * 300,)), "train.json: a question has 300 pieces, which with a stride of 128 leave no room"),
        ({"data": [{"paragraphs": [{"context": "a", "qas": [LOST]}]}]}, "the text does not have the answer 'river'"),
    ],
)
def test_files_of_another_form(bert, tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        bert.load(**write(tmp_path, data))


def test_weights_of_a_folder(bert, tmp_path):
    torch.manual_seed(0)
    first = bert.Bert(vocab_size=30, max_position_embeddings=20, **SMALL).eval()
    first.network.save_pretrained(tmp_path / "weights")
    again = bert.Bert(weights=str(tmp_path / "weights"))
    assert all(module.training for module in again.modules())
    again.eval()
    inputs = torch.randint(30, (2, 9)), torch.ones(2, 9).long(), torch.zeros(2, 9).long()
    with torch.no_grad():
        for a, b in zip(first(*inputs), again(*inputs), strict=True):
            assert a.shape == (2, 9)
            assert torch.equal(a, b)
    with pytest.raises(FileNotFoundError, match=r"nothing lacks config.json: put the files of bert-base-uncased there"):
        bert.Bert(weights="nothing")


def test_refused(bert):
    with pytest.raises(ValueError, match=r"facts must lie in \[3, 6\], got 7"):
        bert.made(10, 10, facts=7)
    with pytest.raises(ValueError, match=r"vocabulary must be at least \d+"):
        bert.made(10, 10, vocabulary=10)


def test_training_and_integers(tmp_path):
    small = [f"model.args.{name}={value}" for name, value in SMALL.items()]
    sizes = ["data.args.train=30", "data.args.test=10", "epochs=2", "threads=1", f"output={tmp_path}"]
    recipe = load_recipe("bert", [*small, *sizes], tiny=True)
    folder, (result,), _ = run_recipe(recipe, "bert", progress=False)
    (found,) = evaluation.evaluate_checkpoints(folder)
    assert found.float_loss == pytest.approx(result.test_loss, rel=0.05)
    assert found.integer_loss == pytest.approx(result.test_loss, rel=0.01)
    saved, _, model = evaluation.restore(folder / "O1-seed0" / "model.pt")
    inputs = torch.randint(300, (1, 9)), torch.tensor([[1] * 7 + [0] * 2]), torch.zeros(1, 9, dtype=torch.int64)
    integers = inference.load(model, saved)
    fused = inference.fuse(integers, *inputs)
    assert all(map(torch.equal, fused(*inputs), integers(*inputs)))
    names = set(saved["cnmix"]["models"][0]["modules"])
    assert {"network.qa_outputs", "network.bert.encoder.layer.0.attention.self.query"} <= names


def test_settings():
    full, tiny = load_recipe("bert"), load_recipe("bert", tiny=True)
    assert full.data.args.vocabulary == "data/bert-base-uncased/vocab.txt"
    assert dict(full.model.args) == {"weights": "data/bert-base-uncased"}
    assert "weights" not in tiny.model.args
    assert (tiny.data.name, tiny.loss, tiny.score) == ("made", full.loss, full.score)


def test_full_settings_on_files_and_weights(bert, tmp_path):
    bert.Bert(vocab_size=40, max_position_embeddings=64, **SMALL).network.save_pretrained(tmp_path)
    files = write(tmp_path, squad(("where?", "Nantes"), ("what is it?", "a river")))
    data = [f"data.args.{name}={value}" for name, value in files.items() if name != "vocabulary"]
    small = ["data.args.length=24", "data.args.stride=8", "epochs=1", "threads=1", f"output={tmp_path}"]
    recipe = load_recipe("bert", [f"model.args.weights={tmp_path}", *data, *small])
    assert recipe.data.args.vocabulary == str(tmp_path / "vocab.txt")
    _, (result,), _ = run_recipe(recipe, "bert", progress=False)
    assert result.test_accuracy in (0, 0.5, 1)
    assert result.test_loss < 10
