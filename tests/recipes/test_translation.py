import random

import pytest
import torch
from torch.nn import functional as F

from cnmix import evaluation
from cnmix.recipe import build_model, load_recipe
from cnmix.task import batches, call, load_task
from cnmix.training import run_recipe

SMALL = ["data.args.train=300", "data.args.test=40", "data.args.digits=4", "model.args.width=32", "model.args.depth=1"]


@pytest.fixture(scope="module")
def numbers(translation):
    return translation.numbers(train=300, test=40, digits=4, vocabulary=120)


@pytest.fixture
def model(translation):
    torch.manual_seed(0)
    return translation.Translator(120, width=32, heads=2, depth=1, dropout=0.0).eval()


@pytest.mark.parametrize(
    ("number", "english", "german"),
    [
        (0, "zero", "null"),
        (1, "one", "eins"),
        (16, "sixteen", "sechzehn"),
        (21, "twenty-one", "einundzwanzig"),
        (70, "seventy", "siebzig"),
        (100, "one hundred", "einhundert"),
        (101, "one hundred and one", "einhunderteins"),
        (999, "nine hundred and ninety-nine", "neunhundertneunundneunzig"),
        (1000, "one thousand", "eintausend"),
        (1042, "one thousand and forty-two", "eintausendzweiundvierzig"),
        (21_300, "twenty-one thousand three hundred", "einundzwanzigtausenddreihundert"),
        (101_001, "one hundred and one thousand and one", "einhunderteintausendeins"),
        (
            342_517,
            "three hundred and forty-two thousand five hundred and seventeen",
            "dreihundertzweiundvierzigtausendfünfhundertsiebzehn",
        ),
    ],
)
def test_numbers_in_words(translation, number, english, german):
    assert (translation.english(number), translation.german(number)) == (english, german)


def test_no_two_numbers_have_the_same_words(translation):
    drawn = random.Random(0).sample(range(10**6), 2000)
    for write in (translation.english, translation.german):
        assert len({write(n) for n in drawn}) == 2000


def test_data(translation, numbers):
    train, test = numbers
    assert (len(train), len(test)) == (300, 40)
    decoded = [{train.tokenizer.decode(source.tolist()) for source, _ in part.pairs} for part in (train, test)]
    assert not decoded[0] & decoded[1]
    known = {translation.english(n): translation.german(n) for n in range(10**4)}
    for source, target in test.pairs:
        assert known[test.tokenizer.decode(source.tolist())] == test.tokenizer.decode(target.tolist())
    again = translation.numbers(train=300, test=40, digits=4, vocabulary=120)[0]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(train.pairs, again.pairs, strict=True))


def test_batch(translation, numbers):
    (sources, given), expected = next(iter(batches(numbers[1], 8)))
    assert given.shape == expected.shape
    assert torch.equal(given[:, 1:][given[:, 1:] != translation.PAD], expected[:, :-1][given[:, 1:] != translation.PAD])
    assert (given[:, 0] == translation.BEGIN).all()
    for row, source, wanted in zip(range(8), sources, expected, strict=True):
        pair = numbers[1].pairs[row]
        assert source[source != translation.PAD].tolist() == pair[0].tolist()
        assert wanted[wanted != translation.PAD].tolist() == [*pair[1].tolist()[1:]]
        assert wanted[wanted != translation.PAD][-1] == translation.END


def test_padding_changes_nothing(translation, model, numbers):
    pairs = sorted(numbers[1], key=lambda sample: len(sample[0][0]))
    short, long = pairs[0], pairs[-1]
    with torch.no_grad():
        alone = call(model, numbers[1].collate([short])[0])
        together = call(model, numbers[1].collate([short, long])[0])
    torch.testing.assert_close(together[:1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-5)


def test_a_piece_sees_those_before_it_alone(model, numbers):
    (source, given), _ = numbers[1].collate([numbers[1][0]])
    other = given.clone()
    other[0, -1] += 1
    with torch.no_grad():
        assert torch.equal(model(source, given)[:, :-1], model(source, other)[:, :-1])


def test_loss_ignores_padding(translation):
    outputs = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[4, 5, 3], [6, 3, 0]])
    flat = [outputs[0, 0], outputs[0, 1], outputs[0, 2], outputs[1, 0], outputs[1, 1]]
    expected = F.cross_entropy(torch.stack(flat), torch.tensor([4, 5, 3, 6, 3]))
    assert translation.loss(outputs, targets) == pytest.approx(expected.item())
    assert translation.loss(outputs, targets, smoothing=0.5) > expected


def test_score(translation):
    targets = torch.tensor([[4, 5, 3], [6, 3, 0]])
    right = F.one_hot(targets, 7).float()
    right[1, 2] = torch.eye(7)[5]  # behind the end
    assert translation.score(right, targets) == (5, 5)
    assert translation.score(right, targets, whole=True) == (2, 2)
    right[0, 1] = torch.eye(7)[6]
    assert translation.score(right, targets) == (4, 5)
    assert translation.score(right, targets, whole=True) == (1, 2)


def test_sentences_are_right_where_their_translations_are(translation):
    data, _ = translation.numbers(train=45, test=5, digits=2, vocabulary=80)
    torch.manual_seed(0)
    model = translation.Translator(80, width=32, heads=2, depth=1, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs, targets = next(iter(batches(data, 45)))
    counts = []
    for step in range(61):
        if step % 20 == 0:
            with torch.no_grad():
                right, count = translation.score(model.eval()(*inputs), targets, whole=True)
            texts = [[data.tokenizer.decode(pair[side].tolist()) for pair in data.pairs] for side in (0, 1)]
            translated = translation.translate(model, texts[0], data.tokenizer, longest=20)
            assert right == sum(map(str.__eq__, translated, texts[1]))
            assert count == 45
            counts.append(right)
        optimizer.zero_grad()
        translation.loss(model.train()(*inputs), targets).backward()
        optimizer.step()
    assert counts[0] == 0
    assert any(0 < each < 45 for each in counts)


def test_integers(tmp_path):
    recipe = load_recipe("translation", [*SMALL, "epochs=1", "threads=1", f"output={tmp_path}"], tiny=True)
    folder, (result,), _ = run_recipe(recipe, "translation", progress=False)
    (found,) = evaluation.evaluate_checkpoints(folder)
    assert found.float_loss == pytest.approx(result.test_loss, rel=0.05)
    assert found.integer_loss == pytest.approx(result.test_loss, rel=0.01)
    saved, _, _ = evaluation.restore(next(folder.rglob("model.pt")))
    # Attention and every layer compute in fixed point.
    names = set(saved["cnmix"]["models"][0]["modules"])
    assert {"head", "encoder.layers.0.linear1"} <= names
    assert any(name.startswith("decoder.layers.0.multihead_attn.") for name in names)


def write_text(folder, train=("a b", "b c", "c d"), other=("x y", "y z", "z x")):
    folder.mkdir(exist_ok=True)
    for name, lines in {"train.en": train, "train.de": other, "test.en": train, "test.de": other}.items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def test_parallel_files(translation, tmp_path, caplog):
    folder = write_text(tmp_path / "text", ("Ein Haus.", "Zwei  Häuser!", "", "z z " * 20), ("A house.", "", "b", "c"))
    train, test = translation.load(str(folder), vocabulary=40, longest=20)
    assert len(train) == len(test) == 1  # an empty line has no translation, and one is too long
    assert train.tokenizer.decode(train.pairs[0][0].tolist()) == "Ein Haus."
    assert f"{folder}, test: 3 of 4 pairs are left out, empty or over 20 pieces" in caplog.text


def test_what_files_may_have(translation, tmp_path):
    folder = write_text(tmp_path)
    plain, _ = translation.load(str(folder), vocabulary=20)
    (folder / "train.en").write_bytes(b"\xef\xbb\xbfa b\r\n  b c \r\nc d")  # a mark of UTF-8, and Windows' lines
    again, _ = translation.load(str(folder), vocabulary=20)
    assert [source.tolist() for source, _ in again.pairs] == [source.tolist() for source, _ in plain.pairs]
    (folder / "train.en").write_text("a </s>\n<pad>\nc\n")
    marks, _ = translation.load(str(folder), vocabulary=40)
    assert min(int(source.min()) for source, _ in marks.pairs) > translation.END
    (folder / "test.de").write_bytes(b"\xfc\ny\nz\n")
    with pytest.raises(ValueError, match=r"test\.de is not in UTF-8"):
        translation.load(str(folder), vocabulary=20)


def test_missing_and_unequal_files(translation, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks train.en, train.de, test.en, test.de: put parallel text there"):
        translation.load(str(tmp_path))
    folder = write_text(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match=r"lacks train.fr, test.fr"):
        translation.load(str(folder), target="fr")
    (folder / "test.de").write_text("x\n")
    with pytest.raises(ValueError, match=r"test.en and .*test.de must have as many lines, got 3 and 1"):
        translation.load(str(folder))


def test_refused(translation, tmp_path):
    with pytest.raises(ValueError, match="width must be even and a multiple of heads, got width 30 and heads 4"):
        translation.Translator(width=30, heads=4)
    with pytest.raises(ValueError, match="dropout must be a number from 0 to below 1, got 1"):
        translation.Translator(dropout=1)
    with pytest.raises(ValueError, match="900 and 200 numbers of at most 3 digits cannot be drawn"):
        translation.numbers(900, 200, 3)
    with pytest.raises(ValueError, match=r"vocabulary must be at least \d+"):
        translation.load(str(write_text(tmp_path / "text")), vocabulary=5)
    with pytest.raises(ValueError, match="text, training has no pair of sentences of 1 to 1 pieces"):
        translation.load(str(write_text(tmp_path / "text")), vocabulary=20, longest=1)


def test_settings():
    full, tiny = load_recipe("translation"), load_recipe("translation", tiny=True)
    assert (full.data.name, tiny.data.name) == ("load", "numbers")
    assert full.data.args.vocabulary == full.model.args.vocabulary
    with torch.device("meta"):
        parameters = sum(each.numel() for each in build_model(full).parameters())
    assert 55e6 < parameters < 65e6  # the base model's size, with two tables for pieces
    outputs, targets = torch.zeros(2, 3, 160), torch.ones(2, 3).long()
    assert [load_task(each).score(outputs, targets)[1] for each in (full, tiny)] == [6, 2]  # pieces, sentences
