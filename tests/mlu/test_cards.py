import itertools

import pytest

from cnmix.torch_mlu.cards import find_card

NAMES = ("MLU220", "MLU270", "MLU290", "MLU370", "MLU590")
TERA = 1e12


@pytest.mark.parametrize(
    ("name", "kind", "peak"),
    [
        ("MLU270", "int8", 128),
        ("MLU290", "int8", 512),
        ("MLU290", "int16", 256),
        ("MLU370", "int8", 256),
        ("MLU370", "int16", 128),
        ("MLU370", "float16", 96),
        ("MLU370", "bfloat16", 96),
        ("MLU370", "float32", 24),
    ],
)
def test_published_peaks_follow_from_cores_clock_and_multiply_accumulates(name, kind, peak):
    card = find_card(name)
    assert card.peak(kind) == pytest.approx(peak * TERA, rel=1e-12)
    assert card.peak(kind) == pytest.approx(2 * card.cores * card.clock * card.macs_per_cycle[kind], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("MLU220", {"int8": 2048, "int16": 1024}),
        ("MLU270", {"int8": 4096, "int16": 2048}),
        ("MLU290", {"int8": 4096, "int16": 2048}),
        ("MLU370", {"int8": 4096, "int16": 2048, "float16": 1536, "float32": 384}),
    ],
)
def test_rates_are_those_of_the_vendors_harness(name, rates):
    known = find_card(name).macs_per_cycle
    assert {kind: known[kind] for kind in rates} == rates


@pytest.mark.parametrize("name", NAMES)
def test_wider_operands_take_longer(name):
    card = find_card(name)
    int8, int16, int31 = (card.rate(kind, kind) for kind in ("int8", "int16", "int31"))
    assert int8 == 2 * int16
    assert int31 == int16 / 4
    assert card.rate("int8", "int16") == card.rate("int16", "int8") == int16
    assert card.rate("int31", "int16") == card.rate("int8", "int31") == int16 / 2
    for left, right in itertools.product(card.macs_per_cycle, repeat=2):
        assert 0 < card.rate(left, right) <= int8


@pytest.mark.parametrize("name", NAMES)
def test_every_card_has_whole_clusters_and_memory(name):
    card = find_card(name)
    assert card.cores == 4 * card.clusters
    assert card.memory % (1 << 30) == 0
    assert card.bandwidth > 1e9
    assert card.floating == ("float32" in card.macs_per_cycle)
    assert card.name == name


@pytest.mark.parametrize("name", ["MLU220", "MLU590"])
def test_what_is_assumed_is_said(name):
    assert "assumed" in find_card(name).note


def test_a_type_that_a_card_does_not_multiply_is_named():
    with pytest.raises(ValueError, match="MLU270 multiplies int8, int16, int31: not float32"):
        find_card("MLU270").rate("float32", "int8")


@pytest.mark.parametrize(("asked", "name"), [("mlu370-x8", "MLU370"), (" MLU270 ", "MLU270"), ("MLU220-M.2", "MLU220")])
def test_variants_are_found(asked, name):
    assert find_card(asked).name == name


@pytest.mark.parametrize("asked", ["", "MLU100", "MLU3700", "mlu"])
def test_other_names_are_refused(asked):
    with pytest.raises(ValueError, match="take one of MLU220, MLU270, MLU290, MLU370, MLU590"):
        find_card(asked)
