"""The prompts are the published ones, byte for byte."""

import hashlib

import pytest

from compresso.prompts import BODIES, HEADER, NAMES, find_prompt

# sha256 of the full texts as published, with {instruction} and {input} left in place
PUBLISHED = {
    ("long", "with input"): "02e6c1de5db0a51ba04113f5d3c26199f34d09927994cdcd4c7cf50df52f9086",
    ("long", "without input"): "b269321141b3c8b4f929f971686e941df5333e91231b58cab52d6f7c9f0f9f25",
    ("long", "raw text"): "327bca9af4bc7d9b511eff29835f958f33d640b274df338c321087fa1a77af65",
    ("long-past", "body"): "abd6122fce54f7def9417a491a15ee5e714027a676937c3b198f2b32941f9420",
    ("long-past", "with input"): "1130f841167ec0590777ec9fe839bd734b7a335c12de37b6ce8ee8ec78bf5856",
    ("middle", "with input"): "d26f44c5ad8dcf8bbb1bacddd108e55c5064a146a8d02c0e112a3a0c32582f4f",
    ("middle", "without input"): "6bb351bd0cb482d87d22b5e603ff4dd0ea9a2c48057d2ab668732430694f6f29",
    ("short", "body"): "0a19b0d942443c882ffa4511e8e04d592a2bbc92065dc7c9ae66860d42046e52",
    ("short", "with input"): "56d81c018164ddb70333b253ffe2a6343874095448fb2fbcc2ffd0ea8e7a1a0a",
    ("none", "with input"): "28811e9850d9511bab334d167a03a8a37614535fdb28d645492efac8e9951c0f",
    ("none", "without input"): "35101bc36d10997c7d926d8f21f7d173aec6523f3a57d78821b944a89925cdca",
}


@pytest.mark.parametrize(("name", "kind"), PUBLISHED)
def test_texts_are_published_byte_for_byte(name, kind):
    prompt = find_prompt(name, "alpaca")
    text = {
        "with input": lambda: prompt.instruction("{instruction}", "{input}"),
        "without input": lambda: prompt.instruction("{instruction}"),
        "raw text": prompt.raw_text,
        "body": lambda: HEADER + BODIES[name],
    }[kind]()
    assert hashlib.sha256(text.encode()).hexdigest() == PUBLISHED[name, kind]


def test_without_a_prompt_the_templates_are_alpacas_own():
    text = find_prompt("none", "alpaca").instruction("Add.", "1 2")
    assert text.startswith("Below is an instruction that describes a task, paired with")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
    assert find_prompt("none", "alpaca").raw_text() == ""


def test_braces_in_a_record_are_left_alone():
    text = find_prompt("long", "alpaca").instruction("print('{input}')", "{instruction}")
    assert "print('{input}')" in text
    assert "### Input:\n{instruction}\n" in text


def test_fields_are_filled_and_other_braces_kept(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Now {sparsity} of {target_sparsity} is gone, {parameters} parameters are left. {other} {}")
    prompt = find_prompt(str(path), "chat")
    filled = prompt.filled(sparsity=0.123, target_sparsity=0.2, parameters=134_515_008)
    assert filled.system == "Now 12.3% of 20.0% is gone, 134.5 million parameters are left. {other} {}"


def test_a_prompt_that_is_no_name_and_no_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="long-past, middle, short, none"):
        find_prompt("lnog", "chat")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="empty"):
        find_prompt(str(tmp_path / "empty.txt"), "chat")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        find_prompt(str(tmp_path / "binary"), "chat")
    assert "none" in NAMES


BEFORE_REQUESTS = {
    ("long", False): "9e6bce650b518b9585394dc415f051e3ebaeb988d33011dba09c427568302263",
    ("long", True): "94c9bed3ad9cee36d2c1c91a3f36a4349fd0fa7b8181efed4cc0082c425a61a1",
    ("long-past", False): "ba1b9755807ffb329c7531b88151f4837ca8067a5d1f04e42b709d64f38e807c",
    ("long-past", True): "46365da251c33c20646f674b5775364af4dbc2cc225bdb97456c6f6ae9c4ff25",
    ("middle", False): "d12a21203b7325e6c66088fb267abf2246f30c1da148fa69816dcd00d0e5d593",
    ("short", False): "2250075c1bd27addbe74467b29018f7b13870e611c6c3e52497108834d782564",
}


@pytest.mark.parametrize(("name", "few_shot"), BEFORE_REQUESTS)
def test_texts_before_requests_are_published_byte_for_byte(name, few_shot):
    text = find_prompt(name, "alpaca").before_request(few_shot)
    assert hashlib.sha256(text.encode()).hexdigest() == BEFORE_REQUESTS[name, few_shot]


def test_nothing_stands_before_a_request_without_a_prompt():
    assert find_prompt("none", "alpaca").before_request() == ""
    assert find_prompt("none", "alpaca").before_request(few_shot=True) == ""
